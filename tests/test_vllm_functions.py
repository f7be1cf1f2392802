"""The functions of vLLM's flash-attention fork: signatures, results against the reference, and what they refuse."""

import inspect
import math

import pytest
import serving_cases
import torch
from oracle import FEW, ints, marks, rand
from serving_cases import Case

from flash_attn_sm120 import reference
from flash_attn_sm120.integrations import vllm
from flash_attn_sm120.matrix import LSE_SLACK, SLACK, largest_difference
from flash_attn_sm120.scheduling import SchedulerMetadata

BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2


def words(text):
    return text.split()


# vllm/vllm_flash_attn/flash_attn_interface.py of the wheels.
VARLEN_0_24 = words("""
q k v max_seqlen_q cu_seqlens_q max_seqlen_k cu_seqlens_k seqused_k q_v dropout_p softmax_scale causal window_size
softcap alibi_slopes deterministic return_attn_probs block_table return_softmax_lse out scheduler_metadata q_descale
k_descale v_descale num_splits output_scale fa_version s_aux cp_world_size cp_rank cp_tot_seqused_k mask_mod
aux_tensors dynamic_causal
""")
VARLEN_0_33 = words("""
q k v max_seqlen_q cu_seqlens_q max_seqlen_k cu_seqlens_k seqused_k q_v dropout_p softmax_scale causal window_size
softcap alibi_slopes deterministic return_attn_probs block_table return_softmax_lse out scheduler_metadata q_descale
k_descale v_descale num_splits output_scale fa_version s_aux cp_world_size cp_rank cp_tot_seqused_k mask_mod
block_sparse_tensors aux_tensors aux_tensor_leading_dims dynamic_causal gather_kv_indices gather_kv_valid_length
""")
METADATA = words("""
batch_size max_seqlen_q max_seqlen_k num_heads_q num_heads_kv headdim cache_seqlens qkv_dtype headdim_v cu_seqlens_q
cu_seqlens_k_new cache_leftpad page_size max_seqlen_k_new causal window_size has_softcap num_splits pack_gqa
sm_margin
""")
WITH_KVCACHE = words("""
q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table softmax_scale
causal window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse out scheduler_metadata
q_descale k_descale v_descale fa_version s_aux
""")
DEFAULTS = {
    "cu_seqlens_k": None, "seqused_k": None, "dropout_p": 0.0, "softmax_scale": None, "causal": False,
    "window_size": None, "softcap": 0.0, "deterministic": False, "return_attn_probs": False,
    "return_softmax_lse": False, "num_splits": 0, "fa_version": 2, "cp_world_size": 1, "cp_rank": 0,
}  # fmt: skip
OWN_NAMES = {"block_table": "page_table", "s_aux": "learnable_sink"}
SPEED = ("max_seqlen_q", "max_seqlen_k", "num_splits", "scheduler_metadata", "fa_version")


def names(function):
    return list(inspect.signature(function).parameters)


def test_signature_of_varlen():
    assert names(vllm.flash_attn_varlen_func) == VARLEN_0_33
    shared = VARLEN_0_24.index("mask_mod") + 1
    assert VARLEN_0_33[:shared] == VARLEN_0_24[:shared]
    assert set(VARLEN_0_24) < set(VARLEN_0_33)
    parameters = inspect.signature(vllm.flash_attn_varlen_func).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty]
    assert required == VARLEN_0_24[:6]
    assert {p.name: p.default for p in parameters if p.name in DEFAULTS} == DEFAULTS
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def test_signature_of_metadata():
    assert names(vllm.get_scheduler_metadata) == METADATA


def test_signature_of_with_kvcache():
    assert names(vllm.flash_attn_with_kvcache) == WITH_KVCACHE
    parameters = inspect.signature(vllm.flash_attn_with_kvcache).parameters.values()
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == WITH_KVCACHE[19:]


def close(got, got_lse, exact, rounded, dtype):
    """exact, rounded: (out, lse) of the reference in float32 and in dtype."""
    limit = 2 * largest_difference(rounded[0], exact[0]) + SLACK
    if exact[0].numel() < FEW:
        limit = max(limit, torch.finfo(dtype).eps * exact[0].abs().max().item() + SLACK)
    assert largest_difference(got, exact[0]) <= limit
    if got_lse is not None:
        assert largest_difference(got_lse, exact[1]) <= 2 * largest_difference(rounded[1], exact[1]) + LSE_SLACK


