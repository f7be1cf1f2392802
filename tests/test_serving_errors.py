"""Wrong calls of what serving adds raise before any launch, in the words of the package. None of this needs a GPU."""

import pytest
import torch
from test_interface_errors import dense, ints, packed, t

from flash_attn_sm120 import checks, flash_attn_combine, get_scheduler_metadata
from flash_attn_sm120.problem import FP8_DTYPES

F32, E4M3, E5M2 = torch.float32, torch.float8_e4m3fn, torch.float8_e5m2


def paged(**changes):
    """A right call with pages, but for `changes` (and the CPU)."""
    pools = {"k": t(5, 8, 2, 64), "v": t(5, 8, 2, 64), "page_table": ints(0, 1, 2, 3).view(2, 2)}
    return dense(**{**pools, "seqused_k": ints(16, 3), **changes})


def paged_packed(**changes):
    pools = {"k": t(5, 8, 2, 64), "v": t(5, 8, 2, 64), "page_table": ints(0, 1, 2, 3).view(2, 2)}
    lengths = {"cu_seqlens_k": None, "seqused_k": ints(16, 3), "max_seqlen_k": 16}
    return packed(**{**pools, **lengths, **changes})


def combined(**changes):
    return flash_attn_combine(
        **{"out_partial": t(3, 2, 9, 4, 64, dtype=F32), "lse_partial": t(3, 2, 9, 4, dtype=F32), **changes}
    )


def combined_packed(**changes):
    partials = {"out_partial": t(3, 9, 4, 64, dtype=F32), "lse_partial": t(3, 9, 4, dtype=F32)}
    return flash_attn_combine(**{**partials, "cu_seqlens": ints(0, 4, 9), **changes})


def planned(**changes):
    sizes = {"batch_size": 2, "max_seqlen_q": 1, "max_seqlen_k": 99, "num_heads_q": 4, "num_heads_kv": 2, "headdim": 64}
    return get_scheduler_metadata(**{**sizes, "cache_seqlens": ints(99, 3), **changes})


def fp8(*shape, dtype=E4M3):
    return t(*shape, dtype=dtype)


RANKS = {"cp_world_size": 2, "cp_rank": 1, "cp_tot_seqused_k": ints(9, 9)}

