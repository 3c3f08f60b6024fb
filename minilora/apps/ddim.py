"""DDIM: a path between noise and picture without randomness, which works in both directions.

At a noise level ᾱ the U-Net's prediction splits x into picture and noise, x̂₀ and ε̂ (diffusion.py).  The same two,
mixed for another level ᾱ′, give the next x:

    x′ = √ᾱ′ · x̂₀ + √(1 − ᾱ′) · ε̂

From high to low noise this draws a picture.  From low to high noise it finds the noise from which a given picture would
be drawn.  That direction is approximate: the U-Net is called with the level that x will have after the step, so
prediction and level must change little per step.

Sources: Song et al., "Denoising diffusion implicit models", 2020, equation 12; Dhariwal & Nichol,
"Diffusion models beat GANs on image synthesis", 2021, appendix F, for the way up.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..diffusion import clean_and_noise

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x, timestep) -> the U-Net's prediction


@dataclass(frozen=True)
class Levels:
    """The noise levels of a path, the noisiest first.

    `timesteps` is (steps,); `alpha_bars`, (steps + 1,), holds ᾱ at each and at the picture's end.
    """

    timesteps: torch.Tensor
    alpha_bars: torch.Tensor
    prediction_type: str

    @classmethod
    def of(cls, scheduler, steps: int, device: torch.device) -> "Levels":
        """Return the levels that diffusers' DDIMScheduler uses for `steps` steps."""
        scheduler.set_timesteps(steps)
        end = scheduler.final_alpha_cumprod.reshape(1)
        alpha_bars = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], end]).float()
        return cls(scheduler.timesteps.to(device), alpha_bars.to(device), scheduler.config.prediction_type)


def ddim_step(
    x: torch.Tensor,
    prediction: torch.Tensor,
    alpha_bar: torch.Tensor,
    next_alpha_bar: torch.Tensor,
    prediction_type: str,
) -> torch.Tensor:
    """Return x at the next level, given x at ᾱ and the U-Net's prediction there; (batch, channels, h, w)."""
    clean, noise = clean_and_noise(prediction, x, alpha_bar, prediction_type)
    return next_alpha_bar.sqrt() * clean + (1 - next_alpha_bar).sqrt() * noise


@torch.no_grad()
def ddim_draw(predict: Predict, noise: torch.Tensor, levels: Levels) -> torch.Tensor:
    """Walk from noise to latents; (batch, channels, h, w)."""
    x = noise
    for t, here, there in zip(levels.timesteps, levels.alpha_bars, levels.alpha_bars[1:], strict=False):
        x = ddim_step(x, predict(x, t), here, there, levels.prediction_type)
    return x


@torch.no_grad()
def ddim_invert(predict: Predict, latents: torch.Tensor, levels: Levels) -> torch.Tensor:
    """Walk from latents to the noise from which they would be drawn; (batch, channels, h, w)."""
    x, rising = latents, levels.alpha_bars.flip(0)
    for t, here, there in zip(levels.timesteps.flip(0), rising, rising[1:], strict=False):
        x = ddim_step(x, predict(x, t), here, there, levels.prediction_type)
    return x


def guided(
    unet, text: torch.Tensor, empty: torch.Tensor | None = None, guidance: float | torch.Tensor = 1.0
) -> Predict:
    """Return a function that predicts for a text, (batch, tokens, width), with classifier-free guidance if it is not 1.

    `empty` is the encoding of the empty text.  Guidance can be one number or one per picture, (batch, 1, 1, 1), and so
    can the timestep, (batch,).
    Source: Ho & Salimans, "Classifier-free diffusion guidance", 2022.
    """
    if not isinstance(guidance, torch.Tensor) and guidance == 1:
        return lambda x, t: unet(x, t, text).sample

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times = torch.cat([t, t]) if t.ndim else t
        both = unet(torch.cat([x, x]), times, torch.cat([empty.expand_as(text), text])).sample
        without, with_text = both.chunk(2)
        return without + guidance * (with_text - without)

    return predict