def check_varlen(q, k, v, *, exact_options=None, **options):
    """Against the reference, into a given out and into a new one, with lse and without."""
    named = {OWN_NAMES.get(name, name): value for name, value in options.items() if name not in SPEED}
    named = exact_options if exact_options is not None else named
    exact = reference.attention(q, k, v, **named)
    rounded = reference.attention(q, k, v, **named, dtype=None)
    out = torch.full((*q.shape[:-1], v.shape[-1]), math.nan, dtype=q.dtype, device=q.device)
    result, lse = vllm.flash_attn_varlen_func(q, k, v, **options, out=out, return_softmax_lse=True)
    assert result is out and lse.shape == (q.shape[1], q.shape[0])
    close(out, lse, exact, rounded, q.dtype)
    alone = vllm.flash_attn_varlen_func(q, k, v, **options)
    assert torch.equal(alone, out)


def paged(device, lengths_q, lengths_k, **fields):
    """q, pools and lengths as vLLM has them: K and V halves of one cache, NaN where no sequence has a key."""
    case = Case(lengths_q, lengths_k, layout="halves", **fields)
    q, options = serving_cases.queries(case, device)
    k, v, lengths = serving_cases.pools(case, serving_cases.sequences(case, device), device)
    options |= {"seqused_k": lengths["seqused_k"], "block_table": lengths["page_table"]}
    return q, k, v, options | {"max_seqlen_k": max(lengths_k)}


PREFILL = ([33, 1, 20], [40, 30, 20])
DECODE = ([1, 3, 1], [130, 17, 64])


