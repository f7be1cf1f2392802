"""The functions of vLLM's flash-attention fork, with its names, order and defaults, on this package's kernels.

Source of the signatures: vLLM 0.24.0 and 0.33.0, vllm/vllm_flash_attn/flash_attn_interface.py; of
flash_attn_with_kvcache, which those two no longer have, flash-attn 2 with the arguments that the fork added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from flash_attn_sm120 import checks, interface, scheduling
from flash_attn_sm120.block_sparse import BlockSparseTensors
from flash_attn_sm120.dispatch import MAX_SPLITS
from flash_attn_sm120.scheduling import SchedulerMetadata

FA_VERSIONS = (None, 2, 3, 4)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    q_v: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    return_softmax_lse: bool = False,
    out: torch.Tensor | None = None,
    scheduler_metadata: torch.Tensor | SchedulerMetadata | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | float | None = None,
    v_descale: torch.Tensor | float | None = None,
    num_splits: int = 0,
    output_scale: torch.Tensor | None = None,
    fa_version: int | None = 2,
    s_aux: torch.Tensor | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: torch.Tensor | None = None,
    mask_mod: Callable | None = None,
    block_sparse_tensors: BlockSparseTensors | None = None,
    aux_tensors: Sequence[torch.Tensor] | None = None,
    aux_tensor_leading_dims: Sequence[int] | None = None,
    dynamic_causal: torch.Tensor | None = None,
    gather_kv_indices: torch.Tensor | None = None,
    gather_kv_valid_length: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """flash_attn_sm120.flash_attn_varlen_func as vLLM calls it.

    q: (total_q, heads, head_dim) bfloat16 or float16. A q whose last dimension isn't contiguous is copied, k and v too
        where they aren't pools.
    k, v: (total_k, heads_kv, head_dim / head_dim_v) with cu_seqlens_k, or pools (blocks, block_size, heads_kv, ...)
        with block_table and seqused_k. dtype of q, float8_e4m3fn or float8_e5m2; vLLM's uint8 caches are to be viewed
        as one of these, as its backends do.
    max_seqlen_q, max_seqlen_k: the longest lengths, or more. cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,). seqused_k:
        int32 (batch,). One of cu_seqlens_k and seqused_k is needed; with both, seqused_k has the lengths.
    block_table: int32 (batch, blocks of a sequence). block_size: a multiple of 8.
    k_descale, v_descale: as flash_attn_sm120.flash_attn_varlen_func takes them. They are of float8 tensors: as in vLLM,
        whose backends always pass them, k and v of 16 bits are not scaled. q_descale likewise is of a float8 q, which
        isn't offered, and has no say about any other.
    scheduler_metadata: of get_scheduler_metadata, for num_splits = 0. num_splits: 1: keys stay whole; n: up to n parts
        of each sequence, up to 64; 0: chosen from the maxima.
    window_size: (left, right), -1 for unbounded; None for no window. softcap: 0 is off. s_aux: (heads,) sinks.
    cp_world_size, cp_rank, cp_tot_seqused_k: as flash_attn_sm120.flash_attn_varlen_func has them.
    fa_version: None, 2, 3 or 4. deterministic, aux_tensor_leading_dims: as fa_version, they choose among vLLM's kernels
        and not the result.
    mask_mod, aux_tensors, block_sparse_tensors, dropout_p: as flash_attn_sm120.flash_attn_varlen_func has them.

    Returns out (total_q, heads, head_dim_v), or with return_softmax_lse (out, lse), lse (heads, total_q) float32,
    natural log.

    Raises as flash_attn_sm120.flash_attn_varlen_func does, NotImplementedError for q_v, output_scale, dynamic_causal,
    gather_kv_indices, gather_kv_valid_length and return_attn_probs.
    """
    _refuse_given(
        q_v=q_v,
        output_scale=output_scale,
        dynamic_causal=dynamic_causal,
        gather_kv_indices=gather_kv_indices,
        gather_kv_valid_length=gather_kv_valid_length,
    )
    _check_fa_version(fa_version)
    if cu_seqlens_k is None and seqused_k is None:
        checks.refuse("seqused_k", "int32 of shape (batch,) where cu_seqlens_k is None", "None")
    if block_table is None:
        k, v = _rows_contiguous(k), _rows_contiguous(v)
    k_descale, v_descale = _descale(k, k_descale), _descale(v, v_descale)
    return interface.flash_attn_varlen_func(
        _rows_contiguous(q),
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_k=seqused_k,
        page_table=block_table,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=(-1, -1) if window_size is None else window_size,
        softcap=softcap,
        learnable_sink=s_aux,
        alibi_slopes=alibi_slopes,
        k_descale=k_descale,
        v_descale=v_descale,
        num_splits=num_splits,
        scheduler_metadata=_own_metadata(scheduler_metadata),
        cp_world_size=cp_world_size,
        cp_rank=cp_rank,
        cp_tot_seqused_k=cp_tot_seqused_k,
        dropout_p=dropout_p,
        mask_mod=mask_mod,
        aux_tensors=aux_tensors,
        block_sparse_tensors=block_sparse_tensors,
        out=out,
        return_lse=return_softmax_lse,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )


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
    window_size: Sequence[int] = (-1, -1),
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> torch.Tensor:
    """flash_attn_sm120.get_scheduler_metadata in the form that vLLM keeps: int32 zeros on the device of cache_seqlens.

    Their number, from 1 to 64, is that of the splits. So vLLM may copy them into a buffer that a CUDA graph reads, and
    nothing is read back from the GPU.

    Arguments and errors: those of flash_attn_sm120.get_scheduler_metadata.
    """
    found = scheduling.get_scheduler_metadata(
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens, qkv_dtype, headdim_v,
        cu_seqlens_q, cu_seqlens_k_new, cache_leftpad, page_size, max_seqlen_k_new, causal, window_size, has_softcap,
        num_splits, pack_gqa, sm_margin,
    )  # fmt: skip
    return torch.zeros(found.num_splits, dtype=torch.int32, device=cache_seqlens.device)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | int | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | None = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    out: torch.Tensor | None = None,
    scheduler_metadata: torch.Tensor | SchedulerMetadata | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | float | None = None,
    v_descale: torch.Tensor | float | None = None,
    fa_version: int | None = 2,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few rows a sequence over a cache.

    q: (batch, seqlen_q, heads, head_dim) bfloat16 or float16.
    k_cache, v_cache: (batch, seqlen_k, heads_kv, head_dim / head_dim_v), or pools (blocks, block_size, heads_kv, ...)
        with block_table. dtype of q, float8_e4m3fn or float8_e5m2.
    cache_seqlens: int32 (batch,), keys of each sequence, or an int for all; None for all of a cache that isn't a pool.
    The rest as in flash_attn_varlen_func. rotary_interleaved says how rotary_cos would be applied.

    Returns out (batch, seqlen_q, heads, head_dim_v), or with return_softmax_lse (out, lse), lse (batch, heads,
    seqlen_q) float32.

    Raises as flash_attn_sm120.flash_attn_func does, NotImplementedError for k, v, rotary_cos, rotary_sin,
    cache_batch_idx and cache_leftpad: nothing is written into the cache.
    """
    _refuse_given(
        k=k,
        v=v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
    )
    _check_fa_version(fa_version)
    checks.check_flag("rotary_interleaved", rotary_interleaved)
    if isinstance(cache_seqlens, int) and not isinstance(cache_seqlens, bool):
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    if block_table is None:
        k_cache, v_cache = _rows_contiguous(k_cache), _rows_contiguous(v_cache)
    return interface.flash_attn_func(
        _rows_contiguous(q),
        k_cache,
        v_cache,
        seqused_k=cast("torch.Tensor | None", cache_seqlens),
        page_table=block_table,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=(-1, -1) if window_size is None else window_size,
        softcap=softcap,
        learnable_sink=s_aux,
        alibi_slopes=alibi_slopes,
        k_descale=_descale(k_cache, k_descale),
        v_descale=_descale(v_cache, v_descale),
        num_splits=num_splits,
        scheduler_metadata=_own_metadata(scheduler_metadata),
        out=out,
        return_lse=return_softmax_lse,
    )


