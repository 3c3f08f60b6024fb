"""The pictures and captions of a run, each encoded once.

With --variants, a picture is encoded several times, with different crops and colours, and so is a caption, with its
tags in different orders.  The VAE turns a picture into a gaussian over latents.  Its mean and standard deviation are
stored, and each use draws a new sample.  They are in a cache, with the encoded captions.  The name of a file there is a
hash of all that it depends on: another picture, size or base has another file, so no file can be out of date.
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance

from ..files.tensors import read_checked, write_checked
from ..models.base import Base
from ..settings.errors import UserError
from ..settings.train import TrainConfig
from . import buckets, draws
from .buckets import Size
from .folder import ChangedError, Item, with_trigger, without_trigger
from .looks import forget
from .pictures import CENTRE, as_tensor, crop, crop_at

_CROP = 3  # increase this when open_picture or crop return different pixels
_MASK = 1  # the same for `mask`


@dataclass(frozen=True)
class View:
    """How a picture is shown: mirrored or not, the place of its crop (see `crop`), its colours."""

    item: Item
    mirrored: bool = False
    place: tuple[float, float] = CENTRE
    colours: tuple[float, ...] = ()  # factors of brightness, contrast and saturation; empty: unchanged


class Encoded:
    """The pictures and captions of a run, their variants, and their files in the cache."""

    def __init__(
        self,
        items: list[Item],
        config: TrainConfig,
        resolution: int,
        encoders: Base,
        schedule_length: int,
        sizes: Sequence[Size] = (),
        class_items: Sequence[Item] = (),
    ):
        self.items, self.class_items = items, class_items
        self.config = config
        self.resolution = resolution
        self.sizes = sizes or [(resolution, resolution)]  # the sizes to crop pictures to
        self.buckets: dict[Size, list[Item]] = {}
        for item in items:
            self.buckets.setdefault(self.size_of(item), []).append(item)
        self.schedule_length = schedule_length
        self.folder = Path(config.cache).expanduser()
        self._base = encoders
        self.is_xl, self.tokens = encoders.is_xl, lru_cache(maxsize=4096)(encoders.tokens)
        self.encoders = encoders if config.needs_vae else None
        texts = {caption for item in (*items, *class_items) for caption in item.captions}
        captions = {"", *(self.version(text, number) for text in texts for number in range(config.variants or 1))}
        self.captions = sorted(captions | ({*map(self.kept_caption, captions)} if config.preserve else set()))

    @property
    def vae(self) -> str:
        """The fingerprint of the VAE."""
        return self._base.encoder_fingerprints[0]

    @property
    def text_encoder(self) -> str:
        """The fingerprint of the text encoders and their tokenizers."""
        return self._base.encoder_fingerprints[1]

    def contents(self) -> list[list]:
        """Return the digest, the captions and, if it has a mask, the mask's digest of each picture, as JSON values."""
        items = (*self.items, *self.class_items)
        return [[item.digest, list(item.captions), *filter(None, [item.mask_digest])] for item in items]

    def content(self) -> str:
        """Return a hash of the pictures and their captions."""
        return hashlib.sha256(json.dumps(self.contents()).encode()).hexdigest()

    def size_of(self, item: Item) -> Size:
        """Return the width and height, in pixels, to crop a picture to."""
        return buckets.nearest(item.size, self.sizes)

    def view(self, item: Item, mirrored: bool, variant: int) -> View:
        """Return the view of a picture's variant, with its own random crop and colours."""

        def drawn(what: str) -> float:
            return draws.uniform(self.config.seed, f"{what} of {item.digest}", variant)

        place = (drawn("crop x"), drawn("crop y")) if self.config.crop == "random" else CENTRE
        jitter, colours = self.config.colour_jitter, ("brightness", "contrast", "saturation")
        return View(item, mirrored, place, tuple(1 + jitter * (2 * drawn(what) - 1) for what in colours if jitter))

    def version(self, caption: str, variant: int) -> str:
        """Return a variant of a caption: tags after the first --keep-tags are shuffled or left out."""
        config = self.config
        if not (config.shuffle_tags or config.tag_dropout):
            return caption
        tags = [tag.strip() for tag in (without_trigger(caption, config) if config.trigger else caption).split(",")]
        kept, rest = tags[: config.keep_tags], tags[config.keep_tags :]
        generator = draws.generator(config.seed, f"tags of {caption}", variant)
        rest = [tag for tag in rest if generator.random() >= config.tag_dropout]
        order = generator.permutation(len(rest)) if config.shuffle_tags else range(len(rest))
        return with_trigger(", ".join([*kept, *(rest[place] for place in order)]), config)

    def kept_caption(self, caption: str) -> str:
        """Return the caption at which --preserve keeps the base's prediction: --class-prompt, else without trigger."""
        return self.config.class_prompt or without_trigger(caption, self.config)

    def pixels(self, view: View) -> torch.Tensor:
        """Return a picture's pixels as training sees them, in [-1, 1], (3, h, w)."""
        try:
            picture = crop(view.item.open(), self.size_of(view.item), view.place)
        except ChangedError:  # perhaps not visible in the file's times, so the next run must read all files again
            forget(self.config.cache)
            raise
        kinds = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
        for kind, factor in zip(kinds, view.colours, strict=False):
            picture = kind(picture).enhance(factor)
        pixels = as_tensor(picture)
        return pixels.flip(-1) if view.mirrored else pixels

    def mask(self, view: View) -> torch.Tensor:
        """Return the mask of `pixels`, from 0 to 1 on the grid of the latents, (1, h, w)."""
        item, (w, h) = view.item, self.size_of(view.item)
        resized, left, top = crop_at(item.size, (w, h), view.place)
        per_latent, box = self._base.pixels_per_latent, Image.Resampling.BOX  # which keeps black 0 and white 1
        seen = item.open_mask().resize(resized, box).crop((left, top, left + w, top + h))
        mask = torch.from_numpy(np.array(seen.resize((w // per_latent, h // per_latent), box)))[None] / 255
        if not mask.any() and self.config.crop == "center":
            what = f"the mask of {item.path} is all black within the crop of {w} × {h} pixels"
            raise UserError(f"{what}; try --buckets or --crop random")
        return mask.flip(-1) if view.mirrored else mask

    def enlarged(self) -> list[str]:
        """Return a line for each picture that is smaller than its crop and must be enlarged."""
        lines = []
        for item in dict.fromkeys((*self.items, *self.class_items)):
            (width, height), (w, h) = item.size, self.size_of(item)
            if width < w or height < h:
                lines.append(f"{item.path} has {width} × {height} pixels; it is enlarged to fill {w} × {h}")
        return lines

    # ----------------------------------------------------------------------------- encoded

    def gaussian(self, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean and standard deviation of a picture's latents, (channels, h, w) each."""
        if self.encoders:
            return self.encoders.encode_picture(self.pixels(view))
        encoded = _load(self._picture_file(view))
        return encoded["mean"], encoded["std"]

    def where(self, view: View, latents: torch.Tensor) -> torch.Tensor:
        """Return the weight of each place of a picture, mean 1, (1, h, w): small and large masks count the same."""
        if not view.item.mask:
            return torch.ones_like(latents[:1])
        mask = self.mask(view) if self.encoders else _load(self._mask_file(view))["mask"]
        counts = 1 - (1 - self.config.outside) * (1 - mask)  # exactly 1 where white
        return counts / counts.mean().clamp(min=1e-9)  # a random crop may hold nothing that counts

    def conditioning(self, caption: str, view: View) -> dict[str, torch.Tensor]:
        """Return the conditioning: the caption's vectors or, if the text encoders are trained, its tokens."""
        trained = self.config.train_text_encoder
        conditioning = {"text": self.tokens(caption)} if trained else _load(self._caption_file(caption))
        if not self.is_xl:
            return conditioning
        # Stable Diffusion XL also gets the size of the picture, and the place and size of the crop.
        item, (w, h) = view.item, self.size_of(view.item)
        resized, left, top = crop_at(item.size, (w, h), view.place)
        left = resized[0] - w - left if view.mirrored else left
        sizes = [item.size[1], item.size[0], top, left, h, w]
        return conditioning | {"sizes": torch.tensor(sizes, dtype=torch.float32)}

    def to_encode(self, encoders: Base) -> tuple[dict[Path, Callable[[], None]], dict[Path, Callable[[], None]]]:
        """Return the files that the cache must hold, each with a function that writes it: captions, then pictures."""

        def encode_caption(caption: str) -> dict[str, torch.Tensor]:
            fields = vars(encoders.encode_prompt(caption))
            return {name: tensor[0] for name, tensor in fields.items() if tensor is not None}

        def encode_picture(view: View) -> dict[str, torch.Tensor]:
            return dict(zip(("mean", "std"), encoders.encode_picture(self.pixels(view)), strict=True))

        def crop_mask(view: View) -> dict[str, torch.Tensor]:
            return {"mask": self.mask(view)}

        views: list[View] = []
        if self.encoders is None:
            ways = (False, True) if self.config.mirror else (False,)
            each = itertools.product((*self.items, *self.class_items), ways, range(self.config.variants or 1))
            views = list(itertools.starmap(self.view, each))
        pictures = _jobs(self._picture_file, encode_picture, views)
        pictures |= _jobs(self._mask_file, crop_mask, [view for view in views if view.item.mask])
        captions = [] if self.config.train_text_encoder else self.captions
        return _jobs(self._caption_file, encode_caption, captions), pictures

    def _file(self, *ingredients) -> Path:
        name = hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _picture_file(self, view: View) -> Path:
        item, drawn = view.item, [] if (view.place, view.colours) == (CENTRE, ()) else [view.place, view.colours]
        return self._file("latents", _CROP, self.vae, item.digest, self.size_of(item), view.mirrored, *drawn)

    def _mask_file(self, view: View) -> Path:
        item, sizes = view.item, (self._base.pixels_per_latent, view.item.size, self.size_of(view.item))
        return self._file("mask", _MASK, item.mask_digest, item.mask == item.path, *sizes, view.mirrored, view.place)

    def _caption_file(self, caption: str) -> Path:
        return self._file("text", self.text_encoder, caption)


def _jobs(file_of: Callable, encode: Callable, things: Iterable) -> dict[Path, Callable[[], None]]:
    """Return the file of each thing, with a function that encodes the thing into its file."""

    def write(thing: View | str) -> None:
        tensors = encode(thing)
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise UserError(f"the base encodes {thing} to numbers that are not finite")
        write_checked(file_of(thing), tensors, {})

    return {file_of(thing): partial(write, thing) for thing in things}


@lru_cache(maxsize=4096)
def _load(path: Path) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(array) for key, array in read_checked(path)[0].items()}


def is_whole(path: Path) -> bool:
    """Whether a file of the cache exists and is intact; print a warning if it is damaged."""
    if not path.exists():
        return False
    try:
        _load(path)
    except (OSError, UserError) as error:
        print(f"warning: {error}; it will be written again", file=sys.stderr)
        return False
    return True
