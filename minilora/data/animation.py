"""Animations as files: GIF, WebP, or animated PNG."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, PngImagePlugin

from ..files.tensors import write_whole
from ..settings.errors import UserError
from .sheet import SETTINGS, picture_format


def animation_format(path: Path) -> str:
    """Return the format of an animation by its file's name; UserError if Pillow cannot animate it."""
    name = picture_format(path)
    if name not in Image.SAVE_ALL or name in ("PDF", "TIFF"):
        raise UserError(f"--output {path}: {name} holds one picture; give a .gif, .webp or .png, or a folder")
    return name


def save_animation(frames: Sequence[Image.Image], path: Path, milliseconds: int | list[int]) -> None:
    """Write an animation that repeats forever, completely or not at all.

    `milliseconds` is the time of each frame, or a list of these.  If the first frame carries settings, they are
    written, too; in a GIF, as a comment.
    """
    content, about = io.BytesIO(), PngImagePlugin.PngInfo()
    options: dict = {"save_all": True, "append_images": frames[1:], "duration": milliseconds, "loop": 0}
    if settings := frames[0].info.get(SETTINGS):
        about.add_text(SETTINGS, settings)
        options |= {"comment": settings, "pnginfo": about}
    frames[0].save(content, animation_format(path), **options)
    write_whole(path, content.getvalue())
