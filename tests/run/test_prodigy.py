"""run/prodigy.py: the package's steps, an estimate that is a bound, and runs that are cut up or divided."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import relative_difference, torchrun
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from minilora.run.checkpoint import all_in
from minilora.run.prodigy import D0, Prodigy
from minilora.settings.command_line import read
from minilora.settings.errors import UserError
from minilora.settings.train import TrainConfig
from minilora.training import train

SETTINGS = {"betas": (0.9, 0.999), "eps": 1e-30, "weight_decay": 0.01}  # eps: where v is 0, and nowhere else


def factors(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """Return the A and B of a LoRA, as they are before the first step."""
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(5, 7, generator=generator, dtype=dtype)),
        nn.Parameter(torch.zeros(4, 5).to(dtype)),
    ]


def loss_of(lora: list[nn.Parameter]) -> torch.Tensor:
    """Return how far B A is from a matrix, at 64 points."""
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(64, size, generator=generator, dtype=torch.float64) for size in (7, 4))
    A, B = lora
    return (x.to(A.dtype) @ A.T @ B.T - (2 * x[:, :4] + 0.3 * noise).to(A.dtype)).square().mean()


def follow(optimizer: torch.optim.Optimizer, loss, steps: int, warmup: int = 1) -> None:
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = min(1, (step + 1) / warmup)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_its_steps_are_those_of_the_authors_package(dtype, tolerance):
    """To the last digits of each format, of which some are lost while d is multiplied by ten thousand.

    (The package multiplies ε by the d of after the step and the paper by that of before.  ε is as good as 0 here.)
    """
    theirs = pytest.importorskip("prodigyopt").Prodigy
    ours, other = factors(dtype), factors(dtype)
    optimizer, more = Prodigy([{"params": ours}], **SETTINGS), {"use_bias_correction": True, "safeguard_warmup": True}
    oracle = theirs(other, **SETTINGS, **more)
    for _ in range(4):
        follow(optimizer, lambda: loss_of(ours), 50, warmup=20)
        follow(oracle, lambda: loss_of(other), 50, warmup=20)
        assert optimizer.d == pytest.approx(oracle.param_groups[0]["d"], rel=tolerance)
        for one, two in zip(ours, other, strict=True):
            assert (one - two).norm() <= tolerance * two.norm()
    assert optimizer.d > 1000 * D0


def test_the_estimate_is_not_above_the_distance_to_the_best_weights_where_the_loss_is_convex():
    for distance in (0.003, 0.1, 4.0):
        x, best = nn.Parameter(torch.zeros(10)), distance * torch.linspace(-1, 1, 10)
        optimizer = Prodigy([{"params": [x]}], **SETTINGS | {"weight_decay": 0.0})
        follow(optimizer, lambda x=x, best=best: (x - best).abs().sum(), 1000)
        assert 0.01 * distance < optimizer.d <= distance
        assert (x - best).abs().max() < 0.2 * distance  # which no one told it


def test_the_unit_of_the_loss_changes_no_bit():
    one, two = factors(), factors()
    follow(Prodigy([{"params": one}], **SETTINGS), lambda: loss_of(one), 100)
    follow(Prodigy([{"params": two}], **SETTINGS), lambda: 1024 * loss_of(two), 100)
    assert all(map(torch.equal, one, two))


def test_the_rate_of_another_group_makes_its_steps_longer_or_shorter():
    def first_step(ratio: float) -> tuple[torch.Tensor, float]:
        unet, text = factors(), factors()
        optimizer = Prodigy([{"params": unet}, {"params": text, "lr": ratio}], **SETTINGS | {"weight_decay": 0.0})
        (loss_of(unet) + loss_of(text)).backward()
        optimizer.step()
        return text[1].detach(), optimizer.d

    half, whole = first_step(0.5), first_step(1.0)
    assert torch.equal(2 * half[0], whole[0])
    assert whole[0].any()
    assert half[1] == whole[1]


def test_without_a_gradient_nothing_moves():
    lora = factors()
    optimizer = Prodigy([{"params": lora}], **SETTINGS | {"weight_decay": 0.0})
    follow(optimizer, lambda: 0 * loss_of(lora), 2)
    assert all(map(torch.equal, lora, factors()))
    assert optimizer.d == pytest.approx(D0)


# ----------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def config(pictures, tiny_base, tmp_path) -> TrainConfig:
    """A run of so many steps that d grows; with these betas it does so early."""
    places = {"data": (str(pictures),), "output": str(tmp_path / "out"), "cache": str(tmp_path / "cache")}
    settings = {"steps": 24, "batch_size": 2, "adam_betas": (0.9, 0.9), "checkpoint_every": 8, "precision": "fp32"}
    return TrainConfig(model=str(tiny_base), optimizer="prodigy", **settings, **places)


def found(config: TrainConfig) -> float:
    """Return the estimate in the newest checkpoint of a run."""
    return load_file(all_in(Path(config.output))[-1])["optimizer.0.d"].item()


@pytest.mark.parametrize("full", [False, True])
def test_a_run_that_was_cut_in_two_gives_the_same_bytes(config, tmp_path, full):
    config = replace(config, full=full)
    whole, cut = replace(config, output=str(tmp_path / "whole")), replace(config, output=str(tmp_path / "cut"))
    result = train(whole)
    train(replace(cut, steps=20))
    again = train(replace(cut, resume=True))
    one, two = (path / "unet" / "diffusion_pytorch_model.safetensors" if full else path for path in (result, again))
    assert one.read_bytes() == two.read_bytes()
    assert found(whole) == found(cut) > 10 * D0


def test_two_processes_give_what_one_gives(config, tmp_path):
    train(replace(config, output=str(tmp_path / "one")))
    (tmp_path / "config.json").write_text(config.to_json())
    result = torchrun(2, "--config", str(tmp_path / "config.json"))
    assert result.returncode == 0, result.stderr
    # The order of a float32 sum, magnified where Adam divides by a gradient that is nearly zero.
    assert relative_difference(tmp_path / "one", tmp_path / "out") < 1e-3
    assert found(config) == pytest.approx(found(replace(config, output=str(tmp_path / "one"))), rel=1e-4)


def test_the_rate_that_is_logged_is_the_factor_times_what_was_found(config):
    config = replace(config, learning_rate=0.5)
    train(config)
    events = EventAccumulator(str(Path(config.output) / "tensorboard"))
    events.Reload()
    rates = [event.value for event in events.Scalars("learning_rate")]
    assert rates[-1] == pytest.approx(0.5 * found(config))  # TensorBoard keeps float32
    assert rates == sorted(rates)
    assert rates[0] == pytest.approx(0.5 * D0)


@pytest.mark.parametrize("more", [[], ["--full"], ["--model", "a/b"], ["--model", "a/b", "--recipe", "subject"]])
def test_the_learning_rate_is_a_factor_of_1_unless_it_is_given(more, tmp_path):
    def parse(*words: str) -> TrainConfig:
        return read(TrainConfig, ["--data", "dataset/mountain", *more, *words], "")

    config, adamw = parse("--optimizer", "prodigy"), parse()
    assert config.learning_rate == 1
    assert parse("--optimizer", "prodigy", "--learning-rate", "0.5").learning_rate == 0.5
    if "--recipe" in more:  # the text encoders are half as fast in either case
        assert config.text_encoder_learning_rate == adamw.text_encoder_learning_rate / adamw.learning_rate
        assert parse("--optimizer", "prodigy", *config.recipe_as_typed().split()) == config
    (tmp_path / "config.json").write_text(config.to_json())
    again = read(TrainConfig, ["--config", str(tmp_path / "config.json"), "--optimizer", "adamw"], "")
    assert replace(again, output=adamw.output) == adamw


def test_a_rate_of_adamw_is_refused():
    with pytest.raises(UserError) as error:
        TrainConfig(
            data=("x",),
            optimizer="prodigy",
            train_text_encoder=True,
            learning_rate=1e-4,
            text_encoder_learning_rate=5e-5,
        )
    why = "with --optimizer prodigy it is a factor on the rate that is found: leave it out, or give at least 0.1"
    rates = "--learning-rate is 0.0001", "--text-encoder-learning-rate is 5e-05"
    assert str(error.value) == "; ".join(f"{rate}; {why}" for rate in rates)
