"""d = a @ b + c to the bit as a Hopper tensor core sums it.

The products of one instruction and the accumulator are aligned to the largest exponent among them (a product's is the
sum of its operands', its significand lies in [1, 4)), cut to FRACTION_BITS towards zero, summed exactly, and the sum
is cut to float32 towards zero. The rule was fitted to f16 and bf16 mma.sync.m16n8k16 on an H200
(tests/simulator/data/README.md); FP8 and m16n8k8 follow it unmeasured. Fasi et al., "Numerical behavior of NVIDIA
tensor cores" (2021), describe the scheme; no source was found for what SM120's own tensor cores keep.
"""

from __future__ import annotations

import functools

import numpy as np

from .constants import FLOAT32_BITS

# Bits kept below the largest exponent.
FRACTION_BITS = 25
# Terms that one NumPy operation takes; four cut terms also stay within an int32.
_STEP = 4
# Where float32 holds the products exactly and int32 the cut terms; outside, float64 does.
_SAFE_EXPONENT = 100
# Of zeros, and of what isn't finite: far enough apart that sums of two tell which they hold.
_ZERO_EXPONENT, _HUGE_EXPONENT = -2000, 6000


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """d (rows, columns, n) of n float32 products: a is (k, rows, n), b (k, columns, n), c (rows, columns, n)."""
    largest, a, b = _largest_exponent(a, b, c), a[:, :, None], b[:, None]
    if largest.min() < -_SAFE_EXPONENT or largest.max() > _SAFE_EXPONENT:
        scale = np.ldexp(1.0, FRACTION_BITS - np.minimum(largest, 300).astype(np.int32))
        total = np.trunc(a * scale * b).sum(axis=0) + np.trunc(c * scale)
    else:
        scale = ((127 + FRACTION_BITS - largest.astype(np.int32)) << 23).view(np.float32)
        total = np.trunc(c * scale).astype(np.float64)
        _, product, term, part = _buffers(c.shape)
        for i in range(0, len(a), _STEP):
            np.multiply(a[i : i + _STEP], b[i : i + _STEP], out=product)
            np.multiply(product, scale, out=product)
            np.copyto(term, product, casting="unsafe")
            total += np.add.reduce(term, axis=0, out=part)
    return ((total.view(np.int64) & FLOAT32_BITS).view(np.float64) / scale).astype(np.float32)


def _largest_exponent(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """(rows, columns, n) of int16: what each sum is aligned to; 0 where every term is 0."""
    largest, a, b = _exponents(c), _exponents(a)[:, :, None], _exponents(b)[:, None]
    exponent, *_ = _buffers(c.shape)
    for i in range(0, len(a), _STEP):
        np.add(a[i : i + _STEP], b[i : i + _STEP], out=exponent)
        for each in exponent:
            np.maximum(largest, each, out=largest)
    largest[largest < _ZERO_EXPONENT // 2] = 0
    return largest


def _exponents(values: np.ndarray) -> np.ndarray:
    exponents = ((values.view(np.int32) >> 23) & 255).astype(np.int16) - np.int16(127)
    exponents[exponents == 128] = _HUGE_EXPONENT
    exponents[values == 0] = _ZERO_EXPONENT
    return exponents


@functools.lru_cache(maxsize=16)
def _buffers(shape: tuple[int, int, int]) -> tuple[np.ndarray, ...]:
    """Room for exponents, products, terms and their sum: fresh pages for them would cost as much as the arithmetic."""
    many = (_STEP, *shape)
    return np.empty(many, np.int16), np.empty(many, np.float32), np.empty(many, np.int32), np.empty(shape, np.int32)
