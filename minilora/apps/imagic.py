"""Imagic: edit a picture on the way between two texts, the one that describes it best and the one that is wanted.

1. The caption's embedding is optimized so that the base, whose weights stay as they are, denoises the picture well
   with it.  The result e stays near the caption.
2. A LoRA is trained on the picture with that embedding, so that together they draw exactly this picture.
3. Pictures are drawn with (1 − η) · e + η · e′, where e′ is the embedding of the edit.  At η = 0 it is the picture.
   The larger η, the more of the edit comes, and the less of the picture is left.

Imagic fine-tunes the whole U-Net in the second step; here it is a LoRA.

Source: Kawar et al., "Imagic: text-based real image editing with diffusion models", 2022.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from ..data import draws
from ..data.examples import Batch
from ..diffusion import Conditioning, Schedule, denoising_loss
from ..lora import lora_disabled
from ..models.base import Base
from ..models.device import this_device
from ..run.objective import Denoising
from ..sampling import draw
from ..settings.sample import SampleConfig
from ..settings.train import TrainConfig
from .likeness import encoder_features, pixels_of, pooled

BATCH, LEARNING_RATE = 8, 2e-3  # noises per step of the embedding, and its rate
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # η of the pictures on the way


def find_text(picture: torch.Tensor, config) -> torch.Tensor:
    """Load the base that `config` names, and return `optimized_text` of a picture, (3, h, w)."""
    base = Base.of(config, this_device(), config.precision)
    base.refuse_inpainting()
    return optimized_text(base, base.encode_picture(picture)[0][None].to(base.device), config.prompt, config.text_steps)


def optimized_text(base: Base, latents: torch.Tensor, prompt: str, steps: int) -> torch.Tensor:
    """Return the embedding with which the base denoises a picture best, (1, tokens, width).

    `latents` is the picture, (1, channels, h, w).  Adam starts from the embedding of `prompt`.
    """
    text = base.encode_text(prompt)[None].to(base.device).float().requires_grad_()  # (1, tokens, width)
    optimizer = torch.optim.Adam([text], LEARNING_RATE)
    for step in tqdm(range(steps), desc="text", unit="step"):
        positions = range(step * BATCH, (step + 1) * BATCH)
        noise = torch.stack([draws.gaussian(0, "text noise", p, tuple(latents.shape[1:])) for p in positions])
        times = [draws.integer(0, "text timestep", p, 0, len(base.schedule)) for p in positions]
        seen = latents.expand(BATCH, -1, -1, -1), Conditioning(text.expand(BATCH, -1, -1)), noise.to(base.device)
        with base.autocast():
            loss = denoising_loss(base.unet, *seen, torch.tensor(times, device=base.device), base.schedule).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return text.detach()


class WithText(Denoising):
    """The ordinary objective with one embedding, (1, tokens, width), in place of every caption's."""

    def __init__(self, text: torch.Tensor):
        self.text = text

    def name(self) -> str:
        return f"WithText {hashlib.sha256(self.text.cpu().numpy().tobytes()).hexdigest()}"

    def loss(self, network: nn.Module, batch: Batch, schedule: Schedule, config: TrainConfig) -> torch.Tensor:
        text = self.text.to(batch.latents.device).expand(len(batch.latents), -1, -1)  # (batch, tokens, width)
        return super().loss(network, replace(batch, conditioning=Conditioning(text)), schedule, config)


def on_the_way(base: Base, picture: torch.Tensor, edit: str, row: Sequence[Image.Image], config) -> dict[str, float]:
    """Return how far the pictures on the way to an edit are from the picture, and from what the base draws for it."""
    with lora_disabled(base.unet):
        drawn = draw(base, edit, range(4), base.resolution, SampleConfig(prompt=(edit,), model=config.model))
    figures, seen = {}, pooled(encoder_features(base, pixels_of(row)))  # (shares, width)
    ends = {
        "likeness to the picture": pooled(encoder_features(base, picture[None])),  # (1, width)
        "likeness to what the base draws for the edit": pooled(encoder_features(base, pixels_of(drawn))).mean(0)[None],
    }
    for what, end in ends.items():
        for share, cosine in zip(SHARES, torch.cosine_similarity(seen, end).tolist(), strict=True):
            figures[f"{what}; {share:.0%} of {edit!r}"] = cosine
    return figures
