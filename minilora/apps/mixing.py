"""The mixtures of two pictures that the frames between them are drawn with (morph.py).

A frame at time t, from 0 to 1, has a mixture of the pictures' noise, of their two LoRAs, and of their self-attention.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F

from ..lora import lora_layers
from ..models.base import Base
from .ddim import Levels, Predict


def slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Interpolate along the great circle from a to b, which keeps the length of gaussian noise.

    Source: Shoemake, "Animating rotation with quaternion curves", 1985.
    """
    cosine = F.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    angle = cosine.clamp(-1, 1).acos()
    if angle < 1e-4:  # for the same direction the formula would be 0 / 0
        return torch.lerp(a, b, t)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def adain(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Give each channel of x, (channels, h, w), a mean and a standard deviation between those of a and b.

    Source: Huang & Belongie, "Arbitrary style transfer in real-time with adaptive instance normalization", 2017.
    """
    (spread, mean), of_a, of_b = (torch.std_mean(z, dim=(1, 2), keepdim=True) for z in (x, a, b))  # (channels, 1, 1)
    wanted_spread, wanted_mean = (torch.lerp(one, two, t) for one, two in zip(of_a, of_b, strict=True))
    return (x - mean) / spread * wanted_spread + wanted_mean


def between(base: Base, times: Sequence[float], text: torch.Tensor, levels: Levels, attention: float) -> Predict:
    """Return a function that predicts for a batch of frames, each with its own mixture of the two LoRAs."""
    t = torch.tensor(times, dtype=torch.float32, device=base.device)  # (batch,)
    mixed = round(attention * len(levels.timesteps))  # steps
    last_mixed = levels.timesteps[mixed - 1] if mixed else len(base.schedule)

    def predict(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        attending = nullcontext() if timestep < last_mixed else self_attention_between(base.unet, t)
        with loras_between(base.unet, t), attending:
            return base.unet(x, timestep, text).sample

    return predict


@contextmanager
def loras_between(unet, times: torch.Tensor) -> Iterator[None]:
    """Within the block each picture of a batch has LoRA a at strength 1 − t and b at t; `times` are (batch,)."""

    def times_its_own(strengths: torch.Tensor):
        return lambda adapter, inputs, y: y * strengths.to(y).view(-1, *[1] * (y.ndim - 1))  # (batch, …, out)

    hooks = [
        layer.adapters[name].register_forward_hook(times_its_own(strengths))
        for name, strengths in (("a", 1 - times), ("b", times))
        for layer in lora_layers(unet).values()
        if name in layer.adapters
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Between:
    """Self-attention whose keys and values come from a mixture of the first and the last picture of the batch."""

    def __init__(self, ordinary, times: torch.Tensor):
        self.ordinary = ordinary
        self.times = times.view(-1, 1, 1)  # (batch, 1, 1)

    def __call__(self, attention, x: torch.Tensor, **more) -> torch.Tensor:
        """Attend from x, (batch, pixels, channels)."""
        mixture = torch.lerp(x[:1], x[-1:], self.times.to(x.dtype))
        return self.ordinary(attention, x, **more | {"encoder_hidden_states": mixture})


@contextmanager
def self_attention_between(unet, times: torch.Tensor) -> Iterator[None]:
    """Within the block the self-attention of the U-Net's upper half is mixed; afterwards it is restored."""
    found = unet.attn_processors
    mixed = {
        name: Between(ordinary, times) if name.startswith("up_blocks") and ".attn1." in name else ordinary
        for name, ordinary in found.items()
    }
    try:
        unet.set_attn_processor(mixed)
        yield
    finally:
        unet.set_attn_processor(found)
