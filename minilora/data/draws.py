"""Every random draw of a run, as a pure function of (seed, purpose, position).

A training run goes through an endless stream of positions 0, 1, 2, …  The picture at a position, its mirroring, its
timestep and its noise are each computed here from the seed, the name of the purpose and the position, and from nothing
else.  So it does not matter which process computes a draw, in which order, or whether the run was stopped in between.

The generator is Philox, which works like a block cipher: it turns (key, counter) into random bits (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", 2011).  The key holds the seed and the purpose, the counter the position.
"""

import hashlib
from functools import lru_cache

import numpy as np
import torch

_64_BITS = (1 << 64) - 1


def generator(seed: int, purpose: str, position: int) -> np.random.Generator:
    """Return the generator of one draw; equal arguments give equal numbers, on every machine."""
    purpose_key = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    # The position goes into the top word of the 256-bit counter: drawing advances the lowest word,
    # so the numbers of two positions can never overlap.
    return np.random.Generator(np.random.Philox(key=[seed & _64_BITS, purpose_key], counter=[0, 0, 0, position]))


def picture_at(seed: int, position: int, count: int, purpose: str = "order") -> int:
    """Return which of `count` pictures belongs to `position`: each epoch is a new permutation."""
    epoch, place = divmod(position, count)
    return int(_order(seed, epoch, count, purpose)[place])


@lru_cache(maxsize=64)
def _order(seed: int, epoch: int, count: int, purpose: str) -> np.ndarray:
    return generator(seed, purpose, epoch).permutation(count)


def uniform(seed: int, purpose: str, position: int) -> float:
    """Return a number drawn uniformly from [0, 1)."""
    return float(generator(seed, purpose, position).random())


def integer(seed: int, purpose: str, position: int, low: int, high: int) -> int:
    """Return an integer drawn uniformly from low, low + 1, …, high - 1."""
    return int(generator(seed, purpose, position).integers(low, high))


def dropout_mask(seed: int, purpose: str, position: int, count: int, dropout: float) -> torch.Tensor:
    """Return a dropout mask, (count,): 0 with probability p = `dropout`, else 1 / (1 − p), so that its mean is 1."""
    drawn = generator(seed, purpose, position).random(count, dtype=np.float32)
    return torch.from_numpy(drawn >= dropout) / (1 - dropout)


def gaussian(seed: int, purpose: str, position: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a float32 tensor of `shape` drawn from the standard normal distribution, on the CPU."""
    numbers = generator(seed, purpose, position).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(numbers)
