"""apps/ddim.py against diffusers' schedulers, and against itself walked both ways."""

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from helpers import CPU

from minilora.apps.ddim import Levels, ddim_draw, ddim_invert, guided
from minilora.models.base import Base
from minilora.settings.setting import BUNDLED

SETTINGS = [
    {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},  # Stable Diffusion's own
    {"timestep_spacing": "trailing", "set_alpha_to_one": True},
]


@pytest.fixture
def start():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def predict(tiny_unet):
    text = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    return guided(tiny_unet, text)


def schedulers(prediction_type, settings):
    common = {"beta_schedule": "scaled_linear", "clip_sample": False, "prediction_type": prediction_type} | settings
    return DDIMScheduler(**common), DDIMInverseScheduler(**common)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_drawing_and_inverting_are_those_of_diffusers(predict, start, prediction_type, settings):
    draws, inverts = schedulers(prediction_type, settings)
    levels = Levels.of(draws, 10, CPU)
    inverts.set_timesteps(10)
    for scheduler, ours in ((draws, ddim_draw), (inverts, ddim_invert)):
        x = start
        for t in scheduler.timesteps:
            x = scheduler.step(predict(x, t), t, x).prev_sample
        # Ten steps in float32, of numbers that grow to some tens with a random U-Net.
        scale = max(1.0, x.abs().max().item())
        torch.testing.assert_close(ours(predict, start, levels), x, rtol=0, atol=1e-5 * scale)


def test_inverting_is_exact_where_the_noise_that_is_seen_is_the_same_at_every_level(start):
    levels = Levels.of(schedulers("epsilon", SETTINGS[0])[0], 20, CPU)

    def predict(x, t):
        return start.flip(0)

    noise = ddim_invert(predict, start, levels)
    # Dividing by √ᾱ = 0.07 at the noisy end magnifies float32 rounding.
    torch.testing.assert_close(ddim_draw(predict, noise, levels), start, rtol=1e-5, atol=1e-5)


def test_guidance_goes_away_from_the_empty_text(tiny_unet, start):
    text, empty = (torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    t = torch.tensor(500)
    with torch.no_grad():
        with_text, without = guided(tiny_unet, text)(start, t), guided(tiny_unet, empty)(start, t)
        found = guided(tiny_unet, text, empty, 3.0)(start, t)
    # One batch of four and two of two differ by the order of sums.
    torch.testing.assert_close(found, without + 3 * (with_text - without), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_drawing_is_what_the_pipeline_does():
    base = Base(BUNDLED, CPU)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    texts = [base.encode_text(words)[None] for words in ("red apple", "")]
    levels = Levels.of(base.scheduler, 5, CPU)
    ours = ddim_draw(guided(base.unet, *texts, 3.0), noise, levels)
    base.scheduler.set_timesteps(5)
    theirs = base.pipeline(
        "red apple",
        num_inference_steps=5,
        guidance_scale=3.0,
        latents=noise,
        height=128,
        width=128,
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # five steps of a guided U-Net in float32
