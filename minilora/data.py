"""A folder of pictures with captions, and what training sees of it.

`read_folder` finds every picture and caption, and everything that is wrong with them, before the
first step.  `Examples` then gives the batch of any positions: which picture, mirrored or not, which
caption, which noise, all by draws.py.

Pictures are encoded once.  The VAE gives each one not a latent but a gaussian over latents; its
mean and standard deviation are what is kept, and each draw takes a new sample from it.  They lie,
with the captions' vectors, in a cache whose file names are hashes of all that went in: a changed
picture, size or base is a new file, and nothing there can be stale.
"""

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from tqdm import tqdm

from . import draws
from .config import TrainConfig, UserError
from .diffusion import Conditioning
from .distributed import Ranks, wait_for_all
from .files import write_tensors
from .models import Base, Tokens


@dataclass(frozen=True)
class Item:
    """One picture of the folder: its file, a hash of the file's bytes, its size, its captions."""

    path: Path
    digest: str
    size: tuple[int, int]  # width and height, in pixels
    captions: tuple[str, ...]  # one or more


@dataclass(frozen=True)
class Batch:
    """What the U-Net is trained on at some positions; all on the device, first dimension the batch."""

    positions: tuple[int, ...]  # for an objective that draws numbers of its own
    latents: torch.Tensor  # (batch, channels, h, w)
    conditioning: Conditioning | Tokens  # of the captions
    noise: torch.Tensor  # (batch, channels, h, w)
    noise_offset: torch.Tensor  # (batch, channels, 1, 1)
    timesteps: torch.Tensor  # (batch,)
    weights: torch.Tensor  # (batch,), of each picture's loss


# ------------------------------------------------------------------------------------------ pictures


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


