"""What training sees of the pictures that folder.py found.

`Examples` gives the batch of any positions: which picture, mirrored or not, which caption, which
noise, all by draws.py.

Pictures are encoded once.  The VAE gives each one not a latent but a gaussian over latents; its
mean and standard deviation are what is kept, and each draw takes a new sample from it.  They lie,
with the captions' vectors, in a cache whose file names are hashes of all that went in: a changed
picture, size or base is a new file, and nothing there can be stale.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from . import buckets, draws
from .buckets import Size
from .config import TrainConfig, UserError
from .distributed import Ranks, wait_for_all
from .files import write_tensors
from .folder import Item
from .models import Base
from .pictures import as_tensor, cut, open_picture


@dataclass(frozen=True)
class Batch:
    """What the U-Net is trained on at some positions; all on the device, first dimension the batch."""

    positions: tuple[int, ...]  # for an objective that draws numbers of its own
    latents: torch.Tensor  # (batch, channels, h, w)
    text: torch.Tensor  # (batch, tokens, width)
    noise: torch.Tensor  # (batch, channels, h, w)
    noise_offset: torch.Tensor  # (batch, channels, 1, 1)
    timesteps: torch.Tensor  # (batch,)


_CUT = 1  # to be counted up when open_picture or cut come to give other pixels


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
        sizes: Sequence[Size] = (),
    ):
        self.items = items
        self.config = config
        self.resolution = resolution
        self.sizes = sizes or [(resolution, resolution)]  # the pictures are cut to
        self.buckets: dict[Size, list[Item]] = {}
        for item in items:
            self.buckets.setdefault(self.size_of(item), []).append(item)
        self.schedule_length = schedule_length
        self.folder = Path(config.cache).expanduser()
        self.vae, self.text_encoder = encoders.encoder_fingerprints()
        self.encoders = encoders if config.crop == "random" else None
        if self.encoders:
            ranks.say("note: --crop random shows no crop twice, so the VAE stays in memory and encodes each draw")
        for item in dict.fromkeys(items):
            (width, height), (w, h) = item.size, self.size_of(item)
            if (width < w or height < h) and ranks.is_main:
                small = f"{item.path} has {width} × {height} pixels"
                print(f"warning: {small}; it is enlarged to fill {w} × {h}", file=sys.stderr)
        captions = sorted({caption for item in items for caption in (*item.captions, "")})
        if ranks.is_main and (cut := [caption for caption in captions if encoders.is_truncated(caption)]):
            print(
                f"warning: the text encoder sees only the beginning of {len(cut)} captions, as of {cut[0]!r}",
                file=sys.stderr,
            )
        self._fill(captions, encoders, ranks)
        encoders.release("text_encoder")

    def batch(self, positions: Sequence[int], device: torch.device) -> Batch:
        """Return what stands at the given positions, whoever asks and in whichever order."""
        rows = [self._row(position) for position in positions]
        columns = (torch.stack(column).to(device) for column in zip(*rows, strict=True))
        return Batch(tuple(positions), *columns)

    def fixed_batch(self, number: int, timesteps: dict[int, int], device: torch.device) -> Batch:
        """Return picture `number` at timesteps, each with the noise of its own key, the same in every run."""
        item = self.items[number]
        latents = _load(self._picture_file(item, mirrored=False))["mean"]  # (channels, h, w)
        text = _load(self._caption_file(item.captions[0]))["text"]  # (tokens, width)
        offset, draw = torch.zeros(len(latents), 1, 1), partial(draws.gaussian, 0, f"validation {number}")
        rows = [(latents, text, draw(n, latents.shape), offset, torch.tensor(t)) for n, t in timesteps.items()]
        columns = (torch.stack(column).to(device) for column in zip(*rows, strict=True))
        return Batch(tuple(timesteps), *columns)

    def content(self) -> str:
        """Return a hash of the pictures and their captions."""
        pictures = json.dumps([[item.digest, item.captions] for item in self.items])
        return hashlib.sha256(pictures.encode()).hexdigest()

    def picture_at(self, position: int) -> Item:
        """Return which picture stands at a position."""
        if self.config.buckets:
            groups = list(self.buckets.values())
            counts = tuple(map(len, groups))
            bucket, number = buckets.picture_at(self.config.seed, position, counts, self.config.batch_size)
            return groups[bucket][number]
        return self.items[draws.picture_at(self.config.seed, position, len(self.items))]

    def size_of(self, item: Item) -> Size:
        """Return the width and height that training sees a picture in, in pixels."""
        return buckets.nearest(item.size, self.sizes)

    def _row(self, position: int) -> tuple[torch.Tensor, ...]:
        seed, item = self.config.seed, self.picture_at(position)
        mirrored = self.config.mirror and draws.uniform(seed, "mirror", position) < 0.5
        if self.encoders is None:
            encoded = _load(self._picture_file(item, mirrored))
            mean, std = encoded["mean"], encoded["std"]  # (channels, h, w) each
        else:
            place = tuple(draws.uniform(seed, f"crop {axis}", position) for axis in "xy")
            mean, std = self.encoders.encode_picture(self._pixels(item, mirrored, place))
        latents = mean + std * draws.gaussian(seed, "posterior", position, mean.shape)
        noise = draws.gaussian(seed, "noise", position, mean.shape)
        noise_offset = draws.gaussian(seed, "noise offset", position, (len(mean), 1, 1))
        timestep = draws.integer(seed, "timestep", position, 0, self.schedule_length)
        text = _load(self._caption_file(self.caption_at(position)))["text"]  # (tokens, width)
        return latents, text, noise, noise_offset, torch.tensor(timestep)

    def caption_at(self, position: int) -> str:
        """Return the caption at a position: one of the picture's, or none at all for caption dropout."""
        seed, captions = self.config.seed, self.picture_at(position).captions
        if draws.uniform(seed, "caption dropout", position) < self.config.caption_dropout:
            return ""
        return captions[draws.integer(seed, "caption", position, 0, len(captions))]

    def _pixels(self, item: Item, mirrored: bool, place: tuple[float, float] = (0.5, 0.5)) -> torch.Tensor:
        pixels = as_tensor(cut(open_picture(item.path), self.size_of(item), place))
        return pixels.flip(-1) if mirrored else pixels

    def _file(self, *ingredients) -> Path:
        name = hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _picture_file(self, item: Item, mirrored: bool) -> Path:
        return self._file("latents", _CUT, self.vae, item.digest, self.size_of(item), mirrored)

    def _caption_file(self, caption: str) -> Path:
        return self._file("text", self.text_encoder, caption)

    def _fill(self, captions: list[str], encoders: Base, ranks: Ranks) -> None:
        """Encode what the cache lacks, each process its share of the files."""

        def encode_caption(caption: str) -> dict[str, torch.Tensor]:
            return {"text": encoders.encode_prompt(caption)}

        def encode_picture(item: Item, mirrored: bool) -> dict[str, torch.Tensor]:
            mean, std = encoders.encode_picture(self._pixels(item, mirrored))
            return {"mean": mean, "std": std}

        jobs = {self._caption_file(caption): partial(encode_caption, caption) for caption in captions}
        if self.encoders is None:
            for item in self.items:
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
