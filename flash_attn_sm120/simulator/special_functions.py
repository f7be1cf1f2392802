"""ex2, rcp and lg2 to the bit as a Hopper GPU's special function unit gives them.

The leading bits of the argument's fraction choose a segment; a parabola in the rest, whose square is cut early, is
summed in fixed point and cut to the result's width (Oberman and Siu, "A high-performance area-efficient multifunction
interpolator", 2005). Widths and complements are those that envytools (nvhw/sfu.c) documents for G80; an H200's results
agree wherever they were measured (tests/simulator/data/README.md), which leaves out ex2 in (-1, 0) and lg2 below 1.
Callers flush subnormals for .ftz; without it a subnormal result is rounded.
"""

from __future__ import annotations

import functools

import numpy as np

from .constants import FLOAT32_BITS
from .special_function_tables import EX2, LG2, RCP

_FRACTION = (1 << 23) - 1
_REST_BITS = 17


@functools.cache
def _squares() -> np.ndarray:
    """The unit's x * x >> 19 for every x of 17 bits: each partial product is cut by itself."""
    x = np.arange(1 << _REST_BITS)
    return sum((x >> bit & 1) * (x >> (18 - bit)) for bit in range(_REST_BITS)) >> 1


def _parabola(table: np.ndarray, fraction: np.ndarray, value_shift: int, curve_shift: int, rounding: int) -> np.ndarray:
    """The interpolated sum for a fraction of 23 bits, before it is cut."""
    bits = 23 - (table.shape[1].bit_length() - 1)
    segment, rest = fraction >> bits, fraction & ((1 << bits) - 1)
    value, slope, curvature = table[:, segment]
    square = _squares()[rest << (_REST_BITS - bits)]
    return (value << value_shift) + slope * rest + (curvature * square << curve_shift) + rounding


def _power_of_two(exponent: np.ndarray) -> np.ndarray:
    return ((exponent + 1023) << 52).view(np.float64)


def _split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exponent and fraction of 23 bits of float32 values, subnormal ones normalized: a float64 has no such."""
    bits = x.astype(np.float64).view(np.int64)
    return (bits >> 52 & 2047) - 1023, bits >> 29 & _FRACTION


def ex2(x: np.ndarray) -> np.ndarray:
    """2 ** x; x is cut to 23 bits after the binary point."""
    x = np.asarray(x, np.float32)
    fixed = (np.minimum(np.abs(x), 255) * np.float32(1 << 23)).astype(np.int64)
    # A negative x is complemented, not negated, unless it is whole.
    fixed = np.where(x < 0, np.where(fixed & _FRACTION, ~fixed, -fixed), fixed)
    mantissa = _parabola(EX2, fixed & _FRACTION, 13, 0, 0x17E2) >> 15
    result = (mantissa * _power_of_two((fixed >> 23) - 23)).astype(np.float32)
    return np.where(np.isnan(x), x, result)


def rcp(x: np.ndarray) -> np.ndarray:
    """1 / x."""
    x = np.asarray(x, np.float32)
    exponent, fraction = _split(x)
    mantissa = _parabola(RCP, fraction, 13, 0, 0x07E7) >> 15
    result = np.copysign(mantissa * _power_of_two(-24 - exponent), x).astype(np.float32)
    return np.where(np.isfinite(x) & (x != 0), result, 1 / x)


def lg2(x: np.ndarray) -> np.ndarray:
    """The logarithm of x to base 2."""
    x = np.asarray(x, np.float32)
    exponent, fraction = _split(x)
    # 36 bits after the binary point; a negative sum is complemented, not negated.
    logarithm = _parabola(LG2, fraction, 12, 1, 0x0345) >> 2
    fixed = (exponent << 36) + np.where((fraction == 0) & (exponent == 0), 0, logarithm)
    magnitude = np.where(fixed < 0, ~fixed, fixed) * 2.0**-36
    magnitude = (magnitude.view(np.int64) & FLOAT32_BITS).view(np.float64)
    result = np.where(fixed < 0, -magnitude, magnitude).astype(np.float32)
    return np.where(np.isfinite(x) & (x > 0), result, np.log2(x))
