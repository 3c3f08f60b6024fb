"""A lost process: the others notice it, name it, save the finished steps, and do not wait forever.

When a collective operation fails, its error says that a wait was too long or that a connection broke, but not which
process is missing.  So there is a roll call through the store, a small table of keys that all processes can reach: each
process answers, and the missing ranks are named.  A process that works alone for long, for example while encoding,
sends heartbeats.

`torch.distributed.monitored_barrier` cannot replace this (tried with torch 2.13): it has no heartbeats, tells only
process 0 who is missing, and does not name a process that died.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from ..settings.errors import first_line

ROLL_CALL = timedelta(seconds=10)  # the time to answer; living processes notice a loss at nearly the same time


def is_loss(error: RuntimeError) -> bool:
    """Whether an error means that another process ended, hangs, or cannot be reached."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def tell_loss(error: RuntimeError) -> str:
    """Return a message about a loss that names the ranks missing at a roll call."""
    reason = re.sub(r"^(\[.*?\] )+", "", first_line(error)).split(". ")[0]  # without the place in gloo, and its advice
    answers: list[list[int]] = []

    def ask() -> None:
        with suppress(RuntimeError):
            answers.append(missing_ranks("after a loss", ROLL_CALL))

    # The store is on the machine of process 0.  If that is gone, a request to the store may never return.
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
    """Call `save` if the block ends because another process was lost."""
    try:
        yield
    except RuntimeError as error:
        if is_loss(error):
            save()
        raise


def missing_ranks(place: str, patience: timedelta) -> list[int]:
    """Wait at `place` for all processes; return the missing ranks after `patience` without a heartbeat."""
    store, world = dist.group.WORLD.get_group_store(), dist.get_world_size()
    store.set(f"{place}: {dist.get_rank()}", "")
    if store.add(place, 1) == world:
        store.set(f"{place}: all", "")
    beats, until, pause = None, 0.0, 0.01
    while not store.check([f"{place}: all"]):
        before, beats = beats, store.add("heartbeats", 0)
        if beats != before:
            until = time.monotonic() + patience.total_seconds()
        elif time.monotonic() > until:
            return [rank for rank in range(world) if not store.check([f"{place}: {rank}"])]
        time.sleep(pause)
        pause = min(1.0, 1.5 * pause)
    return []


def heartbeat() -> None:
    """Tell the processes that wait for this one that it is still working."""
    if dist.is_initialized():
        dist.group.WORLD.get_group_store().add("heartbeats", 1)
