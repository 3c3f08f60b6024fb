"""Pictures: open them, convert them to sRGB, crop them, turn them into tensors and back."""

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError

with suppress(ImportError):  # an optional package
    from pillow_heif import register_heif_opener

    register_heif_opener()

# What Pillow raises for a file that is not a picture, is truncated, has damaged EXIF, or is a decompression bomb.
BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
NO_PICTURE = (OSError, SyntaxError, ValueError, struct.error, *BOMB)
CENTRE = (0.5, 0.5)  # the place of a crop, see `crop`
_TURNED = (5, 6, 7, 8)  # the EXIF orientations that swap width and height
# The picture modes that a profile's colour space fits; pictures are converted to the first of them.
_MODES = {"RGB": ("RGB", "RGBX", "P", "L", "YCbCr"), "GRAY": ("L",), "CMYK": ("CMYK",)}
# Adobe RGB as in an ICC profile: white, red, green and blue under D50, as XYZ; 256 times its gamma.
# Source: Adobe RGB (1998) Color Image Encoding, 2005.
_ADOBE = {
    b"wtpt": (0.95045, 1.0, 1.08905),
    b"rXYZ": (0.60974, 0.31111, 0.01947),
    b"gXYZ": (0.20528, 0.62567, 0.06087),
    b"bXYZ": (0.14919, 0.06322, 0.74457),
}
_ADOBE_GAMMA = 563


def open_picture(source: Path | io.BytesIO, most: int | None = Image.MAX_IMAGE_PIXELS) -> Image.Image:
    """Return a picture as RGB: rotated as its EXIF says, in sRGB, with transparency over white.

    Raises one of `NO_PICTURE` if it is not a picture, is truncated, or has more than `most` pixels.
    """
    with pixels_limited(most), Image.open(source) as file:
        picture, alpha = _decoded(file)
        picture = _in_srgb(picture, _profile_of(file))
    if alpha is not None:
        picture.putalpha(alpha)
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def open_mask(source: io.BytesIO, of_alpha: bool) -> Image.Image | None:
    """Return a picture as a mask, in grey: white counts; transparent parts do not.

    `of_alpha`: the mask is the picture's alpha channel; None if nothing is transparent.  The caller sets the limit with
    `pixels_limited`.  Raises one of `NO_PICTURE`.
    """
    with Image.open(source) as file:
        colours, alpha = _decoded(file)
    if of_alpha:
        return alpha if alpha and alpha.getextrema() != (255, 255) else None
    mask = colours.convert("L")
    return ImageChops.multiply(mask, alpha) if alpha else mask


def look_at(source: io.BytesIO) -> tuple[tuple[int, int], str]:
    """Return the width and height that `open_picture` gives, and what is wrong with the colour profile, else "".

    Decodes the whole picture, to find damage.  Several threads may call this at once, so the caller sets the limit with
    `pixels_limited`.
    """
    try:
        with Image.open(source) as file:
            picture, _ = _decoded(file, turn=False)
            turned = file.getexif().get(0x0112) in _TURNED  # after decoding, because Pillow rotates a TIFF itself
            profile = _profile_of(file)
    except UnidentifiedImageError as error:  # its text has the source's address in memory
        raise ValueError("Pillow does not know this kind of file") from error
    width, height = picture.size
    wrong = ""
    if profile:
        try:
            _transform(profile, picture.mode)
        except (ImageCms.PyCMSError, OSError) as error:
            wrong = str(error)
    return (height, width) if turned else (width, height), wrong


def pixels_claimed(error: Exception) -> int:
    """Return the number of pixels that a picture claims, from Pillow's error about a decompression bomb."""
    return int(re.search(r"\d+", str(error))[0])


