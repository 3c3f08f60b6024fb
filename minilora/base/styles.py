"""Write the example data sets: two styles and a subject, none of which the bundled base has ever seen.

    python -m minilora.base.styles --data base-data

writes dataset/fluent, 64 pictures of Fluent 3D (all others are left for measurements), and dataset/cyanotype, 48
drawings that the base knows in colour, printed in blue.  Both show things that the base can draw in its own styles, so
only the style is new.  It also writes dataset/robot, one subject: the robot of Fluent 3D twelve times, with other
places, sizes, angles and background colours, and with masks that show where it is.
"""

import colorsys
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from minilora.data import draws
from minilora.data.pictures import crop_square, open_picture
from minilora.data.sheet import write_captions

from .command_line import command_line, refuse_missing
from .pictures import SEED, SIZE, Thing, read_style, read_things

Named = tuple[Image.Image, tuple[str, ...]]  # a picture and the names of what it shows
LEARNT, SUBJECT, PRINTED = 64, 12, 48  # pictures in dataset/fluent, dataset/robot and dataset/cyanotype
INK, PAPER = (10, 42, 92), (236, 241, 238)  # Prussian blue; paper that is not quite white
TONES = 64  # steps between the two
HERE = Path(__file__).parent
PROMPTS = (HERE / "prompts.txt").read_text().splitlines()  # what the base is measured on, and in none of the styles
MIT = (HERE / "mit.txt").read_text()
LICENSES = {
    "fluent": f"""\
The pictures are from Microsoft's Fluent Emoji (3D), Copyright (c) Microsoft Corporation, MIT licence,
as packed by LobeHub in `@lobehub/fluent-emoji-3d` 1.1.0, placed on white and resized to 128 pixels.

{MIT}""",
    "robot": f"""\
The pictures show the robot of Microsoft's Fluent Emoji (3D), Copyright (c) Microsoft Corporation, MIT licence,
as packed by LobeHub in `@lobehub/fluent-emoji-3d` 1.1.0, resized, rotated, mirrored and placed on plain colours.

{MIT}""",
    "cyanotype": """\
The pictures are from Noto Emoji, Copyright Google LLC, Apache-2.0, http://www.apache.org/licenses/LICENSE-2.0, as
packed in `@iconify-json/noto` 1.2.9. Changes: placed on white, brightness printed in one blue ink.
""",
}


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


def split(named: Sequence[Named]) -> tuple[list[Named], list[Named]]:
    """Return the pictures for a LoRA's style, and all others, which include those with a name in PROMPTS."""
    free = [pair for pair in named if not set(pair[1]) & set(PROMPTS)]
    order = draws.generator(SEED, "fluent", 0).permutation(len(free))
    learnt = [free[i] for i in sorted(order[:LEARNT])]
    names = {names for _, names in learnt}
    return learnt, [pair for pair in named if pair[1] not in names]


def print_in_blue(picture: Image.Image) -> Image.Image:
    """Return a picture whose brightness is printed in blue ink, as on a cyanotype."""
    tone = (np.asarray(picture.convert("L"), dtype=np.float32) / 255) ** 1.6  # (h, w), 1 is white; printed dark
    result = Image.fromarray((tone * (TONES - 1)).round().astype(np.uint8), "P")
    result.putpalette(np.linspace(INK, PAPER, TONES).round().astype(np.uint8).tobytes())
    return result


def subject_pictures(path: Path) -> list[tuple[Image.Image, Image.Image]]:
    """Return one drawing on twelve plain colours, in different places and sizes, rotated and mirrored; with masks."""
    with Image.open(path) as file:
        drawing = file.convert("RGBA")
    pictures = []
    for number in range(SUBJECT):
        random = draws.generator(SEED, "subject", number)
        side = int(random.integers(round(SIZE * 0.6), round(SIZE * 0.95)))
        shown = drawing.resize((side, side), Image.Resampling.LANCZOS)
        shown = ImageOps.mirror(shown) if number % 2 else shown
        shown = shown.rotate(float(random.uniform(-12, 12)), Image.Resampling.BICUBIC)
        colour = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(number / SUBJECT, 0.35, 0.95))
        picture = Image.new("RGB", (SIZE, SIZE), colour)
        left, top = (int(n) for n in random.integers(0, SIZE - side + 1, 2))
        picture.paste(shown, (left, top), shown)
        mask = Image.new("L", (SIZE, SIZE))
        mask.paste(shown.getchannel("A"), (left, top))
        pictures.append((picture, mask.convert("1", dither=Image.Dither.NONE)))
    return pictures


def known_things() -> list[Thing]:
    """Return the things that the data sets and the figures show; the bundled base has learnt them, and others since."""
    return read_things(240)


def by_file(named: Sequence[Named]) -> dict[str, Named]:
    """Return pictures in the order of their names, by file names made from the first of these."""
    in_order = sorted(named, key=lambda pair: pair[1])
    return {names[0].replace(" ", "_") + ".png": (picture, names) for picture, names in in_order}


def write(folder: Path, pictures: Mapping[str, Named]) -> None:
    """Write a dataset folder: pictures by file name, metadata.jsonl and LICENSE.md; former pictures are deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.png"):
        path.unlink()
    for file_name, (picture, _) in pictures.items():
        picture.save(folder / file_name, optimize=True)
    write_captions(folder, list(pictures), [names for _, names in pictures.values()])
    (folder / "LICENSE.md").write_text(LICENSES[folder.name])
    print(f"wrote {len(pictures)} pictures to {folder}")


def main() -> None:
    folders = {
        "work": (Path(".cache/base"), "folder of the rendered drawings"),
        "output": (Path("dataset"), "folder to write them into"),
    }
    args = command_line("styles", __doc__.splitlines()[0], folders).parse_args()
    refuse_missing(args.data, "fluent-emoji-3d/assets")
    things = known_things()
    write(args.output / "fluent", by_file(split(fluent_pictures(args.data, things))[0]))
    pairs = subject_pictures(fluent_files(args.data)["robot"])
    robots = {f"robot_{number:02d}": pair for number, pair in enumerate(pairs, start=1)}
    write(args.output / "robot", {f"{name}.png": (robot, ("sks robot",)) for name, (robot, _) in robots.items()})
    for name, (_, mask) in robots.items():
        mask.save(args.output / "robot" / f"{name}.mask.png", optimize=True)
    drawn = read_style(args.data, "noto", args.work)
    free = [thing for thing in things if not set(thing.names) & set(PROMPTS)]
    order = draws.generator(SEED, "cyanotype", 1).permutation(len(free))[:PRINTED]
    prints = [(print_in_blue(Image.fromarray(drawn[free[i].icon])), free[i].names) for i in order]
    write(args.output / "cyanotype", by_file(prints))


if __name__ == "__main__":
    main()
