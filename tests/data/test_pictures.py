"""data/pictures.py: the colours of pictures with an ICC profile, in every mode that has one."""

import io
import struct

import numpy as np
import pytest
from conftest import make_picture
from PIL import Image, ImageCms

from minilora.data.folder import read_folders
from minilora.data.pictures import NO_PICTURE, look_at, open_picture
from minilora.settings.errors import UserError
from minilora.settings.train import TrainConfig

# The red, green and blue of spaces as XYZ under D50, one a column: sRGB, Adobe RGB, Display P3 (ICC registry).
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
LEVELS = 2  # of 255: a profile holds numbers of 16 bits, and both lcms and we round


def linear(levels) -> np.ndarray:
    x = np.asarray(levels) / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def encoded(light) -> np.ndarray:
    x = np.clip(light, 0, 1)
    return 255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


def from_p3(levels) -> np.ndarray:
    """Return what colours of Display P3 are in sRGB; both have the same curve."""
    return encoded(np.linalg.solve(SRGB, P3 @ linear(levels)))


def profile(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """Return an ICC profile (ICC.1:2010, 7): header, table of tags, tags."""
    offset, table, body = 132 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", name, offset + len(body), len(content))
        body += content
    header = struct.pack(">I4x4s4s4s4s12x4s", offset + len(body), b"\x02\x10\0\0", kind, space, pcs, b"acsp")
    header += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)  # D50
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def srgb_with(primaries: np.ndarray) -> bytes:
    """Return lcms's own sRGB profile with other primaries."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", content[128:132])[0]
    places = {tag: place for tag, place, _ in struct.iter_unpack(">4sII", content[132 : 132 + 12 * count])}
    for tag, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries.T, strict=True):
        content[places[tag] + 8 : places[tag] + 20] = b"".join(struct.pack(">i", round(v * 65536)) for v in xyz)
    return bytes(content)


DISPLAY_P3 = srgb_with(P3)
GREY = profile(b"GRAY", {b"kTRC": struct.pack(">4s4xIH", b"curv", 1, round(1.8 * 256))})  # gamma 1.8
# Ink C, M, Y does nothing, and K makes L* fall evenly from 100 to 0: tables of 8 bits, two points each way.
CLUT = bytes(n for inks in range(16) for n in (0 if inks & 1 else 255, 128, 128))
EVEN = bytes(range(256))
IDENTITY = struct.pack(">9i", *(65536 if n % 4 == 0 else 0 for n in range(9)))
BLACK = profile(
    b"CMYK",
    {b"A2B0": b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + IDENTITY + 4 * EVEN + CLUT + 3 * EVEN},
    b"Lab ",
    b"prtr",
)


def seen(picture: Image.Image, kind: str = "PNG", **options) -> Image.Image:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    assert look_at(io.BytesIO(content.getvalue())) == (picture.size, "")
    return open_picture(io.BytesIO(content.getvalue()))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_colours_of_a_wide_profile_are_brought_to_srgb(kind):
    for colour in [(200, 100, 50), (40, 200, 60), (128, 128, 128), (90, 80, 200)]:
        options = {"lossless": True} if kind == "WEBP" else {}
        ours = seen(Image.new("RGB", (8, 8), colour), kind, icc_profile=DISPLAY_P3, **options)
        assert ours.mode == "RGB"
        assert np.abs(ours.getpixel((3, 3)) - from_p3(colour)).max() <= LEVELS


def test_so_are_a_palettes_and_those_that_can_be_seen_through():
    colour, wanted = (200, 100, 50), from_p3((200, 100, 50))
    palette = Image.new("RGB", (8, 8), colour).quantize(4)
    assert np.abs(seen(palette, icc_profile=DISPLAY_P3).getpixel((0, 0)) - wanted).max() <= LEVELS
    half = Image.new("RGBA", (8, 8), (*colour, 255))
    half.putpixel((0, 0), (0, 0, 0, 0))
    half.putpixel((1, 0), (*colour, 128))
    ours = seen(half, icc_profile=DISPLAY_P3)
    assert ours.getpixel((0, 0)) == (255, 255, 255)
    assert np.abs(ours.getpixel((3, 3)) - wanted).max() <= LEVELS
    assert np.abs(ours.getpixel((1, 0)) - (wanted * 128 + 255 * 127) / 255).max() <= LEVELS


def test_a_turned_picture_is_turned_and_has_its_colours():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    Image.new("RGB", (8, 4), (40, 200, 60)).save(content, "PNG", exif=exif, icc_profile=DISPLAY_P3)
    ours = open_picture(content)
    assert look_at(content)[0] == ours.size == (4, 8)
    assert np.abs(ours.getpixel((0, 0)) - from_p3((40, 200, 60))).max() <= LEVELS


@pytest.mark.parametrize("kind", ["TIFF", "JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_that_is_told_is_that_of_the_picture_turned_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = io.BytesIO()
    make_picture(0, 24, 20).save(content, kind, exif=exif)
    assert look_at(content)[0] == open_picture(content).size == ((24, 20) if orientation < 5 else (20, 24))


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_greys_follow_their_own_profile(mode):
    value = {"L": 100, "LA": (100, 255), "I;16": 100 * 256}[mode]
    ours = seen(Image.new(mode, (8, 8), value), icc_profile=GREY)
    assert np.abs(ours.getpixel((3, 3)) - encoded((100 / 255) ** 1.8)).max() <= LEVELS


def test_greys_with_a_profile_of_colours_stay_grey():
    r, g, b = seen(Image.new("L", (8, 8), 100), "JPEG", icc_profile=DISPLAY_P3).getpixel((3, 3))
    assert max(r, g, b) - min(r, g, b) <= 1  # the white of a profile is rounded to 16 bits
    assert abs(r - 100) <= LEVELS


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_inks_are_seen_as_their_profile_prints_them(kind):
    ours = seen(Image.new("CMYK", (8, 8), (0, 0, 0, 128)), kind, icc_profile=BLACK)
    lightness = 100 * (1 - 128 / 255)  # L*, whose light is ((L* + 16) / 116)³
    assert np.abs(ours.getpixel((3, 3)) - encoded(((lightness + 16) / 116) ** 3)).max() <= LEVELS


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_a_profile_that_is_srgb_changes_no_number(mode):
    picture = make_picture(0).convert(mode)
    assert seen(picture, icc_profile=srgb_with(SRGB)).tobytes() == seen(picture).tobytes()


def exif_of(space: int, index: str | None) -> bytes:
    """Return EXIF with a colour space and an index of interoperability, as cameras write them."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = space
    if index:
        exif.get_ifd(0x8769)[0xA005] = {1: index}
    return exif.tobytes()


