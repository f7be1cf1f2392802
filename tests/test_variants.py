"""Every variant compiles for SM120 and SM121, spills nothing, and keeps two matrix warps on each sub-partition."""

import pytest

from flash_attn_sm120 import cli, dispatch

VARIANTS = dispatch.variants() if hasattr(dispatch, "variants") else []


def test_variants_are_distinct():
    if not VARIANTS:
        pytest.skip("dispatch.variants() isn't there yet")
    assert len(set(VARIANTS)) == len(VARIANTS)
    assert {problem.dtype for problem in VARIANTS} == {"bfloat16", "float16"}
    assert {problem.mask for problem in VARIANTS} == {"full", "causal", "local"}


@pytest.mark.parametrize("arch", cli.ARCHES)
@pytest.mark.parametrize("problem", VARIANTS, ids=cli.label)
def test_variant(problem, arch):
    pytest.importorskip("cutlass")
    row, good = cli.measure(problem, arch)
    assert good, row