@contextmanager
def pixels_limited(most: int | None) -> Iterator[None]:
    """Within the block, make Pillow refuse pictures of more than `most` pixels, in all threads."""
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = most
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _decoded(file: Image.Image, turn: bool = True) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours of a picture in 8 bits, and its alpha channel, if it has one."""
    file.load()
    picture = ImageOps.exif_transpose(file) if turn else file
    if picture.mode.startswith("I;16"):  # Pillow would clip at 255
        picture = Image.fromarray((np.array(picture) // 256).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"its numbers are of Pillow's mode {picture.mode}, whose white is not defined")
    if picture.mode == "1":
        picture = picture.convert("L")
    if not picture.has_transparency_data:
        return picture, None
    with_alpha = picture.convert("RGBA")
    grey = picture.mode in ("L", "LA", "La")
    return picture.convert("L") if grey else with_alpha.convert("RGB"), with_alpha.getchannel("A")


def _profile_of(file: Image.Image) -> bytes | None:
    """Return the ICC profile of a picture's colours; None if it has none.

    Cameras mark Adobe RGB only in EXIF: the colour space is 65535, for "another", and the interoperability index is
    R03.  Some programs write 2 for the colour space.
    Source: CIPA DC-009 (DCF 2.0), on files with the optional colour space.
    """
    if profile := file.info.get("icc_profile"):
        return profile
    exif = file.getexif()
    details = exif.get_ifd(0x8769)
    index = exif.get_ifd(0xA005).get(1, "") if 0xA005 in details else ""  # (Pillow 12 fails where there is none)
    space, index = details.get(0xA001), str(index).rstrip("\0 ")
    return adobe_rgb() if space == 2 or (space == 0xFFFF and index == "R03") else None


@cache
def adobe_rgb() -> bytes:
    """Return an ICC profile of Adobe RGB: a header, a table of tags, then the tags (ICC.1:2001-04, 6)."""
    tags = {name: struct.pack(">4s4x3i", b"XYZ ", *(round(n * 65536) for n in xyz)) for name, xyz in _ADOBE.items()}
    curve = struct.pack(">4s4xIHxx", b"curv", 1, _ADOBE_GAMMA)
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4s2I", name, start + len(body), len(content))
        body += content
    header = struct.pack(">I4xI4s4s4s12x4s", start + len(body), 0x2100000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    white = struct.pack(">28x3i", 63190, 65536, 54061)  # D50
    return (header + white).ljust(128, b"\0") + table + body


def _in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Return a picture as RGB, its colours converted from its ICC profile to sRGB.

    Without a usable profile its numbers are taken as sRGB, as in viewers.
    """
    if profile:
        with suppress(ImageCms.PyCMSError, OSError):
            mode, transform = _transform(profile, picture.mode)
            if transform:
                return ImageCms.applyTransform(picture.convert(mode), transform)
    return picture.convert("RGB")


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Return the mode to convert a picture of `mode` to, and the transform from its profile to sRGB.

    The transform is None if the profile is sRGB under any name: if no colour would change by more than 1 of 255, the
    picture keeps its numbers.  Raises PyCMSError or OSError for a profile that cannot be used.

    Source: ICC.1:2022, 7.2.6 (the colour space of a profile).
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if mode not in _MODES.get(space, ()):
        raise ImageCms.PyCMSError(f"it is for {space}, and the picture is {mode}")
    takes = _MODES[space][0]
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), takes, "RGB")
    if takes == "CMYK":
        return takes, transform
    levels = np.arange(0, 256, 15, dtype=np.uint8)  # 18 of them, with 0 and 255
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)  # (1, 5832, 3)
    before = Image.fromarray(colours) if takes == "RGB" else Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    after = np.array(ImageCms.applyTransform(before, transform)).astype(int)
    same = np.abs(after - np.array(before.convert("RGB"))).max() <= 1
    return takes, None if same else transform


def crop_square(picture: Image.Image, side: int) -> Image.Image:
    """Resize the short side to `side` pixels and crop the square in the centre."""
    return crop(picture, (side, side))


def crop(picture: Image.Image, size: tuple[int, int], place: tuple[float, float] = CENTRE) -> Image.Image:
    """Resize a picture until it just fills a size, width and height in pixels, and crop it to that size.

    `place` says where to crop: 0 is left or top, 1 right or bottom, 0.5 the centre.
    """
    resized, left, top = crop_at(picture.size, size, place)
    return picture.resize(resized, Image.Resampling.LANCZOS).crop((left, top, left + size[0], top + size[1]))


def crop_at(
    picture: tuple[int, int], size: tuple[int, int], place: tuple[float, float]
) -> tuple[tuple[int, int], int, int]:
    """Return the size to resize a picture to before `crop` crops it to `size`, and the left and top of that crop."""
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
