"""Measure drawing in few steps: held-out captions in many steps, in few, and in few with an LCM-LoRA.

Pictures are compared with those of many steps in two ways:

1. One by one, with the same seed.  (LCMScheduler adds new noise between its steps, so its picture is another one.)
2. As distributions, with other seeds.  The features of a picture are the mean and standard deviation of each channel of
   the VAE's encoder (likeness.py).  For each feature, the Wasserstein distance is how far the values of one set must
   move on average to become those of the other; the figure is its mean over the features, in standard deviations.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ..data.pictures import open_picture
from ..data.sheet import sheet
from ..models.base import Base
from ..sampling import draw, merged_at, use_scheduler
from ..settings.sample import SampleConfig
from .classifier import share_right, train_classifier
from .drawing import STYLES
from .likeness import TOGETHER, apart, encoder_features, pixels_of, pooled, psnr

MANY, FEW = 50, (4, 2, 1)  # steps
SEEDS = (0, 1)
SHOWN = 6  # captions on the sheet
# The sheet's rows below that of many steps: base and LoRA at equal passes of the U-Net; guidance needs two per step.
ROWS = {
    "4 passes, base": "base, 2 steps",
    "4 passes, LoRA": "LCM-LoRA, 4 steps",
    "2 passes, base": "base, 1 step",
    "2 passes, LoRA": "LCM-LoRA, 2 steps",
    "1 pass, base": "base, 1 step as with the LoRA",
    "1 pass, LoRA": "LCM-LoRA, 1 step",
}


def few_steps(base: Base, captions: Sequence[str], learnt: Path, config) -> tuple[dict[str, float], Image.Image]:
    """Draw captions in many steps, in few, and in few with the LoRA; return the figures and a sheet.

    `learnt` is the folder of the LoRA's training pictures; a classifier learns the styles from them.
    """
    many, middle = f"base, {MANY} steps", config.middle_guidance
    ways = {many: ("ddim", MANY, middle, 0.0)}  # scheduler, steps, guidance, strength of the LoRA
    for steps in FEW:
        so_many = f"{steps} steps" if steps > 1 else "1 step"
        ways[f"base, {so_many}"] = ("ddim", steps, middle, 0.0)
        ways[f"base, {so_many} as with the LoRA"] = ("lcm", steps, 1.0, 0.0)
        ways[f"LCM-LoRA, {so_many}"] = ("lcm", steps, 1.0, 1.0)
    drawn, times = {}, {}
    for name, (scheduler, steps, guidance, strength) in ways.items():
        use_scheduler(base, scheduler)
        how = SampleConfig(prompt=tuple(captions), steps=steps, guidance=guidance)
        with merged_at(base, {"default": strength}):
            draw(base, captions[0], SEEDS, base.resolution, how)  # the first time is slower
            started = time.perf_counter()
            drawn[name] = [draw(base, caption, SEEDS, base.resolution, how) for caption in captions]
            times[name] = (time.perf_counter() - started) / (len(captions) * len(SEEDS))
    pixels = {name: pixels_of([picture for row in rows for picture in row]) for name, rows in drawn.items()}
    each = [caption for caption in captions for _ in SEEDS]
    figures = {f"seconds per picture; {name}": value for name, value in times.items()}
    figures |= compared(base, pixels, many) | called_right(pixels, each, learnt)
    shown = {f"{MANY} steps": many} | ROWS
    rows = [[pictures[0] for pictures in drawn[name][:SHOWN]] for name in shown.values()]
    return figures, sheet(rows, captions[:SHOWN], list(shown))


@torch.no_grad()
def compared(base: Base, pixels: dict[str, torch.Tensor], many: str) -> dict[str, float]:
    """Return the distances of pictures to those of many steps, one by one and as distributions."""
    far: dict[str, list[torch.Tensor]] = {name: [] for name in pixels}
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in pixels}
    for start in range(0, len(pixels[many]), TOGETHER):  # the features of all would need too much memory
        part = slice(start, start + TOGETHER)
        wanted = encoder_features(base, pixels[many][part])
        for name, pictures in pixels.items():
            features = wanted if name == many else encoder_features(base, pictures[part])
            far[name].append(apart(features, wanted))
            seen[name].append(pooled(features))
    figures = {}
    for name in [name for name in pixels if name != many]:
        figures[f"PSNR to the same seed at {MANY} steps, dB; {name}"] = psnr(pixels[name], pixels[many])
        figures[f"perceptual distance to the same seed at {MANY} steps; {name}"] = torch.cat(far[name]).mean().item()
    for name, rows in seen.items():
        what = f"distance of distributions to {MANY} steps with another seed; {name}"
        figures[what] = crossed(torch.cat(rows), torch.cat(seen[many]))  # of (n, width) each
    return figures


def crossed(features: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the mean distance of the pictures of each seed to those of the next seed in `wanted`.

    Both are (captions · seeds, width), ordered by caption, then by seed.
    """
    n = len(SEEDS)
    return sum(wasserstein(features[seed::n], wanted[(seed + 1) % n :: n], wanted) for seed in range(n)) / n


def wasserstein(one: torch.Tensor, other: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the Wasserstein distance of two sets, (n, width), as a mean over the features.

    Each feature is divided by its standard deviation in `reference`.  The distance between two sets of n numbers is the
    mean distance between their sorted values.
    """
    moved = (one.sort(dim=0).values - other.sort(dim=0).values).abs().mean(0)
    return (moved / reference.std(0)).mean().item()


def called_right(pixels: dict[str, torch.Tensor], captions: Sequence[str], learnt: Path) -> dict[str, float]:
    """Return how often a classifier recognizes the style of a picture's caption.

    It is trained on the training pictures that the base drew in its styles.
    """
    about = learnt / "metadata.jsonl"
    rows = [json.loads(line) for line in about.read_text().splitlines()] if about.exists() else []
    styled = [row for row in rows if str(row.get("text")).endswith(STYLES[1:])]
    if not styled:
        return {}  # another base, or the pictures are from --data

    def kinds(captions: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[caption.endswith(style) for style in STYLES[1:]].index(True) for caption in captions])

    seen = pixels_of([open_picture(learnt / row["file_name"]) for row in styled])
    classifier = train_classifier(seen, kinds([row["text"] for row in styled]))
    wanted = kinds(captions)
    return {f"style called as asked for; {name}": share_right(classifier, p, wanted) for name, p in pixels.items()}
