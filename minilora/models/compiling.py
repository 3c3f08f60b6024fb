"""torch.compile: makes code for one network and one input shape, instead of one operation after the other.

The results are the same up to rounding: several operations are fused into one, so values in between are not rounded.
Compiling takes minutes, on the first pass and again for each new shape.  The code is stored on disk (in
TORCHINDUCTOR_CACHE_DIR), so the next run with the same shapes loads it in seconds.
"""

import torch

from ..settings.errors import UserError, first_line


def compile_options(device: torch.device) -> dict:
    """Return the keyword arguments of torch.compile for a device."""
    # Without `deterministic`, torch times several kernels on a GPU and takes the fastest, which may vary between runs.
    options = {"deterministic": True}
    if device.type == "cpu":
        # The compiler would give convolutions channels-last inputs, which is slower on a CPU.
        options["layout_optimization"] = False
    # Each shape gets its own code: with `dynamic`, code for any shape, torch 2.13 failed on a small U-Net.
    return {"dynamic": False, "options": options}


def check_compiler(device: torch.device) -> None:
    """Raise UserError unless torch.compile works on a device: it needs a C++ compiler, and on a GPU also triton."""

    def twice(x: torch.Tensor) -> torch.Tensor:
        return x + x

    try:
        torch.compile(twice, **compile_options(device))(torch.ones(1, device=device))
    except Exception as error:  # the compiler's parts raise many kinds of errors
        raise UserError(f"--compile: torch.compile does not work here ({first_line(error)}); leave it out") from error
