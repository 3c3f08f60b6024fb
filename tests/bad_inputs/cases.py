"""Bad inputs: every case with how it is made and what comes of it.

Each case makes files in an empty folder and gives a command for them.  It *works* and prints
something, or ends with exit code 2 and a message that names what is wrong.  tests/bad_inputs/test_bad_inputs.py
runs them all; `python tests/bad_inputs/cases.py` writes the table of them, docs/bad_input.md.
"""

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms
from safetensors.torch import load, load_file, save, save_file

PAGE = Path(__file__).parents[2] / "docs" / "bad_input.md"
LONG = " ".join(f"word{number}" for number in range(10_000))


@dataclass(frozen=True)
class Place:
    """Where a case makes its files, and what it may take: a tiny base, and a run of three steps on it."""

    folder: Path
    base: Path
    run: Path  # its output folder, with checkpoints after steps 1 and 2; its LoRA file fits the base

    def write(self, name: str, content: bytes | str = b"") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def copy(self, source: Path, name: str) -> Path:
        """Copy a folder file by file."""
        for path in source.rglob("*"):
            if path.is_file():
                self.write(f"{name}/{path.relative_to(source)}", path.read_bytes())
        return self.folder / name


@dataclass(frozen=True)
class Case:
    """One case: what is given, how it is made, part of what is said, and whether it works all the same."""

    room: str
    given: str
    what: object  # for the room's function, which makes the files and returns the command's words
    said: str
    works: bool = False


# ------------------------------------------------------------------------------------- commands


def train(place: Place, *words: str | Path, data: str | Path = "data", base: Path | None = None) -> list[str]:
    places = ["--data", place.folder / data, "--model", base or place.base, "--output", place.folder / "out"]
    words = [*places, "--cache", place.folder / "cache", "--steps", "1", "--rank", "2", *words]
    return ["train", *map(str, words)]


def sample(place: Place, *words: str | Path, prompt: str = "a dog", base: Path | None = None) -> list[str]:
    words = ["--prompt", prompt, "--model", base or place.base, "--steps", "1", *words]
    return ["sample", "--output", str(place.folder / "out" / "a.png"), *map(str, words)]


# ----------------------------------------------------------------------------------- data folders


