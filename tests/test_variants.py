"""One case of every variant in the dispatcher's table, ragged on all sides, against the reference.

The machine code for sm_120a is audited too. `python tests/test_variants.py` runs the same cases without pytest, for
compute-sanitizer.
"""

import dual_group_cases
import pytest
import serving_cases
import torch
from oracle import assert_right, ints, marks, rand, variant_name
from serving_cases import Case
from sparse_cases import random_blocks
from test_compile import audit

from flash_attn_sm120 import calls, launchers
from flash_attn_sm120.compile import build_best
from flash_attn_sm120.problem import AttentionProblem, CombineProblem
from flash_attn_sm120.variants import changed_variants, dual_group_variants, variants

LENGTHS_Q, LENGTHS_K = (37, 1, 130), (150, 20, 67)
HEADS_KV = 2
COMBINE = CombineProblem("float16", 128, lse=True)  # of the ranks of a context-parallel variant
PROBLEMS = [*variants(), *changed_variants(), *dual_group_variants()]


def run_variant(problem: AttentionProblem, device: torch.device) -> None:
    if problem.dual_group:
        dual_group_cases.run_variant(problem, LENGTHS_Q, LENGTHS_K, device)
    elif problem.paged or problem.kv_dtype:
        run_serving_variant(problem, device)
    else:
        run_plain_variant(problem, device)


def run_serving_variant(problem: AttentionProblem, device: torch.device) -> None:
    heads = 2 * HEADS_KV if is_changed(problem) else 4 * HEADS_KV
    case = Case(
        [*LENGTHS_Q],
        [*LENGTHS_K],
        heads_kv=HEADS_KV,
        ratio=heads // HEADS_KV,
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
        scales="each" if problem.k_descale else "number" if problem.v_descale else "",
        chunk=64 * problem.chunked,
        changes=changes_of(problem, heads, device),
    )
    if problem.context_parallel:
        serving_cases.run_ranks(case, 2, device)
    elif problem.paged:
        serving_cases.run(case, device)
    else:
        serving_cases.run_padded(case, device)


def run_plain_variant(problem: AttentionProblem, device: torch.device) -> None:
    dtype, heads = getattr(torch, problem.dtype), 2 * HEADS_KV

    def rows(lengths, packed):
        return (sum(lengths),) if packed else (len(lengths), max(lengths))

    q = rand(device, *rows(LENGTHS_Q, problem.packed_q), heads, problem.head_dim, dtype=dtype)
    k = rand(device, *rows(LENGTHS_K, problem.packed_k), HEADS_KV, problem.head_dim, dtype=dtype)
    v = rand(device, *rows(LENGTHS_K, problem.packed_k), HEADS_KV, problem.head_dim_v, dtype=dtype)
    if not problem.tma_strides:
        k = k[:, :, :1].expand_as(k)
    options = changes_of(problem, heads, device)
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
    if problem.sink:
        options["learnable_sink"] = rand(device, heads, dtype=getattr(torch, problem.sink))
    if problem.alibi:
        options["alibi_slopes"] = torch.rand(heads, device=device) * 0.3
    if problem.mask == "causal":
        options["causal"] = True
    elif problem.mask == "local":
        options["window_size"] = (50, 9)
    assert_right(q, k, v, with_lse=problem.lse, **options)


def is_changed(problem: AttentionProblem) -> bool:
    return problem.dropout or problem.modded or problem.block_sparse


def changes_of(problem: AttentionProblem, heads: int, device: torch.device) -> dict:
    """dropout, mods with what they read, and lists of blocks."""
    options, batch = {}, len(LENGTHS_Q)
    if problem.dropout:
        options |= {"dropout_p": 0.3, "dropout_seed": 1234567890123}
    for name in ("score_mod", "mask_mod"):
        if getattr(problem, name) is not None:
            options[name] = getattr(problem, name).function
    aux = {
        ("float32", 1): lambda: torch.rand(heads, device=device) * 0.3,
        ("int32", 2): lambda: torch.randint(0, 3, (batch, max(LENGTHS_K)), dtype=torch.int32, device=device),
        ("bool", 4): lambda: torch.rand(batch, heads, max(LENGTHS_Q), max(LENGTHS_K), device=device) < 0.6,
    }
    if problem.aux:
        options["aux_tensors"] = [aux[kind]() for kind in problem.aux]
    if problem.block_sparse:
        sizes = (batch, heads, max(LENGTHS_Q), max(LENGTHS_K))
        kinds = ("full",) if problem.mask_mod is None else ("mask", "full")
        options["block_sparse_tensors"] = random_blocks(*sizes, problem.sparse_block, 0.8, kinds, device)
    return options


@pytest.mark.parametrize("problem", PROBLEMS, ids=variant_name)
def test_variant(problem, device, monkeypatch):
    met = []
    load = launchers.load
    monkeypatch.setattr(launchers, "load", lambda problem, *rest: met.append(problem) or load(problem, *rest))
    calls.forget()
    run_variant(problem, device.torch_device)
    assert set(met) - {COMBINE} == {problem}
    if device.size == "short":  # what was run is kept
        from flash_attn_sm120.simulator.attention import artifact

        built = artifact(problem, "sm_120a")
        audit(problem, built.plan, built.__cubin__)
    else:
        built, plan = build_best(problem, "sm_120a", keep=True)
        audit(problem, plan, built.__cubin__)


if __name__ == "__main__":
    torch.manual_seed(0)
    for problem in PROBLEMS:
        run_variant(problem, torch.device("cuda"))
        print("right:", variant_name(problem), flush=True)
