"""The styles that LoRA is shown to learn, neither of which the bundled base has ever seen.

    python -m minilora.base.styles --data base-data

writes dataset/fluent, 64 pictures of Fluent 3D (all the others stay out, to measure with), and
dataset/cyanotype, 48 pictures that the base knows in colour, printed in blue: a style and nothing else.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from minilora.sampling import write_captions

from .pictures import Named, fluent_pictures, noto_pictures

INK, PAPER = (10, 42, 92), (236, 241, 238)  # Prussian blue; paper that is not quite white
TONES = 64  # steps between the two
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
as packed by LobeHub in `@lobehub/fluent-emoji-3d` 1.1.0, and resized to 128 pixels.  Captions are the names in
`emoji-datasource` 16.0.0, Copyright (c) 2013 Cal Henderson, MIT licence.

{MIT}""",
    "cyanotype": f"""\
The pictures are from Noto Emoji, Copyright Google LLC, Apache-2.0, http://www.apache.org/licenses/LICENSE-2.0, as
packed in `emoji-datasource-google` 16.0.0.  They were changed: put on white, their brightness printed in one blue ink.
Captions are the names in `emoji-datasource` 16.0.0, Copyright (c) 2013 Cal Henderson, MIT licence:

{MIT}""",
}


def shrink(picture: Image.Image) -> Image.Image:
    return picture.resize((128, 128), Image.Resampling.LANCZOS)


def print_in_blue(picture: Image.Image) -> Image.Image:
    """Return a picture whose brightness is printed in blue ink, as on a cyanotype."""
    on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("L")
    tone = (np.asarray(on_white, dtype=np.float32) / 255) ** 1.6  # (h, w), 1 is white; printed dark
    result = Image.fromarray((tone * (TONES - 1)).round().astype(np.uint8), "P")
    result.putpalette(np.linspace(INK, PAPER, TONES).round().astype(np.uint8).tobytes())
    return result


def write(folder: Path, named: Sequence[Named], change: Callable[[Image.Image], Image.Image]) -> None:
    """Write a dataset folder: the pictures, changed, with metadata.jsonl and LICENSE.md."""
    folder.mkdir(parents=True, exist_ok=True)
    named = sorted(named, key=lambda pair: pair[1])
    files = [names[0].replace(" ", "_") + ".png" for _, names in named]
    for (path, _), file_name in zip(named, files, strict=True):
        with Image.open(path) as picture:
            change(picture.convert("RGBA")).save(folder / file_name, optimize=True)
    write_captions(folder, files, [names for _, names in named])
    (folder / "LICENSE.md").write_text(LICENSES[folder.name])
    print(f"wrote {len(files)} pictures to {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m minilora.base.styles", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("base-data"), help="folder of the unpacked data packages")
    parser.add_argument("--output", type=Path, default=Path("dataset"), help="folder to write them into")
    args = parser.parse_args()
    write(args.output / "fluent", fluent_pictures(args.data)[0], shrink)
    write(args.output / "cyanotype", noto_pictures(args.data), print_in_blue)


if __name__ == "__main__":
    main()
