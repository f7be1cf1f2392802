"""One case of every variant in the dispatcher's table, ragged on all sides, against the reference.

`python tests/test_variants.py` runs the same cases without pytest, for compute-sanitizer.
"""

import pytest
import serving_cases
import torch
from oracle import assert_right, ints, marks, rand, variant_name
from serving_cases import Case

from flash_attn_sm120 import calls, launchers
from flash_attn_sm120.problem import AttentionProblem, CombineProblem
from flash_attn_sm120.variants import serving_variants, variants

LENGTHS_Q, LENGTHS_K = (37, 1, 130), (150, 20, 67)
COMBINE = CombineProblem("float16", 128, lse=True)  # of the ranks of a context-parallel variant


def run_variant(problem: AttentionProblem, device: torch.device) -> None:
    if problem in serving_variants():
        run_serving_variant(problem, device)
    else:
        run_plain_variant(problem, device)


def run_serving_variant(problem: AttentionProblem, device: torch.device) -> None:
    case = Case(
        [*LENGTHS_Q],
        [*LENGTHS_K],
        head_dims=(problem.head_dim, problem.head_dim_v),
        dtype=getattr(torch, problem.dtype),
        kv_dtype=getattr(torch, problem.kv_dtype, None),
        page_size=problem.page_size,
        packed=problem.packed_q,
        used=problem.seqused_q,
        lse=problem.lse,
        mask=problem.mask,
        window=(50, 9),
        softcap=3.0 * problem.softcap,
        sink=getattr(torch, problem.sink, None),
        slopes="heads" if problem.alibi else "",
        scales="each" if problem.k_descale else "",
        chunk=64 * problem.chunked,
    )
    if problem.context_parallel:
        serving_cases.run_ranks(case, 2, device)
    elif problem.paged:
        serving_cases.run(case, device)
    else:
        serving_cases.run_padded(case, device)


def run_plain_variant(problem: AttentionProblem, device: torch.device) -> None:
    dtype = getattr(torch, problem.dtype)

    def rows(lengths, packed):
        return (sum(lengths),) if packed else (len(lengths), max(lengths))

    q = rand(device, *rows(LENGTHS_Q, problem.packed_q), 4, problem.head_dim, dtype=dtype)
    k = rand(device, *rows(LENGTHS_K, problem.packed_k), 2, problem.head_dim, dtype=dtype)
    v = rand(device, *rows(LENGTHS_K, problem.packed_k), 2, problem.head_dim_v, dtype=dtype)
    if not problem.tma_strides:
        k = k[:, :, :1].expand_as(k)
    options = {}
    if problem.packed_q:
        options["cu_seqlens_q"] = marks(device, *LENGTHS_Q)
    if problem.packed_k:
        options["cu_seqlens_k"] = marks(device, *LENGTHS_K)
    if problem.seqused_q:
        options["seqused_q"] = ints(device, *(length - 1 for length in LENGTHS_Q))
    if problem.seqused_k:
        options["seqused_k"] = ints(device, *(length - 3 for length in LENGTHS_K))
    if problem.softcap:
        options["softcap"] = 3.0
    if problem.mask == "causal":
        options["causal"] = True
    elif problem.mask == "local":
        options["window_size"] = (50, 9)
    assert_right(q, k, v, with_lse=problem.lse, **options)


@pytest.mark.parametrize("problem", variants(), ids=variant_name)
def test_variant(problem, device, monkeypatch):
    met = []
    load = launchers.load
    monkeypatch.setattr(launchers, "load", lambda problem, *rest: met.append(problem) or load(problem, *rest))
    calls.forget()
    run_variant(problem, device.torch_device)
    assert set(met) - {COMBINE} == {problem}


if __name__ == "__main__":
    torch.manual_seed(0)
    for problem in variants():
        run_variant(problem, torch.device("cuda"))
        print("right:", variant_name(problem), flush=True)
