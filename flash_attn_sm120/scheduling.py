"""get_scheduler_metadata: what can be computed once a step and serves the calls of all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flash_attn_sm120 import checks, checks_serving, dispatch, launchers
from flash_attn_sm120.arguments import Numbers
from flash_attn_sm120.prepare import keys_in_sight
from flash_attn_sm120.problem import AttentionProblem
from flash_attn_sm120.splits import choose_splits


@dataclass(frozen=True, slots=True)
class SchedulerMetadata:
    """num_splits: as flash_attn_func takes it; right for any call, fast for those that it was computed for."""

    num_splits: int


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: torch.Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    *,
    attention_chunk: int = 0,
) -> SchedulerMetadata:
    """The number of splits for calls of flash_attn_varlen_func; names and order are flash-attn's.

    batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, headdim_v (headdim if None), causal,
    window_size, attention_chunk: of the calls. cache_seqlens: any tensor on their device, whose SMs are counted.
    num_splits: other than 0 it is the answer. qkv_dtype, cu_seqlens_q, page_size, has_softcap and pack_gqa are not
    looked at.

    Reads no values from the device. Raises as flash_attn_func does, NotImplementedError for new keys, left padding and
    SMs kept free (cu_seqlens_k_new, max_seqlen_k_new, cache_leftpad, sm_margin).
    """
    for name, value in (
        ("cu_seqlens_k_new", cu_seqlens_k_new), ("cache_leftpad", cache_leftpad),
        ("max_seqlen_k_new", max_seqlen_k_new or None), ("sm_margin", sm_margin or None),
    ):  # fmt: skip
        if value is not None:
            checks.refuse(name, "its neutral value", checks.describe(value), NotImplementedError)
    if not isinstance(cache_seqlens, torch.Tensor):
        checks.refuse("cache_seqlens", "a tensor on the calls' device", checks.describe(cache_seqlens), TypeError)
    num_splits = checks_serving.check_num_splits(num_splits)
    if num_splits or not dispatch.use_decode(max_seqlen_q, 0):
        return SchedulerMetadata(num_splits or 1)
    problem = AttentionProblem("bfloat16", headdim, headdim_v or headdim, decode=True)
    _, left, right = checks.check_mask(causal, window_size)
    chunk = checks_serving.check_attention_chunk(attention_chunk)
    numbers = Numbers(window_left=left, window_right=right, attention_chunk=chunk)
    keys = keys_in_sight(max_seqlen_k, max_seqlen_q, numbers)
    sms, q_shape = launchers.sm_count(cache_seqlens.device), (batch_size, max_seqlen_q, num_heads_q, headdim)
    cut = choose_splits(problem, sms, q_shape, num_heads_kv, batch_size, max_seqlen_q, keys)
    return SchedulerMetadata(cut.num_splits)


def splits_of(metadata: Any, num_splits: Any) -> int:
    """num_splits, or that of the metadata where it is 0."""
    if not isinstance(metadata, SchedulerMetadata):
        expected = "what get_scheduler_metadata returns, or None"
        checks.refuse("scheduler_metadata", expected, checks.describe(metadata), TypeError)
    return checks_serving.check_num_splits(num_splits) or metadata.num_splits
