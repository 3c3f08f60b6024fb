"""Training examples: what belongs to each position of the endless stream 0, 1, 2, …

`Examples` returns the batch for any positions.  draws.py draws picture, mirroring, caption and noise; encoded.py has
encoded the pictures and captions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..diffusion import Conditioning
from ..models.text import Tokens
from . import buckets, draws
from .encoded import Encoded, View
from .folder import Item


@dataclass(frozen=True)
class Batch:
    """The training examples at some positions; all on the device, with the batch as first dimension."""

    positions: tuple[int, ...]  # for objectives with random draws of their own
    latents: torch.Tensor  # (batch, channels, h, w)
    conditioning: Conditioning  # of the captions
    noise: torch.Tensor  # (batch, channels, h, w)
    noise_offset: torch.Tensor  # (batch, channels, 1, 1)
    timesteps: torch.Tensor  # (batch,)
    weights: torch.Tensor  # (batch,), of each picture's loss
    where: torch.Tensor  # (batch, 1, h, w), mean 1: the weight of each place in the loss
    kept: Conditioning | None = None  # with --preserve: where to keep the base's prediction


class Examples(Encoded):
    """The training example at each position."""

    def batch(self, positions: Sequence[int], device: torch.device) -> Batch:
        """Return the batch at the given positions; it is the same on every process and in any order."""
        return self._collate(tuple(positions), [self._row(position) for position in positions], device)

    def fixed_batch(self, number: int, timesteps: dict[int, int], device: torch.device) -> Batch:
        """Return picture `number` at several timesteps; their keys determine the noise, which never changes."""
        view = View(self.items[number])
        latents, _ = self.gaussian(view)  # (channels, h, w)
        conditioning, where = self.conditioning(view.item.captions[0], view), self.where(view, latents)
        offset, one, rows = torch.zeros(len(latents), 1, 1), torch.tensor(1.0), []
        for n, t in timesteps.items():
            noise = draws.gaussian(0, f"validation {number}", n, latents.shape)
            rows.append((latents, conditioning, noise, offset, torch.tensor(t), one, where, None))
        return self._collate(tuple(timesteps), rows, device)

    def picture_at(self, position: int) -> Item:
        """Return the picture at a position; with --class-prompt every other one is a class picture."""
        if self.class_items:
            items = self.class_items if position % 2 else self.items
            return items[draws.picture_at(self.config.seed, position // 2, len(items))]
        if self.config.buckets:
            groups = list(self.buckets.values())
            counts = tuple(map(len, groups))
            bucket, number = buckets.picture_at(self.config.seed, position, counts, self.config.batch_size)
            return groups[bucket][number]
        return self.items[draws.picture_at(self.config.seed, position, len(self.items))]

    def view_at(self, position: int) -> View:
        """Return the view at a position: a variant of the picture or, without --variants, a newly drawn crop."""
        seed, item = self.config.seed, self.picture_at(position)
        mirrored = self.config.mirror and draws.uniform(seed, "mirror", position) < 0.5
        if self.config.variants or self.config.crop != "random":
            return self.view(item, mirrored, self.variant_at(position))
        return View(item, mirrored, (draws.uniform(seed, "crop x", position), draws.uniform(seed, "crop y", position)))

    def variant_at(self, position: int) -> int:
        """Return the number of the variant at a position; 0 without --variants."""
        return draws.integer(self.config.seed, "variant", position, 0, self.config.variants or 1)

    def caption_at(self, position: int) -> str:
        """Return the caption at a position: one of the picture's, or "" for caption dropout."""
        seed, captions = self.config.seed, self.picture_at(position).captions
        if draws.uniform(seed, "caption dropout", position) < self.config.caption_dropout:
            return ""
        caption = captions[draws.integer(seed, "caption", position, 0, len(captions))]
        return self.version(caption, self.variant_at(position))

    def _row(self, position: int) -> tuple[Any, ...]:
        """Return the example at a position, in the order of `Batch`."""
        config, view, caption = self.config, self.view_at(position), self.caption_at(position)
        mean, std = self.gaussian(view)  # (channels, h, w) each
        low, high = config.timestep_range or (0, self.schedule_length)
        return (
            mean + std * draws.gaussian(config.seed, "posterior", position, mean.shape),
            self.conditioning(caption, view),
            draws.gaussian(config.seed, "noise", position, mean.shape),
            draws.gaussian(config.seed, "noise offset", position, (len(mean), 1, 1)),
            torch.tensor(draws.integer(config.seed, "timestep", position, low, high)),
            torch.tensor(config.prior_weight if self.class_items and position % 2 else 1.0),
            self.where(view, mean),
            self.conditioning(self.kept_caption(caption), view) if config.preserve else None,
        )

    def _collate(self, positions: tuple[int, ...], rows: list[tuple], device: torch.device) -> Batch:
        """Stack rows, as `_row` returns them, into a batch."""

        def stack(column: Sequence[Any]) -> Any:
            if isinstance(column[0], dict):
                kind = Tokens if self.config.train_text_encoder else Conditioning
                return kind(**{name: stack([row[name] for row in column]) for name in column[0]})
            return None if column[0] is None else torch.stack(list(column)).to(device)

        return Batch(positions, *map(stack, zip(*rows, strict=True)))
