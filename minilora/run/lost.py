"""A process that is lost: others notice, name it, save what is done, and do not wait for it for ever.

Processes meet in collective operations, which say that they waited too long or that a connection broke, and
not who is missing.  So there is a roll call by way of the store, a small table of keys that all can reach: each
writes that it has come to a place, and whoever has not is named.  A process that works on alone for long,
as one that encodes, gives heartbeats meanwhile.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from ..settings.errors import first_line

ROLL_CALL = timedelta(seconds=10)  # for those that are still there; they notice a loss at nearly the same time


def is_loss(error: RuntimeError) -> bool:
    """Whether an error says that another process ended, hangs, or cannot be reached."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def tell_loss(error: RuntimeError) -> str:
    """Return what there is to say of a loss: who does not answer when all are called."""
    reason = re.sub(r"^(\[.*?\] )+", "", first_line(error)).split(". ")[0]  # without where in gloo, and its advice
    answers: list[list[int]] = []

    def ask() -> None:
        with suppress(RuntimeError):
            answers.append(missing_ranks("after a loss", ROLL_CALL))

    # The store is on the machine of process 0: where that is gone, a question to it may wait for ever.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * ROLL_CALL.total_seconds())
    if not answers:
        return f"the machine of process 0 cannot be reached: {reason}"
    [missing] = answers
    if not missing:
        return f"the processes lost each other: {reason}"
    return f"process {', '.join(map(str, missing))} ended, hangs or cannot be reached: {reason}"


@contextmanager
def rescue(save: Callable) -> Iterator[None]:
    """Do `save` if the block ends since another process was lost."""
    try:
        yield
    except RuntimeError as error:
        if is_loss(error):
            save()
        raise


def missing_ranks(place: str, patience: timedelta) -> list[int]:
    """Come to a place, wait for all others, and return those without a heartbeat for as long as `patience`."""
    store, world = dist.group.WORLD.get_group_store(), dist.get_world_size()
    store.set(f"{place}: {dist.get_rank()}", "")
    if store.add(place, 1) == world:
        store.set(f"{place}: all", "")
    signs, until, pause = None, 0.0, 0.01
    while not store.check([f"{place}: all"]):
        before, signs = signs, store.add("heartbeats", 0)
        if signs != before:
            until = time.monotonic() + patience.total_seconds()
        elif time.monotonic() > until:
            return [rank for rank in range(world) if not store.check([f"{place}: {rank}"])]
        time.sleep(pause)
        pause = min(1.0, 1.5 * pause)
    return []


def heartbeat() -> None:
    """Tell those that wait for this process that it is at work, for as long as that may take."""
    if dist.is_initialized():
        dist.group.WORLD.get_group_store().add("heartbeats", 1)
