"""Encode once: the pictures and captions that the cache lacks, divided over the processes."""

import sys
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from ..data.buckets import Size, bucket_sizes
from ..data.encoded import is_whole
from ..data.examples import Examples
from ..data.folder import Item
from ..models.base import Base
from ..models.text import warn_of_cuts
from ..settings.errors import UserError
from ..settings.train import TrainConfig
from .lost import heartbeat
from .ranks import Ranks, wait_for_all


def encode(
    config: TrainConfig, base: Base, ranks: Ranks, items: list[Item], others: list[Item], held_out_items: list[Item]
) -> tuple[Examples, Examples | None]:
    """Return the encoded examples: of the training and class pictures, and of the held-out ones, if any."""
    resolution, sizes = sizes_for(base, config)
    if config.train_text_encoder:
        ranks.say("note: --train-text-encoder changes the encoding of captions, so they are encoded at each step")
    # Pictures and captions are encoded in float32: a VAE in half precision can overflow.
    encoders = Base.of(config, ranks.device, loras=config.base_lora)
    how = resolution, encoders, len(base.schedule), ranks, sizes
    examples = encoded_examples(items, config, *how, others)
    plain: dict[str, Any] = {"mirror": False, "crop": "center", "outside": 0.0, "variants": None, "keep_tags": 0}
    plain |= {"colour_jitter": 0.0, "shuffle_tags": False, "tag_dropout": 0.0}
    held_out = encoded_examples(held_out_items, replace(config, **plain), *how) if held_out_items else None
    encoders.release("text_encoder", "text_encoder_2", *([] if examples.encoders else ["vae"]))
    return examples, held_out


def encoded_examples(items, config, resolution: int, encoders: Base, length: int, ranks: Ranks, *more) -> Examples:
    """Return the examples of a run, after filling the cache for them; `more` is as `Examples` takes it."""
    examples = Examples(items, config, resolution, encoders, length, *more)
    if examples.encoders:
        ranks.say("note: --crop random never repeats a crop, so the VAE stays in memory and encodes each one")
        ranks.say("note: with --variants 10, each picture would have ten crops, encoded once")
    if ranks.is_main:
        for line in examples.enlarged():
            print(f"warning: {line}", file=sys.stderr)
        warn_of_cuts(encoders.tokenizers, examples.captions, "caption")
    fill_cache(examples, encoders, ranks)
    return examples


def fill_cache(examples: Examples, encoders: Base, ranks: Ranks) -> None:
    """Encode what the cache lacks, captions first; each process writes a part of the files."""
    for jobs in examples.to_encode(encoders):
        # All processes divide the work.  Then, if machines do not share the folder, each machine encodes the rest.
        for rank, world in ((ranks.rank, ranks.world), (ranks.local_rank, ranks.local_world)):
            share = [path for path in list(jobs)[rank::world] if not is_whole(path)]
            for path in tqdm(share, "encode", disable=not (ranks.is_main and share)):
                jobs[path]()
                heartbeat()
            wait_for_all()
        if not examples.config.train_text_encoder:  # (else they may hold a LoRA, and their output is not cached)
            encoders.release(*encoders.text_parts)  # the VAE needs gigabytes for a large picture


def sizes_for(base: Base, config: TrainConfig) -> tuple[int, list[Size]]:
    """Return the resolution of a run and, with --buckets, the sizes of its pictures; UserError if there is none."""
    resolution = config.resolution or base.resolution
    if not config.buckets:
        return resolution, []
    # Steps of 64 pixels, as is usual, would be too coarse for a miniature.
    multiple = max(64, base.side_multiple) if base.resolution >= 256 else base.side_multiple
    if sizes := bucket_sizes(resolution, multiple):
        return resolution, sizes
    raise UserError(f"--resolution is {resolution}; --buckets needs at least {multiple} on this base")


def notes(examples: Examples) -> list[str]:
    """Return lines about masks and --preserve, if there are any."""
    count, config, lines = sum(item.mask is not None for item in examples.items), examples.config, []
    if count:
        lines.append(f"masks      {count} of {len(examples.items)} pictures")
    if config.preserve:
        without = f"captions without {config.trigger!r}" if config.trigger else "the empty prompt"
        at = repr(config.class_prompt) if config.class_prompt else without
        lines.append(f"preserve   the base's predictions at {at}")
    return lines
