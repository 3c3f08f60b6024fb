"""The number types of safetensors files, in numpy, which lacks three of them.

A floating-point number is a sign, an exponent and a fraction:

    F64        1 + 11 + 52 bits
    F32        1 +  8 + 23
    F16        1 +  5 + 10     up to 65 504
    BF16       1 +  8 +  7     the upper half of an F32
    F8_E5M2    1 +  5 +  2     the upper half of an F16
    F8_E4M3    1 +  4 +  3     up to 448; it has no infinity, and one NaN

`widen` converts numbers to float32 or float64, exactly.  `narrow` rounds them once to the nearest number of a type;
ties go to the number whose last bit is 0, as in IEEE 754 and torch.  A number that is too large becomes infinite, or in
F8_E4M3 the largest number.

Bits are moved by hand where numpy's own casts take several times as long.

An array of a type that numpy lacks is an array of records with a single field, named after the type.
Sources: IEEE 754-2019; Micikevicius et al., "FP8 formats for deep learning", 2022.
"""

import math
import threading

import numpy as np

BF16 = np.dtype([("BF16", "<u2")])
F8_E4M3, F8_E5M2 = np.dtype([("F8_E4M3", "u1")]), np.dtype([("F8_E5M2", "u1")])
# In the order in which safetensors lays tensors out in a file.
_IN_NUMPY: dict[str, str | np.dtype] = {
    **{"U64": "<u8", "I64": "<i8", "F64": "<f8", "F32": "<f4", "U32": "<u4", "I32": "<i4", "BF16": BF16},
    **{"F16": "<f2", "U16": "<u2", "I16": "<i2", "F8_E4M3": F8_E4M3, "F8_E5M2": F8_E5M2},
    **{"I8": "i1", "U8": "u1", "BOOL": "?"},
}
DTYPES: dict[str, np.dtype] = {name: np.dtype(dtype) for name, dtype in _IN_NUMPY.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The bits of the exponent and of the fraction.
_BITS = {"F64": (11, 52), "F32": (8, 23), "F16": (5, 10), "BF16": (8, 7), "F8_E4M3": (4, 3), "F8_E5M2": (5, 2)}
EPSILON = {name: 2.0**-fraction for name, (_, fraction) in _BITS.items()}
WEIGHTS = tuple(_BITS)  # the types that a weight can have

_kept = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an array in memory that this thread reuses: allocating pages would take as long as the sums."""
    size = math.prod(shape) * dtype.itemsize
    if len(getattr(_kept, name, b"")) < size:
        setattr(_kept, name, np.empty(size, np.uint8))
    return getattr(_kept, name)[:size].view(dtype).reshape(shape)


def widen(stored: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return floating-point numbers as float32, F64 as float64, exactly; in `out` if it is given.

    `out` may have a wider type.  Without it, float32 and float64 arrays are returned as they are, not copied.
    """
    if out is None and stored.dtype in (np.float32, np.float64):
        return stored
    if out is None:
        out = np.empty(stored.shape, np.float32)
    if stored.dtype == BF16 and out.dtype == np.float32:
        np.left_shift(stored.view(np.uint16), np.uint32(16), out=out.view(np.uint32))
    elif stored.dtype == BF16:
        out[...] = widen(stored)
    elif stored.dtype == np.float16 and out.dtype == np.float32:
        _from_f16(stored, out)
    elif stored.dtype in _STEPS:
        bits = stored.view(np.uint8)
        out[...] = _STEPS[stored.dtype][bits & 0x7F]
        np.copysign(out, bits.view(np.int8), out=out)
    else:
        out[...] = stored
    return out


def narrow(wide: np.ndarray, name: str) -> np.ndarray:
    """Return float32 or float64 numbers rounded once to the type of that name."""
    dtype = DTYPES[name]
    if dtype == BF16:
        return _to_bf16(wide.ravel()).reshape(wide.shape)
    if dtype in _STEPS:
        return _to_float8(wide.ravel(), dtype).reshape(wide.shape)
    if dtype == np.float16 and wide.dtype == np.float32:
        return _to_f16(wide.ravel()).reshape(wide.shape)
    with np.errstate(over="ignore"):
        return wide.astype(dtype)


def rounding_error(numbers: np.ndarray, name: str) -> np.ndarray:
    """Return the largest error of rounding each number to the type of that name: half its last place."""
    lowest = 2 - 2 ** (_BITS[name][0] - 1)  # the smallest exponent of a normal number
    sizes = np.maximum(np.abs(numbers), 2.0**lowest)
    return np.ldexp(EPSILON[name] / 2, np.frexp(sizes)[1] - 1)


def _from_f16(stored: np.ndarray, out: np.ndarray) -> None:
    """Move the bits to their places in float32, and multiply by 2^(127 - 15) to correct the exponents."""
    exponents = scratch("exponents", stored.shape, np.dtype(np.int16))
    np.bitwise_and(stored.view(np.int16), 0x7C00, out=exponents)
    if (exponents == 0x7C00).any():  # infinity or NaN, which would become numbers
        out[...] = stored
        return
    bits = np.left_shift(stored.view(np.int16), 13, out=out.view(np.int32), dtype=np.int32)
    bits &= np.int32(-0x70002000)  # keeps one of the four copies of the sign that widening an int16 makes
    out *= np.float32(2.0**112)


def _to_f16(wide: np.ndarray) -> np.ndarray:
    """Round each number to a whole number of last places, and store that with its exponent.

    A float16 of 2^e ≤ |x| < 2^(e + 1) is a whole number n of 2^(e − 10), stored as n + (e + 14) · 2^10; below
    2^-14 the last place stays that of e = −14.  In float32 the last place of 2^(e + 13) is the same 2^(e − 10), so
    the sum |x| + 2^(e + 13) is rounded to it, and has n in its lowest bits.
    """
    size, power = (scratch(name, wide.shape, np.dtype(np.float32)) for name in ("size", "power"))
    np.abs(wide, out=size)
    if not size.max(initial=0) < 65520:  # infinite when rounded, or NaN
        with np.errstate(over="ignore"):
            return wide.astype(np.float16)
    np.bitwise_and(wide.view(np.int32), 0x7F800000, out=power.view(np.int32))  # 2^e
    np.clip(power, np.float32(2.0**-14), np.float32(2.0**15), out=power)
    power *= np.float32(2.0**13)
    size += power
    bits, exponent = size.view(np.int32), power.view(np.int32)  # n + (e + 140) · 2^23, and (e + 140) · 2^23
    exponent >>= 13
    bits += exponent
    result = bits.astype(np.int16)  # the lower 16 bits of n + (e + 140) · 2^10
    result += 2048  # -126 · 2^10, modulo 2^16
    np.right_shift(wide.view(np.int32), 16, out=bits)
    sign = scratch("sign", wide.shape, np.dtype(np.int16))
    np.copyto(sign, bits, casting="unsafe")
    sign &= -0x8000
    result |= sign
    return result.view(np.float16)


def _to_bf16(wide: np.ndarray) -> np.ndarray:
    """Round to the upper halves of float32 numbers: add half of the last place, and drop the lower half."""
    bits = (_to_odd(wide) if wide.dtype == np.float64 else wide).view(np.uint32)
    half = np.right_shift(bits, 16, out=scratch("half", bits.shape, bits.dtype))
    half &= 1  # so that ties go to even: just under half of the last place for even numbers, half for odd ones
    half += 0x7FFF
    half += bits
    half >>= 16
    result = half.astype(np.uint16)
    result[np.isnan(wide)] = 0x7FC0  # for a NaN the sum may have overflowed
    return result.view(BF16)


def _to_odd(wide: np.ndarray) -> np.ndarray:
    """Return float64 numbers as float32; an inexact one becomes the neighbour whose last bit is 1.

    So a number near the midpoint of two BF16 numbers does not land on it, and rounding the result equals rounding the
    number once (Boldo and Melquiond, 2008).
    """
    with np.errstate(over="ignore"):
        near = wide.astype(np.float32)
    bits = near.view(np.uint32)
    even = (near != wide) & (bits & 1 == 0) & ~np.isnan(wide)
    bits += np.where(even, np.where(np.abs(near) > np.abs(wide), -1, 1), 0).astype(np.uint32)
    return near


def _steps(name: str, last: list[float]) -> np.ndarray:
    """Return the values of the 128 positive bit patterns, in float64; those of the last ones are given."""
    (exponent, fraction), bits = _BITS[name], np.arange(128)
    power, rest = bits >> fraction, bits & (2**fraction - 1)
    implied = np.where(power > 0, 2**fraction, 0)  # the leading 1, which subnormal numbers lack
    values = np.ldexp((implied + rest).astype(np.float64), np.maximum(power, 1) - 2 ** (exponent - 1) + 1 - fraction)
    values[-len(last) :] = last
    return values


_STEPS = {F8_E4M3: _steps("F8_E4M3", [np.nan]), F8_E5M2: _steps("F8_E5M2", [np.inf, np.nan, np.nan, np.nan])}


def _to_float8(wide: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round each number by searching the midpoints between neighbouring numbers of the type."""
    steps = _STEPS[dtype][np.isfinite(_STEPS[dtype])]
    if dtype == F8_E5M2:
        steps = np.append(steps, 2 * steps[-1] - steps[-2])  # the place of infinity
    middles = (steps[1:] + steps[:-1]) / 2
    size = np.abs(wide)
    below, above = (np.searchsorted(middles, size, side) for side in ("left", "right"))  # equal except at midpoints
    bits = np.where(below % 2, above, below).astype(np.uint8)
    bits[np.isnan(wide)] = 0x7F
    return (bits | np.signbit(wide).astype(np.uint8) << 7).view(dtype)