V, T, N = ValueError, TypeError, NotImplementedError
# (name, call, exception, argument named, what the rest of the message must hold, changes)
WRONG = [
    ("two tables", paged, V, "block_table", ["page_table"], {"block_table": ints(0, 1, 2, 3).view(2, 2)}),
    ("table int64", paged, T, "page_table", ["int32", "int64"], {"page_table": t(2, 2, dtype=torch.int64)}),
    ("table list", paged, T, "page_table", ["(batch, pages)", "list"], {"page_table": [[0, 1], [2, 3]]}),
    ("table rank", paged, V, "page_table", ["(batch, pages)", "(4,)"], {"page_table": ints(0, 1, 2, 3)}),
    ("table batch", paged, V, "page_table", ["batch of 2", "3"], {"page_table": ints(0, 1, 2).view(3, 1)}),
    ("table stride", paged, V, "page_table", ["stride 1", "(1, 2)"], {"page_table": ints(0, 1, 2, 3).view(2, 2).T}),
    ("table elsewhere", paged, V, "page_table", ["meta"], {"page_table": t(2, 2, dtype=torch.int32, device="meta")}),
    ("block_table is named page_table", dense, V, "seqused_k", ["page_table", "None"], {"block_table": ints(0, 1)}),
    ("no lengths", paged, V, "seqused_k", ["(batch,)", "page_table", "None"], {"seqused_k": None}),
    ("cu_seqlens_k", paged_packed, V, "cu_seqlens_k", ["seqused_k", "(3,)"], {"cu_seqlens_k": ints(0, 16, 19)}),
    ("length of the lengths", paged, V, "seqused_k", ["batch of 2", "3"], {"seqused_k": ints(1, 2, 3)}),
    ("page_size 12", paged, V, "k", ["multiple of 8", "12"], {"k": t(5, 12, 2, 64), "v": t(5, 12, 2, 64)}),
    ("page_size 0", paged, V, "k", ["page_size", "got 0"], {"k": t(5, 0, 2, 64), "v": t(5, 0, 2, 64)}),
    ("no pages", paged, V, "k", ["one page", "(0, 8"], {"k": t(0, 8, 2, 64), "v": t(0, 8, 2, 64)}),
    ("rank of a pool", paged, V, "k", ["num_pages, page_size", "(40, "], {"k": t(40, 2, 64), "v": t(40, 2, 64)}),
    ("pools of two sizes", paged, V, "v", ["(5, 8, 2", "(5, 16, 2, 64)"], {"v": t(5, 16, 2, 64)}),
    ("heads of a pool", paged, V, "k", ["4 heads", "got 3"], {"k": t(5, 8, 3, 64), "v": t(5, 8, 3, 64)}),
    ("seqused_k dense", dense, V, "seqused_k", ["batch of 2", "got 3"], {"seqused_k": ints(1, 2, 3)}),
    ("float8 q", dense, T, "q", ["bfloat16 or float16", "float8_e4m3fn"], {"q": fp8(2, 9, 4, 64)}),
    ("two float8", dense, T, "v", ["float8_e4m3fn", "float8_e5m2"],
     {"k": fp8(2, 11, 2, 64), "v": fp8(2, 11, 2, 64, dtype=E5M2)}),
    ("float8 k alone", dense, T, "v", ["float8_e4m3fn as k", "bfloat16"], {"k": fp8(2, 11, 2, 64)}),
    ("uint8 k", dense, T, "k", ["float8_e4m3fn or float8_e5m2", "uint8"], {"k": t(2, 11, 2, 64, dtype=torch.uint8)}),
    ("float8 head_dim", dense, N, "k", ["multiple of 16", "got 72"],
     {"q": t(2, 9, 4, 72), "k": fp8(2, 11, 2, 72), "v": fp8(2, 11, 2, 64)}),
    ("float8 head_dim_v", dense, N, "v", ["multiple of 16", "got 40"],
     {"k": fp8(2, 11, 2, 64), "v": fp8(2, 11, 2, 40)}),
    ("k_descale shape", paged, V, "k_descale", ["(2, 2)", "(1,) or ()", "(2, 4)"], {"k_descale": t(2, 4, dtype=F32)}),
    ("k_descale by KV head", paged, V, "k_descale", ["(2, 2)", "(2,)"], {"k_descale": t(2, dtype=F32)}),
    ("k_descale dtype", paged, T, "k_descale", ["float32", "bfloat16"], {"k_descale": t(2, 2)}),
    ("v_descale elsewhere", paged, V, "v_descale", ["cpu", "meta"], {"v_descale": t(2, 2, dtype=F32, device="meta")}),
    ("v_descale 0", paged, V, "v_descale", ["> 0", "0.0"], {"v_descale": 0.0}),
    ("k_descale nan", paged, V, "k_descale", ["finite", "nan"], {"k_descale": float("nan")}),
    ("k_descale text", paged, T, "k_descale", ["float32 tensor", "str"], {"k_descale": "1"}),
    ("k_descale true", paged, T, "k_descale", ["a number", "bool"], {"k_descale": True}),
    ("scales past float32", paged, V, "k_descale", ["product", "1e+30"], {"k_descale": 1e30, "softmax_scale": 1e30}),
    ("q_descale", paged, N, "q_descale", ["None or 1", "2.0"], {"q_descale": 2.0}),
    ("sink shape", dense, V, "learnable_sink", ["(4,)", "(2,)"], {"learnable_sink": t(2)}),
    ("sink rank", dense, V, "learnable_sink", ["(4,)", "(4, 1)"], {"learnable_sink": t(4, 1)}),
    ("sink dtype", dense, T, "learnable_sink", ["bfloat16 or float32", "float16"],
     {"learnable_sink": t(4, dtype=torch.float16)}),
    ("sink list", dense, T, "learnable_sink", ["bfloat16 or float32", "list"], {"s_aux": [0.0] * 4}),
    ("sink elsewhere", dense, V, "learnable_sink", ["cpu", "meta"], {"learnable_sink": t(4, device="meta")}),
    ("two sinks", dense, V, "s_aux", ["learnable_sink", "(4,)"], {"learnable_sink": t(4), "s_aux": t(4)}),
    ("slopes shape", dense, V, "alibi_slopes", ["(4,) or (2, 4)", "(2,)"], {"alibi_slopes": t(2, dtype=F32)}),
    ("slopes by sequence", packed, V, "alibi_slopes", ["(2, 4)", "(3, 4)"], {"alibi_slopes": t(3, 4, dtype=F32)}),
    ("slopes dtype", dense, T, "alibi_slopes", ["float32", "bfloat16"], {"alibi_slopes": t(4)}),
    ("slopes elsewhere", dense, V, "alibi_slopes", ["cpu", "meta"], {"alibi_slopes": t(4, dtype=F32, device="meta")}),
    ("splits -1", dense, V, "num_splits", ["0 (choose) to 64", "-1"], {"num_splits": -1}),
    ("splits 65", packed, V, "num_splits", ["64", "65"], {"num_splits": 65}),
    ("splits text", packed, T, "num_splits", ["int", "str"], {"num_splits": "4"}),
    ("splits float", dense, T, "num_splits", ["int", "2.0"], {"num_splits": 2.0}),
    ("splits true", dense, T, "num_splits", ["int", "bool"], {"num_splits": True}),
    ("metadata tensor", packed, T, "scheduler_metadata", ["get_scheduler_metadata", "int32"],
     {"scheduler_metadata": ints(1)}),
    ("chunk -1", dense, V, "attention_chunk", [">= 0", "-1"], {"attention_chunk": -1}),
    ("chunk float", dense, T, "attention_chunk", ["int", "8.0"], {"attention_chunk": 8.0}),
    ("world 0", dense, V, "cp_world_size", [">= 1", "got 0"], {"cp_world_size": 0}),
    ("world text", dense, T, "cp_world_size", ["int", "str"], {"cp_world_size": "2"}),
    ("rank 2 of 2", dense, V, "cp_rank", ["0 to cp_world_size - 1 = 1", "got 2"], {**RANKS, "cp_rank": 2}),
    ("rank -1", dense, V, "cp_rank", ["-1"], {**RANKS, "cp_rank": -1}),
    ("rank alone", dense, V, "cp_rank", ["= 0", "got 1"], {"cp_rank": 1}),
    ("no totals", dense, V, "cp_tot_seqused_k", ["(batch,)", "None"], {**RANKS, "cp_tot_seqused_k": None}),
    ("totals alone", dense, V, "cp_tot_seqused_k", ["None where", "(2,)"], {"cp_tot_seqused_k": ints(9, 9)}),
    ("totals int64", dense, T, "cp_tot_seqused_k", ["int32", "int64"],
     {**RANKS, "cp_tot_seqused_k": ints(9, 9).long()}),
    ("totals shape", dense, V, "cp_tot_seqused_k", ["(2,)", "(1,)"], {**RANKS, "cp_tot_seqused_k": ints(9)}),
    ("totals strided", dense, V, "cp_tot_seqused_k", ["contiguous", "(2,)"],
     {**RANKS, "cp_tot_seqused_k": ints(9, 9, 9)[::2]}),
    ("totals elsewhere", dense, V, "cp_tot_seqused_k", ["cpu", "meta"],
     {**RANKS, "cp_tot_seqused_k": ints(9, 9).to("meta")}),
    ("half partial", combined, T, "out_partial", ["float32", "bfloat16"], {"out_partial": t(3, 2, 9, 4, 64)}),
    ("half lse", combined, T, "lse_partial", ["float32", "bfloat16"], {"lse_partial": t(3, 2, 9, 4)}),
    ("partial list", combined, T, "out_partial", ["torch.Tensor", "list"], {"out_partial": []}),
    ("partial rank", combined, V, "out_partial", ["num_splits, total_q", "(9, 4, 64)"],
     {"out_partial": t(9, 4, 64, dtype=F32)}),
    ("lse of the kernels", combined, V, "lse_partial", ["(3, 2, 9, 4)", "(3, 2, 4, 9)"],
     {"lse_partial": t(3, 2, 4, 9, dtype=F32)}),
    ("lse elsewhere", combined, V, "lse_partial", ["cpu", "meta"],
     {"lse_partial": t(3, 2, 9, 4, dtype=F32, device="meta")}),
    ("no parts", combined_packed, V, "out_partial", ["1 to 128", "got 0"],
     {"out_partial": t(0, 9, 4, 64, dtype=F32), "lse_partial": t(0, 9, 4, dtype=F32)}),
    ("parts' head_dim", combined, V, "out_partial", ["multiple of 8", "got 12"],
     {"out_partial": t(3, 2, 9, 4, 12, dtype=F32)}),
    ("parts' stride", combined, V, "out_partial", ["stride 1", "strides"],
     {"out_partial": t(3, 2, 9, 64, 4, dtype=F32).mT}),
    ("combined out's shape", combined, V, "out", ["(2, 9, 4, 64)", "(2, 9, 4, 32)"], {"out": t(2, 9, 4, 32)}),
    ("combined out's dtype", combined, T, "out", ["float16", "bfloat16"],
     {"out": t(2, 9, 4, 64), "out_dtype": torch.float16}),
    ("int out", combined, T, "out", ["float32", "int32"], {"out": t(2, 9, 4, 64, dtype=torch.int32)}),
    ("float64 out", combined, T, "out_dtype", ["float32", "float64"], {"out_dtype": torch.float64}),
    ("cu_seqlens padded", combined, V, "cu_seqlens", ["None", "five", "(3,)"], {"cu_seqlens": ints(0, 9, 18)}),
    ("seqused without cu_seqlens", combined_packed, V, "cu_seqlens", ["seqused", "None"],
     {"cu_seqlens": None, "seqused": ints(4)}),
    ("seqused batch", combined_packed, V, "seqused", ["batch of 2", "(3,)"], {"seqused": ints(1, 2, 3)}),
    ("combined sink", combined, V, "learnable_sink", ["(4,)", "(9,)"], {"learnable_sink": t(9)}),
    ("return_lse", combined, T, "return_lse", ["bool", "int 1"], {"return_lse": 1}),
    ("gradient of a part", combined, N, "lse_partial", ["forward only"],
     {"lse_partial": t(3, 2, 9, 4, dtype=F32, requires_grad=True)}),
    ("a right combine on the CPU", combined, V, "out_partial", ["CUDA", "cpu"], {}),
    ("new keys", planned, N, "cu_seqlens_k_new", ["neutral", "int32"], {"cu_seqlens_k_new": ints(0, 1)}),
    ("spare SMs", planned, N, "sm_margin", ["neutral", "8"], {"sm_margin": 8}),
    ("lengths list", planned, T, "cache_seqlens", ["tensor", "list"], {"cache_seqlens": [1]}),
    ("planned splits", planned, V, "num_splits", ["64", "200"], {"num_splits": 200}),
]  # fmt: skip


