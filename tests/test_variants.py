"""One case of every variant in the dispatcher's table, ragged on all sides, against the reference.

`python tests/test_variants.py` runs the same cases without pytest, for compute-sanitizer.
"""

import pytest
import torch
from oracle import assert_right, ints, marks, rand, variant_name

from flash_attn_sm120 import calls, launchers
from flash_attn_sm120.dispatch import variants
from flash_attn_sm120.problem import AttentionProblem

LENGTHS_Q, LENGTHS_K = (37, 1, 130), (150, 20, 67)


def run_variant(problem: AttentionProblem, device: torch.device) -> None:
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
    monkeypatch.setattr(launchers, "load", lambda problem, device: met.append(problem) or load(problem, device))
    calls.forget()
    run_variant(problem, device.torch_device)
    assert met == [problem]


if __name__ == "__main__":
    torch.manual_seed(0)
    for problem in variants():
        run_variant(problem, torch.device("cuda"))
        print("right:", variant_name(problem), flush=True)
