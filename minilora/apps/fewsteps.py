"""What a few steps are worth: pictures of held-out captions in many steps, in few, and in few with an LCM-LoRA.

One by one they are compared with the picture of the same noise, though LCMScheduler adds more noise on
the way; and all together as distributions, by features of the VAE's encoder (morph.py), each the
mean over its places.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from .. import draws
from ..config import SampleConfig, TrainConfig
from ..data import Batch, as_tensor, open_picture
from ..lora import lora_disabled
from ..models import Base
from ..objectives import Objective
from ..sampling import draw, merged_at, sheet, use_scheduler
from .drawing import STYLES, TOGETHER
from .morph import apart, encoder_features
from .restore import psnr

MANY = 50  # steps that few ones are compared with


def few_steps(base: Base, captions: Sequence[str], learnt: Path, config) -> tuple[dict[str, float], Image.Image]:
    """Draw captions in many steps, in few, and in few with the LoRA; return the figures and a sheet.

    `learnt` is the folder that the LoRA was trained on, which shows what the styles look like.
    """
    many, few, lcm = f"base, {MANY} steps", f"base, {config.steps} steps", f"LCM-LoRA, {config.steps} steps"
    middle = config.middle_guidance
    drawn, times = {}, {}
    for name, scheduler, steps, guidance, strength in (
        (many, "ddim", MANY, middle, 0.0),
        (few, "ddim", config.steps, middle, 0.0),
        (lcm, "lcm", config.steps, 1.0, 1.0),
    ):
        use_scheduler(base, scheduler)
        how, seeds = SampleConfig(prompt=tuple(captions), steps=steps, guidance=guidance), range(config.seeds)
        with merged_at(base, {"default": strength}):
            draw(base, captions[0], seeds, base.resolution, how)  # the first time is slower
            started = time.perf_counter()
            drawn[name] = [draw(base, caption, seeds, base.resolution, how) for caption in captions]
            times[name] = (time.perf_counter() - started) / (len(captions) * config.seeds)
    pixels = {name: torch.stack([as_tensor(p) for row in rows for p in row]) for name, rows in drawn.items()}
    each = [caption for caption in captions for _ in seeds]
    figures = {f"seconds per picture, {name}": value for name, value in times.items()}
    figures |= compared(base, pixels, many) | called_right(base, pixels, each, learnt)
    figures |= held_out_losses(base, config.objective_itself(), pixels[many], each, config)
    columns = range(min(8, len(captions)))
    rows = [[row[0] for row in rows[: len(columns)]] for rows in drawn.values()]
    return figures, sheet(rows, captions[: len(columns)], list(drawn))


def compared(base: Base, pixels: dict[str, torch.Tensor], many: str) -> dict[str, float]:
    """Return how far pictures are from those of many steps, one by one and as distributions."""
    figures, aim = {}, pixels[many]
    for name, pictures in pixels.items():
        if name != many:
            near = torch.tensor([psnr(one, other) for one, other in zip(pictures, aim, strict=True)])
            figures[f"PSNR to the same seed at {MANY} steps, dB, {name}"] = near.mean().item()
    for name, pictures in pixels.items():
        if name != many:
            parts = zip(pictures.split(TOGETHER), aim.split(TOGETHER), strict=True)
            far = [apart(encoder_features(base, one), encoder_features(base, other)) for one, other in parts]
            figures[f"perceptual distance to the same seed at {MANY} steps, {name}"] = torch.cat(far).mean().item()
    wanted = pooled(base, aim)
    for name, pictures in pixels.items():
        if name != many:
            figures[f"kernel distance to all pictures of {MANY} steps, {name}"] = kernel_distance(
                pooled(base, pictures), wanted
            )
    figures[f"kernel distance of {MANY} steps to {MANY} steps, with other seeds"] = kernel_distance(
        wanted[::2], wanted[1::2]
    )
    return figures


def pooled(base: Base, pixels: torch.Tensor) -> torch.Tensor:
    """Return the features of pictures, each the mean over its places; (n, width)."""
    layers = [encoder_features(base, part) for part in pixels.split(TOGETHER)]
    return torch.cat([torch.cat([f.float().mean((2, 3)) for f in part], dim=1) for part in layers]).cpu()


def kernel_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return how far two sets of features, (n, width), are apart as distributions; 0 for the same one.

    The squared distance of means under the kernel (x·y / width + 1)³, without the bias of few pictures.
    Source: Binkowski et al., "Demystifying MMD GANs", 2018.
    """
    mean, spread = other.mean(0), other.std(0)
    a, b = ((x.double() - mean) / spread for x in (one, other))

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def without_diagonal(k):
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    return (without_diagonal(kernel(a, a)) + without_diagonal(kernel(b, b)) - 2 * kernel(a, b).mean()).item()