def _refuse_given(**values: Any) -> None:
    for name, value in values.items():
        if value is not None:
            checks.refuse(name, "None (the rest is not offered)", checks.describe(value), NotImplementedError)


def _check_fa_version(value: Any) -> None:
    if value.__class__ is bool or value not in FA_VERSIONS:
        checks.refuse("fa_version", "2, 3, 4 or None", checks.describe(value))


def _rows_contiguous(tensor: Any) -> Any:
    """The tensor, or a copy whose last dimension is contiguous; what isn't a tensor is refused later."""
    if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.stride(-1) != 1:
        return tensor.contiguous()
    return tensor


def _descale(tensor: Any, descale: Any) -> Any:
    """That of a float8 tensor; other tensors have none."""
    if isinstance(tensor, torch.Tensor) and tensor.dtype not in checks.FLOAT8_NAMES:
        return None
    return descale


def _own_metadata(value: Any) -> SchedulerMetadata | None:
    """From the form that get_scheduler_metadata gives it."""
    if value is None or isinstance(value, SchedulerMetadata):
        return value
    expected = f"what get_scheduler_metadata returns: int32 of shape (splits,), 1 to {MAX_SPLITS}"
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int32:
        checks.refuse("scheduler_metadata", expected, checks.describe(value), TypeError)
    if value.dim() != 1 or not 1 <= value.shape[0] <= MAX_SPLITS:
        checks.refuse("scheduler_metadata", expected, checks.describe(value))
    return SchedulerMetadata(value.shape[0])
