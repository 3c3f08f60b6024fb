"""apps/smooth: the variation is the length of a row of the Jacobian, and what is asked of it is a mean."""

from dataclasses import replace

import pytest
import torch
from conftest import make_tiny_unet
from helpers import CPU
from safetensors.torch import load_file
from test_consistency import CONFIG

from minilora import inject_lora
from minilora.apps.smooth import SmoothDenoising
from minilora.data import draws
from minilora.data.examples import Batch
from minilora.diffusion import Conditioning, Schedule, add_noise, clean_and_noise
from minilora.models.base import Base
from minilora.run import checkpoint
from minilora.run.objective import Denoising
from minilora.settings.train import TrainConfig
from minilora.training import train


@pytest.fixture
def unet():
    unet = make_tiny_unet().requires_grad_(False)
    inject_lora(unet, rank=2)
    return unet


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    text, timesteps = torch.randn(3, 5, 16, generator=generator), torch.tensor([50, 400, 900])
    return Batch(
        (5, 6, 7),
        latents,
        Conditioning(text),
        noise,
        noise[:, :, :1, :1],
        timesteps,
        torch.ones(3),
        torch.ones(3, 1, 1, 1),
    )


@pytest.fixture
def schedule(tiny_base) -> Schedule:
    return Base(str(tiny_base), CPU).schedule


def started(unet, weight: float) -> SmoothDenoising:
    objective = SmoothDenoising(weight)
    objective.begin(unet, CONFIG)
    return objective


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_without_weight_it_is_the_ordinary_objective(unet, batch, schedule, snr_gamma):
    config = replace(CONFIG, snr_gamma=snr_gamma)
    ordinary = Denoising().loss(unet, batch, schedule, config)
    found = started(unet, 0.0).loss(unet, batch, schedule, config)
    torch.testing.assert_close(found, ordinary, rtol=1e-5, atol=1e-6)  # attention is summed in another order


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_variation_is_that_of_the_picture_seen_in_noise_that_changes(unet, batch, schedule, prediction_type):
    """The derivative along a step of the noise, by differences in float64, is the gradient times the step."""
    schedule = replace(schedule, prediction_type=prediction_type)
    objective, unet = started(unet, 1.0), unet.double()
    told = Conditioning(batch.conditioning.text.double())
    batch = replace(batch, latents=batch.latents.double(), conditioning=told, noise=batch.noise.double())
    alpha_bar = schedule.alpha_bar(batch.timesteps)
    shape = (4, 8, 8)
    directions = torch.stack([draws.gaussian(CONFIG.seed, "direction", p, shape) for p in batch.positions]) / 16

    def seen(noise: torch.Tensor) -> torch.Tensor:
        noisy = add_noise(batch.latents, noise, batch.timesteps, schedule)
        prediction = unet(noisy, batch.timesteps, batch.conditioning.text).sample
        return (clean_and_noise(prediction, noisy, alpha_bar, prediction_type)[0] * directions).sum()

    noise = batch.noise.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(seen(noise), noise)
    step = torch.randn(batch.noise.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        slope = (seen(noise + 1e-4 * step) - seen(noise - 1e-4 * step)) / 2e-4
    torch.testing.assert_close((gradient * step).sum(), slope, rtol=1e-4, atol=1e-6)  # what 1e-4 bends

    noise = batch.noise.clone().requires_grad_()
    prediction = unet(
        add_noise(batch.latents, noise, batch.timesteps, schedule), batch.timesteps, batch.conditioning.text
    ).sample
    found = objective.variation(prediction, noise, batch, schedule, CONFIG.seed)
    wanted = ((1 - alpha_bar).sqrt() * gradient).flatten(1).norm(dim=1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # the levels are float32


def test_what_is_asked_for_is_the_mean_of_what_was_seen(unet, batch, schedule):
    objective = started(unet, 1.0)
    assert objective.state() == {"mean variation": 0}
    means = []
    for _ in range(3):
        loss = objective.loss(unet, batch, schedule, CONFIG)
        excess = (loss - started(unet, 0.0).loss(unet, batch, schedule, CONFIG)).sqrt()  # |variation - a|
        means.append(sum(objective.seen).item() / len(objective.seen))
        if len(means) == 1:  # a is 0
            assert excess.mean().item() == pytest.approx(means[0], rel=1e-4)
        objective.before_step()
    # The LoRA does not move, so a goes towards what is seen by a hundredth of the rest each time.
    assert objective.mean.item() == pytest.approx(means[0] * (1 - 0.99**3), rel=1e-5)


def test_a_smooth_run_that_was_cut_in_two_gives_the_same_bytes(pictures, tmp_path, tiny_base):
    def learn(name: str, **settings):
        places = {"data": (str(pictures),), "output": str(tmp_path / name), "cache": str(tmp_path / "cache")}
        defaults = {"steps": 6, "batch_size": 4, "rank": 2, "learning_rate": 0.01, "model": str(tiny_base)}
        return train(TrainConfig(**(places | defaults | settings)), SmoothDenoising())

    whole = learn("whole").read_bytes()
    cut = learn("cut", steps=4, checkpoint_every=4, micro_batch_size=2).parent
    assert load_file(checkpoint.path_of(cut, 4))["objective.mean variation"] > 0
    cut = learn("cut", resume=True)
    assert load_file(cut).keys() == load_file(tmp_path / "whole" / cut.name).keys()
    again = learn("again", steps=4, checkpoint_every=4).parent
    assert learn("again", resume=True).read_bytes() == whole, again
