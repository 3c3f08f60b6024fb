"""The commands: read the settings, do the work, tell a user's mistake in one line."""

import os
import sys
from collections.abc import Callable

from . import config


def train() -> None:
    """Train a LoRA on a folder of pictures."""
    settings = _read(config.TrainConfig, train.__doc__)
    from .training import Stopped, train as work  # after the settings: --help need not wait for torch

    try:
        _run(work, settings)
    except Stopped as stopped:
        if str(stopped):
            print(stopped)
        sys.exit(stopped.exit_code)


def sample() -> None:
    """Draw pictures with a base and any mix of LoRAs."""
    settings = _read(config.SampleConfig, sample.__doc__)
    from .sampling import sample as work

    _run(work, settings)


def _read(settings: type, description: str):
    return _run(lambda argv: config.read(settings, argv, description), sys.argv[1:])


def _run(work: Callable, argument):
    """Return `work(argument)`; for a mistake of the user's say it in one line and exit with 2."""
    try:
        return work(argument)
    except config.UserError as error:
        rank = int(os.environ.get("RANK", 0))
        print(f"error: {error}" if rank == 0 else f"error (process {rank}): {error}", file=sys.stderr)
        sys.exit(2)