def png(mode: str = "RGB", size: tuple[int, int] = (20, 20), kind: str = "PNG", **options) -> bytes:
    content = io.BytesIO()
    Image.new(mode, size).save(content, kind, **options)
    return content.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, pixels: bytes = b"") -> bytes:
    """Return a PNG file with a header that claims a size, whatever pixels there are."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, body) for kind, body in chunks)


def no_folder(place: Place) -> list[str]:
    return train(place)


def empty_folder(place: Place) -> list[str]:
    (place.folder / "data").mkdir()
    return train(place)


def text_as_data(place: Place) -> list[str]:
    place.write("data", "not a picture")
    return train(place, "--caption", "x")


def unreadable(place: Place, name: str) -> list[str]:
    """Make something unreadable that root, too, cannot read: a link to itself."""
    place.write("data/a.png", png())
    (place.folder / name).unlink(missing_ok=True)
    (place.folder / name).symlink_to(place.folder / name)
    return train(place, "--caption", "x", data="data" if "/" in name else name)


def linked(place: Place, folder: bool) -> list[str]:
    there = place.write("elsewhere/a.png", png())
    (place.folder / "data").mkdir()
    (place.folder / "data" / ("more" if folder else "a.png")).symlink_to(there.parent if folder else there)
    return train(place, "--caption", "x")


def two_tables(place: Place) -> list[str]:
    place.write("data/metadata.csv", "file_name,text\na.png,x\n")
    return metadata(place, '{"file_name": "a.png", "text": "x"}')


def beside(files: dict[str, bytes | str], place: Place, *words: str) -> list[str]:
    """Put files beside a picture that has its caption."""
    for name, content in {"a.png": png(), "a.txt": "x", **files}.items():
        place.write(f"data/{name}", content)
    return train(place, *words)


def rows_of(*names: str) -> str:
    return "".join(json.dumps({"file_name": name, "text": "x"}) + "\n" for name in names)


def below(place: Place, name: str) -> list[str]:
    """Put a picture and a table, or something like it, into a folder below the one that is given."""
    place.write("data/train/a.png", png())
    place.write(f"data/train/{name}", '{"file_name": "a.png", "text": "x"}')
    return train(place)


def only_copies(place: Place) -> list[str]:
    place.write("data/.thumbnails/a.png", png())
    return train(place, "--caption", "x")


def broken_output(place: Place) -> list[str]:
    place.write("out", "a file")
    return picture(place, png())


WHITE = io.BytesIO()
Image.new("L", (20, 10), "white").save(WHITE, "PNG")
FOLDERS = [
    ("a folder that does not exist", no_folder, "data: there is no such folder or picture"),
    ("an empty folder", empty_folder, "data: there is no picture in it"),
    ("a file that is not a picture", text_as_data, "data: it cannot be opened as a picture"),
    ("a folder that cannot be read", partial(unreadable, name="loop"), "loop: there is no such folder or picture"),
    ("a picture that cannot be read", partial(unreadable, name="data/b.png"), "b.png cannot be opened"),
    ("a link to a folder", partial(linked, folder=True), "more is a link to a folder, which is not followed"),
    ("a picture that is a link to a file", partial(linked, folder=False), "pictures   1 of", True),
    ("metadata.jsonl and metadata.csv", two_tables, "data holds metadata.jsonl and metadata.csv; keep one of them"),
    (
        "pictures of kinds that cannot be read beside one that can",
        partial(beside, {"b.jxl": b"", "c.CR2": b"", "b.txt": "x", "c.txt": "x"}),
        "2 pictures (b.jxl, c.CR2) cannot be read (JPEG XL, camera raw); save them as .png or .jpg",
    ),
    ("only pictures in a hidden folder", only_copies, ".thumbnails (holding 1): hidden pictures and copies there"),
    (
        "pictures and copies of them that programs made",
        partial(beside, dict.fromkeys((".ipynb_checkpoints/a.png", "@eaDir/a.png", "__MACOSX/a.png", "._a.png"), b"")),
        "4 places (._a.png, .ipynb_checkpoints (holding 1), @eaDir (holding 1), __MACOSX (holding 1)): hidden pictures",
        True,
    ),
    (
        "texts without a picture",
        partial(beside, {"b.txt": "x", "c.txt": "x"}),
        "2 texts (b.txt, c.txt): not read, because there is no picture of that name",
        True,
    ),
    (
        "files of other kinds",
        partial(beside, {"a.json": "{}", "clip.mov": b""}),
        "2 files (a.json, clip.mov): not read: neither picture nor caption",
        True,
    ),
    (
        "a picture in a sub-folder, of the same name as one above",
        partial(beside, {"masks/a.png": png()}),
        "masks/a.png has no caption",
    ),
    (
        "a mask without a picture",
        partial(beside, {"b.mask.png": png()}),
        "b.mask.png: there is no picture of that name",
    ),
    (
        "a mask of another shape than its picture",
        partial(beside, {"a.mask.png": WHITE.getvalue()}),
        "a.mask.png has 20 × 10 pixels, another shape than a.png with 20 × 20",
    ),
    ("a mask that is all black", partial(beside, {"a.mask.png": png("L")}), "a.mask.png is all black"),
    ("a mask that is not a picture", partial(beside, {"a.mask.png": "x"}), "a.mask.png cannot be opened as a picture"),
    (
        "a table that leaves out a picture with a .txt beside it",
        partial(beside, {"b.png": png(), "b.txt": "x", "metadata.csv": "file_name,text\na.png,x\n"}),
        "b.png has no caption in metadata.csv; b.txt beside: not read, because there is a table",
    ),
    (
        "a table in a sub-folder",
        partial(below, name="metadata.jsonl"),
        "train/metadata.jsonl: not read, because it is in a sub-folder; give",
    ),
    (
        "captions in .caption",
        partial(below, name="a.caption"),
        "train/a.caption: not read; name captions .txt",
    ),
    (
        "a table with a name in another Unicode form",
        partial(beside, {"a.png": png(), "\u00e9.png": png(), "metadata.jsonl": rows_of("a.png", "e\u0301.png")}),
        "pictures   2 of",
        True,
    ),
    ("an --output that is a file", broken_output, "out: nothing can be written there (File exists)"),
]


def metadata(place: Place, content: bytes | str, name: str = "metadata.jsonl") -> list[str]:
    place.write("a.png", png())  # outside of the folder
    place.write("data/a.png", png())
    place.write(f"data/{name}", content)
    return train(place)


ROW = '{"file_name": "a.png", "text": "x"}'
TABLES = [
    ("ends in the middle of a line", ROW[:-9], "metadata.jsonl line 1 is not JSON"),
    ("is not JSON", "a.png: x", "metadata.jsonl line 1 is not JSON"),
    ("has a line that is not an object", f"[]\n{ROW}", "metadata.jsonl line 1 has no file_name"),
    ("has a line without file_name", '{"text": "x"}', "metadata.jsonl line 1 has no file_name"),
    ("has a file_name that is a number", '{"file_name": 1}', "metadata.jsonl line 1 has no file_name"),
    ("has another key", '{"file_name": "a.png", "title": "x"}', "'text' holds no text; the line has title"),
    ("has half a character", '{"file_name": "a.png", "text": "\\ud800"}', "surrogates not allowed"),
    ("has null instead of a text", '{"file_name": "a.png", "text": null}', "'text' holds no text"),
    ("has an empty list of texts", '{"file_name": "a.png", "text": []}', "'text' holds no text"),
    ("names a picture twice", f"{ROW}\n{ROW}", "metadata.jsonl line 2: a.png occurs twice"),
    ("leaves a picture out", "", "a.png has no caption"),
    ("names a picture that does not exist", f'{ROW}\n{{"file_name": "b.png", "text": "x"}}', "there is no file b.png"),
    ("leads outside by ..", f'{ROW}\n{{"file_name": "../a.png", "text": "x"}}', "../a.png points outside the folder"),
    ("leads outside by an absolute path", f'{ROW}\n{{"file_name": "/a.png", "text": "x"}}', "points outside"),
    ("has a name with NUL in it", f'{ROW}\n{{"file_name": "\\u0000", "text": "x"}}', "there is no file"),
    ("has a name of 5,000 letters", f'{ROW}\n{{"file_name": "{"a" * 5000}", "text": "x"}}', "there is no file aaa"),
    ("is in Latin-1", ROW.replace("x", "ä").encode("latin-1"), "metadata.jsonl cannot be read as UTF-8 text"),
    ("is in UTF-16", ROW.encode("utf-16"), "metadata.jsonl cannot be read as UTF-8 text"),
    ("holds 100,000 brackets", "[" * 100_000, "metadata.jsonl line 1 is not JSON"),
    ("begins with a byte order mark", f"\ufeff{ROW}", "trained", True),
    ("ends its lines as Windows does", f"{ROW}\r\n", "trained", True),
    ("has blank lines", f"\n\n{ROW}\n  \n", "trained", True),
    ("has a line separator (U+2028) in a text", '{"file_name": "a.png", "text": "x\u2028y"}', "trained", True),
]
CSVS = [
    ("has no file_name", "file,text\na.png,x\n", "metadata.csv line 1: the header has no file_name"),
    ("has an open quotation mark", 'file_name,text\na.png,"x\n', "metadata.csv line 2 is not CSV"),
    ("has a row of three cells", "file_name,text\na.png,x,y\n", "metadata.csv line 2 has 3 cells and the header 2"),
    ("is empty", "", "a.png has no caption"),
    ("has NUL in it", "file_name,text\na.png,x\0\n", "NUL"),
    ("has a cell of 200,000 letters", f"file_name,text\na.png,{'x' * 200_000}\n", "is not CSV"),
    ("leads outside by ..", "file_name,text\na.png,x\n../a.png,x\n", "../a.png points outside the folder"),
    ("begins with a byte order mark, and ends lines with CRLF", "\ufefffile_name,text\r\na.png,x\r\n", "trained", True),
]


# --------------------------------------------------------------------------------------- captions


def caption(place: Place, text: str, *words: str) -> list[str]:
    place.write("data/a.txt", text)
    place.write("data/a.png", png())
    return train(place, *words)


CAPTIONS = [
    ("is empty", "", "trained", True),
    ("is only spaces", " \n\t ", "trained", True),
    ("has 10,000 words", LONG, "a caption is too long for the text encoder, which ignores the end: “…word", True),
    ("is emoji", "🐶🏽‍🦰" * 3, "trained", True),
    ("is written from right to left", "كلب على الثلج", "trained", True),
    ("has NUL in it", "a\0dog", "NUL"),
    ("is not UTF-8", b"ros\xe9", "a.txt cannot be read as UTF-8 text"),
]

# --------------------------------------------------------------------------------------- pictures


def picture(place: Place, content: bytes, name: str = "a.png") -> list[str]:
    place.write(f"data/{name}", content)
    return train(place, "--caption", "x")


def turned(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return png(kind="JPEG", exif=exif)


def frames(kind: str) -> bytes:
    return png(kind=kind, save_all=True, append_images=[Image.new("RGB", (20, 20), "red")])


WHOLE = png()
ADOBE = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x87\x69\0\4\0\0\0\1\0\0\0\x1a\0\0\0\0"  # where the colour space stands
ADOBE += b"\0\1\xa0\1\0\3\0\0\0\1\0\2\0\0\0\0\0\0"  # and that it is 2
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
JPEG, WEBP = io.BytesIO(), io.BytesIO()
NOISE.save(JPEG, "JPEG")
NOISE.save(WEBP, "WEBP")
BAD_CRC = WHOLE[:29] + bytes([WHOLE[29] ^ 1]) + WHOLE[30:]  # of the header's chunk
PICTURES = [
    ("an empty file", b"", "a.png cannot be opened"),
    ("a PNG of 4 bytes", WHOLE[:4], "a.png cannot be opened"),
    ("a PNG cut off in its header", WHOLE[:20], "a.png cannot be opened"),
    ("a PNG cut off in its pixels", png_of(20, 20, bytes(100)), "a.png cannot be opened"),
    ("a PNG without pixels", WHOLE[:33], "a.png cannot be opened"),
    ("a JPEG cut in half", JPEG.getvalue()[: len(JPEG.getvalue()) // 2], "a.png cannot be opened"),
    ("a WebP cut in half", WEBP.getvalue()[: len(WEBP.getvalue()) // 2], "a.png cannot be opened"),
    ("a GIF cut off", png(kind="GIF")[:15], "a.png cannot be opened"),
    ("text", b"not a picture", "a.png cannot be opened"),
    ("a PNG with a wrong checksum", BAD_CRC, "a.png cannot be opened"),
    ("a PNG that claims 30,000 × 30,000 pixels", png_of(30_000, 30_000), "train with --max-pixels 900000000"),
    ("a PNG that claims 2³¹ − 1 pixels each way", png_of(2**31 - 1, 2**31 - 1), "a.png has 4,611,686,014,132,420,609"),
    ("a PNG of 0 × 0 pixels", png_of(0, 0), "a.png cannot be opened"),
    ("a picture of floating-point numbers", png("F", kind="TIFF"), "whose white is not defined"),
    ("JPEG XL named .png", b"\xff\x0a", "a.png cannot be read (JPEG XL); save it as .png or .jpg"),
    ("one with a false colour profile", png(icc_profile=b"x"), "a.png: its colour profile cannot be used", True),
    ("one with a colour profile cut in half", png(icc_profile=PROFILE[:300]), "profile cannot be used", True),
    ("grey with a colour profile of colours", png("L", icc_profile=PROFILE), "trained", True),
    ("CMYK with a colour profile of colours", png("CMYK", kind="TIFF", icc_profile=PROFILE), "it is for RGB", True),
    ("one that only EXIF calls Adobe RGB", png(exif=ADOBE), "trained", True),
    ("one with EXIF that is cut off", png(exif=ADOBE[:12]), "a.png cannot be opened"),
    ("a JPEG named .png", JPEG.getvalue(), "trained", True),
    ("16 bits", png("I;16"), "trained", True),
    ("a palette with transparency", png("P", transparency=0), "trained", True),
    ("CMYK", png("CMYK", kind="TIFF"), "trained", True),
    ("grey with transparency", png("LA"), "trained", True),
    ("1 bit", png("1"), "trained", True),
    ("an animated GIF", frames("GIF"), "trained", True),
    ("an animated WebP", frames("WEBP"), "trained", True),
    ("one that EXIF turns on its side", turned(6), "trained", True),
    ("one with an EXIF orientation that does not exist", turned(99), "trained", True),
    ("1 × 1 pixels", png(size=(1, 1)), "it is enlarged to fill 16 × 16", True),
    ("5,000 × 1 pixels", png(size=(5000, 1)), "it is enlarged to fill 16 × 16", True),
]

# ------------------------------------------------------------------------------------ config files


def config(place: Place, content: bytes | str | None) -> list[str]:
    place.write("data/a.png", png())
    file = place.folder / "c.json" if content is None else place.write("c.json", content)
    words = train(place, "--caption", "x", "--config", file)
    at = words.index("--rank")  # which the file may say
    return words[:at] + words[at + 2 :]


CONFIGS = [
    ("is not there", None, "c.json: there is no such file"),
    ("is empty", "", "c.json: Expecting value"),
    ("is not JSON", "{rank: 8}", "c.json: Expecting property name"),
    ("is cut off", '{"rank": 8', "c.json: Expecting ',' delimiter"),
    ("is a list", "[]", "c.json: it holds a list and should hold one object of settings"),
    ("is in UTF-16", '{"seed": 8}'.encode("utf-16"), "c.json: 'utf-8' codec can't decode"),
    ("holds 100,000 brackets", "[" * 100_000, "c.json: its brackets are nested too deeply"),
    ("has an unknown key", '{"sead": 8}', "c.json: unknown setting sead; did you mean seed?"),
    ("has half a character", '{"caption": "\\ud800"}', "surrogates not allowed"),
    ("has a key twice", '{"seed": 8, "seed": 9}', "seed occurs twice"),
    ("has a text instead of a number", '{"seed": "8"}', 'c.json: seed is "8" and should be int'),
    ("has null instead of a number", '{"seed": null}', "c.json: seed is null and should be int"),
    ("has NaN", '{"learning_rate": NaN}', "--learning-rate is nan; it must be"),
    ("has infinity", '{"learning_rate": 1e999}', "--learning-rate is inf; it must be"),
    ("has a seed of 40 digits", f'{{"seed": {"9" * 40}}}', "--seed is 99999"),
    ("has a rank of 40 digits", f'{{"rank": {"9" * 40}}}', "rank 99999"),
    ("has a number of 5,000 digits", f'{{"seed": {"9" * 5000}}}', "c.json: Exceeds the limit"),
    ("has a warm-up longer than the run", '{"warmup_steps": 2}', "--warmup-steps is 2 and --steps 1: the warm-up"),
    (
        "is kohya's, and skips a layer of the text encoder",
        '{"network_dim": 2, "clip_skip": 2}',
        "c.json: clip_skip = 2 has no counterpart, and may change what is learnt",
    ),
    ("is diffusers', and not square", '{"lr_scheduler": "linear", "resolution": "8,16"}', 'resolution is "8,16"'),
    ("is diffusers', with a setting without effect", '{"random_flip": true, "allow_tf32": true}', "trained", True),
    ("begins with a byte order mark", '\ufeff{"seed": 8}', "trained", True),
]


# ----------------------------------------------------------------------------------------- bases


UNET = "unet/diffusion_pytorch_model.safetensors"


def base(place: Place, spoil: Callable[[Path], None]) -> list[str]:
    copy = place.copy(place.base, "base")
    spoil(copy)
    return sample(place, base=copy)


def single(place: Place, content: bytes | Callable[[Place], bytes]) -> list[str]:
    content = content(place) if callable(content) else content
    return sample(place, "--model-config", place.base, base=place.write("single.safetensors", content))


def single_without(*parts: str, **more: torch.Tensor) -> Callable[[Place], bytes]:
    """Return what makes the base a single file, without the tensors whose names have one of these parts."""

    def content(place: Place) -> bytes:
        from helpers import original_tensors  # of the tests, which `python tests/bad_inputs/cases.py` does without

        tensors = original_tensors(place.base)
        return save({key: t for key, t in tensors.items() if not any(part in key for part in parts)} | more)

    return content


def only_half(copy: Path) -> None:
    half = {key: tensor.half() for key, tensor in load_file(copy / UNET).items()}
    save_file(half, (copy / UNET).with_suffix(".fp16.safetensors"), {"format": "pt"})
    (copy / UNET).unlink()


def without(name: str) -> Callable[[Path], None]:
    def spoil(copy: Path) -> None:
        for path in [copy / name] if (copy / name).is_file() else list((copy / name).iterdir()):
            path.unlink()

    return spoil


def with_bytes(name: str, content: bytes | str, keep: int = 0) -> Callable[[Path], None]:
    def spoil(copy: Path) -> None:
        path = copy / name
        kept = path.read_bytes()[:keep] if keep else b""
        path.write_bytes(kept + (content if isinstance(content, bytes) else content.encode()))

    return spoil


def with_json(name: str, **changes) -> Callable[[Path], None]:
    def spoil(copy: Path) -> None:
        (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | changes))

    return spoil


def with_tensors(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    def spoil(copy: Path) -> None:
        save_file(change(load_file(copy / UNET)), copy / UNET)

    return spoil


def only_pickle(copy: Path) -> None:
    torch.save(load_file(copy / UNET), (copy / UNET).with_suffix(".bin"))
    (copy / UNET).unlink()


def sharded(name: str = "1.safetensors", index: str | None = None, weights: str = UNET) -> Callable[[Path], None]:
    """Spread weights over two files, with `name` in the index for the first of them; or another index."""

    def spoil(copy: Path) -> None:
        tensors = load_file(copy / weights)
        (copy / weights).unlink()
        weight_map = {}
        for file, called, keys in (
            ("1.safetensors", name, list(tensors)[::2]),
            ("2.safetensors", "2.safetensors", list(tensors)[1::2]),
        ):
            save_file({key: tensors[key] for key in keys}, (copy / weights).parent / file)
            weight_map |= dict.fromkeys(keys, called)
        (copy / "1.safetensors").write_bytes(
            ((copy / weights).parent / "1.safetensors").read_bytes()
        )  # beside the U-Net's folder
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
        (copy / f"{weights}.index.json").write_text(text if index is None else index)

    return spoil


def wrong_shape(tensors: dict) -> dict:
    return tensors | {"conv_in.weight": tensors["conv_in.weight"][:, :3].contiguous()}


def one_missing(tensors: dict) -> dict:
    return {key: tensor for key, tensor in tensors.items() if key != "conv_in.weight"}


def one_more(tensors: dict) -> dict:
    return tensors | {"conv_in.more": tensors["conv_in.weight"].clone()}


def not_finite(tensors: dict) -> dict:
    return tensors | {"conv_in.weight": tensors["conv_in.weight"] * torch.nan}


def a_terabyte(copy: Path) -> None:
    """Let the U-Net have a weight of 10¹² bytes, none of which is on the disk."""
    (copy / UNET).write_bytes(raw({"conv_in.weight": entry(0, 10**12, (10**12,), "F8_E4M3")}))
    os.truncate(copy / UNET, (copy / UNET).stat().st_size + 10**12)


TEXT = "text_encoder/model.safetensors"
NO_UNET = "its unet does not load"
INDEX = "model_index.json"
BASES = [
    ("lacks model_index.json", without(INDEX), "base: neither a diffusers folder (with model_index.json) nor"),
    ("has an empty model_index.json", with_bytes(INDEX, ""), "model_index.json"),
    ("has a model_index.json that is a list", with_bytes(INDEX, "[]"), "it holds a None; supported are"),
    ("has a model_index.json that is cut off", with_bytes(INDEX, "", keep=30), "model_index.json"),
    ("is an unknown pipeline", with_json(INDEX, _class_name="Flux"), "it holds a Flux; supported are"),
    ("has a list instead of its pipeline's name", with_json(INDEX, _class_name=["a", "b"]), "it holds a ['a', 'b']"),
    ("names code of its own in model_index.json", with_json(INDEX, unet=["evil", "Unet"]), "wrote", True),
    ("lacks its U-Net", without("unet"), NO_UNET),
    ("lacks its VAE", without("vae"), "its vae does not load"),
    ("lacks its text encoder", without("text_encoder"), "its text_encoder does not load"),
    ("lacks the tokenizer's vocabulary", without("tokenizer/tokenizer.json"), "its tokenizer does not load"),
    ("lacks its tokenizer", without("tokenizer"), "its tokenizer does not load"),
    ("lacks its scheduler", without("scheduler"), "its scheduler does not load"),
    ("has a U-Net's config without weights", without(UNET), NO_UNET),
    ("has a U-Net's weights without config", without("unet/config.json"), NO_UNET),
    ("has a config that is cut off", with_bytes("unet/config.json", "", keep=40), NO_UNET),
    ("has a config that is a list", with_bytes("unet/config.json", "[]"), NO_UNET),
    ("has a text instead of a list in a config", with_json("unet/config.json", block_out_channels="x"), NO_UNET),
    ("has a size of 0 in a config", with_json("unet/config.json", norm_num_groups=0), NO_UNET),
    (
        "has no sample_size in a config",
        with_json("unet/config.json", sample_size=None),
        "sample_size in its unet's config is",
    ),
    ("has a VAE's config that is a list", with_bytes("vae/config.json", "[]"), "its vae does not load"),
    ("has a text encoder of another width", with_json("text_encoder/config.json", hidden_size=24), "does not load"),
    ("has a tokenizer that is cut off", with_bytes("tokenizer/tokenizer.json", "", keep=99), "its tokenizer does not"),
    ("has a tokenizer that is not JSON", with_bytes("tokenizer/tokenizer_config.json", "x"), "its tokenizer does not"),
    ("has weights of another shape", with_tensors(wrong_shape), NO_UNET),
    ("lacks one tensor", with_tensors(one_missing), "the weights of its unet lack conv_in.weight"),
    ("has a tensor too many", with_tensors(one_more), "its unet does not use conv_in.more", True),
    ("has weights that are NaN", with_tensors(not_finite), "what it draws for 'a dog' is not finite"),
    ("has weights that are cut off", with_bytes(UNET, "", keep=5000), NO_UNET),
    ("has weights with extra bytes behind them", with_bytes(UNET, "more", keep=1 << 30), NO_UNET),
    ("has weights of 0 bytes", with_bytes(UNET, ""), NO_UNET),
    ("has weights of a terabyte", a_terabyte, "its numbers need 4,000.0 GB of memory, and"),
    ("has only pickles of the U-Net (.bin)", only_pickle, NO_UNET),
    ("has only an fp16 variant of the U-Net", only_half, "its unet has only the variant fp16", True),
    ("is sharded", sharded(), "wrote", True),
    ("is sharded, and one file is missing", sharded("3.safetensors"), NO_UNET),
    ("is sharded, and the index leads outside by ..", sharded("../1.safetensors"), "leads outside its folder"),
    (
        "is sharded, and the index leads outside by an absolute path",
        sharded("/1.safetensors"),
        "leads outside its folder",
    ),
    ("has a sharded text encoder", sharded(weights=TEXT), "wrote", True),
    (
        "has a text encoder whose index leads outside by ..",
        sharded("../1.safetensors", weights=TEXT),
        "leads outside its folder",
    ),
    ("has a text encoder whose index leads to /", sharded("/1.safetensors", weights=TEXT), "leads outside its folder"),
    ("is sharded, and the index is not JSON", sharded(index="x"), NO_UNET),
    ("is sharded, and the index lists nothing", sharded(index="{}"), NO_UNET),
    (
        "has an unknown prediction type",
        with_json("scheduler/scheduler_config.json", prediction_type="x"),
        "prediction_type is 'x'; known are",
    ),
]
ORIGINAL = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k"
SINGLES = [
    ("is empty", b"", "single.safetensors"),
    ("is text", b"not a base at all", "single.safetensors"),
    ("holds no tensors", save({}), "single.safetensors"),
    ("holds tensors of another kind", save({"x": torch.ones(2)}), "single.safetensors"),
    ("is whole", single_without(), "wrote", True),
    ("lacks a tensor of its U-Net", single_without(f"{ORIGINAL}.weight"), f"the weights of its unet lack {ORIGINAL}."),
    ("lacks a tensor of its VAE", single_without("decoder.conv_in.bias"), "its vae lack first_stage_model.decoder"),
    ("lacks a tensor of its text encoder", single_without("0.mlp.fc1.bias"), "its text_encoder lack cond_stage_model."),
    ("has no U-Net", single_without("diffusion_model."), "single.safetensors: it holds no U-Net"),
    ("has no VAE", single_without("first_stage_model."), "it holds no VAE; give one with --vae"),
    ("has no text encoder", single_without("cond_stage_model."), "it holds no text encoder"),
    ("is marked v_pred", single_without(v_pred=torch.ones(0)), "v_prediction (marked in the file)", True),
    (
        "is marked with EDM",
        single_without(edm_mean=torch.ones(4)),
        "edm_mean marks a base with the noise levels of EDM",
    ),
]

# ------------------------------------------------------------------------------------- LoRA files


def lora(place: Place, content: bytes | Callable[[Place], Path | None]) -> list[str]:
    path = content(place) if callable(content) else place.write("lora.safetensors", content)
    return sample(place, "--lora", path)


def raw(header: bytes | dict, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file of a header, whatever that says, and bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int = 0, end: int = 16, shape: tuple = (2, 2), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


PAIR = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
A, B = f"{PAIR}.lora_A.weight", f"{PAIR}.lora_B.weight"
GOOD = {A: torch.ones(2, 16), B: torch.ones(16, 2)}


def headers(first: dict | list | str, second: dict | None = None, size: int = 32) -> bytes:
    return raw({A: first, B: second or entry(16, 32)}, bytes(size))


def vast(place: Place) -> Path:
    path = place.write("lora.safetensors", headers(entry(0, 10**12, (10**12,), "F8_E4M3"), entry(10**12, 10**12, (0,))))
    os.truncate(path, path.stat().st_size - 32 + 10**12)
    return path


def pickled(place: Place) -> Path:
    torch.save(GOOD, place.folder / "lora.pt")
    return place.folder / "lora.pt"


def pickle_beside(place: Place) -> Path:
    torch.save(GOOD, place.folder / "lora.bin")
    return place.folder / "lora.safetensors"


def folder_without(place: Place) -> Path:
    return place.write("folder/a.txt").parent


def peft_folder(place: Place, text: str = "{}") -> Path:
    place.write("peft/adapter_config.json", text)
    return place.write("peft/adapter_model.safetensors", save(GOOD)).parent


def peft_file_alone(place: Place) -> Path:
    return place.write("alone/adapter_model.safetensors", save(GOOD))


def other(name: str) -> bytes:
    down = name.replace("up", "down") if name.endswith("up") else name.replace("lora_B", "lora_A")
    return save({f"{name}.weight": torch.ones(64, 2), f"{down}.weight": torch.ones(2, 64)})


def of(more: dict, metadata: dict | None = None) -> bytes:
    return save(GOOD | more, metadata)


SLOW = json.dumps({"alpha_pattern": {"(.*.*)*x": 8}})
HEADER = "its safetensors header cannot be read"
LORAS = [
    ("is empty", b"", "not a whole safetensors file"),
    ("has 7 bytes", b"1234567", "not a whole safetensors file"),
    ("claims a header longer than the file", raw(b"{}", length=3), "not a whole safetensors file"),
    ("claims a header of 2⁶⁴ − 1 bytes", raw(b"{}", length=2**64 - 1), "not a whole safetensors file"),
    ("has a header that is not JSON", raw(b"{x"), HEADER),
    ("has a header that is not UTF-8", raw(b'{"\xff": 1}'), HEADER),
    ("has a header that is a list", raw(b"[]"), HEADER),
    ("has a header of 100,000 brackets", raw(b"[" * 100_000), HEADER),
    ("has a key twice in its header", raw(b'{"x": {}, "x": {}}'), "x occurs twice"),
    ("has metadata that is a number", raw({"__metadata__": 1}), HEADER),
    ("has metadata of numbers", raw({"__metadata__": {"lora_adapter_metadata": 1}}), HEADER),
    ("has an entry that is a list", headers([]), HEADER),
    ("has an entry without a type", headers({"shape": [2, 2], "data_offsets": [0, 16]}), HEADER),
    ("has an unknown type", headers(entry(dtype="F99")), "unknown type or shape: F99"),
    ("has a shape of texts", headers(entry(shape=("2", "2"))), "has an unknown type or shape"),
    ("has a negative shape", headers(entry(shape=(-2, -2))), "has an unknown type or shape"),
    ("has a shape of true and false", headers(entry(shape=(True, 4))), "has an unknown type or shape"),
    ("has a shape of 10³⁰", headers(entry(shape=(10**30, 2))), "should begin at byte"),
    ("has a shape that its bytes do not fit", headers(entry(shape=(2, 3))), "should begin at byte"),
    ("has tensors that overlap", headers(entry(), entry(8, 24), 24), "should begin at byte"),
    ("has a gap between tensors", headers(entry(), entry(24, 40), 40), "should begin at byte"),
    ("has a tensor before the beginning", headers(entry(-16, 0)), "should begin at byte"),
    ("has a tensor that ends before it begins", headers(entry(16, 0)), "should begin at byte"),
    ("has a tensor beyond the end", headers(entry(), size=16), "it was cut off or extended"),
    ("has more bytes than it says", headers(entry(), size=48), "it was cut off or extended"),
    ("has numbers for a terabyte", vast, "its numbers need 8,000.0 GB of memory, and"),
    ("has an offset that is a fraction", headers(entry(0.0, 16.0)), HEADER),
    ("is cut off", save(GOOD)[:-8], "it was cut off or extended"),
    ("holds no tensors", save({}), "it holds no tensors"),
    ("holds NaN", of({A: torch.full((2, 16), torch.nan)}), "holds numbers that are not finite"),
    ("holds infinity", of({B: torch.full((16, 2), torch.inf)}), "holds numbers that are not finite"),
    ("has an alpha that is NaN", of({f"{PAIR}.alpha": torch.tensor(torch.nan)}), "holds numbers that are not finite"),
    ("has an alpha that is a vector", of({f"{PAIR}.alpha": torch.ones(2)}), "should be one number"),
    ("has A alone", save({A: GOOD[A]}), "is alone: B, the up matrix is missing"),
    ("has B alone", save({B: GOOD[B]}), "is alone: A, the down matrix is missing"),
    ("has alpha alone", save({f"{PAIR}.alpha": torch.ones(())}), "is alone"),
    ("has two ranks for one layer", of({B: torch.ones(16, 3)}), "which do not make a LoRA"),
    ("has rank 0", save({A: torch.ones(0, 16), B: torch.ones(16, 0)}), "which do not make a LoRA"),
    ("has whole numbers", of({A: torch.ones(2, 16, dtype=torch.int64)}), "of types I64 and F32"),
    ("was made for other widths", of({A: torch.ones(2, 24)}), "but the base's weight is"),
    ("was made for another model", save({"transformer.x.lora_A.weight": torch.ones(1)}), "not made for this base"),
    ("was made for Flux", other("lora_unet_double_blocks_0_img_mlp_0.lora_up"), "it is one of Flux (lora_unet_double"),
    (
        "was made for Stable Diffusion 3",
        other("lora_unet_joint_blocks_0_x.lora_up"),
        "it is one of Stable Diffusion 3 (",
    ),
    (
        "was made for another transformer",
        other("transformer.transformer_blocks.0.attn.to_q.lora_B"),
        "it is one of a diffusion transformer such as Stable Diffusion 3 (transformer.",
    ),
    ("has a bias", of({f"{PAIR}.lora.up.bias": torch.ones(16)}), "belongs to LoRA with a bias, which is not LoRA"),
    (
        "brings a learnt word of another family",
        of({"bundle_emb.sks.clip_l": torch.ones(1, 768)}),
        "its word 'sks' has vectors of 768 numbers",
    ),
    (
        "brings a word for a second text encoder",
        of({"bundle_emb.sks.clip_g": torch.ones(1, 1280)}),
        "its word 'sks' is for a text_encoder_2, which this base lacks; --allow-unmatched leaves it out",
    ),
    ("brings a learnt word", of({"bundle_emb.sks.emb_params": torch.ones(2, 16)}), "brings the word 'sks'", True),
    ("is LoHa", of({"lora_unet_x.hada_w1_a": torch.ones(2)}), "belongs to LoHa, which is not LoRA"),
    ("is LoKr", of({"lora_unet_x.lokr_w1": torch.ones(2)}), "belongs to LoKr, which is not LoRA"),
    ("is DoRA", of({"lora_unet_x.dora_scale": torch.ones(2)}), "belongs to DoRA, which is not LoRA"),
    ("is a checkpoint of a whole model", of({"conv_in.weight": torch.ones(2)}), "is not a key of a LoRA"),
    ("has settings that are not JSON", of({}, {"lora_adapter_metadata": "{"}), "lora_adapter_metadata is not a JSON"),
    ("has settings that are a list", of({}, {"lora_adapter_metadata": "[]"}), "lora_adapter_metadata is not a JSON"),
    ("has an alpha that is a text", of({}, {"lora_adapter_metadata": '{"unet.lora_alpha": "8"}'}), "is '8'"),
    ("is a pickle (.pt)", pickled, "a pickle, which can run code when it is opened, is not read"),
    ("is missing, but a pickle of the same name is there", pickle_beside, "a pickle, which can run code"),
    ("is not there", lambda place: place.folder / "gone.safetensors", "gone.safetensors: there is no such file"),
    ("is a folder without a LoRA", folder_without, "it holds neither pytorch_lora_weights.safetensors nor"),
    ("is a PEFT folder whose settings are not JSON", partial(peft_folder, text="{"), "adapter_config.json: Expecting"),
    ("is a PEFT folder whose settings are a list", partial(peft_folder, text="[]"), "settings are not a JSON object"),
    ("is a PEFT folder with a pattern without end", partial(peft_folder, text=SLOW), "could take forever to match"),
    ("is a PEFT file without its settings", peft_file_alone, "its scale is in adapter_config.json"),
    ("is the file in a PEFT folder", lambda place: peft_folder(place) / "adapter_model.safetensors", "wrote", True),
    ("is a PEFT folder", peft_folder, "wrote", True),
    ("is one that fits", lambda place: place.run, "wrote", True),
]

# ---------------------------------------------------------------------------------------- prompts

PROMPTS = [
    ("names a LoRA in the way of A1111", "a dog <lora:film:0.8>", "take it out and give --lora film.safetensors:0.8"),
    ("is empty", "", "wrote", True),
    ("is only spaces", "  ", "wrote", True),
    ("has 10,000 words", LONG, "a prompt is too long for the text encoder, which ignores the end: “…word", True),
    ("is emoji", "🐶🏽‍🦰", "wrote", True),
    ("is written from right to left", "كلب على الثلج", "wrote", True),
    ("has NUL in it", "a\0dog", "wrote", True),
    ("has bytes that are not UTF-8", "a\udcffdog", "on the command line holds bytes that are not UTF-8"),
]

# ------------------------------------------------------------------------------------- checkpoints


def resumed(place: Place, spoil: Callable[[Path], list[str] | None]) -> list[str]:
    """Resume a copy of the run after `spoil` has spoilt its checkpoints; `spoil` may return more settings."""
    out = place.copy(place.run, "out")
    more = spoil(out) or []
    words = json.loads((place.run / "words.json").read_text())
    return ["train", *words, "--output", str(out), "--resume", *more]


def another_run(out: Path) -> list[str]:
    return ["--seed", "7"]


def newest(change: Callable[[bytes], bytes], which: slice = slice(-1, None)) -> Callable[[Path], None]:
    def spoil(out: Path) -> None:
        for path in sorted((out / "checkpoints").iterdir())[which]:
            path.write_bytes(change(path.read_bytes()))

    return spoil


def without_metadata(content: bytes) -> bytes:
    return save(load(content))


def other_metadata(**changes) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        length = struct.unpack("<Q", content[:8])[0]
        about = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["minilora"]) | changes
        return save(load(content), {"minilora": json.dumps(about)})

    return change


def swapped(content: bytes) -> bytes:
    """Swap two bytes of the last tensor."""
    return content[:-2] + content[-1:] + content[-2:-1] if content[-1] != content[-2] else content[:-1] + b"?"


def no_checkpoint(out: Path) -> None:
    for path in (out / "checkpoints").iterdir():
        path.unlink()


def tensor_missing(content: bytes) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    about = json.loads(content[8 : 8 + length])["__metadata__"]
    return save(dict(list(load(content).items())[1:]), about)


ALL = slice(None)
GOING_ON = "is not a readable checkpoint"
CHECKPOINTS = [
    ("the newest is cut off", newest(lambda b: b[:-9]), GOING_ON, True),
    ("the newest is empty", newest(lambda b: b""), GOING_ON, True),
    ("the newest has two bytes swapped", newest(swapped), GOING_ON, True),
    ("the newest has no metadata", newest(without_metadata), GOING_ON, True),
    ("the newest has a step that is a text", newest(other_metadata(step="x")), GOING_ON, True),
    ("the newest lacks a tensor", newest(tensor_missing), GOING_ON, True),
    ("all are cut off", newest(lambda b: b[:-9], ALL), GOING_ON),
    ("all have two bytes swapped", newest(swapped, ALL), GOING_ON),
    ("all have no metadata", newest(without_metadata, ALL), GOING_ON),
    ("they are from another run", another_run, "belongs to another run: --seed was 0 and is 7"),
    ("there is none", no_checkpoint, "found no checkpoint", True),
]

VERSIONS = [
    ("--variant, which it does not have", ("--variant", "fp8"), "its unet does not load"),
    ("--revision, which only the hub has", ("--revision", "old"), "--revision old: --model"),
]

SIZES = [
    ("is two numbers with a comma", "16,8", "--size: '16,8' is not WIDTHxHEIGHT, in whole numbers"),
    ("lacks a height", "16x", "--size: '16x' is not WIDTHxHEIGHT, in whole numbers"),
    ("has three numbers", "16x8x8", "--size is 16x8x8; it takes WIDTHxHEIGHT, or the side of a square"),
    ("has no pixels", "16x0", "--size is 16x0; it must be at least 1"),
    ("is not a multiple of what the base needs", "16x10", "--size is 16x10; this base needs multiples of 8"),
]

BLOCKS = [
    ("lacks a factor", "up", "--lora-blocks up: it takes a block and a factor, as up=0.5"),
    ("has a factor that is not finite", "up=nan", "--lora-blocks up=nan: it takes a block and a factor"),
    ("names a block twice", "up=1,mid=1,up=2", "--lora-blocks names up twice"),
    ("names a block without a layer of the LoRA", "up_blocks.0=2", "--lora-blocks up_blocks.0: no layer of a LoRA is"),
    (
        "names the text encoders, which have no LoRA",
        "text=1",
        "--lora-blocks text: no layer of a LoRA is there; they are",
    ),
    ("is one that fits", "down=0,mid=-1,up_blocks.1=.5", "wrote", True),
]

TARGETS = [
    (
        "is a block that does not exist",
        "up_blocks.9:attention",
        "the blocks are down_blocks.0, down_blocks.1, mid_block,",
    ),
    (
        "is a block without such layers",
        "down_blocks.1:attention",
        "attention is in down_blocks.0, mid_block, up_blocks",
    ),
    ("is a block without layers after the colon", "mid_block:", "target 'mid_block:' matches no layer"),
    (
        "is a block of another family",
        "style",
        "'style' is a block that only Stable Diffusion XL and bases made of it have",
    ),
    ("is one that fits", "up_blocks.1:attention,mid_block:attention+ff", "trained    ", True),
]


def targeted(place: Place, text: str) -> list[str]:
    place.write("data/a.png", png())
    return train(place, "--caption", "x", "--targets", text)


ROOMS = {
    "Data folders": ("`--data` is", lambda place, what: what(place), FOLDERS),
    "metadata.jsonl": ("the file", metadata, TABLES),
    "metadata.csv": ("the file", partial(metadata, name="metadata.csv"), CSVS),
    "Captions": ("the .txt beside a picture", caption, CAPTIONS),
    "Pictures": ("a picture is", picture, PICTURES),
    "Config files": ("the file of `--config`", config, CONFIGS),
    "Bases": ("the folder of `--model`", base, BASES),
    "Versions of bases": ("given with a base in a folder", lambda place, words: sample(place, *words), VERSIONS),
    "Bases in a single file": ("the file of `--model`", single, SINGLES),
    "LoRA files": ("the file of `--lora`", lora, LORAS),
    "Prompts": ("`--prompt` of sample.py", lambda place, text: sample(place, prompt=text), PROMPTS),
    "Sizes": ("`--size` of sample.py", lambda place, text: sample(place, "--size", text), SIZES),
    "Blocks": (
        "`--lora-blocks` of sample.py",
        lambda place, text: sample(place, "--lora", place.run, "--lora-blocks", text),
        BLOCKS,
    ),
    "Targets": ("`--targets` of train.py", targeted, TARGETS),
    "Checkpoints": ("with `--resume`", resumed, CHECKPOINTS),
}
CASES = [Case(room, *row) for room, (_, _, rows) in ROOMS.items() for row in rows]


def page() -> str:
    """Return docs/bad_input.md."""
    lines = [
        "# Bad input",
        "",
        f"{len(CASES)} bad or unusual inputs, and what happens with each. A refused input ends with exit code 2 and a "
        "message on standard error that contains the words in the last column. No result file is then written.",
        "",
        "[`tests/bad_inputs/cases.py`](../tests/bad_inputs/cases.py) makes these inputs and writes this page; "
        "[`tests/bad_inputs/test_bad_inputs.py`](../tests/bad_inputs/test_bad_inputs.py) runs them.",
    ]
    for room, (about, _, rows) in ROOMS.items():
        lines += ["", f"## {room}", "", f"| {about} | result | output contains |", "|---|---|---|"]
        for case in (Case(room, *row) for row in rows):
            outcome = "works" if case.works else "exit code 2"
            lines.append(f"| {case.given} | {outcome} | {case.said.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(Path.cwd())}: {len(CASES)} cases")