def cut_square(picture: Image.Image, side: int, place: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """Resize the short side to `side` pixels and cut out the square at `place`.

    `place` is 0 for left or top, 1 for right or bottom, 0.5 for the centre.
    """
    size, left, top = _cut(picture.size, side, place)
    return picture.resize(size, Image.Resampling.LANCZOS).crop((left, top, left + side, top + side))


def _cut(size: tuple[int, int], side: int, place: tuple[float, float]) -> tuple[tuple[int, int], int, int]:
    """Return the size that a picture is resized to, and left and top of the square at `place` in it."""
    scale = side / min(size)
    width, height = (max(side, round(n * scale)) for n in size)
    return (width, height), round((width - side) * place[0]), round((height - side) * place[1])


def as_tensor(picture: Image.Image) -> torch.Tensor:
    """Return an RGB picture as float32 in [-1, 1], (3, h, w)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def as_picture(pixels: torch.Tensor) -> Image.Image:
    """Return a (3, h, w) tensor in [-1, 1] as an RGB picture."""
    numbers = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(numbers.permute(1, 2, 0).numpy())


# ---------------------------------------------------------------------------------- folder -> items


# What Pillow raises for a file that is no picture, is cut off, or is a decompression bomb.
NO_PICTURE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)


def read_folder(config: TrainConfig) -> list[Item]:
    """Return the pictures of `config.data` with their captions, in the order of their names.

    Captions come from metadata.jsonl, or else from a .txt beside each picture, or else from
    --caption.  `config.data` may also be a single picture, whose caption is --caption.  Raises
    UserError with everything that is wrong with the folder, in one message.
    """
    folder = Path(os.path.normpath(config.data))
    if folder.is_file():
        return [_read_one(folder, config.caption)]
    if not folder.is_dir():
        raise UserError(f"--data {folder}: there is no such folder or picture")
    suffixes = Image.registered_extensions()
    inside = list(folder.rglob("*"))
    pictures = sorted(p for p in inside if p.suffix.lower() in suffixes and p.is_file())
    problems = [
        f"{p.relative_to(folder)} is a link to a folder, which is not followed; put the pictures themselves there"
        for p in inside
        if p.is_symlink() and p.is_dir()
    ]
    captions = _captions(folder, pictures, config, problems)
    pictures = sorted({*pictures, *captions})  # metadata may name a picture whatever its name ends with
    if not pictures and not problems:
        raise UserError(f"--data {folder}: there is no picture in it")
    items = []
    for path in pictures:
        if path not in captions:
            problems.append(f"{path.name} has no caption in metadata.jsonl or a .txt beside it; give one, or --caption")
        try:
            size = open_picture(path).size
        except NO_PICTURE as error:
            problems.append(f"{path.name} cannot be opened as a picture ({error})")
        else:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            items.append(Item(path, digest, size, captions.get(path, ())))
    if problems:
        raise UserError(f"--data {folder}: " + "; ".join(problems))
    return items


def _read_one(path: Path, caption: str | None) -> Item:
    if caption is None:
        raise UserError(f"--data {path}: one picture needs its --caption")
    try:
        size = open_picture(path).size
    except NO_PICTURE as error:
        raise UserError(f"--data {path}: it cannot be opened as a picture ({error})") from error
    return Item(path, hashlib.sha256(path.read_bytes()).hexdigest(), size, (caption,))


def _captions(
    folder: Path, pictures: list[Path], config: TrainConfig, problems: list[str]
) -> dict[Path, tuple[str, ...]]:
    """Return the captions by picture, and add what is wrong with them to `problems`."""
    metadata = folder / "metadata.jsonl"
    captions: dict[Path, tuple[str, ...]] = {}
    if metadata.exists():
        captions = _read_metadata(metadata, config.caption_column, problems)
    else:
        for picture in pictures:
            beside = picture.with_suffix(".txt")
            if beside.exists():
                captions[picture] = (_read_text(beside, problems).strip(),)
    if config.caption is not None:
        captions = dict.fromkeys(pictures, (config.caption,)) | captions
    return captions


def _read_text(path: Path, problems: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path.name} cannot be read as UTF-8 text ({error})")
        return ""


def _read_metadata(metadata: Path, column: str, problems: list[str]) -> dict[Path, tuple[str, ...]]:
    """Read metadata.jsonl: one object a line, with `file_name` and a text or a list of texts."""
    folder, captions = metadata.parent, {}
    for number, line in enumerate(_read_text(metadata, problems).splitlines(), start=1):
        where = f"metadata.jsonl line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            problems.append(f"{where} is not JSON ({error})")
            continue
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            problems.append(f"{where} has no file_name")
            continue
        name, texts = row["file_name"], row.get(column)
        path = Path(os.path.normpath(folder / name))
        texts = [texts] if isinstance(texts, str) else texts
        if not path.is_relative_to(folder):
            problems.append(f"{where}: {name} points outside the folder")
        elif not path.is_file():
            problems.append(f"{where}: there is no file {name}")
        elif not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
            others = ", ".join(key for key in row if key != "file_name") or "nothing else"
            problems.append(f"{where}: {column!r} holds no text; the line has {others} (see --caption-column)")
        elif path in captions:
            problems.append(f"{where}: {name} stands there twice")
        else:
            captions[path] = tuple(texts)
    return captions


# ------------------------------------------------------------------------------- items -> batches


_CUT = 1  # to be counted up when open_picture or cut_square come to give other pixels


class Examples:
    """What training sees at each position, with pictures and captions encoded once."""

    def __init__(
        self,
        items: list[Item],
        config: TrainConfig,
        resolution: int,
        encoders: Base,
        schedule_length: int,
        ranks: Ranks,
        class_items: Sequence[Item] = (),
    ):
        self.items, self.class_items = items, class_items
        self.config = config
        self.resolution = resolution
        self.schedule_length = schedule_length
        self.folder = Path(config.cache).expanduser()
        self.vae, self.text_encoder = encoders.encoder_fingerprints()
        self.is_xl, self.tokens = encoders.is_xl, lru_cache(maxsize=4096)(encoders.tokens)
        self.encoders = encoders if config.crop == "random" else None
        if self.encoders:
            ranks.say("note: --crop random shows no crop twice, so the VAE stays in memory and encodes each draw")
        for item in (*items, *class_items):
            if min(item.size) < resolution and ranks.is_main:
                small = f"{item.path} is {min(item.size)} pixels on its short side"
                print(f"warning: {small}; it is enlarged to {resolution}", file=sys.stderr)
        captions = sorted({caption for item in (*items, *class_items) for caption in (*item.captions, "")})
        if ranks.is_main and (cut := [caption for caption in captions if encoders.is_truncated(caption)]):
            print(
                f"warning: the text encoder sees only the beginning of {len(cut)} captions, as of {cut[0]!r}",
                file=sys.stderr,
            )
        self._fill(captions, encoders, ranks)
        encoders.release("text_encoder", "text_encoder_2")

    def batch(self, positions: Sequence[int], device: torch.device) -> Batch:
        """Return what stands at the given positions, whoever asks and in whichever order."""
        rows = [self._row(position) for position in positions]
        latents, told, *drawn = ([*column] for column in zip(*rows, strict=True))
        keys = told[0].keys()
        conditioning = {key: torch.stack([each[key] for each in told]).to(device) for key in keys}
        kind = Tokens if "tokens" in keys else Conditioning
        latents, *drawn = (torch.stack(column).to(device) for column in (latents, *drawn))
        return Batch(tuple(positions), latents, kind(**conditioning), *drawn)

    def picture_at(self, position: int) -> Item:
        """Return which picture stands at a position: at every other one, with --class-prompt, one of the class."""
        if not self.class_items:
            return self.items[draws.picture_at(self.config.seed, position, len(self.items))]
        items = self.class_items if position % 2 else self.items
        return items[draws.picture_at(self.config.seed, position // 2, len(items))]

    def _row(self, position: int) -> tuple[torch.Tensor, ...]:
        seed, item = self.config.seed, self.picture_at(position)
        mirrored = self.config.mirror and draws.uniform(seed, "mirror", position) < 0.5
        place = (0.5, 0.5)
        if self.encoders is None:
            encoded = _load(self._picture_file(item, mirrored))
            mean, std = encoded["mean"], encoded["std"]  # (channels, h, w) each
        else:
            place = tuple(draws.uniform(seed, f"crop {axis}", position) for axis in "xy")
            mean, std = self.encoders.encode_picture(self._pixels(item, mirrored, place))
        latents = mean + std * draws.gaussian(seed, "posterior", position, mean.shape)
        noise = draws.gaussian(seed, "noise", position, mean.shape)
        noise_offset = draws.gaussian(seed, "noise offset", position, (len(mean), 1, 1))
        low, high = self.config.timestep_range or (0, self.schedule_length)
        timestep = draws.integer(seed, "timestep", position, low, high)
        told = self._told(self.caption_at(position))
        if self.is_xl:
            told = told | {"sizes": self._sizes(item, mirrored, place)}
        weight = self.config.prior_weight if self.class_items and position % 2 else 1.0
        return latents, told, noise, noise_offset, torch.tensor(timestep), torch.tensor(weight)

    def _told(self, caption: str) -> dict[str, torch.Tensor]:
        """Return a caption's vectors or, where the text encoders are trained, its tokens."""
        if self.config.train_text_encoder:
            return {"tokens": self.tokens(caption)}
        return _load(self._caption_file(caption))

    def _sizes(self, item: Item, mirrored: bool, place: tuple[float, float]) -> torch.Tensor:
        """Return what Stable Diffusion XL is told of a picture: its size, where it was cut, and to what size; (6,)."""
        (width, height), side = item.size, self.resolution
        resized, left, top = _cut(item.size, side, place)
        left = resized[0] - side - left if mirrored else left
        return torch.tensor([height, width, top, left, side, side], dtype=torch.float32)

    def caption_at(self, position: int) -> str:
        """Return the caption at a position: one of the picture's, or none at all for caption dropout."""
        seed, captions = self.config.seed, self.picture_at(position).captions
        if draws.uniform(seed, "caption dropout", position) < self.config.caption_dropout:
            return ""
        return captions[draws.integer(seed, "caption", position, 0, len(captions))]

    def _pixels(self, item: Item, mirrored: bool, place: tuple[float, float] = (0.5, 0.5)) -> torch.Tensor:
        pixels = as_tensor(cut_square(open_picture(item.path), self.resolution, place))
        return pixels.flip(-1) if mirrored else pixels

    def _file(self, *ingredients) -> Path:
        name = hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _picture_file(self, item: Item, mirrored: bool) -> Path:
        return self._file("latents", _CUT, self.vae, item.digest, self.resolution, mirrored)

    def _caption_file(self, caption: str) -> Path:
        return self._file("text", self.text_encoder, caption)

    def _fill(self, captions: list[str], encoders: Base, ranks: Ranks) -> None:
        """Encode what the cache lacks, each process its share of the files."""

        def encode_caption(caption: str) -> dict[str, torch.Tensor]:
            told = encoders.encode_prompt(caption)
            return {"text": told.text[0]} | ({} if told.pooled is None else {"pooled": told.pooled[0]})

        def encode_picture(item: Item, mirrored: bool) -> dict[str, torch.Tensor]:
            mean, std = encoders.encode_picture(self._pixels(item, mirrored))
            return {"mean": mean, "std": std}

        jobs = {}
        if self.config.train_text_encoder:
            ranks.say("note: --train-text-encoder changes what captions mean, so they are encoded anew at each step")
        else:
            jobs = {self._caption_file(caption): partial(encode_caption, caption) for caption in captions}
        if self.encoders is None:
            for item in (*self.items, *self.class_items):
                for mirrored in (False, True) if self.config.mirror else (False,):
                    jobs[self._picture_file(item, mirrored)] = partial(encode_picture, item, mirrored)
        # Shared out over all processes; then, where machines do not share the folder, each makes the rest.
        for rank, world in ((ranks.rank, ranks.world), (ranks.local_rank, ranks.local_world)):
            share = [path for path in list(jobs)[rank::world] if not path.exists()]
            for path in tqdm(share, "encode", disable=not (ranks.is_main and share)):
                tensors = jobs[path]()
                if not all(tensor.isfinite().all() for tensor in tensors.values()):
                    raise UserError(f"the base gives numbers that are not finite for {jobs[path].args[0]}")
                write_tensors(path, tensors, {})
            wait_for_all()


@lru_cache(maxsize=4096)
def _load(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)
