"""Measure the bundled base, and what LoRA does on it; write the model card.

    python -m minilora.base.measure --data base-data

It measures:

- reconstruction: the PSNR of the VAE on pictures that it was not trained on;
- prompts: 200 names are drawn in each style: how often the nearest training picture has that name and that style;
- one photograph: how close a LoRA, trained on dataset/mountain with train.py's defaults, comes to it;
- a style: how often a classifier finds the style in pictures drawn with a LoRA of dataset/fluent, and how often the
  picture still shows the thing in its prompt.

A contact sheet shows fifty everyday prompts, with four seeds each.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from minilora.apps.classifier import share_right, train_classifier
from minilora.apps.likeness import pixels_of, psnr, through_vae
from minilora.data.pictures import crop_square, open_picture
from minilora.data.sheet import sheet
from minilora.files.network import load_lora
from minilora.files.tensors import write_whole
from minilora.lora import remove_lora
from minilora.models.base import Base
from minilora.models.device import CPU
from minilora.sampling import draw, draw_each, merged_at
from minilora.settings.sample import SampleConfig
from minilora.settings.setting import BUNDLED
from minilora.settings.train import TrainConfig
from minilora.training import train

from .command_line import command_line, refuse_missing
from .pictures import SEED, SIZE, STYLES, Drawing, as_pixels, is_held_out, read_drawings, read_style
from .styles import PROMPTS, Named, fluent_pictures, known_things, split

ASKED = 200  # names to draw in each style
DRAWING = SampleConfig(prompt=tuple(PROMPTS))  # steps and guidance are those of sample.py
SHEET = "contact_sheet.jpg"

Note = Callable[[str, str], None]  # records a figure: its name and its value


def photograph(path: Path) -> torch.Tensor:
    return pixels_of([crop_square(open_picture(path), SIZE)])  # (1, 3, 128, 128)


def measure_vae(base: Base, styles: dict, fluent: list[Named], photographs: list[Path], note: Note) -> None:
    held_out = [pixels for drawn in styles.values() for icon, pixels in drawn.items() if is_held_out(icon)]
    kinds = {f"{len(held_out)} held-out drawings": as_pixels(held_out)}
    kinds[f"{len(fluent)} Fluent pictures"] = pixels_of([picture for picture, _ in fluent])
    kinds |= {path.stem: photograph(path) for path in photographs}
    for name, pixels in kinds.items():
        note(f"VAE reconstruction, {name}", f"{psnr(through_vae(base, pixels), pixels):.1f} dB")


class Nearest:
    """Finds a picture's nearest training picture, both decoded by the VAE, at a quarter of the pixels."""

    def __init__(self, base: Base, drawings: list[Drawing]):
        self.drawings = drawings
        self.known = self.small(through_vae(base, as_pixels([drawing.pixels for drawing in drawings])))

    @staticmethod
    def small(pixels: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(pixels, 2).flatten(1)  # (n, 3 · 64 · 64)

    def __call__(self, pictures: Sequence[Image.Image]) -> list[Drawing]:
        nearest = torch.cdist(self.small(pixels_of(pictures)), self.known).argmin(1)
        return [self.drawings[i] for i in nearest.tolist()]


def measure_drawing(base: Base, drawings: list[Drawing], nearest: Nearest, note: Note) -> None:
    """Draw names in each style, and record how often the nearest training picture has that name and style."""
    shown = np.linspace(0, len(drawings) // len(STYLES) - 1, min(ASKED, len(drawings) // len(STYLES))).astype(int)
    chosen = [drawing for i in shown for drawing in drawings[i * len(STYLES) : (i + 1) * len(STYLES)]]
    right = {"name": 0, "style": 0}
    for drawing in chosen:
        caption = f"{drawing.thing.names[0]}, {drawing.style} style"
        for found in nearest(draw(base, caption, (0, 1), SIZE, DRAWING)):
            right["name"] += found.thing == drawing.thing
            right["style"] += found.style == drawing.style
    for what, count in right.items():
        name = f"draws the {what} that was asked for, {len(shown)} names × {len(STYLES)} styles × 2 seeds"
        note(name, f"{count / (2 * len(chosen)):.1%}")


def draw_contact_sheet(base: Base) -> None:
    rows = draw_each(base, PROMPTS, range(4), SIZE, DRAWING)
    half = len(PROMPTS) // 2
    pairs = [left + right for left, right in zip(rows[:half], rows[half:], strict=True)]
    labels = [f"{left} | {right}" for left, right in zip(PROMPTS[:half], PROMPTS[half:], strict=True)]
    contact = sheet(pairs, [f"seed {seed}" for seed in (*range(4), *range(4))], labels)
    contact.save(BUNDLED / SHEET, quality=88)


def measure_photograph(base: Base, path: Path, work: Path, note: Note) -> None:
    """Train a LoRA on one photograph, with the defaults, and record how close its pictures come to it."""
    started = time.time()
    lora = train(TrainConfig(data=(str(path.parent),), output=str(work / "mountain")))
    note("time to train a LoRA on dataset/mountain by train.py's defaults", f"{time.time() - started:.0f} s")
    load_lora(base.unet, lora)
    wanted = through_vae(base, photograph(path))
    with merged_at(base, {"default": 1.0}):
        drawn = pixels_of(draw(base, "mountain", range(3), SIZE, DRAWING))
    note(
        "mountain at strength 1, mean of 3 seeds, to the photograph as the VAE gives it",
        f"{psnr(drawn, wanted):.1f} dB",
    )
    remove_lora(base.unet)


def measure_style(
    base: Base, drawings: list[Drawing], fluent: list[Named], nearest: Nearest, folder: Path, work: Path, note: Note
) -> None:
    """Train a LoRA on dataset/fluent, with the defaults; record what a classifier says about things not in it."""
    lora = train(TrainConfig(data=(str(folder),), output=str(work / "fluent")))
    load_lora(base.unet, lora)
    # Decoded by the VAE like drawn pictures, so that the classifier cannot tell them apart by the VAE's blur.
    pictures = as_pixels([drawing.pixels for drawing in drawings])
    pixels = through_vae(base, torch.cat([pictures, pixels_of([picture for picture, _ in fluent])]))
    kinds = torch.tensor([STYLES.index(d.style) for d in drawings] + [len(STYLES)] * len(fluent))
    test = torch.arange(len(kinds)) % 5 == 0
    classifier = train_classifier(pixels[~test], kinds[~test], SEED)
    note(
        f"style classifier, right on {int(test.sum())} held-out pictures",
        f"{share_right(classifier, pixels[test], kinds[test]):.1%}",
    )
    for strength in (0.0, 0.5, 1.0):
        with merged_at(base, {"default": strength}):
            drawn = [p for row in draw_each(base, PROMPTS, range(2), SIZE, DRAWING) for p in row]
        share = share_right(classifier, pixels_of(drawn), torch.full((len(drawn),), len(STYLES)))
        what = f"{len(drawn)} pictures of {len(PROMPTS)} prompts not learnt, LoRA at {strength:g}"
        note(f"called Fluent, {what}", f"{share:.1%}")
        asked = [prompt for prompt in PROMPTS for _ in range(2)]
        same = sum(name in found.thing.names for name, found in zip(asked, nearest(drawn), strict=True))
        note(f"the nearest picture the base knows is of that thing, {what}", f"{same / len(drawn):.1%}")
    remove_lora(base.unet)


def main() -> None:
    folders = {
        "dataset": (Path("dataset"), "folder of the example datasets"),
        "work": (Path(".cache/base"), "folder of drawings and of the LoRAs"),
    }
    args = command_line("measure", __doc__.splitlines()[0], folders).parse_args()
    refuse_missing(args.data, "fluent-emoji-3d/assets")
    figures: list[str] = []

    def note(name: str, value: str) -> None:
        figures.append(f"| {name} | {value} |\n")
        print(f"{name}: {value}", flush=True)

    base = Base(None, CPU)
    styles = {style: read_style(args.data, style, args.work) for style in STYLES}
    things = known_things()
    drawings, fluent = read_drawings(styles, things), fluent_pictures(args.data, things)
    photographs = sorted(args.dataset.glob("mountain*/*.jpg"))
    measure_vae(base, styles, fluent, photographs, note)
    draw_contact_sheet(base)
    nearest = Nearest(base, drawings)
    measure_drawing(base, drawings, nearest, note)
    measure_photograph(base, args.dataset / "mountain" / "mountain.jpg", args.work, note)
    measure_style(base, drawings, split(fluent)[1], nearest, args.dataset / "fluent", args.work, note)

    before, rest = (BUNDLED / "README.md").read_text().split("<!-- figures -->")
    after = rest.split("<!-- end of figures -->")[1]
    card = f"{before}<!-- figures -->\n| | |\n|---|---|\n{''.join(figures)}<!-- end of figures -->{after}"
    write_whole(BUNDLED / "README.md", card.encode())
    print(f"wrote the figures into {BUNDLED / 'README.md'}")


if __name__ == "__main__":
    main()
