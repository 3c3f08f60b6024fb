"""The commands: read the settings, do the work, tell a user's mistake in one line."""

import os
import sys
from collections.abc import Callable

from . import config, sampling, training


def train() -> None:
    """Train a LoRA on a folder of pictures."""
    _run(config.TrainConfig, training.train, train.__doc__)


def sample() -> None:
    """Draw pictures with a base and any mix of LoRAs."""
    _run(config.SampleConfig, sampling.sample, sample.__doc__)


def _run(settings: type, work: Callable, description: str) -> None:
    """Do `work` on the settings of the command line; for a mistake of the user's exit with 2."""
    rank = int(os.environ.get("RANK", 0))
    try:
        work(config.read(settings, sys.argv[1:], description))
    except (config.UserError, OSError) as error:  # an OSError: a disk that is full, a folder that is not ours
        print(f"error: {error}" if rank == 0 else f"error (process {rank}): {error}", file=sys.stderr)
        sys.exit(2)
    except training.Stopped as stopped:
        if rank == 0:
            print(stopped)
        sys.exit(stopped.exit_code)
