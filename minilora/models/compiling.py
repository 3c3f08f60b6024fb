"""torch.compile: code made for one network and one shape of its inputs, instead of one operation after the other.

What is computed is the same, up to rounding: operations that follow each other are done in one go, without rounding
what lies between.  Making the code takes minutes, on the first pass and again for another shape; it is kept
on the disk (where TORCHINDUCTOR_CACHE_DIR says), so that the next run with the same shapes has it in seconds.
"""

import torch

from ..settings.errors import UserError, first_line


def compile_options(device: torch.device) -> dict:
    """Return how torch.compile is asked for on a device, as its arguments by name."""
    # Without `deterministic` some ways to compute are tried out on a GPU, and the clock decides between them.
    options = {"deterministic": True}
    if device.type == "cpu":
        # The compiler would lay out what convolutions see with the channels last, which is slower on a CPU.
        options["layout_optimization"] = False
    # With code for any shape (`dynamic`) torch 2.13 failed on a small U-Net, so each shape has code of its own.
    return {"dynamic": False, "options": options}


def check_compiler(device: torch.device) -> None:
    """Raise UserError unless torch.compile works on a device: it needs a C++ compiler, on a GPU triton, too."""

    def twice(x: torch.Tensor) -> torch.Tensor:
        return x + x

    try:
        torch.compile(twice, **compile_options(device))(torch.ones(1, device=device))
    except Exception as error:  # each part of it has errors of its own
        raise UserError(f"--compile: torch.compile does not work here ({first_line(error)}); go without") from error
