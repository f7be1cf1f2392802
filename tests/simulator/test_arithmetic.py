"""The simulator's sums of products and approximated functions: an H200's results (data/README.md) and error bounds."""

from pathlib import Path

import numpy as np
import pytest
from ptx_harness import elementwise

from flash_attn_sm120.simulator.special_functions import ex2, lg2, rcp
from flash_attn_sm120.simulator.tensor_core import multiply_add

MEASURED = np.load(Path(__file__).parent / "data" / "h200.npz")


def assert_same_bits(result, expected):
    np.testing.assert_array_equal(result.view(np.uint32), expected.view(np.uint32))


def operand(bits, kind):
    """float32 of f16 or bf16 bits."""
    return (
        bits.view(np.float16).astype(np.float32) if kind == "f16" else (bits.astype(np.uint32) << 16).view(np.float32)
    )


def products(a, b, c):
    """a @ b + c for stacks (n, 16, 16), (n, 16, 8), (n, 16, 8)."""
    a, b, c = (
        np.ascontiguousarray(x, np.float32) for x in (a.transpose(2, 1, 0), b.transpose(1, 2, 0), c.transpose(1, 2, 0))
    )
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(multiply_add(a, b, c).transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["ex2", "rcp", "lg2"])
def test_special_functions_as_measured(name):
    arguments, results = MEASURED[name]
    assert_same_bits(elementwise(f"{name}.approx.ftz.f32 %o, %a;", [arguments], np.float32), results)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_products_as_measured(kind):
    a, b = (operand(MEASURED[f"{kind}_{name}"], kind) for name in "ab")
    c, d = MEASURED[f"{kind}_c"], MEASURED[f"{kind}_d"]
    assert_same_bits(products(a, b, c), d)
    # The order of the terms doesn't matter, nor where in float32's range they are.
    order = np.random.default_rng(1).permutation(16)
    assert_same_bits(products(a[:, :, order], b[:, order], c), d)
    for scale in (2.0**-85, 2.0**90):
        assert_same_bits(products(a * np.float32(scale), b, c * np.float32(scale)), d * np.float32(scale))


def test_products_error():
    """Each term loses less than 2^-25 of the largest exponent, the sum less than its last place."""
    rng = np.random.default_rng(2)
    a, b, c = (
        rng.standard_normal((40, *s)) * 2.0 ** rng.integers(-9, 9, (40, *s)) for s in ((16, 16), (16, 8), (16, 8))
    )
    a, b = a.astype(np.float16).astype(np.float64), b.astype(np.float16).astype(np.float64)
    c = c.astype(np.float32).astype(np.float64)
    exact = a @ b + c
    largest = np.maximum((np.abs(a)[..., None] * np.abs(b)[:, None]).max(axis=2), np.abs(c))
    assert (np.abs(products(a, b, c) - exact) <= 17 * 2.0**-25 * largest + 2.0**-23 * np.abs(exact)).all()


@pytest.mark.parametrize(
    "a, b, c, expected",
    [
        (0, 1, 0, 0), (0, 2.0**120, 2.0**-40, 2.0**-40), (np.inf, 1, 5, np.inf), (np.inf, 0, 5, np.nan),
        (1, np.nan, 5, np.nan), (1, 1, -np.inf, -np.inf), (2.0**-80, 2.0**-40, 0, 2.0**-116),
        (2.0**70, 2.0**70, 0, np.inf),
        (1, 2.0**-26, 1, 1), (1, 2.0**-25, 1, 1 + 2.0**-21), (-1, 2.0**-27, 0.5, 0.5), (-1, 2.0**-25, 1, 1 - 2.0**-21),
    ],
)  # fmt: skip
def test_products_special_values(a, b, c, expected):
    """16 equal products and an accumulator."""
    result = products(*(np.full((1, *s), x) for s, x in (((16, 16), a), ((16, 8), b), ((16, 8), c))))
    np.testing.assert_array_equal(result, np.full((1, 16, 8), expected, np.float32))


@pytest.mark.parametrize(
    "function, exact, low, high, bound",
    [
        (ex2, np.exp2, -2, 2, 2**-22),
        (rcp, np.reciprocal, 1, 4, 2**-23),
        (lg2, np.log2, 2, 8, 2**-22),
    ],
)
def test_special_functions_error(function, exact, low, high, bound):
    """The relative error that PTX documents, and no step back, across every segment."""
    x = np.linspace(low, high, 1_000_001, dtype=np.float32)
    result, expected = function(x), exact(x.astype(np.float64))
    assert (np.abs(result - expected) <= bound * np.abs(expected)).all()
    steps = np.diff(result)
    assert (steps <= 0).all() if function is rcp else (steps >= 0).all()


def test_special_functions_without_flush():
    """Subnormal arguments and results; the unit's own error at a power of two is below 2^-23."""
    np.testing.assert_array_equal(ex2(np.float32([-127, -149, -151])), np.float32([2.0**-127, 2.0**-149, 0]))
    np.testing.assert_array_equal(rcp(np.float32([2.0**127, 2.0**-127])), np.float32([2.0**-127, 2.0**127]))
    np.testing.assert_allclose(lg2(np.float32([2.0**-127, 2.0**-149])), [-127, -149], rtol=2.0**-23)
