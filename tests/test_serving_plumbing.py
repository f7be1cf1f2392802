"""The way from a server's call to a kernel, the reference in the kernel's place; and that the cases find faults."""

import pytest
import serving_cases
import stand_in
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from serving_cases import Case, cases
from test_hypothesis import EXAMPLES

from flash_attn_sm120 import calls, reference
from flash_attn_sm120.launchers import launches_on_cpu

CPU = torch.device("cpu")
few = settings(max_examples=2 * EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
PREFILL = cases(rows=60, keys=90, most_heads=8, splits=(0, 1))
DECODE = cases(rows=16, keys=200, most_heads=16, splits=(0, 32))


def each(strategy, body):
    @few
    @given(strategy)
    def examples(case):
        note(str(case))
        body(case)

    examples()


def test_prefill(reference_kernels):
    each(PREFILL, lambda case: serving_cases.run(case, CPU))
    each(PREFILL, lambda case: serving_cases.run_padded(case, CPU))


def test_decode(reference_kernels):
    each(DECODE, lambda case: serving_cases.run(case, CPU))
    each(DECODE, lambda case: serving_cases.run_padded(case, CPU))
    each(DECODE, lambda case: serving_cases.run_split_and_whole(case, CPU))


def test_ranks(reference_kernels):
    each(st.tuples(PREFILL, st.integers(2, 4)), lambda pair: serving_cases.run_ranks(*pair, CPU))
    each(st.tuples(DECODE, st.integers(2, 4)), lambda pair: serving_cases.run_ranks(*pair, CPU))


def test_far_window(reference_kernels, monkeypatch):
    case = Case([3, 1], [700, 900], mask="local", window=(30, 0))
    with pytest.raises(AssertionError, match="out is off by"):  # the reference reads it all
        serving_cases.run_far_window(case, CPU, 256)
    monkeypatch.setattr(reference, "_pages", near_pages)
    serving_cases.run_far_window(case, CPU, 256)


def near_pages(table, seqused_k, page_size, pages=reference._pages):
    """The first row in the place of those that no row of the case sees."""
    found = []
    for page, row in pages(table, seqused_k, page_size):
        last = row.new_full((1,), len(row) - 1)
        index = torch.where(torch.arange(len(row)) < len(row) - 280, last, torch.arange(len(row)))
        found.append((page[index], row[index]))
    return found


FAULTS = {
    "learnable_sink": {"sink": torch.bfloat16},
    "alibi_slopes": {"slopes": "heads"},
    "k_descale": {"scales": "each"},
    "v_descale": {"scales": "(1,)"},
    "attention_chunk": {"chunk": 7},
    "cp_rank": {"slopes": "heads"},
    "page_table": {},
    "seqused_k": {},
}


@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize("name", FAULTS)
def test_a_kernel_that_forgets_something_is_found(name, rows, monkeypatch):
    case = Case([rows, rows], [90, 61], **FAULTS[name])
    right = reference.attention

    def forgetful(q, k, v, *, dtype=torch.float32, **options):
        if dtype is not torch.float32 or not forgetful.on:
            return right(q, k, v, dtype=dtype, **options)
        if name == "page_table":
            options[name] = options[name].clamp(0, len(k) - 1).roll(1, 0)
        elif name == "seqused_k":
            options[name] = options[name] - 1
        else:
            options.pop(name)
        return right(q, k, v, dtype=dtype, **options)

    def load(problem):
        launch = stand_in.load(problem)

        def faulty(*values):
            forgetful.on = True
            launch(*values)
            forgetful.on = False

        return faulty

    forgetful.on = False
    monkeypatch.setattr(reference, "attention", forgetful)
    calls.forget()
    run, more = (serving_cases.run_ranks, (3,)) if name == "cp_rank" else (serving_cases.run, ())
    with launches_on_cpu(load), pytest.raises(AssertionError, match="off by"):
        run(case, *more, CPU)


def test_shared_pages_are_shared():
    case = Case([1, 1, 1], [50, 40, 8], shared=True)
    k, _, lengths = serving_cases.pools(case, serving_cases.sequences(case, CPU), CPU)
    table = lengths["page_table"]
    assert table[0, :2].tolist() == table[1, :2].tolist() and table[1, 2] != table[0, 2] and table[2, 0] != table[0, 0]
    assert k.isnan().any()


@pytest.mark.parametrize("layout", serving_cases.LAYOUTS)
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e5m2])
def test_layouts(layout, kv_dtype):
    case = Case([1], [1], layout=layout, kv_dtype=kv_dtype, page_size=24, heads_kv=3)
    for pool in serving_cases.empty_pools(case, 5, CPU):
        assert pool.shape == (5, 24, 3, 64) and pool.float().isnan().all()
        assert (pool.stride(1) > pool.stride(2)) == ("heads first" not in layout)
