"""Encode once: the pictures and captions that the cache lacks, divided over the processes."""

import sys

from tqdm import tqdm

from ..data.encoded import is_whole
from ..data.examples import Examples
from ..models.base import Base
from ..models.text import warn_of_cuts
from .lost import heartbeat
from .ranks import Ranks, wait_for_all


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
