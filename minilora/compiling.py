"""torch.compile: code made for one network and one shape of its inputs, instead of one operation after the other.

What is computed is the same, up to rounding: operations that follow each other are done in one go, without rounding
what lies between.  Making the code takes minutes, on the first pass and again for another shape; it is kept
on the disk (where TORCHINDUCTOR_CACHE_DIR says), so that the next run with the same shapes has it in seconds.
"""

import torch

from .config import UserError, first_line

# `dynamic`: with code for any shape torch 2.13 failed on a small U-Net, so each shape has code of its own.
# `deterministic`: else some ways to compute are tried out on a GPU, and the clock decides: a run would be no function.
HOW = {"dynamic": False, "options": {"deterministic": True}}


def check_compiler(device: torch.device) -> None:
    """Raise UserError unless torch.compile works on a device: it needs a C++ compiler, on a GPU triton, too."""

    def twice(x: torch.Tensor) -> torch.Tensor:
        return x + x

    try:
        torch.compile(twice, **HOW)(torch.ones(1, device=device))
    except Exception as error:  # each part of it has errors of its own
        raise UserError(f"--compile: torch.compile does not work here ({first_line(error)}); go without") from error