@pytest.mark.parametrize("lengths", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_pages(device, lengths):
    q, k, v, options = paged(device.torch_device, *lengths)
    check_varlen(q, k, v, **options, causal=True, fa_version=3)


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("lengths", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_a_cache_whose_rows_hold_k_and_v(device, lengths, heads_first):
    """vLLM 0.33: (blocks, heads_kv, block_size, 2 * head_dim), in memory either heads or rows first."""
    q, k, v, options = paged(device.torch_device, *lengths)
    cache = torch.cat([k, v], dim=-1)
    cache = cache.transpose(1, 2).contiguous() if heads_first else cache.transpose(1, 2)
    k, v = cache.transpose(1, 2).split(64, dim=-1)
    check_varlen(q, k, v, **options, causal=True)


def test_packed_keys(device):
    where = device.torch_device
    q, k, v = rand(where, 50, 4, 64), rand(where, 61, 2, 64), rand(where, 61, 2, 64)
    lens = {"cu_seqlens_q": marks(where, 20, 30), "cu_seqlens_k": marks(where, 31, 30)}
    check_varlen(q, k, v, **lens, max_seqlen_q=30, max_seqlen_k=31, window_size=[9, 4], softmax_scale=0.2)


@pytest.mark.parametrize("lengths", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_sinks_slopes_softcap_and_a_window(device, lengths):
    where = device.torch_device
    q, k, v, options = paged(where, *lengths)
    options |= {"s_aux": rand(where, 8), "alibi_slopes": torch.rand(8, device=where) * 0.3}
    check_varlen(q, k, v, **options, causal=True, window_size=[15, 0], softcap=20.0)


@pytest.mark.parametrize("kv_dtype", [E4M3, E5M2])
@pytest.mark.parametrize("lengths", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_float8_cache(device, kv_dtype, lengths):
    """Scales as vLLM's backends pass them: one number, seen as (batch, heads_kv)."""
    where = device.torch_device
    q, k, v, options = paged(where, *lengths, kv_dtype=kv_dtype)
    for name, scale in (("k_descale", 0.5), ("v_descale", 1.75)):
        options[name] = torch.tensor(scale, device=where).expand(3, 2)
    check_varlen(q, k, v, **options, causal=True)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_splits_and_metadata(device, num_splits):
    where = device.torch_device
    q, k, v, options = paged(where, [1, 2], [300, 90])
    check_varlen(q, k, v, **options, causal=True, num_splits=num_splits)
    metadata = vllm.get_scheduler_metadata(2, 2, 300, 8, 2, 64, options["seqused_k"], num_splits=num_splits)
    assert metadata.dtype == torch.int32 and metadata.shape == (num_splits,) and metadata.device == q.device
    kept = torch.zeros(65, dtype=torch.int32, device=where)
    kept[:num_splits] = metadata
    check_varlen(q, k, v, **options, causal=True, scheduler_metadata=kept[:num_splits])


def test_ranks(device):
    where = device.torch_device
    q, k, v, options = paged(where, [1, 2], [33, 21])
    totals = {"cp_world_size": 2, "cp_rank": 1, "cp_tot_seqused_k": ints(where, 66, 43)}
    check_varlen(q, k, v, **options, causal=True, **totals)


def test_metadata_reaches_the_kernel(recorder):
    """Splits of the metadata count where num_splits is 0, and num_splits where it isn't."""
    q, k, v, options = paged("cpu", [1, 2], [300, 90])
    for given, expected in ((torch.zeros(5, dtype=torch.int32), 5), (SchedulerMetadata(7), 7)):
        vllm.flash_attn_varlen_func(q, k, v, **options, scheduler_metadata=given)
        assert recorder.partials[-1].out.shape[0] == expected
    vllm.flash_attn_varlen_func(q, k, v, **options, scheduler_metadata=torch.zeros(5, dtype=torch.int32), num_splits=2)
    assert recorder.partials[-1].out.shape[0] == 2


def test_metadata_chooses_as_a_call_does(recorder):
    q, k, v, options = paged("cpu", [1, 1], [3000, 90])
    vllm.flash_attn_varlen_func(q, k, v, **options)
    metadata = vllm.get_scheduler_metadata(2, 1, 3000, 8, 2, 64, options["seqused_k"], causal=True)
    assert metadata.shape[0] == recorder.partials[-1].out.shape[0] > 1
    assert vllm.get_scheduler_metadata(2, 100, 3000, 8, 2, 64, options["seqused_k"]).shape == (1,)


def test_scales_are_of_float8_alone(reference_kernels):
    """vLLM passes its layers' scales with every call; 16-bit keys and values are what they are."""
    q, k, v, options = paged("cpu", *DECODE)
    exact_options = {OWN_NAMES.get(n, n): t for n, t in options.items() if n not in SPEED}
    for scale in (torch.tensor(0.5).expand(3, 2), 2.0):
        scales = {"q_descale": scale, "k_descale": scale, "v_descale": scale}
        check_varlen(q, k, v, **options, **scales, exact_options=exact_options)


def test_rows_that_are_not_contiguous_are_copied(reference_kernels):
    q, k, v, options = paged("cpu", *DECODE)
    backwards = q.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert backwards.stride(-1) != 1
    check_varlen(backwards, k, v, **options)
    packed = torch.randn(2, 64, 61).bfloat16().permute(2, 0, 1)
    lens = {"cu_seqlens_q": marks("cpu", 2, 3), "cu_seqlens_k": marks("cpu", 31, 30)}
    check_varlen(rand("cpu", 5, 4, 64), packed, packed, **lens, max_seqlen_q=3, max_seqlen_k=31)
    with pytest.raises(ValueError, match="k: expected a last dimension of stride 1"):
        vllm.flash_attn_varlen_func(q, k.mT.contiguous().mT, v, **options)


def test_packed_keys_with_used_lengths(reference_kernels):
    lens = {"cu_seqlens_q": marks("cpu", 2, 3), "cu_seqlens_k": marks("cpu", 31, 30), "seqused_k": ints("cpu", 20, 30)}
    q, k, v = rand("cpu", 5, 4, 64), rand("cpu", 61, 2, 64), rand("cpu", 61, 2, 64)
    check_varlen(q, k, v, **lens, max_seqlen_q=3, max_seqlen_k=31, fa_version=4)


@pytest.mark.parametrize("form", ["pages", "an int", "rows", "all"])
def test_with_kvcache(device, form):
    where = device.torch_device
    q = rand(where, 2, 3, 4, 64)
    cache = {"k_cache": rand(where, 2, 40, 2, 64), "v_cache": rand(where, 2, 40, 2, 64)}
    own, options = {}, {"causal": True, "window_size": (30, 0), "softcap": 10.0}
    if form == "pages":
        _, k, v, lengths = paged(where, [3, 3], [40, 33])
        cache = {"k_cache": k, "v_cache": v, "block_table": lengths["block_table"]}
        own = {"page_table": lengths["block_table"], "seqused_k": lengths["seqused_k"]}
        cache["cache_seqlens"] = lengths["seqused_k"]
    elif form != "all":
        own["seqused_k"] = ints(where, 40, 33) if form == "rows" else ints(where, 37, 37)
        cache["cache_seqlens"] = own["seqused_k"] if form == "rows" else 37
    k, v = cache["k_cache"], cache["v_cache"]
    exact = reference.attention(q, k, v, **own, **options)
    rounded = reference.attention(q, k, v, **own, **options, dtype=None)
    out, lse = vllm.flash_attn_with_kvcache(q, **cache, **options, return_softmax_lse=True)
    assert lse.shape == (2, 4, 3)
    close(out, lse, exact, rounded, BF16)


REFUSED = {
    "q_v": (torch.zeros(1), NotImplementedError),
    "output_scale": (torch.ones(1), NotImplementedError),
    "dynamic_causal": (torch.ones(3, dtype=torch.int32), NotImplementedError),
    "gather_kv_indices": (torch.zeros(1, dtype=torch.int32), NotImplementedError),
    "gather_kv_valid_length": (torch.zeros(1, dtype=torch.int32), NotImplementedError),
    "return_attn_probs": (True, NotImplementedError),
    "deterministic": ("yes", TypeError),
    "fa_version": (5, ValueError),
    "window_size": ([1], ValueError),
    "num_splits": (65, ValueError),
    "scheduler_metadata": (torch.zeros(65, dtype=torch.int32), ValueError),
    "s_aux": (torch.zeros(8, dtype=torch.float16), TypeError),
    "softcap": (-1.0, ValueError),
    "causal": (torch.ones(3, dtype=torch.bool), TypeError),
}
SAID_AS = {"s_aux": "learnable_sink"}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, recorder):
    q, k, v, options = paged("cpu", *DECODE)
    value, kind = REFUSED[name]
    with pytest.raises(kind, match=f"^{SAID_AS.get(name, name)}: expected "):
        vllm.flash_attn_varlen_func(q, k, v, **options | {name: value})
    assert not recorder.calls


@pytest.mark.parametrize("value", [torch.zeros(3), "x"])
def test_metadata_of_another_kind(value, recorder):
    q, k, v, options = paged("cpu", *DECODE)
    with pytest.raises(TypeError, match=r"^scheduler_metadata: expected what get_scheduler_metadata returns"):
        vllm.flash_attn_varlen_func(q, k, v, **options, scheduler_metadata=value)


def test_bytes_are_no_float8(recorder):
    """Two formats have eight bits, so a uint8 cache has to be viewed as one."""
    q, k, v, options = paged("cpu", *DECODE, kv_dtype=E4M3)
    with pytest.raises(TypeError, match="k: expected bfloat16 as q, or float8_e4m3fn or float8_e5m2, got uint8"):
        vllm.flash_attn_varlen_func(q, k.view(torch.uint8), v.view(torch.uint8), **options)
    with pytest.raises(TypeError, match="q: expected bfloat16 or float16, got float8_e4m3fn"):
        vllm.flash_attn_varlen_func(q.to(E4M3), k, v, **options)


def test_lengths_are_needed(recorder):
    q, k, v, options = paged("cpu", *DECODE)
    del options["seqused_k"]
    with pytest.raises(ValueError, match=r"^seqused_k: expected int32"):
        vllm.flash_attn_varlen_func(q, k, v, **options)


@pytest.mark.parametrize("name", ["k", "v", "rotary_cos", "rotary_sin", "cache_batch_idx", "cache_leftpad"])
def test_kvcache_refuses(name, recorder):
    q, cache = rand("cpu", 2, 1, 4, 64), rand("cpu", 2, 40, 2, 64)
    with pytest.raises(NotImplementedError, match=f"^{name}: expected None"):
        vllm.flash_attn_with_kvcache(q, cache, cache, **{name: torch.zeros(2)})


def test_metadata_refuses():
    lens = ints("cpu", 3, 4)
    with pytest.raises(NotImplementedError, match=r"^sm_margin: expected"):
        vllm.get_scheduler_metadata(2, 1, 300, 8, 2, 64, lens, sm_margin=2)
    with pytest.raises(TypeError, match=r"^cache_seqlens: expected"):
        vllm.get_scheduler_metadata(2, 1, 300, 8, 2, 64, [3, 4])
