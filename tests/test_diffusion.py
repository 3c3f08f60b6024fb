"""diffusion.py against equations written out by hand, and against diffusers."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_dream_and_update_latents, compute_snr

from minilora.diffusion import (
    PREDICTION_TYPES,
    Conditioning,
    Schedule,
    add_noise,
    denoising_loss,
    dream_noise,
    huber,
    min_snr_weight,
    offset_noise,
    target,
)
from minilora.models.base import Base
from minilora.settings.errors import UserError

TIMES = torch.tensor([0, 10, 500, 999])


def schedule_of(prediction_type: str) -> Schedule:
    return Schedule.of(DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type))


@pytest.fixture
def latents_and_noise():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 4, 6, 6, generator=generator) for _ in range(2)]


def test_noise_and_velocity_are_those_of_diffusers(latents_and_noise):
    latents, noise = latents_and_noise
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    schedule = Schedule.of(scheduler)
    torch.testing.assert_close(add_noise(latents, noise, TIMES, schedule), scheduler.add_noise(latents, noise, TIMES))
    torch.testing.assert_close(target(latents, noise, TIMES, schedule), scheduler.get_velocity(latents, noise, TIMES))


def test_each_target_gives_back_the_picture(latents_and_noise):
    latents, noise = latents_and_noise
    for kind in PREDICTION_TYPES:
        schedule = schedule_of(kind)
        noisy, wanted = add_noise(latents, noise, TIMES, schedule), target(latents, noise, TIMES, schedule)
        a = schedule.alpha_bar(TIMES)
        rebuilt = {
            "epsilon": (noisy - (1 - a).sqrt() * wanted) / a.sqrt(),
            "v_prediction": a.sqrt() * noisy - (1 - a).sqrt() * wanted,
            "sample": wanted,
        }[kind]
        # At t = 999 the epsilon form divides by √ᾱ ≈ 0.07, which magnifies float32 rounding.
        torch.testing.assert_close(rebuilt, latents, atol=1e-5, rtol=1e-4)


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="'flow'; known are epsilon, v_prediction, sample"):
        Schedule(torch.ones(3), "flow")


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_the_weighted_mean_square_of_each_picture(kind, gamma, latents_and_noise):
    latents, noise = latents_and_noise
    schedule = schedule_of(kind)

    def guess(noisy, timesteps, encoder_hidden_states):
        return SimpleNamespace(sample=0.3 * noisy + encoder_hidden_states.mean())

    text = Conditioning(torch.ones(4, 2, 3))
    losses = denoising_loss(guess, latents, text, noise, TIMES, schedule, gamma)
    assert losses.dtype == torch.float32
    for i, t in enumerate(TIMES.tolist()):
        a = schedule.alphas_cumprod[t]
        noisy = a.sqrt() * latents[i] + (1 - a).sqrt() * noise[i]
        velocity = a.sqrt() * noise[i] - (1 - a).sqrt() * latents[i]
        wanted = {"epsilon": noise[i], "v_prediction": velocity, "sample": latents[i]}[kind]
        expected = ((0.3 * noisy + 1 - wanted) ** 2).mean()
        if gamma is not None:
            snr = a / (1 - a)
            capped = torch.minimum(snr, torch.tensor(gamma))
            expected *= {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}[kind]
        torch.testing.assert_close(losses[i], expected)


def test_min_snr_weighs_the_error_in_the_picture_alike_for_all_predictions(latents_and_noise):
    """An error δ in x₀ is an error δ·√SNR in ε and δ·√(SNR + 1) in v; weighted, all must cost the same."""
    weights = {kind: min_snr_weight(TIMES, schedule_of(kind), 5.0) for kind in PREDICTION_TYPES}
    snr = compute_snr(DDIMScheduler(beta_schedule="scaled_linear"), TIMES)
    torch.testing.assert_close(weights["epsilon"] * snr, weights["sample"], rtol=1e-4, atol=0)
    torch.testing.assert_close(weights["v_prediction"] * (snr + 1), weights["sample"], rtol=1e-4, atol=0)


def test_no_signal_at_all_gives_a_finite_weight():
    for kind, expected in [("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)]:
        assert min_snr_weight(torch.tensor([0]), Schedule(torch.zeros(1), kind), 5.0).item() == expected


def test_offset_noise_shifts_whole_channels():
    noise, offset = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 1, 1)
    shift = offset_noise(noise, offset, 0.1) - noise
    torch.testing.assert_close(shift, (0.1 * offset).expand_as(noise), atol=1e-6, rtol=1e-4)
    assert torch.equal(offset_noise(noise, offset, 0.0), noise)


def test_the_huber_loss_is_the_square_of_small_errors_and_the_size_of_large_ones():
    small, large = torch.tensor([1e-3, -2e-3]), torch.tensor([100.0, -300.0])
    torch.testing.assert_close(huber(small, 0.1), small.square(), rtol=1e-3, atol=0)  # up to (z / c)² / 4
    torch.testing.assert_close(huber(large, 0.1), 2 * 0.1 * large.abs(), rtol=1e-2, atol=0)  # up to c / |z|


def test_with_a_large_constant_the_huber_loss_is_the_ordinary_one(latents_and_noise):
    latents, noise = latents_and_noise
    text = Conditioning(torch.ones(4, 2, 3))

    def guess(noisy, timesteps, encoder_hidden_states):
        return SimpleNamespace(sample=0.3 * noisy)

    ordinary = denoising_loss(guess, latents, text, noise, TIMES, schedule_of("epsilon"))
    # c² + z² has 24 bits, of which z² keeps those that are left of c².
    found = denoising_loss(guess, latents, text, noise, TIMES, schedule_of("epsilon"), huber_c=30.0)
    torch.testing.assert_close(found, ordinary, rtol=5e-3, atol=0)


@pytest.mark.parametrize("preservation", [0.5, 1.0])
def test_dream_is_that_of_diffusers(preservation, latents_and_noise, tiny_unet):
    latents, noise = latents_and_noise
    latents, noise = latents.repeat(1, 1, 2, 2)[..., :8, :8], noise.repeat(1, 1, 2, 2)[..., :8, :8]
    scheduler = DDIMScheduler(beta_schedule="scaled_linear")
    schedule, text = Schedule.of(scheduler), torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(0))
    noisy = scheduler.add_noise(latents, noise, TIMES)
    noisy, wanted = compute_dream_and_update_latents(
        tiny_unet, scheduler, TIMES, noise, noisy, noise, text, preservation
    )
    with torch.no_grad():
        expected = (tiny_unet(noisy, TIMES, text).sample - wanted).square().mean(dim=(1, 2, 3))
        told = Conditioning(text)
        found = denoising_loss(tiny_unet, latents, told, noise, TIMES, schedule, dream=preservation)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_dream_leaves_a_perfect_prediction_alone(latents_and_noise):
    """For every prediction type: where there is no error, nothing is rectified."""
    latents, noise = latents_and_noise
    for kind in PREDICTION_TYPES:
        schedule = schedule_of(kind)
        times = TIMES[1:3]  # at the ends of the schedule the inverse divides by almost nothing
        same = dream_noise(
            lambda n, t, s=schedule, **_: SimpleNamespace(sample=target(latents[1:3], noise[1:3], t, s)),
            *(latents[1:3], Conditioning(torch.ones(2, 2, 3)), noise[1:3], times, schedule, 1.0),
        )
        torch.testing.assert_close(same, noise[1:3], rtol=1e-4, atol=1e-4)


def test_a_zero_terminal_snr_is_that_of_diffusers_and_every_weight_is_finite(family_base):
    base = Base(str(family_base("sd2")), torch.device("cpu"), zero_terminal_snr=True)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    torch.testing.assert_close(base.schedule.alphas_cumprod, scheduler.alphas_cumprod)
    assert base.schedule.alphas_cumprod[-1] < 1e-6
    for kind in PREDICTION_TYPES:
        schedule = Schedule(torch.tensor([1 - 1e-4, 0.5, 0.0]), kind)
        assert min_snr_weight(torch.arange(3), schedule, 5.0).isfinite().all()
    with pytest.raises(UserError, match="predicts epsilon, which tells nothing about the picture"):
        _ = Base(str(family_base("sd1")), torch.device("cpu"), zero_terminal_snr=True).schedule
