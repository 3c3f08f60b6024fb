"""files/number_types.py: torch's casts as the oracle, for every pattern there is, and exact rounding from float64."""

import numpy as np
import pytest
import torch

from minilora.files.number_types import DTYPES, EPSILON, WEIGHTS, narrow, widen

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")  # NaN in, as it should be
TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TORCH |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
SHORT = [name for name in WEIGHTS if DTYPES[name].itemsize <= 2]


def every(name: str) -> np.ndarray:
    """Return every number of a short type, stored."""
    size = DTYPES[name].itemsize
    return np.arange(256**size, dtype=f"u{size}").view(DTYPES[name])


def in_torch(name: str, stored: np.ndarray) -> torch.Tensor:
    return torch.frombuffer(bytearray(stored.tobytes()), dtype=TORCH[name])


def same(one: np.ndarray, two: np.ndarray) -> bool:
    """Whether numbers are the same to the sign of zero; a NaN is a NaN, whose bits torch itself does not agree on."""
    return bool(((one == two) & (np.signbit(one) == np.signbit(two)) | np.isnan(one) & np.isnan(two)).all())


@pytest.mark.parametrize("name", SHORT)
def test_every_pattern_is_widened_as_by_torch_and_back_to_itself(name):
    stored = every(name)
    wide = widen(stored)
    assert wide.dtype == np.float32
    assert same(wide, in_torch(name, stored).float().numpy())
    assert same(widen(stored, np.empty(stored.shape)), wide.astype(np.float64))
    back = narrow(wide, name)
    number = ~np.isnan(wide)
    assert back[number].tobytes() == stored[number].tobytes()
    assert np.isnan(widen(back[~number])).all()


def numbers_to_round(name: str) -> np.ndarray:
    """Return float32 numbers: all of a type, the middles between them, those just beside, and random ones."""
    with np.errstate(over="ignore"):
        numbers = np.sort(widen(every(name)).astype(np.float64))
        middles = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)  # exact: one more bit
    largest = middles[np.isfinite(middles)].max()
    beyond = largest * np.array([1 + k * EPSILON[name] / 4 for k in range(9)])
    near = np.concatenate([numbers, middles, beyond, -beyond]).astype(np.float32)
    near = np.concatenate([near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))])
    patterns = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    return np.concatenate([near, patterns, np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45], np.float32)])


@pytest.mark.parametrize("name", SHORT)
def test_float32_is_rounded_as_by_torch(name):
    wide = numbers_to_round(name)
    assert same(widen(narrow(wide, name)), torch.from_numpy(wide).to(TORCH[name]).float().numpy())
    assert narrow(wide[:6].reshape(2, 3), name).shape == (2, 3)
    assert narrow(np.asarray(wide[0]), name).shape == ()


@pytest.mark.parametrize("name", SHORT)
def test_float64_is_rounded_once(name):
    """To the nearest number, of two to the even one; through float32 numbers beside a middle would go astray."""
    wide = numbers_to_round(name).astype(np.float64)
    wide = np.concatenate([wide, np.nextafter(wide, np.inf), np.nextafter(wide, -np.inf), [1e-300, -1e300]])
    wide = wide[~np.isnan(wide)]
    found = widen(narrow(wide, name), np.empty(wide.shape))
    stored = every(name)
    positive = widen(stored, np.empty(stored.shape))[: len(stored) // 2]
    positive = positive[np.isfinite(positive)]
    ladder = np.append(positive, 2 * positive[-1] - positive[-2])  # and what the next would be, too large
    size = np.abs(wide)
    above = np.searchsorted(ladder, size).clip(1, len(ladder) - 1)
    down, up = size - ladder[above - 1], ladder[above] - size  # exact, the two being near
    nearest = np.where((down < up) | (down == up) & (above % 2 == 1), above - 1, above)
    nearest = np.copysign(ladder[nearest], wide)
    too_large = np.abs(nearest) == ladder[-1]
    limit = positive[-1] if name == "F8_E4M3" else np.inf  # which has no infinity
    assert same(found[too_large], np.copysign(limit, wide[too_large]))
    assert same(found[~too_large], nearest[~too_large])


def test_float64_to_float32_is_numpys_own():
    wide = np.array([1 + 2.0**-24, 1e300, -1e-300, np.nan])
    assert same(narrow(wide, "F32"), torch.from_numpy(wide).float().numpy())
    assert narrow(wide, "F64").tobytes() == wide.tobytes()
