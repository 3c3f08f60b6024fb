"""--preserve: what the base predicts at other captions is kept, without any class pictures, however a run is cut up."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CPU, randomize, relative_difference, torchrun

from minilora import inject_lora
from minilora.data.folder import read_folders
from minilora.diffusion import Schedule, add_noise, denoising_loss
from minilora.files.network import load_lora
from minilora.files.read import FILE_NAME
from minilora.models.base import Base
from minilora.run.encode import encoded_examples
from minilora.run.memory import memory_of
from minilora.run.objective import Denoising
from minilora.run.preview import look_at
from minilora.run.ranks import Ranks
from minilora.settings.command_line import read
from minilora.settings.errors import UserError
from minilora.settings.train import TrainConfig
from minilora.training import train


@pytest.fixture
def config(pictures, tmp_path, tiny_base) -> TrainConfig:
    recipe = {"steps": 6, "batch_size": 4, "rank": 2, "learning_rate": 0.01, "preserve": 1.0, "class_prompt": "a dog"}
    places = {"data": (str(pictures),), "cache": str(tmp_path / "cache"), "output": str(tmp_path / "run")}
    return TrainConfig(model=str(tiny_base), **recipe, **places)


def lora(config: TrainConfig, name: str, **more) -> bytes:
    folder = Path(config.output).with_name(name)
    train(replace(config, output=str(folder), **more))
    return (folder / FILE_NAME).read_bytes()


def examples_of(config: TrainConfig):
    base = Base.of(config, CPU)
    return encoded_examples(read_folders(config), config, 16, base, len(base.schedule), Ranks(0, 1, CPU))


# ---------------------------------------------------------------------------------- what is learnt


def test_the_loss_has_the_distance_from_the_base_at_the_same_noise(config, tiny_unet):
    batch = examples_of(config).batch(range(4), CPU)
    schedule = Schedule(torch.linspace(0.99, 0.01, 1000), "epsilon")
    noisy, seen = add_noise(batch.latents, batch.noise, batch.timesteps, schedule), batch.kept.inputs()
    wanted = tiny_unet(noisy, batch.timesteps, **seen).sample
    inject_lora(tiny_unet, rank=2)
    objective = Denoising()
    objective.begin(tiny_unet, config)
    assert not objective.drift(tiny_unet, batch, noisy).any()  # B is zero yet: the base, bit for bit
    randomize(tiny_unet)
    drift = (tiny_unet(noisy, batch.timesteps, **seen).sample - wanted).square().mean(dim=(1, 2, 3))
    assert torch.equal(objective.drift(tiny_unet, batch, noisy), drift)
    assert drift.all()
    plain = denoising_loss(tiny_unet, batch.latents, batch.conditioning, batch.noise, batch.timesteps, schedule)
    assert torch.equal(objective.loss(tiny_unet, batch, schedule, replace(config, preserve=0.5)), plain + 0.5 * drift)


def test_the_first_step_is_as_without_and_the_next_ones_are_not(config):
    """Before it the LoRA changes nothing, so there is nothing to keep."""
    plain = {"preserve": 0.0, "class_prompt": None, "class_data": None}
    assert lora(config, "a", steps=1) == lora(config, "b", steps=1, **plain)
    assert lora(config, "a", steps=2) != lora(config, "b", steps=2, **plain)


def test_a_stronger_one_keeps_more_of_the_base(config):
    def drift(preserve: float) -> float:
        lora(config, f"p{preserve}", steps=20, preserve=preserve, class_data=None)
        base = Base.of(config, CPU)
        objective, batch = Denoising(), examples_of(config).batch(range(40, 60), CPU)
        load_lora(base.unet, str(Path(config.output).with_name(f"p{preserve}")))
        objective.begin(base.unet, config)
        with torch.no_grad():
            noisy = add_noise(batch.latents, batch.noise, batch.timesteps, base.schedule)
            return objective.drift(base.unet, batch, noisy).mean().item()

    some, more, most = map(drift, (0.01, 1.0, 100.0))
    assert some > more > most


def test_it_is_kept_at_the_class_or_without_the_trigger_or_without_words(config):
    def kept(**more) -> set[bytes]:
        examples = examples_of(replace(config, class_prompt=None, class_data=None, **more))
        return {row.numpy().tobytes() for row in examples.batch(range(12), CPU).kept.text}

    encoded = {text: Base.of(config, CPU).encode_text(text).numpy().tobytes() for text in ("", "a dog", "picture 3")}
    assert kept() == {encoded[""]}
    with_trigger = kept(trigger="sks")
    assert {encoded["picture 3"]} < with_trigger  # and the other captions
    assert encoded[""] not in with_trigger
    assert kept(trigger="sks", caption_dropout=1.0) == {encoded[""]}
    examples = examples_of(replace(config, trigger="sks"))
    assert [row.numpy().tobytes() for row in examples.batch([5], CPU).kept.text] == [encoded["a dog"]]


# ------------------------------------------------------------------------------ however it is cut up


def test_cut_in_two_or_into_micro_batches_or_over_processes_it_is_the_same(config, tmp_path):
    more = {"preserve": 3.0, "dropout": 0.2, "learning_rate": 0.001}
    whole = lora(config, "whole", **more)
    lora(config, "cut", checkpoint_every=4, **more | {"steps": 4})
    assert lora(config, "cut", resume=True, **more) == whole
    with pytest.raises(UserError, match="another run: --preserve was 3 and is 2"):
        lora(config, "cut", resume=True, **more | {"preserve": 2.0})
    lora(config, "micro", micro_batch_size=1, **more)
    two = replace(config, output=str(tmp_path / "two"), micro_batch_size=1, **more)
    (tmp_path / "two.json").write_text(two.to_json())
    done = torchrun(2, "--config", str(tmp_path / "two.json"))
    assert done.returncode == 0, done.stderr
    for name in ("micro", "two"):
        # The order of float32 sums, magnified by Adam where a gradient is nearly zero.
        assert relative_difference(tmp_path / "whole", tmp_path / name) < 1e-4


def test_the_text_encoders_too_are_kept_and_found_switched_off(config, monkeypatch):
    seen = []
    drift = Denoising.drift

    def watched(self, *args):
        seen.append(drift(self, *args))
        return seen[-1]

    monkeypatch.setattr(Denoising, "drift", watched)
    lora(config, "a", train_text_encoder=True, steps=2, gradient_checkpointing=True)
    assert not seen[0].any()
    assert seen[1].all()


# --------------------------------------------------------------------------------------- the settings


def test_no_class_pictures_are_drawn_or_counted(config, tmp_path, capsys):
    lora(config, "a", steps=1, buckets=True)
    assert "preserve   the base's predictions at 'a dog'" in capsys.readouterr().out
    assert not list(tmp_path.rglob("class-*"))
    assert replace(config, epochs=2, steps=None).with_steps(10).steps == 5  # of 4 pictures each
    for more, told in (
        ({}, "'a dog'"),
        ({"class_prompt": None, "trigger": "sks"}, "captions without 'sks'"),
        ({"class_prompt": None}, "the empty prompt"),
    ):
        lines = look_at(replace(config, **more | {"class_data": None})).lines
        assert f"preserve   the base's predictions at {told}" in lines
        assert not any("class pictures" in line for line in lines)
    words = ["--data", config.data[0], "--model", "a/b", "--recipe", "subject"]
    plain, kept = (
        read(TrainConfig, words, ""),
        read(TrainConfig, [*words, "--class-prompt", "x", "--preserve", "1"], ""),
    )
    assert (kept.steps, kept.buckets) == (plain.steps, plain.buckets)


def test_what_has_no_effect_is_refused(config, tmp_path):
    for more, words in (
        ({"class_data": "dogs"}, "--class-data has no effect with --preserve, which needs no class pictures"),
        ({"class_pictures": 3}, "--class-pictures has no effect with --preserve"),
        ({"prior_weight": 2.0}, "--prior-weight has no effect with --preserve"),
        ({"full": True, "rank": 8}, "--preserve has no effect with --full, which trains no LoRA"),
        ({"preserve": -1.0}, "--preserve is -1; it must be at least 0"),
    ):
        with pytest.raises(UserError, match=words):
            replace(config, **more)


def test_the_memory_of_both_captions_is_told(config):
    base = Base.of(config, CPU)
    kept, plain = (memory_of(replace(config, preserve=weight), base).step for weight in (1.0, 0.0))
    assert 1.5 * plain < kept < 2.1 * plain  # what a step keeps for the backward pass, twice