def called_right(
    base: Base, pixels: dict[str, torch.Tensor], captions: Sequence[str], learnt: Path
) -> dict[str, float]:
    """Return how often a classifier finds in pictures the style that their captions ask for.

    It is a ridge regression on the pooled features, learnt from the pictures that the base drew in both styles.
    """
    rows = [json.loads(line) for line in (learnt / "metadata.jsonl").read_text().splitlines()]
    styled = [row for row in rows if isinstance(row["text"], str) and row["text"].endswith(STYLES[1:])]
    if not styled:
        return {}  # another base, or pictures that were given

    def style(caption: str) -> float:
        return 1.0 if caption.endswith(STYLES[1]) else -1.0

    x = pooled(base, torch.stack([as_tensor(open_picture(learnt / row["file_name"])) for row in styled]))
    mean, spread = x.mean(0), x.std(0)

    def features(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([(x - mean) / spread, torch.ones(len(x), 1)], dim=1).double()

    x, y = features(x), torch.tensor([style(row["text"]) for row in styled]).double()
    weights = torch.linalg.solve(x.T @ x + 0.1 * len(x) * torch.eye(x.shape[1]), x.T @ y)
    wanted = torch.tensor([style(caption) for caption in captions])
    return {
        f"style called as asked for, {name}": (features(pooled(base, p)) @ weights * wanted > 0).double().mean().item()
        for name, p in pixels.items()
    }


@torch.no_grad()
def held_out_losses(
    base: Base, objective: Objective, pixels: torch.Tensor, captions: Sequence[str], config
) -> dict[str, float]:
    """Return the objective's loss on pictures that were not learnt, by the base and with the LoRA."""
    settings = TrainConfig(data="none", model=config.model)
    objective.begin(base.unet, settings)
    latents = torch.stack([base.encode_picture(picture)[0] for picture in pixels])  # (n, channels, h, w)
    texts = torch.stack([base.encode_prompt(caption) for caption in captions])  # (n, tokens, width)
    without, with_lora = [], []
    for start in range(0, len(pixels), TOGETHER):
        positions = tuple(range(start, min(start + TOGETHER, len(pixels))))
        part = slice(start, start + TOGETHER)
        noise = torch.stack([draws.gaussian(settings.seed, "held-out noise", p, latents.shape[1:]) for p in positions])
        tensors = (tensor.to(base.device) for tensor in (latents[part], texts[part], noise))
        batch = Batch(positions, *tensors, noise_offset=None, timesteps=None)
        with torch.autocast(base.device.type, base.dtype, enabled=base.dtype != torch.float32):
            with_lora.append(objective.loss(base.unet, batch, base.schedule, settings))
            with lora_disabled(base.unet):
                without.append(objective.loss(base.unet, batch, base.schedule, settings))
    return {
        "consistency loss on held-out captions, base": torch.cat(without).mean().item(),
        "consistency loss on held-out captions, LCM-LoRA": torch.cat(with_lora).mean().item(),
    }
