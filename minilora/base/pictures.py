"""The pictures that the bundled base learns from: drawings of named things in three styles, and photographs.

The drawings are vectors, so they are rendered at the needed size.  things.txt lists the ones that the U-Net learns to
draw, and their names; the VAE learns from all of them, and from the photographs.
"""

import io
import json
import re
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load, save

from minilora.data import draws
from minilora.data.pictures import crop_square, open_picture
from minilora.files.tensors import write_whole

SIZE = 128  # pixels
SEED = 0
STYLES = ("noto", "twemoji", "openmoji")
_PROMPTS = """apple, banana, strawberry, lemon, watermelon, tomato, carrot, pizza, hamburger, ice cream,
doughnut, birthday cake, dog, cat, rabbit, bear, pig, frog, penguin, octopus, butterfly, bee, tulip,
sunflower, cactus, mushroom, evergreen tree, house, car, bus, bicycle, rocket, airplane, sailboat,
umbrella, rainbow, snowman, star, key, balloon, book, pencil, guitar, soccer ball, trophy, crown,
heart, ghost, smile, mountain"""  # for the contact sheet; no style data set contains them
PROMPTS = [prompt.strip() for prompt in _PROMPTS.replace("\n", " ").split(",")]
THINGS = Path(__file__).parent / "things.txt"
DATA_HELP = """\
The build reads these packages, unpacked side by side in --data:
  noto              npm pack @iconify-json/noto@1.2.9            Noto Emoji, Apache-2.0
  twemoji           npm pack @iconify-json/twemoji@1.2.5         Twemoji, CC-BY-4.0
  openmoji          npm pack @iconify-json/openmoji@1.2.29       OpenMoji, CC-BY-SA-4.0
  fluent-emoji-3d   npm pack @lobehub/fluent-emoji-3d@1.1.0      Fluent 3D, MIT (to measure only)
  lomiri            apt-get download lomiri-wallpapers-16.04 lomiri-wallpapers-20.04    photographs, CC
for example
  mkdir noto && tar xzf iconify-json-noto-1.2.9.tgz -C noto --strip-components=1
  dpkg-deb -x lomiri-wallpapers-16.04*.deb lomiri && dpkg-deb -x lomiri-wallpapers-20.04*.deb lomiri
and it needs the extra "base": pip install -e ".[base]\""""
# Uninformative pictures: flags, clocks, signs, and variants of people in other skin tones and genders.
LEFT_OUT = re.compile(
    r"flag|skin-tone|medium-|light-|dark-|keycap|^u[0-9a-f]|button|clock-|squared|ideograph|o-clock|thirty|arrow|input|"
    r"symbol|sign|zodiac|square$|circle$|letter|person-|woman-|man-|women-|men-|people-|family|couple|kiss-|hole$"
)
# The two that LoRA learns in the examples, and three that are not photographs.
PHOTOGRAPHS_LEFT_OUT = ("picosdeeuropa", "aitzgorri", "Fossa", "Infinite-Sea", "Painting-Colors")


def refuse_missing(data: Path, *more: str) -> None:
    """End the program, with what to download, if a data folder lacks the drawings or `more`."""
    needed = [*(f"{style}/icons.json" for style in STYLES), *more]
    if missing := [name for name in needed if not (data / name).exists()]:
        print(f"error: {data} lacks {', '.join(missing)}\n\n{DATA_HELP}", file=sys.stderr)
        sys.exit(2)


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

    def caption(self) -> str:
        return f"{self.thing.names[0]}, {self.style} style"


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

    file = io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)))
    picture = Image.open(file).convert("RGBA").resize((SIZE, SIZE))
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))


def read_style(data: Path, style: str, work: Path) -> dict[str, np.ndarray]:
    """Return every drawing of a style by name; rendering them takes a minute, and the result is stored in `work`."""
    kept = work / f"{style}-{SIZE}.safetensors"
    if not kept.exists():
        content = json.loads((data / style / "icons.json").read_text())
        pictures = {}
        for name, icon in content["icons"].items():
            if LEFT_OUT.search(name) or icon.get("hidden"):
                continue
            corner = (icon.get("left", 0), icon.get("top", 0))
            width, height = (icon.get(side, content.get(side, 16)) for side in ("width", "height"))
            box = " ".join(map(str, (*corner, width, height)))
            spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            pictures[name] = render(f'<svg {spaces} viewBox="{box}">{icon["body"]}</svg>')
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


Named = tuple[Image.Image, tuple[str, ...]]  # a picture and the names of what it shows
LEARNT, PRINTED = 64, 48  # pictures in dataset/fluent and in dataset/cyanotype


def fluent_files(data: Path) -> dict[str, Path]:
    """Return the files of Fluent 3D's pictures, by the names in things.txt."""
    files = {path.stem.replace("-fe0f", ""): path for path in (data / "fluent-emoji-3d" / "assets").glob("*.webp")}
    names = json.loads((data / "noto" / "chars.json").read_text())  # by code point
    return {icon: files[plain] for code, icon in names.items() if (plain := code.replace("-fe0f", "")) in files}


def fluent_pictures(data: Path, things: Sequence[Thing]) -> list[Named]:
    """Return Fluent 3D's pictures of things, on white, 128 × 128 pixels."""
    files = fluent_files(data)
    named = [(files[thing.icon], thing.names) for thing in things if thing.icon in files]
    return [(crop_square(open_picture(path), SIZE), names) for path, names in named]


def split(named: Sequence[Named], shown: Sequence[str]) -> tuple[list[Named], list[Named]]:
    """Return the pictures for a LoRA's style, and all others, which include those with a name in `shown`."""
    free = [pair for pair in named if not set(pair[1]) & set(shown)]
    order = draws.generator(SEED, "fluent", 0).permutation(len(free))
    learnt = [free[i] for i in sorted(order[:LEARNT])]
    names = {names for _, names in learnt}
    return learnt, [pair for pair in named if pair[1] not in names]
