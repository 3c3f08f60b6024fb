"""The device that a process computes on: the CPU, or what torch calls an accelerator.

That is a CUDA GPU.  Apple's GPUs and others are used in the same way, but nobody has tried.  The environment variable
MINILORA_DEVICE=cpu makes a process use the CPU.
"""

import os

import torch

from ..settings.errors import UserError

CPU = torch.device("cpu")


def this_device() -> torch.device:
    """Return an accelerator for this process alone if the machine has any, else the CPU.

    Raises UserError if the machine has fewer accelerators than processes, or none of the kind in MINILORA_DEVICE.
    """
    kind = (torch.accelerator.current_accelerator(check_available=True) or CPU).type
    asked = os.environ.get("MINILORA_DEVICE") or kind
    if asked not in ("cpu", kind):
        there = "only cpu" if kind == "cpu" else f"cpu and {kind}"
        raise UserError(f"MINILORA_DEVICE is {asked}; this machine has {there}")
    if asked == "cpu":
        return CPU
    local_world, count = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.accelerator.device_count()
    if local_world > count:
        raise UserError(
            f"--nproc-per-node is {local_world}; this machine has {count} GPUs, and each process needs its own "
            "(or none, with MINILORA_DEVICE=cpu)"
        )
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))
