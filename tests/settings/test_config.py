"""config.py: one dataclass, its command line and its file, and what a slip of the finger gets."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT
from test_training import CHANGES

from minilora.settings.command_line import read, run
from minilora.settings.distill import DistillConfig
from minilora.settings.errors import UserError
from minilora.settings.evaluate import EvaluateConfig
from minilora.settings.merge import MergeConfig
from minilora.settings.morph import MorphConfig
from minilora.settings.page import PageConfig
from minilora.settings.restore import RestoreConfig
from minilora.settings.restyle import RestyleConfig
from minilora.settings.sample import SampleConfig
from minilora.settings.setting import BUNDLED, ByBase, as_typed, option
from minilora.settings.train import TrainConfig


def parse(*argv):
    return read(TrainConfig, list(argv), "")


def test_defaults_are_the_well_known_recipe_and_differ_on_the_bundled_base_where_it_is_said():
    usual, bundled = parse("--data", "x/y", "--model", "some/base"), parse("--data", "x/y")
    assert (usual.rank, usual.alpha, usual.learning_rate, usual.batch_size) == (8, 8, 1e-4, 1)
    assert (usual.max_grad_norm, usual.noise_offset, usual.snr_gamma, usual.precision) == (1.0, 0, None, "auto")
    assert usual.output == "out/y"
    differ = {f.name for f in dataclasses.fields(usual) if getattr(usual, f.name) != getattr(bundled, f.name)}
    assert usual.prior_weight == 1  # and needs no class, being what it is by default
    assert differ == {
        "model",
        "steps",
        "batch_size",
        "learning_rate",
        "checkpoint_every",
        "class_pictures",
        "caption_dropout",
        "targets",
    }


def test_a_base_with_the_bundled_shapes_has_its_defaults(tmp_path):
    """As one that LoRAs were merged into."""
    for folder, content in (("merged", (BUNDLED / "unet" / "config.json").read_bytes()), ("other", b"{}")):
        (tmp_path / folder / "unet").mkdir(parents=True)
        (tmp_path / folder / "unet" / "config.json").write_bytes(content)
    bundled = parse("--data", "x")
    merged, other = (parse("--data", "x", "--model", str(tmp_path / folder)) for folder in ("merged", "other"))
    assert (merged.steps, merged.learning_rate) == (bundled.steps, bundled.learning_rate)
    assert (other.steps, other.learning_rate) == (1000, 1e-4)


def test_the_command_line_wins_over_the_file(tmp_path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"data": "a", "rank": 4, "learning_rate": 1, "targets": ["to_q"], "mirror": True}))
    config = parse("--config", str(file), "--rank", "2", "--no-mirror")
    assert (config.data, config.rank, config.learning_rate, config.targets, config.mirror) == (
        ("a",),
        2,
        1.0,
        ("to_q",),
        False,
    )


def test_a_configuration_written_is_the_configuration_read(tmp_path):
    config = parse(
        "--data",
        "a",
        "--sample-prompt",
        "x, y",
        "--sample-prompt",
        "z",
        "--sample-every",
        "5",
        "--targets",
        "to_q, to_k",
    )
    assert config.sample_prompt == ("x, y", "z")
    assert config.targets == ("to_q", "to_k")
    file = tmp_path / "config.json"
    file.write_text(config.to_json())
    assert parse("--config", str(file)) == config


def test_the_settings_printed_are_the_configuration_read(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--data", "x", "--rank", "4", "--also", "kohya,peft", "--print-config")
    assert ended.value.code == 0
    (tmp_path / "c.json").write_text(capsys.readouterr().out)
    assert parse("--config", str(tmp_path / "c.json")) == parse("--data", "x", "--rank", "4", "--also", "kohya,peft")


def test_what_follows_from_other_settings_goes_on_following_them(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(parse("--data", "x/y", "--steps", "7").to_json())
    again = parse("--config", str(file), "--data", "x/z", "--rank", "4", "--model", "some/base")
    assert (again.output, again.alpha, again.batch_size, again.steps) == ("out/z", 4, 1, 7)
    file.write_text(parse("--data", "x/y", "--output", "o", "--alpha", "1").to_json())
    again = parse("--config", str(file), "--data", "x/z", "--rank", "4")
    assert (again.output, again.alpha) == ("o", 1)


SHOWN = {  # which test shows what a setting does, but for the CHANGES of test_training.py
    TrainConfig: {
        "data": "test_data.py::test_each_folder_comes_as_often_as_its_weight_says",
        "image_column": "test_data_from_hub.py::test_columns_have_other_names_and_captions_may_come_from_the_option",
        "max_pictures": "test_data_from_hub.py::test_a_data_set_on_the_hub_is_the_folder_of_its_pictures_and_later_"
        "without_a_network",
        "data_revision": "test_data_from_hub.py::test_a_data_set_on_the_hub_is_the_folder_of_its_pictures_and_later_"
        "without_a_network",
        "max_pixels": "test_folder.py::test_a_larger_picture_is_read_where_max_pixels_says_so",
        "caption": "test_data.py::test_captions_come_from_text_files_and_the_option_fills_the_gaps",
        "class_prompt": "test_dreambooth.py::test_what_is_learnt_depends_on_the_class",
        "class_data": "test_dreambooth.py::test_missing_pictures_are_drawn_and_those_that_are_there_are_counted",
        "class_pictures": "test_dreambooth.py::test_missing_pictures_are_drawn_and_those_that_are_there_are_counted",
        "prior_weight": "test_dreambooth.py::test_the_class_stands_at_every_other_position_with_its_weight",
        "cache": "test_data.py::test_the_cache_is_filled_once_and_follows_the_content",
        "alpha_mask": "test_masks.py::test_what_can_be_seen_through_is_left_out_of_either_kind_of_mask",
        "outside": "test_masks.py::test_a_white_mask_changes_no_byte_and_another_one_does",
        "variants": "test_variants.py::test_each_variant_is_encoded_once_and_the_vae_leaves_memory",
        "colour_jitter": "test_variants.py::test_crops_and_colours_vary_within_their_limits",
        "shuffle_tags": "test_variants.py::test_tags_are_shuffled_and_left_out_but_for_the_first",
        "tag_dropout": "test_variants.py::test_tags_are_shuffled_and_left_out_but_for_the_first",
        "keep_tags": "test_variants.py::test_tags_are_shuffled_and_left_out_but_for_the_first",
        "preserve": "test_preserve.py::test_a_stronger_one_keeps_more_of_the_base",
        "patience": "test_validation.py::test_patience_ends_the_run_and_leaves_the_best_however_it_is_cut_up",
        "validation": "test_validation.py::test_a_share_of_the_pictures_is_kept_from_training",
        "validate_every": "test_validation.py::test_figures_are_logged_printed_and_kept_and_disturb_nothing",
        "model": "test_families.py::test_a_lora_trained_here_draws_the_same_in_diffusers",
        "revision": "test_base_folder.py::test_a_revision_and_a_variant_of_a_base_on_the_hub",
        "variant": "test_base_folder.py::test_a_revision_and_a_variant_of_a_base_on_the_hub",
        "model_config": "test_single_file.py::test_a_single_file_is_the_same_base",
        "vae": "test_single_file.py::test_the_vae_is_taken_from_a_folder_or_a_file_of_a_base_or_of_its_own",
        "prediction_type": "test_single_file.py::test_the_option_overrules_a_mark_and_what_is_used_is_printed",
        "push_to_hub": "test_hub.py::test_the_hub_has_the_results_byte_for_byte_and_nothing_else",
        "wandb": "test_tracking.py::test_wandb_has_the_numbers_and_pictures_and_a_resumed_run_goes_on_in_the_same",
        "base_lora": "test_training.py::test_training_on_top_of_loras_is_training_on_the_base_they_are_merged_into",
        "rank_for": "test_training.py::test_ranks_and_sets_from_the_settings",
        "alpha_for": "test_training.py::test_alphas_from_the_settings",
        "init_from": "test_training.py::test_a_lora_is_trained_on",
        "train_text_encoder": "test_families.py::test_text_encoders_are_trained_too_and_load_in_diffusers",
        "text_encoder_targets": "test_families.py::test_text_encoders_are_trained_too_and_load_in_diffusers",
        "micro_batch_size": "test_training.py::test_micro_batches_give_the_lora_of_the_whole_batch",
        "optimizer": "test_training.py::test_eight_bits_of_state_learn_nearly_the_same",
        "text_encoder_learning_rate": "test_families.py::test_a_learning_rate_of_their_own",
        "huber_c": "test_training.py::test_each_recipe_changes_what_is_learnt",
        "dream": "test_training.py::test_each_recipe_changes_what_is_learnt",
        "dropout": "test_training.py::test_each_layer_and_position_does_without_other_features",
        "timestep_range": "test_training.py::test_timesteps_are_drawn_from_their_range",
        "zero_terminal_snr": "test_training.py::test_zero_terminal_snr_trains_and_draws_with_the_changed_schedule",
        "ema": "test_training.py::test_the_average_follows_the_lora",
        "precision": "test_training.py::test_precision_and_checkpointing_are_what_is_asked_for",
        "gradient_checkpointing": "test_training.py::test_precision_and_checkpointing_are_what_is_asked_for",
        "compile": "test_training.py::test_what_is_traced_for_compiling_learns_the_same_bytes",
        "output": "test_training.py::test_a_run_leaves_what_it_promises",
        "also": "test_training.py::test_other_dialects_are_written_too_and_hold_the_same_lora",
        "checkpoint_every": "test_training.py::test_only_the_newest_checkpoints_stay",
        "checkpoints_kept": "test_training.py::test_only_the_newest_checkpoints_stay",
        "timeout": "test_machines.py::test_a_process_that_hangs_is_named_and_nothing_is_lost",
        "epochs": "test_training.py::test_epochs_are_steps_in_which_each_picture_is_seen_so_often",
        "full": "test_full.py::test_a_step_is_adamws_step_on_the_gradient_of_all_weights",
        "ema_device": "test_full.py::test_the_average_may_be_kept_elsewhere",
        "recipe": "test_recipes.py::test_a_recipe_is_nothing_but_the_settings_that_it_stands_for",
        "preview": "test_preview.py::test_each_picture_is_shown_as_training_sees_it_first",
        "resume": "test_training.py::test_a_run_that_was_cut_in_two_gives_the_same_bytes",
        "sample_prompt": "test_training.py::test_samples_during_training_disturb_nothing",
        "sample_every": "test_training.py::test_samples_during_training_disturb_nothing",
        "sample_average": "test_training.py::test_pictures_are_drawn_with_the_average",
    },
    SampleConfig: {
        "prompt": "test_sampling.py::test_a_picture_depends_on_its_seed_and_nothing_else",
        "negative": "test_sampling.py::test_a_picture_depends_on_its_seed_and_nothing_else",
        "seed": "test_sampling.py::test_a_picture_depends_on_its_seed_and_nothing_else",
        "count": "test_sampling.py::test_count_and_prompts_make_a_sheet",
        "steps": "test_sampling.py::test_a_picture_depends_on_its_seed_and_nothing_else",
        "guidance": "test_sampling.py::test_a_picture_depends_on_its_seed_and_nothing_else",
        "zero_terminal_snr": "test_sampling.py::test_zero_terminal_snr_draws_from_pure_noise",
        "image": "test_families.py::test_an_inpainting_base_draws_as_in_diffusers_and_is_not_trained",
        "mask": "test_families.py::test_an_inpainting_base_draws_as_in_diffusers_and_is_not_trained",
        "size": "test_sampling.py::test_a_size_is_width_and_height_or_the_side_of_a_square",
        "scheduler": "test_sampling.py::test_every_scheduler_draws_in_its_own_way",
        "model": "test_families.py::test_a_lora_trained_here_draws_the_same_in_diffusers",
        "revision": "test_base_folder.py::test_a_revision_and_a_variant_of_a_base_on_the_hub",
        "variant": "test_base_folder.py::test_a_revision_and_a_variant_of_a_base_on_the_hub",
        "model_config": "test_single_file.py::test_loras_are_folded_into_a_single_file_as_into_a_folder",
        "vae": "test_single_file.py::test_the_vae_is_taken_from_a_folder_or_a_file_of_a_base_or_of_its_own",
        "prediction_type": "test_single_file.py::test_the_option_overrules_a_mark_and_what_is_used_is_printed",
        "lora": "test_sampling.py::test_several_loras_add_up",
        "motion": "test_motion.py::test_the_clip_is_the_one_diffusers_draws",
        "frames": "test_motion.py::test_the_clip_is_the_one_diffusers_draws",
        "allow_unmatched": "test_sampling.py::test_a_word_that_does_not_fit_is_said_and_can_be_left_out",
        "strengths": "test_sampling.py::test_strengths_make_one_row_per_seed_and_one_column_per_strength",
        "lora_blocks": "test_sampling.py::test_drawn_with_blocks_is_drawn_on_the_base_merged_with_blocks",
        "grid": "test_restyle.py::test_a_grid_mixes_two_loras",
        "precision": "test_sampling.py::test_half_precision_draws_nearly_the_same",
        "compile": "test_sampling.py::test_what_is_traced_for_compiling_draws_the_same",
        "output": "test_restyle.py::test_a_folder_of_drawn_pictures_can_be_trained_on",
    },
}


@pytest.mark.parametrize("settings", SHOWN)
def test_every_setting_has_a_test_that_shows_what_it_does(settings):
    changes = {name for change in CHANGES for name in change} if settings is TrainConfig else set()
    assert {field.name for field in dataclasses.fields(settings)} == changes | SHOWN[settings].keys()
    for name, where in SHOWN[settings].items():
        file, test = where.split("::")
        [text] = [path.read_text() for path in (ROOT / "tests").rglob(file)]
        assert f"def {test}(" in text, where
        assert name in text, where


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse("--data", "a").rank = 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--data is needed"),
        (["--data", "a", "--learning-rat", "1"], "unknown setting --learning-rat; did you mean --learning-rate?"),
        (["--data", "a", "--rank", "many"], "--rank: 'many' is not a whole number"),
        (["--data", "a", "--steps", "1,000"], "--steps: '1,000' is not a whole number"),
        (["--data", "a", "--learning-rate", "1e"], "--learning-rate: '1e' is not a number"),
        (["--data", "a", "--caption"], "--caption: a value is missing behind it"),
        (["--data", "a", "--trigger", "-sks"], "(if it begins with a minus, write --trigger=-…)"),
        (["--data", "a", "--rank", "0"], "--rank is 0; it must be at least 1"),
        (["--data", "a", "--precision", "fp8"], "--precision is 'fp8'; it can be auto, fp32, bf16, fp16"),
        (["--data", "a", "--caption-dropout", "1.5"], "--caption-dropout is 1.5; it must be at least 0 and at most 1"),
        (["--data", "a", "--dropout", "1"], "--dropout is 1; it must be at least 0 and at most 0.99"),
        (["--data", "a", "--learning-rate", "0"], "--learning-rate is 0; it must be greater than 0"),
        (["--data", "a", "--learning-rate", "nan"], "--learning-rate is nan"),
        (["--data", "a", "--compile", "--buckets"], "--compile and --buckets cannot be combined"),
        (["--data", "a", "--sample-every", "5"], "--sample-every needs --sample-prompt, what to draw"),
        (["--data", "a", "--prior-weight", "2"], "--prior-weight needs --class-prompt, what the class pictures show"),
        (["--data", "a", "--class-prompt", "?"], "--class-prompt '?' has no word to name a folder after; give --class"),
        (["--data", "a", "--ema", "0"], "--ema is 0; it must be greater than 0 and at most 1"),
        (["--data", "a", "--also", "peft,koyha"], "--also is 'koyha'; it can be kohya, peft"),
        (["--data", "a", "--rank", "0", "--batch-size", "0"], "--rank is 0; it must be at least 1; --batch-size is 0"),
        (["--data", "a", "--config", "/nowhere.json"], "--config /nowhere.json"),
        (["--data", "a", "--data", "b:0"], "--data b: the weight 0 is not a whole number of at least 1"),
        (["--data", "a:1.5"], "--data a: the weight 1.5 is not a whole number of at least 1"),
        (["--data", "a", "--warmup-steps", "9", "--steps", "8"], "--warmup-steps is 9 and --steps 8: the warm-up must"),
        (["--data", "a", "--warmup-steps", "301"], "--warmup-steps is 301 and --steps 300: the warm-up must not be"),
        (["--data", "a", "--timestep-range", "1-9"], "--timestep-range: '1-9' is not FROM,TO, in whole numbers"),
        (["--data", "a", "--epochs", "2", "--steps", "9"], "--epochs and --steps cannot be combined"),
        (["--data", "a", "--adam-betas", "0.9,1"], "--adam-betas is 0.9,1.0; it takes two numbers"),
        (["--data", "a", "--lr-cycles", "2"], "--lr-cycles needs --lr-schedule cosine_with_restarts"),
        (["dataset/mountain"], "there is no setting before it; did you mean --data dataset/mountain?"),
        (["--data", "a", "--caption", "a", "sks", "dog"], "sks dog: there is no setting before it; a text of"),
    ],
)
def test_mistakes_on_the_command_line_are_named(argv, message):
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_home_folder_is_found_where_no_shell_puts_it_in(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "c.json"
    file.write_text('{"data": ["~/dog:2", "cat~"], "cache": "~/.cache/minilora"}')
    assert parse("--data=~/dog").data == (f"{tmp_path}/dog",)
    assert parse("--config", str(file)).data == (f"{tmp_path}/dog:2", "cat~")
    assert parse("--config", str(file)).cache == parse("--data", "a").cache  # a default, for each user his own
    assert parse("--data", "a", "--caption", "~/dog").caption == "~/dog"  # a text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": "a", "lerning_rate": 1}', "unknown setting lerning_rate; did you mean learning_rate?"),
        ('{"data": "a", "rank": "8"}', 'rank is "8" and should be int'),
        ('{"data": "a", "rank": true}', "rank is true and should be int"),
        (f'{{"data": "a", "learning_rate": {10**400}}}', "0000 and should be float"),
        ('{"data": "a", "targets": "to_q"}', 'targets is "to_q" and should be a list of str'),
        ('{"data": "a", "rank": null}', "rank is null and should be int"),
        ('{"data": "a", "targets": null}', "targets is null and should be a list of str"),
        ("[1]", "holds a list"),
        ("{", "Expecting property name"),
    ],
)
def test_mistakes_in_the_file_are_named(text, message, tmp_path):
    file = tmp_path / "c.json"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        parse("--config", str(file))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("64,48", "--size: '64,48' is not WIDTHxHEIGHT, in whole numbers"),
        ("64x", "--size: '64x' is not WIDTHxHEIGHT, in whole numbers"),
        ("64x48x32", "--size is 64x48x32; it takes WIDTHxHEIGHT, or the side of a square"),
        ("64x0", "--size is 64x0; it must be at least 1"),
        ("-8", "--size is -8; it must be at least 1"),
    ],
)
def test_a_size_is_two_whole_numbers_or_one(text, message):
    with pytest.raises(UserError) as error:
        read(SampleConfig, ["--prompt", "a", f"--size={text}"], "")
    assert message in str(error.value)


def test_a_size_in_the_file_is_a_number_or_two(tmp_path):
    file = tmp_path / "c.json"
    for written, size in (("64", (64,)), ("[64, 48]", (64, 48)), ("null", None)):
        file.write_text(f'{{"prompt": "a", "size": {written}}}')
        assert read(SampleConfig, ["--config", str(file)], "").size == size


@pytest.mark.parametrize(
    ("settings", "words", "said"),
    [
        (
            SampleConfig,
            ["--prompt", "a dog <lora:film:0.7>, grain"],
            "--prompt: <lora:film:0.7> is not read in a prompt; take it out and give --lora film.safetensors:0.7",
        ),
        (
            SampleConfig,
            ["--prompt", "a", "--negative", "<lyco:b>"],
            "--negative: <lyco:b> is not read in a prompt; take it out and give --lora b.safetensors",
        ),
        (
            TrainConfig,
            ["--data", "x", "--sample-prompt", "a", "--sample-prompt", "<lora:c:-1:5>", "--sample-every", "1"],
            "--sample-prompt: <lora:c:-1:5> is not read in a prompt; take it out and give --base-lora c.safetensors:-1",
        ),
        (
            MorphConfig,
            ["a.png", "b.png", "--prompt", "a", "--prompt", "<locon:d:1>"],
            "--prompt: <locon:d:1> is not read in a prompt; take it out and give --lora d.safetensors:1",
        ),
    ],
)
def test_a_lora_in_a_prompt_is_an_error_that_tells_how_to_give_it(settings, words, said):
    with pytest.raises(UserError) as error:
        read(settings, words, "")
    assert str(error.value) == said
    read(SampleConfig, ["--prompt", "1 < 2, a <lora and a lora:b> or <3"], "")


HELPFUL = [TrainConfig, SampleConfig, MergeConfig, RestoreConfig, RestyleConfig]
HELPFUL += [MorphConfig, EvaluateConfig, DistillConfig, PageConfig]


def help_of(settings, columns, monkeypatch, capsys) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as end:
        read(settings, ["--help"], "What it does.")
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("settings", HELPFUL)
@pytest.mark.parametrize("columns", [80, 100, 200])
def test_help_fits_and_shows_every_setting_once_the_basic_ones_first(settings, columns, monkeypatch, capsys):
    text = help_of(settings, columns, monkeypatch, capsys)
    assert max(map(len, text.splitlines())) <= min(columns, 100)
    groups = re.split(r"^(?=\w.*:$)", text[text.index("\nbasic:") :], flags=re.M)[1:]
    shown = [re.findall(r"^  (--?[-\w]+|\S)", group, re.M) for group in groups]
    names = {
        field.name: field.metadata["metavar"][0] if field.metadata["bare"] else option(field.name)
        for field in dataclasses.fields(settings)
    } | {field.name: option(f"no_{field.name}") for field in dataclasses.fields(settings) if field.default is True}
    basic = {names[field.name] for field in dataclasses.fields(settings) if field.metadata["basic"]}
    assert set(shown[0]) == basic
    assert 4 <= len(basic) <= 13
    assert sorted(name for group in shown for name in group) == sorted(
        [*names.values(), "--config", "--print-config", "-h"]
    )


@pytest.mark.parametrize("settings", HELPFUL)
def test_help_says_values_as_one_would_type_them(settings, monkeypatch, capsys):
    text = " ".join(help_of(settings, 100, monkeypatch, capsys).split())
    by_base = [f.metadata["default"] for f in dataclasses.fields(settings) if isinstance(f.metadata["default"], ByBase)]
    for default in by_base:
        assert f"(default {as_typed(default.usual)}; {as_typed(default.bundled)} on the bundled base)" in text
    assert not re.search(r"default \(|default True|\d\.0[^.\d]", text)


@pytest.mark.parametrize("settings", HELPFUL)
def test_the_examples_of_help_are_right(settings):
    assert settings.examples
    for example in settings.examples:
        words = shlex.split(example.replace("\\\n", " "))
        start = next(i for i, word in enumerate(words) if word.endswith(".py") or word.startswith("minilora."))
        read(settings, words[start + 1 :], "")  # UserError, were it wrong


def test_sampling_settings():
    config = read(SampleConfig, ["--prompt", "a", "--prompt", "b", "--lora", "x:0.5", "--strengths", "0,0.5,1"], "")
    assert config.prompt == ("a", "b")
    assert config.strengths == (0.0, 0.5, 1.0)
    with pytest.raises(UserError, match="--prompt is needed"):
        read(SampleConfig, [], "")
    with pytest.raises(UserError, match="--strengths needs --lora, whose strength"):
        read(SampleConfig, ["--prompt", "a", "--strengths", "1"], "")
    with pytest.raises(UserError, match="--lora-blocks needs --lora, whose strength"):
        read(SampleConfig, ["--prompt", "a", "--lora-blocks", "up=1"], "")
    for wrong in ("up", "up=", "=1", "up=nan", "up=1e3", "up=1=2", "up mid=1"):
        with pytest.raises(UserError, match=f"--lora-blocks {wrong}: it takes a block and a factor, as up=0.5"):
            read(SampleConfig, ["--prompt", "a", "--lora", "x", "--lora-blocks", wrong], "")
    with pytest.raises(UserError, match="--negative has no effect at --guidance 1"):
        read(SampleConfig, ["--prompt", "a", "--negative", "b", "--guidance", "1"], "")
    with pytest.raises(UserError, match=r"--strengths is 0,nan; each must be a finite number"):
        read(SampleConfig, ["--prompt", "a", "--lora", "x", "--strengths", "0,nan"], "")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("there is no such folder"), 2, "error: there is no such folder\n"),
        (OSError(28, "No space left on device", "out/x"), 2, "error: [Errno 28] No space left on device: 'out/x'\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_ends_a_command_early_is_one_line_and_an_exit_code(error, code, line, monkeypatch, capsys):
    def work(config):
        raise error

    monkeypatch.setattr("sys.argv", ["sample.py", "--prompt", "a"])
    with pytest.raises(SystemExit) as end:
        run(SampleConfig, work, "")
    assert end.value.code == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("empty", [np.empty, torch.empty])
def test_more_memory_than_there_is_is_one_line(empty, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sample.py", "--prompt", "a"])
    with pytest.raises(SystemExit) as end:
        run(SampleConfig, lambda config: empty(1 << 50), "")
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: not enough memory (")


def test_a_setting_that_may_be_repeated_may_stand_once_in_the_file(tmp_path):
    (tmp_path / "old.json").write_text('{"data": "x/y"}')
    assert parse("--config", str(tmp_path / "old.json")).data == ("x/y",)


MODULES = ["train", "sample", "minilora.merge"]  # train.py and sample.py stand at the top
MODULES += [f"minilora.apps.{name}" for name in ("restore", "morph", "restyle", "distill", "evaluate", "page")]


@pytest.mark.parametrize("word", ["--help", "--no-such-setting"])
def test_help_and_a_misspelt_setting_are_answered_before_torch_is_imported(word):
    program = f"""
import contextlib, io, runpy, sys
for module in {MODULES}:
    sys.argv = [module, {word!r}]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert "torch" not in sys.modules, module
    assert {word!r} != "--help" or "--output" in said.getvalue(), module
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)