@pytest.mark.parametrize("colour", [(200, 100, 50), (128, 128, 128), (250, 240, 20)])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_adobe_rgb_that_only_exif_tells_is_brought_to_srgb(kind, colour):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    wanted = encoded(np.linalg.solve(SRGB, ADOBE @ (np.array(colour) / 255) ** (563 / 256)))
    ours = seen(Image.new("RGB", (8, 8), colour), kind, exif=exif_of(65535, "R03"), **options)
    most = 2 * LEVELS if kind == "JPEG" else LEVELS  # JPEG rounds, too
    assert np.abs(ours.getpixel((3, 3)) - wanted).max() <= most


def test_a_colour_space_of_2_is_adobe_rgb_too_and_greys_keep_their_own_curve():
    colour = Image.new("RGB", (8, 8), (200, 100, 50))
    for kind in ("PNG", "TIFF"):
        two, r03 = seen(colour, kind, exif=exif_of(2, None)), seen(colour, exif=exif_of(65535, "R03"))
        assert two.getpixel((0, 0)) == r03.getpixel((0, 0)) != (200, 100, 50)
    r, g, b = seen(Image.new("L", (8, 8), 60), "JPEG", exif=exif_of(65535, "R03")).getpixel((3, 3))
    assert max(r, g, b) - min(r, g, b) <= 1  # the white of a profile is rounded to 16 bits
    assert abs(g - encoded((60 / 255) ** (563 / 256))) <= LEVELS


@pytest.mark.parametrize(("space", "index"), [(1, "R98"), (65535, None), (65535, "R98"), (1, None)])
def test_what_exif_does_not_call_adobe_rgb_keeps_its_numbers(space, index):
    picture = make_picture(0)
    assert seen(picture, exif=exif_of(space, index)).tobytes() == picture.tobytes()


def test_a_profile_says_more_than_exif():
    colour, wanted = (200, 100, 50), from_p3((200, 100, 50))
    ours = seen(Image.new("RGB", (8, 8), colour), icc_profile=DISPLAY_P3, exif=exif_of(65535, "R03"))
    assert np.abs(ours.getpixel((3, 3)) - wanted).max() <= LEVELS


@pytest.mark.parametrize("content", [exif_of(65535, "R03")[:12], b"Exif\0\0MM"], ids=["cut in its header", "no TIFF"])
def test_a_picture_with_damaged_exif_is_refused_as_others_are(content):
    file = io.BytesIO()
    make_picture(0).save(file, "PNG", exif=content)
    for read in (look_at, open_picture):
        with pytest.raises(NO_PICTURE):
            read(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"none", "cannot open profile"), (DISPLAY_P3[:300], "cannot build transform"), (GREY, "it is for GRAY")],
)
def test_a_profile_that_cannot_be_used_is_told_and_the_numbers_stay(content, words, tmp_path, capsys):
    make_picture(0).save(tmp_path / "a.png", icc_profile=content)
    config = TrainConfig(data=(str(tmp_path),), caption="x", cache=str(tmp_path / "cache"))
    [item] = read_folders(config)
    assert item.open().tobytes() == make_picture(0).tobytes()
    said = capsys.readouterr().err
    assert "a.png: its colour profile cannot be used" in said
    assert words in said
    read_folders(config, quiet=True)
    assert capsys.readouterr().err == ""


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path):
    pytest.importorskip("pillow_heif")
    picture = Image.new("RGB", (32, 16), (200, 100, 50))
    picture.save(tmp_path / "a.HEIC", quality=100, icc_profile=DISPLAY_P3)
    [item] = read_folders(TrainConfig(data=(str(tmp_path),), caption="x", cache=str(tmp_path / "cache")))
    assert item.size == (32, 16)
    assert np.abs(item.open().getpixel((9, 9)) - from_p3((200, 100, 50))).max() <= 2 * LEVELS  # it is a lossy file
    whole = (tmp_path / "a.HEIC").read_bytes()
    (tmp_path / "a.HEIC").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.HEIC cannot be opened as a picture"):
        read_folders(TrainConfig(data=(str(tmp_path),), caption="x", cache=str(tmp_path / "cache")))
