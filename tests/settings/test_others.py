"""settings/others.py: what the settings of other programs mean, in their own files and in ours."""

import json

import pytest
from helpers import ROOT

from minilora.settings.command_line import read
from minilora.settings.errors import UserError
from minilora.settings.train import TrainConfig

BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
EXAMPLES = {  # of docs/settings, and what one would type instead
    "article.json": f"--output out/article --data dataset/fluent --model {BASE} --batch-size 4 --micro-batch-size 1 "
    "--rank 4 --learning-rate 1e-4 --resolution 512 --epochs 100 --checkpoint-every 500 --noise-offset 0.1",
    "diffusers.json": f"--model {BASE} --variant fp16 --data dataset/fluent --resolution 512 --mirror --batch-size 8 "
    "--micro-batch-size 2 --gradient-checkpointing --steps 1500 --lr-schedule cosine --warmup-steps 100 --snr-gamma 5 "
    "--rank 8 --precision bf16 --checkpoint-every 500 --resume --sample-prompt=a_green_apple --sample-every 500 "
    "--output out/diffusers --seed 1337",
    "kohya.toml": "--model v1-5-pruned-emaonly.safetensors --data dataset/fluent --output out/kohya --rank 16 "
    "--alpha 8 --resolution 512 --buckets --batch-size 2 --micro-batch-size 2 --epochs 10 --learning-rate 1e-4 "
    "--lr-cycles 3 --lr-schedule cosine_with_restarts --snr-gamma 5 --noise-offset 0.05 --precision fp16 "
    "--checkpoint-every 500 --seed 42",
}


def parse(*argv) -> TrainConfig:
    return read(TrainConfig, list(argv), "")


@pytest.fixture
def config(tmp_path):
    """What reads a file of these settings."""

    def config(*argv, **values) -> TrainConfig:
        (tmp_path / "c.json").write_text(json.dumps(values))
        return parse("--config", str(tmp_path / "c.json"), *argv)

    return config


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_what_one_would_type_and_what_was_understood_is_printed_so(name, capsys):
    typed = parse(*[word.replace("_apple", " apple").replace("a_", "a ") for word in EXAMPLES[name].split()])
    assert parse("--config", str(ROOT / "docs" / "settings" / name)) == typed
    told = capsys.readouterr().err
    assert told.startswith(f"note: --config {ROOT / 'docs' / 'settings' / name} says: --")
    assert f"--output {typed.output}" in told
    assert "\n" not in told.strip()


def test_what_has_no_counterpart_is_named_and_is_an_error_only_if_it_may_change_what_is_learnt(config, capsys):
    harmless = {"dataloader_num_workers": 4, "report_to": "wandb", "cache_latents": True}
    off = {"shuffle_caption": False, "clip_skip": 1, "scale_lr": False, "network_args": [], "dataset_config_name": None}
    assert config(train_data_dir="x", **harmless, **off) == parse("--data", "x")
    assert capsys.readouterr().err.endswith(f"says: --data x; without effect here: {', '.join(harmless)}\n")
    with pytest.raises(UserError) as error:
        config(train_data_dir="x", shuffle_caption=True, clip_skip=2, scale_lr=True, lern=1, rank="8")
    for part in (
        "shuffle_caption = true",
        "clip_skip = 2",
        "scale_lr = true",
        "lern = 1 has no counterpart",
        'rank is "8"',
    ):
        assert part in str(error.value)


def test_a_file_of_ours_is_read_as_before_and_silently(config, capsys):
    assert config(data="x", rank=2, push_to_hub="a/b").push_to_hub == "a/b"
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="unknown setting shuffle_caption"):
        config(data="x", shuffle_caption=False)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"resolution": [512, 512]}, {"resolution": 512}),
        ({"center_crop": False}, {"crop": "random"}),
        ({"random_crop": True}, {"crop": "random"}),
        ({"mixed_precision": "no"}, {"precision": "fp32"}),
        ({"gradient_accumulation_steps": 4}, {"batch_size": 4}),
        ({"adam_beta1": 0.8}, {"adam_betas": (0.8, 0.999)}),
        (
            {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 5},
            {"lr_schedule": "constant", "warmup_steps": 5},
        ),
        ({"lr_warmup_steps": 0.1, "max_train_steps": 200}, {"warmup_steps": 20}),
        ({"max_train_steps": 200, "num_train_epochs": 7}, {"steps": 200}),
        ({"max_train_steps": 200, "max_train_epochs": 7}, {"epochs": 7}),
        ({"push_to_hub": True, "hub_model_id": "a/b"}, {"push_to_hub": "a/b"}),
        ({"push_to_hub": False, "hub_model_id": "a/b"}, {"push_to_hub": None}),
        (
            {"instance_prompt": "a dog", "class_prompt": "dogs", "with_prior_preservation": False},
            {"class_prompt": None},
        ),
        ({"v_parameterization": True}, {"prediction_type": "v_prediction"}),
        ({"learning_rate": "1e-5"}, {"learning_rate": 1e-5}),
        ({"optimizer_type": "Prodigy"}, {"optimizer": "prodigy", "learning_rate": 1}),
        ({"network_dim": 8}, {"rank": 8, "alpha": 1, "train_text_encoder": True}),
        (
            {"network_dim": 8, "text_encoder_lr": 0, "unet_lr": 1e-3},
            {"train_text_encoder": False, "learning_rate": 1e-3},
        ),
        ({"section": {"network_dim": 8, "network_alpha": 2}}, {"rank": 8, "alpha": 2}),
    ],
)
def test_what_has_another_form_there(theirs, ours, config):
    read = config(train_data_dir="x", **theirs)
    assert {name: getattr(read, name) for name in ours} == ours


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"resolution": "512,768"}, 'resolution is "512,768" and should be int'),
        ({"optimizer_type": "Lion"}, "--optimizer is 'lion'; it can be adamw, adamw8bit, prodigy"),
        ({"resume_from_checkpoint": "out/checkpoint-500"}, 'resume is "out/checkpoint-500" and should be bool'),
        ({"train_batch_size": "4"}, "train_batch_size and gradient_accumulation_steps should be whole numbers above 0"),
        ({"push_to_hub": True}, "push_to_hub needs hub_model_id, as OWNER/NAME"),
    ],
)
def test_mistakes_there_are_named(theirs, said, config):
    with pytest.raises(UserError) as error:
        config(train_data_dir="x", **theirs)
    assert said in str(error.value)


def test_each_process_has_its_share_of_the_batch(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    read = config(train_data_dir="x", train_batch_size=3, gradient_accumulation_steps=4)
    assert (read.batch_size, read.micro_batch_size) == (24, 3)


def test_kohyas_folders_come_as_often_as_their_names_say(config, tmp_path):
    for name in ("10_dog", "2_cat house"):
        (tmp_path / "set" / name).mkdir(parents=True)
    (tmp_path / "set" / "12_notes.txt").write_text("")
    assert config(train_data_dir=str(tmp_path / "set")).data == tuple(
        f"{tmp_path}/set/{name}" for name in ("10_dog:10", "2_cat house:2")
    )


def test_a_file_in_sections_is_one_without(config):
    assert config(model={"network_dim": 8}, data={"train_data_dir": "x"}) == config(network_dim=8, train_data_dir="x")


def test_the_command_line_wins_over_the_file_where_one_excludes_the_other(config):
    assert config("--steps", "9", train_data_dir="x", n_epochs=100).epochs is None
    assert config("--epochs", "2", data="x", steps=9).epochs == 2
