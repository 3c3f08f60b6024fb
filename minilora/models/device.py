"""The device that a process computes on."""

import os

import torch

from ..settings.errors import UserError


def this_device() -> torch.device:
    """Return where this process computes: its own GPU if there are any, else the CPU.

    Raises UserError if the machine has GPUs, but fewer than processes.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_world, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if local_world > gpus:
        raise UserError(f"--nproc-per-node is {local_world}; this machine has {gpus} GPUs, and a process needs its own")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
