"""Smooth Diffusion: a LoRA that makes the picture change evenly when the noise changes evenly.

On the way from one noise to another, the pictures drawn often stay the same for a while and then jump.  The Jacobian
J = ∂x̂₀ / ∂ε tells how much the predicted picture x̂₀ changes with the noise ε.  For a random direction Δ,

    variation = ‖√(1 − ᾱ_t) · Jᵀ Δ‖,        Jᵀ Δ = ∂⟨x̂₀, Δ⟩ / ∂ε,        Δ ~ N(0, I / n)
    loss      = ordinary loss + λ · (variation − a)²

The loss makes the variation equal to a for every picture, timestep and direction.  a is a moving average of the
variations, over about 100 steps, and starts at 0.  This is the path length regularisation of StyleGAN2, applied to one
step of diffusion.

Sources: Guo et al., "Smooth Diffusion: crafting smooth latent spaces in diffusion models", 2023,
section 3; Karras et al., "Analyzing and improving the image quality of StyleGAN", 2020.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import nn

from ..data import draws
from ..data.examples import Batch
from ..data.pictures import as_picture
from ..data.sheet import sheet
from ..diffusion import Schedule, add_noise, clean_and_noise, denoising_loss
from ..lora import set_lora_strength
from ..models.base import Base
from ..run.objective import Objective
from ..run.ranks import mean_over_ranks
from ..settings.sample import SampleConfig
from ..settings.train import TrainConfig
from .drawing import draw_from
from .likeness import distances
from .mixing import slerp

DECAY = 0.01  # weight of the newest step in a
WAYS, SHOWN = 6, 3  # ways from one noise to another: measured, and on the sheet
FRAMES = 13  # pictures on each way, including the two ends


@dataclass
class SmoothDenoising(Objective):
    """Predict the noise, with the same variation of x̂₀ for every change of the noise; `weight` is λ."""

    weight: float = 1.0

    def begin(self, unet: Any, config: TrainConfig) -> None:
        # The loss needs a second derivative, which fused attention does not have.
        unet.set_attn_processor(AttnProcessor())
        self.mean = torch.zeros((), device=unet.device)  # a
        self.seen: list[torch.Tensor] = []  # of this step, one for each micro-batch

    def loss(self, unet: nn.Module, batch: Batch, schedule: Schedule, config: TrainConfig) -> torch.Tensor:
        noise = batch.noise.clone().requires_grad_()
        noisy = add_noise(batch.latents, noise, batch.timesteps, schedule)
        output = unet(noisy, batch.timesteps, **batch.conditioning.inputs())
        seen = batch.latents, batch.conditioning, batch.noise, batch.timesteps
        loss = denoising_loss(lambda *_, **__: output, *seen, schedule, config.snr_gamma, where=batch.where)
        variation = self.variation(output.sample.float(), noise, batch, schedule, config.seed)
        self.seen.append(variation.detach().mean())
        return loss + self.weight * (variation - self.mean).square()  # (batch,)

    def variation(
        self, prediction: torch.Tensor, noise: torch.Tensor, batch: Batch, schedule: Schedule, seed: int
    ) -> torch.Tensor:
        """Return ‖√(1 − ᾱ_t) · Jᵀ Δ‖ for each picture, (batch,); it can be differentiated again."""
        alpha_bar = schedule.alpha_bar(batch.timesteps)
        noisy = add_noise(batch.latents, noise, batch.timesteps, schedule)
        clean, _ = clean_and_noise(prediction, noisy, alpha_bar, schedule.prediction_type)
        shape = tuple(clean.shape[1:])
        directions = torch.stack([draws.gaussian(seed, "direction", p, shape) for p in batch.positions]).to(clean)
        directions = directions / clean[0].numel() ** 0.5  # of length about 1
        (change,) = torch.autograd.grad((clean * directions).sum(), noise, create_graph=True)
        return ((1 - alpha_bar).sqrt() * change).flatten(1).norm(dim=1)

    @torch.no_grad()
    def before_step(self) -> None:
        newest = mean_over_ranks(torch.stack(self.seen).mean())
        self.mean.lerp_(newest, DECAY)
        self.seen.clear()

    def state(self) -> dict[str, torch.Tensor]:
        return {"mean variation": self.mean}


# ------------------------------------------------------------------------------------------- figures


def smoothness(base: Base, captions: Sequence[str], learnt: Path, config) -> tuple[dict[str, float], Image.Image]:
    """Draw the way between two noises without and with the LoRA; return how evenly pictures change, and a sheet."""
    steps = SampleConfig(prompt=("any",), model=config.model).steps
    shape = (base.unet.config.in_channels, *[base.unet.config.sample_size] * 2)
    times = torch.linspace(0, 1, FRAMES).tolist()
    figures: dict[str, float] = {}
    shown: dict[tuple[int, float], tuple[str, list[Image.Image]]] = {}  # each row of the sheet with its label
    for name, strength in (("base", 0.0), ("LoRA", 1.0)):
        set_lora_strength(base.unet, strength)
        ways = []
        for number, caption in enumerate(captions[:WAYS]):
            a, b = (draws.gaussian(config.seed, f"end {end}", number, shape) for end in "ab")
            noise = torch.stack([slerp(a, b, t) for t in times])
            frames = draw_from(base, noise, [caption] * FRAMES, steps, config.middle_guidance)
            ways.append(torch.tensor(distances(base, frames)))
            if number < SHOWN:
                shown[number, strength] = f"{caption}, {name}", [as_picture(frame) for frame in frames[::2]]
        far = torch.stack(ways)  # (ways, frames - 1)
        figures[f"distance between neighbouring frames; {name}"] = far.mean().item()
        figures[f"its standard deviation along the way; {name}"] = far.std(1).mean().item()
        figures[f"largest jump between frames; {name}"] = far.max(1).values.mean().item()
    labels, rows = zip(*(shown[key] for key in sorted(shown)), strict=True)
    return figures, sheet(list(rows), [f"frame {number + 1}" for number in range(0, FRAMES, 2)], labels)
