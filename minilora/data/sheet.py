"""Pictures as files: sheets of several pictures, the settings inside a file, and captions beside it."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from ..files.tensors import write_whole
from ..settings.errors import UserError

SETTINGS = "minilora"  # the key in a picture's file for the settings that it was drawn with
DRAWN_BY = "drawn by"  # the key in a picture's file for its prompt and base


def sheet(rows: list[list[Image.Image]], columns: Sequence[str], labels: Sequence[str]) -> Image.Image:
    """Put pictures on one labelled sheet: `columns` above, `labels` to the left.

    Small pictures are enlarged by a whole factor, so that every pixel becomes a square.
    """
    side = max(rows[0][0].size)
    cell = side * max(1, -(-128 // side))
    font = ImageFont.load_default(16)
    margin = 12 + max(round(font.getlength(label)) for label in labels)
    result = Image.new("RGB", (margin + len(columns) * (cell + 4), 28 + len(rows) * (cell + 4)), "white")
    ink = ImageDraw.Draw(result)
    for x, column in enumerate(columns):
        fitting = ImageFont.load_default(min(16, 16 * cell / max(1, font.getlength(column))))
        ink.text((margin + x * (cell + 4) + cell // 2, 14), column, "black", fitting, anchor="mm")
    for y, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = 28 + y * (cell + 4)
        ink.text((margin - 6, top + cell // 2), label, "black", font, anchor="rm")
        for x, picture in enumerate(row):
            fitted = ImageOps.pad(picture, (cell, cell), Image.Resampling.BICUBIC, color="white")
            result.paste(fitted, (margin + x * (cell + 4), top))
    place = {"columns": list(columns), "rows": list(labels), "left": margin, "top": 28, "cell": cell, "gap": 4}
    result.info["sheet"] = json.dumps(place)  # a PNG file keeps it, for programs that crop the pictures out of it
    return result


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture, completely or not at all, in the format of its name's extension."""
    content, about = io.BytesIO(), PngImagePlugin.PngInfo()
    for what in ("sheet", DRAWN_BY, SETTINGS):
        if what in picture.info:
            about.add_text(what, picture.info[what])
    picture.save(content, picture_format(path), pnginfo=about)
    write_whole(path, content.getvalue())


def numbered_in(folder: Path, count: int) -> list[str]:
    """Return names for `count` pictures; UserError if the folder has other files, which would have no captions."""
    names = [f"{number:04d}.png" for number in range(1, count + 1)]
    refuse_others(folder, {path.name for path in folder.glob("*")} - {*names, "metadata.jsonl"})
    return names


def refuse_others(folder: Path, others: set[str]) -> None:
    """Raise UserError if there are other files in a folder that is to be written."""
    if others:
        raise UserError(f"--output {folder}: {min(others)} already exists there; choose another folder, or delete it")


def write_captions(folder: Path, names: Sequence[str], captions: Sequence[str | Sequence[str]]) -> None:
    """Write the metadata.jsonl that training reads: file names, and one or several captions of each picture."""
    lines = [json.dumps({"file_name": n, "text": c}) + "\n" for n, c in zip(names, captions, strict=True)]
    write_whole(folder / "metadata.jsonl", "".join(lines).encode())


def picture_format(path: Path) -> str:
    """Return the picture format of a file's name; UserError if Pillow cannot write one of that name."""
    name = Image.registered_extensions().get(path.suffix.lower())
    if name not in Image.SAVE:
        raise UserError(f"--output {path}: its name needs a picture's extension, for example .png")
    return name
