"""The pictures that the bundled base learns from: drawings of named things in three styles, and photographs.

The drawings are vectors, so they are rendered at the needed size.  things.txt lists the ones that the U-Net learns to
draw, and their names; the VAE learns from all of them, and from the photographs.
"""

import io
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load, save

from minilora.data import draws
from minilora.data.pictures import open_picture
from minilora.files.tensors import write_whole

SIZE = 128  # pixels
SEED = 0
STYLES = ("noto", "twemoji", "openmoji")
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
THINGS = Path(__file__).parent / "things.txt"
# Uninformative pictures: flags, clocks, signs, and variants of people in other skin tones and genders.
LEFT_OUT = re.compile(
    r"flag|skin-tone|medium-|light-|dark-|keycap|^u[0-9a-f]|button|clock-|squared|ideograph|o-clock|thirty|arrow|input|"
    r"symbol|sign|zodiac|square$|circle$|letter|person-|woman-|man-|women-|men-|people-|family|couple|kiss-|hole$"
)
# The two that LoRA learns in the examples, and three that are not photographs.
PHOTOGRAPHS_LEFT_OUT = ("picosdeeuropa", "aitzgorri", "Fossa", "Infinite-Sea", "Painting-Colors")


@dataclass(frozen=True)
class Thing:
    """A thing that the base knows: the name of its drawing in the packages, and its everyday names."""

    icon: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Drawing:
    """One drawing: its pixels, (128, 128, 3) of bytes, its thing and its style."""

    pixels: np.ndarray
    thing: Thing
    style: str


def read_things(count: int | None = None) -> list[Thing]:
    """Return the first things of things.txt, the most common first; all if no count is given."""
    things = []
    for line in THINGS.read_text().splitlines()[:count]:
        icon, _, names = line.partition(": ")
        things.append(Thing(icon, tuple(names.split(", "))))
    return things


def render(svg: str) -> np.ndarray:
    """Return a vector drawing on white, (128, 128, 3) of bytes."""
    import resvg_py  # in the extra "base", which only building the base needs

    png = io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)))
    return np.asarray(open_picture(png).resize((SIZE, SIZE)))


def read_style(data: Path, style: str, work: Path) -> dict[str, np.ndarray]:
    """Return every drawing of a style by name; rendering them takes a minute, and the result is stored in `work`."""
    kept = work / f"{style}-{SIZE}.safetensors"
    if not kept.exists():
        content = json.loads((data / style / "icons.json").read_text())
        pictures = {}
        for name, icon in content["icons"].items():
            if LEFT_OUT.search(name) or icon.get("hidden"):
                continue
            left, top = (icon.get(side, 0) for side in ("left", "top"))
            width, height = (icon.get(side, content.get(side, 16)) for side in ("width", "height"))
            box = f'viewBox="{left} {top} {width} {height}"'
            pictures[name] = render(f"<svg {NAMESPACES} {box}>{icon['body']}</svg>")
        write_whole(kept, save(pictures))
    pictures = load(kept.read_bytes())  # in no fixed order
    return {name: pictures[name] for name in sorted(pictures)}


def is_held_out(icon: str) -> bool:
    """Whether a thing is held out from the VAE's training for measurements: one in forty, by its name."""
    return zlib.crc32(icon.encode()) % 40 == 0


def read_drawings(styles: dict[str, dict[str, np.ndarray]], things: Sequence[Thing]) -> list[Drawing]:
    """Return the drawings of the things in every style that has them."""
    return [
        Drawing(pictures[thing.icon], thing, style)
        for thing in things
        for style, pictures in styles.items()
        if thing.icon in pictures
    ]


def caption_at(drawing: Drawing, position: int) -> str:
    """Return the caption at a position: a name, sometimes with an article, often with the style; or "".

    A name without a style always means the first style.  If it meant any of the three, "dog" would draw a mixture.
    """
    random = draws.generator(SEED, "caption", position)
    chance, article, style = random.random(3)
    if chance < 0.1:
        return ""  # for classifier-free guidance
    name = drawing.thing.names[random.integers(len(drawing.thing.names))]
    if article < 0.15:
        name = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    return name if drawing.style == STYLES[0] and style < 0.4 else f"{name}, {drawing.style} style"


def read_photographs(data: Path) -> list[np.ndarray]:
    """Return the photographs that the VAE learns from, each in four sizes, (h, w, 3) of bytes."""
    paths = sorted((data / "lomiri" / "usr" / "share" / "backgrounds").glob("*.jpg"))
    sizes = []
    for path in paths:
        if not path.name.startswith(PHOTOGRAPHS_LEFT_OUT):
            picture = open_picture(path)
            for short in (144, 224, 352, 544):
                width, height = (round(side * short / min(picture.size)) for side in picture.size)
                sizes.append(np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS)))
    return sizes


def as_pixels(pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """Return pictures of bytes as float32 in [-1, 1], (n, 3, h, w)."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
