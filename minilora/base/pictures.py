"""The pictures that the bundled base is trained on, and those that it is measured with."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from minilora import draws
from minilora.pictures import open_picture

SIZE = 64  # pixels
SEED = 0
STYLES = {"noto": "google", "twemoji": "twitter"}  # the name in a caption, and in the package
LEARNT, PRINTED = 64, 48  # pictures in dataset/fluent and in dataset/cyanotype
DATA_HELP = """\
The build reads four packages, unpacked side by side in --data:
  emoji-datasource-google    npm pack emoji-datasource-google@16.0.0     Noto, Apache-2.0
  emoji-datasource-twitter   npm pack emoji-datasource-twitter@16.0.0    Twemoji, CC-BY-4.0
  fluent-emoji-3d            npm pack @lobehub/fluent-emoji-3d@1.1.0     Fluent 3D, MIT (to measure only)
  lomiri                     apt-get download lomiri-wallpapers-16.04    photographs, CC-BY(-SA)-4.0 or CC0
for example
  mkdir emoji-datasource-google
  tar xzf emoji-datasource-google-16.0.0.tgz -C emoji-datasource-google --strip-components=1
  dpkg-deb -x lomiri-wallpapers-16.04*.deb lomiri"""
# Left out: flags and symbols (letters, arrows, signs), and the photographs that LoRA is shown to learn.
CATEGORIES_LEFT_OUT = ("Flags", "Symbols", "Component")
PHOTOGRAPHS_LEFT_OUT = ("picosdeeuropa", "aitzgorri")


@dataclass(frozen=True)
class Drawing:
    """One drawn picture: where it is, what it shows (one or more names) and in which style."""

    path: Path
    names: tuple[str, ...]
    style: str
    held_out: bool  # kept for measuring: the thing is then known from the other style only


def read_things(data: Path) -> list[tuple[str, tuple[str, ...], str]]:
    """Return (file stem, names, category) of every thing that both drawn styles have."""
    things = []
    for row in json.loads((data / "emoji-datasource-google" / "emoji.json").read_text()):
        left_out = row["category"] in CATEGORIES_LEFT_OUT
        gendered = re.search("-200D-264[02]", row["unified"])  # "woman running" beside "running"
        if left_out or gendered or not (row["has_img_google"] and row["has_img_twitter"]):
            continue
        names = [re.sub("[_-]", " ", n).lower() for n in (*row["short_names"], row["name"])]
        names = tuple(dict.fromkeys(n for n in names if re.search("[a-z]", n)))
        if names:
            things.append((row["image"].removesuffix(".png"), names, row["category"]))
    return things


def read_drawings(data: Path) -> list[Drawing]:
    """Return the drawn pictures of both styles; of one thing in twenty, one style is held out."""
    drawings = []
    for number, (stem, names, _) in enumerate(read_things(data)):
        for which, (style, package) in enumerate(STYLES.items()):
            path = data / f"emoji-datasource-{package}" / "img" / package / str(SIZE) / f"{stem}.png"
            held_out = number % 20 == 0 and number // 20 % 2 == which
            drawings.append(Drawing(path, names, style, held_out))
    return drawings


def read_photographs(data: Path) -> list[Image.Image]:
    """Return the photographs that the VAE learns from, 512 pixels on the short side."""
    folder = data / "lomiri" / "usr" / "share" / "backgrounds"
    paths = sorted(p for p in folder.glob("*.jpg") if not p.name.startswith(PHOTOGRAPHS_LEFT_OUT))
    pictures = [open_picture(path) for path in paths]
    scales = [512 / min(picture.size) for picture in pictures]
    return [p.resize([round(n * s) for n in p.size], Image.LANCZOS) for p, s in zip(pictures, scales, strict=True)]


def caption_at(drawing: Drawing, position: int) -> str:
    """Return the caption of one draw: a name, often with the style, one time in ten nothing."""
    chance = draws.uniform(SEED, "caption", position)
    name = drawing.names[draws.integer(SEED, "name", position, 0, len(drawing.names))]
    if chance < 0.1:
        return ""  # what classifier-free guidance compares with
    return name if chance < 0.5 else f"{name}, {drawing.style} style"


Named = tuple[Path, tuple[str, ...]]  # a file and the names of what it shows


def fluent_pictures(data: Path) -> tuple[list[Named], list[Named]]:
    """Return the pictures of Fluent 3D that LoRA learns from, and all the others, to measure with."""
    files = {path.stem.replace("-fe0f", ""): path for path in (data / "fluent-emoji-3d" / "assets").glob("*.webp")}
    pictures = []
    for stem, names, _ in read_things(data):
        if path := files.get(stem.replace("-fe0f", "")):
            pictures.append((path, names))
    order = draws.generator(SEED, "fluent", 0).permutation(len(pictures))
    mixed = [pictures[i] for i in np.asarray(order)]
    return mixed[:LEARNT], mixed[LEARNT:]


def noto_pictures(data: Path) -> list[Named]:
    """Return the Noto pictures that dataset/cyanotype is made of, a sample of those the base has learnt from."""
    known = [drawing for drawing in read_drawings(data) if drawing.style == "noto" and not drawing.held_out]
    order = draws.generator(SEED, "cyanotype", 1).permutation(len(known))
    return [(known[i].path, known[i].names) for i in np.asarray(order)[:PRINTED]]
