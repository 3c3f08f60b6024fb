"""Write the example data sets: two styles and a subject, none of which the bundled base has ever seen.

    python -m minilora.base.styles --data base-data

writes dataset/fluent, 64 pictures of Fluent 3D (all others are left for measurements), and dataset/cyanotype, 48
drawings that the base knows in colour, printed in blue.  Both show things that the base can draw in its own styles, so
only the style is new.  It also writes dataset/robot, one subject: the robot of Fluent 3D twelve times, with other
places, sizes, angles and background colours, and with masks that show where it is.
"""

import argparse
import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from minilora.data import draws
from minilora.data.sheet import write_captions
from minilora.settings.setting import BUNDLED

from .pictures import (
    PRINTED,
    PROMPTS,
    SEED,
    SIZE,
    Named,
    fluent_files,
    fluent_pictures,
    read_style,
    read_things,
    refuse_missing,
    split,
)

INK, PAPER = (10, 42, 92), (236, 241, 238)  # Prussian blue; paper that is not quite white
TONES = 64  # steps between the two
SUBJECT = 12  # pictures of the robot
MIT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute, sublicense,
and/or sell copies of the Software, and to permit persons to whom the Software is furnished to do so,
subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT
LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN
NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY,
WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE
SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
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


def known_things() -> list:
    """Return the things that the bundled base has learnt, according to its captions.txt."""
    known = set((BUNDLED / "captions.txt").read_text().splitlines())
    return [thing for thing in read_things() if thing.names[0] in known]


def write(folder: Path, named: Sequence[Named], files: Sequence[str] = ()) -> None:
    """Write a dataset folder: pictures, metadata.jsonl and LICENSE.md; former pictures are deleted.

    Without `files`, the pictures' files are named after what they show.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.png"):
        path.unlink()
    named = list(named) if files else sorted(named, key=lambda pair: pair[1])
    files = files or [names[0].replace(" ", "_") + ".png" for _, names in named]
    for (picture, _), file_name in zip(named, files, strict=True):
        picture.save(folder / file_name, optimize=True)
    write_captions(folder, files, [names for _, names in named])
    (folder / "LICENSE.md").write_text(LICENSES[folder.name])
    print(f"wrote {len(files)} pictures to {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m minilora.base.styles", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", default=Path("base-data"), help="folder of the unpacked data packages"
    )
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", default=Path(".cache/base"), help="folder of the rendered drawings"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", default=Path("dataset"), help="folder to write them into"
    )
    args = parser.parse_args()
    refuse_missing(args.data, "fluent-emoji-3d/assets")
    write(args.output / "fluent", split(fluent_pictures(args.data, known_things()), PROMPTS)[0])
    robots = subject_pictures(fluent_files(args.data)["robot"])
    files = [f"robot_{number:02d}.png" for number in range(1, SUBJECT + 1)]
    write(args.output / "robot", [(robot, ("sks robot",)) for robot, _ in robots], files)
    for (_, mask), file in zip(robots, files, strict=True):
        mask.save(args.output / "robot" / file.replace(".png", ".mask.png"), optimize=True)
    drawn = read_style(args.data, "noto", args.work)
    free = [thing for thing in known_things() if not set(thing.names) & set(PROMPTS)]
    order = draws.generator(SEED, "cyanotype", 1).permutation(len(free))[:PRINTED]
    write(
        args.output / "cyanotype",
        [(print_in_blue(Image.fromarray(drawn[t.icon])), t.names) for t in (free[i] for i in order)],
    )


if __name__ == "__main__":
    main()
