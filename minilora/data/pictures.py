"""Pictures: opened, cropped, turned into tensors and back."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

# What Pillow raises for a file that is no picture, is truncated, or is a decompression bomb.
NO_PICTURE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)
CENTRE = (0.5, 0.5)  # where a picture is cropped by default


def open_picture(path: Path) -> Image.Image:
    """Return a picture as RGB: turned as its EXIF says, transparency laid on white.

    Raises one of `NO_PICTURE` if it is no picture, is cut off, or is a decompression bomb.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I;16"):  # Pillow would clip at 255
                picture = Image.fromarray((np.array(picture) // 256).astype(np.uint8))
            if picture.mode in ("I", "F"):
                raise ValueError(f"its numbers are of Pillow's mode {picture.mode}, whose white is not defined")
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            return picture.convert("RGB")


def crop_square(picture: Image.Image, side: int, place: tuple[float, float] = CENTRE) -> Image.Image:
    """Resize the short side to `side` pixels and crop the square at `place`, as `crop` does."""
    return crop(picture, (side, side), place)


def crop(picture: Image.Image, size: tuple[int, int], place: tuple[float, float] = CENTRE) -> Image.Image:
    """Resize a picture until it just fills a size, width and height in pixels, and crop it to that at `place`.

    `place` is 0 for left or top, 1 for right or bottom, 0.5 for the centre.
    """
    resized, left, top = crop_at(picture.size, size, place)
    return picture.resize(resized, Image.Resampling.LANCZOS).crop((left, top, left + size[0], top + size[1]))


def crop_at(
    picture: tuple[int, int], size: tuple[int, int], place: tuple[float, float]
) -> tuple[tuple[int, int], int, int]:
    """Return the size that a picture is resized to before it is cropped to `size`, and left and top of the crop."""
    factor = max(wanted / n for wanted, n in zip(size, picture, strict=True))
    width, height = (max(wanted, round(n * factor)) for wanted, n in zip(size, picture, strict=True))
    return (width, height), round((width - size[0]) * place[0]), round((height - size[1]) * place[1])


def as_tensor(picture: Image.Image) -> torch.Tensor:
    """Return an RGB picture as float32 in [-1, 1], (3, h, w)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def as_picture(pixels: torch.Tensor) -> Image.Image:
    """Return a (3, h, w) tensor in [-1, 1] as an RGB picture."""
    numbers = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(numbers.permute(1, 2, 0).numpy())
