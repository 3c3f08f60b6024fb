"""Several processes that train one LoRA together: starting, stopping, ranks, and means over all.

`torchrun` starts the processes, and the environment of each has its rank and their number (the world).  Without
torchrun there is one process, of rank 0 in a world of 1, and nothing here communicates.
"""

import itertools
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..models.device import this_device
from ..settings.errors import UserError, first_line
from ..settings.shared import TIMEOUT
from .lost import is_loss, missing_ranks, tell_loss


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` counts from 0 to `world` - 1; `device` is its device.

    `local_rank` and `local_world` count the processes of one machine only.
    """

    rank: int
    world: int
    device: torch.device
    local_rank: int = 0
    local_world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes files."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.is_main:
            with suppress(OSError):  # the terminal was closed; the run goes on
                print(text, flush=True)


@contextmanager
def processes(timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """Within the block, this process is connected to the others that torchrun started.

    An inner block uses the same connection: joining again after leaving can hang, because torchrun's store still has
    the old addresses.  Raises UserError, naming the missing ranks, if other processes are lost or keep this one waiting
    for longer than `timeout`, in minutes.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = this_device()
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    # On GPUs, NCCL itself ends a process that waited too long; this makes it say for whom.
    os.environ.setdefault("TORCH_NCCL_DESYNC_DEBUG", "1")
    joining = world > 1 and not dist.is_initialized()
    if joining:
        backend, wait = dist.get_default_backend_for_device(device), timedelta(minutes=timeout)
        try:
            store = _store(timedelta(minutes=TIMEOUT))
            store.set_timeout(wait)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
        except dist.DistError as error:
            raise UserError(f"the {world} processes did not find each other: {first_line(error)}") from error
    local_rank, local_world = (int(os.environ.get(f"LOCAL_{name}", n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    try:
        yield Ranks(rank, world, device, local_rank, local_world)
    except RuntimeError as error:
        if not joining or not is_loss(error):
            raise
        raise UserError(tell_loss(error)) from error
    finally:
        if joining:
            dist.destroy_process_group()


def _store(timeout: timedelta) -> dist.Store:
    """Return a store of keys for all processes of this start, without anything from an earlier start.

    torchrun keeps one store over all its restarts.  It holds the addresses of dead processes, and joining with these
    hangs (torch 2.13).  So each process writes a random word, and process 0 answers with the word of this start, which
    becomes the prefix of all keys.
    """
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    word = start = uuid.uuid4().hex
    store.set(f"hello {rank}", word)
    if rank:
        store.wait([f"welcome {word}"])
        start = store.get(f"welcome {word}").decode()
        store.add(f"joined {start}", 1)
    until = time.monotonic() + timeout.total_seconds()
    while not rank and store.add(f"joined {start}", 0) < world - 1:
        there = [other for other in range(1, world) if store.check([f"hello {other}"])]
        for other in there:
            store.set(f"welcome {store.get(f'hello {other}').decode()}", start)
        if time.monotonic() > until:
            missing = sorted({*range(1, world)} - {*there}) or there
            raise dist.DistStoreError(f"process {', '.join(map(str, missing))} did not come")
        time.sleep(0.02)
    return dist.PrefixStore(start, store)


_places = itertools.count()


def wait_for_all() -> None:
    """Return when every process has called this."""
    if dist.is_initialized():
        store: Any = dist.group.WORLD.get_group_store()
        if missing_ranks(f"place {next(_places)}", store.timeout):
            raise dist.DistError(f"waited for longer than {store.timeout.total_seconds() / 60:g} minutes")


def decided_by_main(work: Callable):
    """Call `work` on the main process only, and return its result or raise its UserError on every process.

    So all processes agree on the content of the main process's disk, shared or not.
    """
    if not dist.is_initialized():
        return work()
    outcome: list = [None, None]  # result, what the user did wrong
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def refuse_differences(identity: dict) -> None:
    """Raise UserError, naming what differs, unless all processes train the same, as only gradients are exchanged."""
    if not dist.is_initialized():
        return
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, identity)
    first = everywhere[0]
    for rank, other in enumerate(everywhere):
        if differing := sorted(key for key in first | other if first.get(key) != other.get(key)):
            raise UserError(f"processes 0 and {rank} do not train the same; what differs: {', '.join(differing)}")


class BatchPlan:
    """How the positions of a step are divided into micro-batches, over accumulation rounds and processes.

    `batch` is the number of positions of a step over all processes.  `micro` is the size of a micro-batch; None means
    one micro-batch for each process.  Raises UserError, with the numbers, if the batch cannot be divided evenly.
    """

    def __init__(self, batch: int, micro: int | None, rank: int, world: int):
        self.batch, self.rank, self.world = batch, rank, world
        self.micro = micro or max(1, batch // world)
        self.rounds, left_over = divmod(batch, self.micro * world)
        if left_over or not self.rounds:
            raise UserError(
                f"--batch-size is {batch}; it cannot be divided into micro-batches of {self.micro} "
                f"on each of {world} processes"
            )

    def all_positions(self, step: int) -> range:
        """Return the positions of a step, over all processes."""
        return range(step * self.batch, (step + 1) * self.batch)

    def positions(self, step: int) -> list[range]:
        """Return this process's micro-batches of a step, each a range of positions."""
        starts = (step * self.batch + (n * self.world + self.rank) * self.micro for n in range(self.rounds))
        return [range(start, start + self.micro) for start in starts]

    def __str__(self) -> str:
        return f"{self.micro} pictures × {self.rounds} rounds × {self.world} processes"


class StopSignals:
    """Within a block, record SIGTERM, SIGINT and SIGHUP (a closed terminal) instead of ending at once.

    A second SIGINT, from a second Ctrl-C, ends the process at once.  The other signals may arrive several times for one
    reason: Slurm and shells send them to all processes, and torchrun passes them on.

    SIGUSR1 asks to save and draw now, not to stop.
    """

    def __enter__(self) -> "StopSignals":
        self.number: int | None = None
        self.is_wanted = False  # whether to save and draw now
        numbers = [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
        hangup = getattr(signal, "SIGHUP", None)  # Windows lacks it, and nohup ignores it
        if hangup and signal.getsignal(hangup) != signal.SIG_IGN:
            numbers.append(hangup)
        self.before: dict[int, Any] = {number: signal.signal(number, self._notice) for number in numbers}
        return self

    def _notice(self, number: int, frame) -> None:
        if number == getattr(signal, "SIGUSR1", None):
            self.is_wanted = True
            return
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, self.before[number])

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def seen_by_any(self, ranks: Ranks) -> tuple[bool, bool]:
        """Whether any process got a signal to stop, and whether one to save and draw; the same on all processes."""
        wanted, self.is_wanted = self.is_wanted, False
        if not dist.is_initialized():
            return self.number is not None, wanted
        seen = torch.tensor([float(self.number or 0), float(wanted)], device=ranks.device)
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        if seen[0]:
            self.number = int(seen[0])
        return bool(seen[0]), bool(seen[1])


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the mean of `values` over all processes, the same on each."""
    if dist.is_initialized():
        values = values.to(this_device())  # NCCL cannot send from CPU memory
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values