@pytest.mark.parametrize("call, kind, argument, parts, changes", [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_call(call, kind, argument, parts, changes):
    with pytest.raises(Exception) as caught:
        call(**changes)
    assert type(caught.value) is kind, caught.value
    text = str(caught.value)
    assert text.startswith(f"{argument}: expected "), text
    for part in [*parts, ", got "]:
        assert part in text, text


@pytest.mark.parametrize("call", [paged, paged_packed, dense, packed])
def test_a_right_call_on_the_cpu_asks_for_a_gpu(call):
    with pytest.raises(ValueError, match=r"^q: expected a tensor on a CUDA device, got cpu"):
        call(num_splits=4)


def test_pools_are_never_copied(recorder):
    odd = t(5, 8, 2, 65)[..., :64]
    shifted = t(5 * 8 * 2 * 64 + 8)[1:-7].view(5, 8, 2, 64)
    for pool in (odd, shifted, fp8(5, 8, 2, 72)[..., :64]):
        good = torch.zeros(5, 8, 2, 64, dtype=pool.dtype)
        for k, v, name in ((pool, good, "k"), (good, pool, "v")):
            with pytest.raises(ValueError, match=f"^{name}: expected a pool whose address and strides .*, got address"):
                paged(k=k, v=v)
    assert not recorder.calls


def test_gradients_of_modifiers(recorder):
    sink = t(4, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"^learnable_sink: expected no gradient"):
        dense(learnable_sink=sink)
    with torch.no_grad():
        dense(learnable_sink=sink)
    assert not recorder.calls[0].modifiers.learnable_sink.requires_grad


WRONG_VALUES = [
    (paged, {"page_table": ints(0, 5, 2, 3).view(2, 2)}, "page_table", "from 0 to 4 at batch 0, position 1, got 5"),
    (paged, {"page_table": ints(0, 1, -1, 3).view(2, 2)}, "page_table", "at batch 1, position 0, got -1"),
    (paged, {"seqused_k": ints(16, 17)}, "seqused_k", "from 0 to 16, the rows of sequence 1, got 17"),
    (paged, {"seqused_k": ints(-1, 17)}, "seqused_k", "sequence 0, got -1"),
    (paged_packed, {"max_seqlen_k": 9}, "max_seqlen_k", "at least 16, the longest sequence, got 9"),
    (paged_packed, {"k_descale": torch.tensor([[1.0, 0.0], [1.0, 1.0]])}, "k_descale", "finite numbers > 0"),
    (paged, {"v_descale": torch.tensor([float("inf")])}, "v_descale", "finite numbers > 0"),
    (paged, {**RANKS, "seqused_k": ints(4, 5)}, "seqused_k", "4 for sequence 1, .* rank 1 of 2 in 9 keys, got 5"),
    (dense, {"seqused_k": ints(4, 12)}, "seqused_k", "from 0 to 11, the rows of sequence 1, got 12"),
]  # fmt: skip


@pytest.mark.parametrize("call, changes, argument, text", WRONG_VALUES)
def test_wrong_values_are_found_on_request(call, changes, argument, text, monkeypatch, recorder):
    call(**changes)
    monkeypatch.setattr(checks, "VALUE_CHECKS", True)
    with pytest.raises(ValueError, match=f"^{argument}: expected .*{text}"):
        call(**changes)
    assert len(recorder.calls) == 1


def test_right_values_pass_on_request(monkeypatch, recorder):
    monkeypatch.setattr(checks, "VALUE_CHECKS", True)
    wild = ints(0, 4, 2, 2**30).view(2, 2)
    paged(page_table=wild)
    paged_packed(page_table=wild, k_descale=torch.ones(2, 2), v_descale=3.0)
    paged(
        page_table=wild, seqused_k=ints(16, 5), cp_world_size=2, cp_rank=0, cp_tot_seqused_k=ints(31, 10), causal=True
    )
    assert len(recorder.calls) == 3


@pytest.mark.parametrize("name", FP8_DTYPES)
def test_float8_is_taken(name, recorder):
    dtype = getattr(torch, name)
    paged(k=t(5, 8, 2, 64, dtype=dtype), v=t(5, 8, 2, 48, dtype=dtype), q_descale=1.0, block_table=None)
    assert recorder.problems[0].kv_dtype == name and recorder.problems[0].dtype == "bfloat16"
