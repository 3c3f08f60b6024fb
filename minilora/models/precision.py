"""The number format to compute in: what --precision auto chooses.

bf16 and fp16 need half the memory of float32.  They are also faster if the hardware supports them; if not, each number
is converted back and forth, and a step can take fifty times as long.  bf16 has float32's range with fewer digits; fp16
has more digits than bf16 but a small range, so its gradients need a scaler.
"""

import time
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL = 100_000_000  # parameters; a smaller U-Net has no need to save memory or time


def choose(device: torch.device, parameters: int) -> tuple[str, str]:
    """Return the precision for a U-Net of that size on a device, and the reason in a few words."""
    if parameters < SMALL:
        return "fp32", "the base is small"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):  # Ampere and later
            return "bf16", "computed natively"
        return "fp16", "this GPU does not support bf16"
    if device.type != "cpu":
        return "fp32", f"half precision was not tried on {device.type}"
    times = speed_on_cpu("bf16")
    return ("bf16" if times > 1 else "fp32"), f"bf16 measured {times:.2g} times as fast as fp32"


def slow_precision(precision: str, device: torch.device, parameters: int) -> str:
    """Return a warning if the chosen precision is slower than fp32 on this processor, else ""."""
    if precision == "fp32" or device.type != "cpu" or parameters < SMALL:
        return ""
    if (times := speed_on_cpu(precision)) >= 1:
        return ""
    return (
        f"--precision {precision}: this processor was measured to be {1 / times:.2g} times slower with it than with "
        "fp32, so a step may take minutes; try --precision fp32"
    )


@cache
def speed_on_cpu(precision: str) -> float:
    """Measure how many times faster than float32 a precision is on the CPU, for a linear layer and a convolution."""
    return _seconds(torch.float32) / _seconds(DTYPES[precision])


def _seconds(dtype: torch.dtype) -> float:
    """Return the time of a forward and a backward pass: the shortest of three, because the first includes setup."""
    linear, convolution = nn.Linear(320, 1280).to(dtype), nn.Conv2d(64, 64, 3, padding=1).to(dtype)
    x, picture = (torch.ones(shape, dtype=dtype, requires_grad=True) for shape in ((1024, 320), (1, 64, 32, 32)))
    times = []
    for _ in range(3):
        began = time.perf_counter()
        (F.silu(linear(x)).sum() + convolution(picture).sum()).backward()
        times.append(time.perf_counter() - began)
    return min(times)
