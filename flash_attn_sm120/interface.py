"""flash_attn_func and flash_attn_varlen_func: check, default, launch.

Names and order are those of flash-attn 2 and its CuTe successor, so that a call moves over by changing the import.
Idea: Dao, FlashAttention-2 (2023).
"""

from __future__ import annotations

from typing import Any

import torch

from flash_attn_sm120 import calls, checks
from flash_attn_sm120.arguments import Modifiers
from flash_attn_sm120.prepare import prepare
from flash_attn_sm120.strides import aligned, target_for

DENSE = (None,) * 6
NO_MODIFIERS = Modifiers()


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    **later: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(q @ k^T * softmax_scale) @ v for each head, in one kernel. Forward only.

    q: (batch, seqlen_q, heads, head_dim), bfloat16 or float16, on a GPU of compute capability 8.0 or later.
    k: (batch, seqlen_k, heads_kv, head_dim), v: (batch, seqlen_k, heads_kv, head_dim_v); heads % heads_kv == 0, query
        head h reads KV head h // (heads // heads_kv). head_dim and head_dim_v: multiples of 8 up to 256.
        Any strides with a contiguous last dimension. A tensor whose address isn't a multiple of 16 bytes, or whose
        strides aren't, is copied first.
    softmax_scale: 1 / sqrt(head_dim) if None.
    causal: query row i sees the columns up to i + seqlen_k - seqlen_q (the last row is aligned with the last column).
    window_size: (left, right), the row sees columns from i + seqlen_k - seqlen_q - left to + right; -1 or None is
        unbounded. causal makes right 0. Blocks outside the window are never loaded.
    softcap: scores become softcap * tanh(score / softcap), after the scale; 0 is off.
    out: (batch, seqlen_q, heads, head_dim_v), written in place and returned.
    return_lse: also return the natural log of each row's sum of exponentials.
    later: deterministic (this forward always is) and pack_gqa (forced off: it would change the speed, not the result)
        are accepted. dropout_p, num_splits, page_table, block_table, learnable_sink, s_aux, alibi_slopes, score_mod,
        mask_mod, aux_tensors, block_sparse_tensors, q_descale, k_descale, v_descale and return_attn_probs are accepted
        at their neutral value only.

    Returns out, or (out, lse) with lse (batch, heads, seqlen_q) float32. A row that sees nothing is 0, its lse -inf.

    Raises ValueError (shape, value, device), TypeError (kind, dtype) or NotImplementedError (valid, but not offered),
    before any launch, in the form `argument: expected ..., got ...`.
    """
    if later:
        checks.check_later("flash_attn_func", later)
    if isinstance(q, torch.Tensor) and q.dim() == 3:
        hint = f"{checks.describe(q)} (packed tensors go to flash_attn_varlen_func)"
        checks.refuse("q", "(batch, seqlen_q, heads, head_dim)", hint)
    return _forward(q, k, v, DENSE, softmax_scale, causal, window_size, softcap, out, return_lse)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    **later: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """flash_attn_func for sequences of different lengths: packed one behind the other, or padded.

    q: (total_q, heads, head_dim) with cu_seqlens_q, or (batch, seqlen_q, heads, head_dim) without.
    k, v: (total_k, heads_kv, head_dim / head_dim_v) with cu_seqlens_k, or (batch, seqlen_k, heads_kv, ...) without;
        q may be packed and k padded, or the other way round.
    cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), contiguous, from 0: sequence b is rows cu_seqlens[b] to [b + 1].
    max_seqlen_q, max_seqlen_k: the longest lengths; taken for the sake of callers, the kernels don't need them.
    seqused_q, seqused_k: int32 (batch,), how many rows of each sequence take part, packed or padded. The rows of q
        beyond seqused_q become 0, their lse -inf.
    The rest as in flash_attn_func; masks align at the end of each sequence.

    Returns out of q's form with head_dim_v columns, or (out, lse) with lse float32 (heads, total_q) for packed q,
    (batch, heads, seqlen_q) for padded q. Rows of a packed q past cu_seqlens_q[-1] belong to no sequence and are not
    written.

    Raises as flash_attn_func does. What the length tensors contain is on the device, and reading it would wait for the
    GPU: with FLASH_ATTN_SM120_CHECK=1 in the environment at import it is checked on every call (first value 0, never
    falling, within the tensor, seqused within its sequence, max_seqlen not too small); otherwise the kernel clamps the
    values so that nothing outside the tensors is touched.
    """
    if later:
        checks.check_later("flash_attn_varlen_func", later)
    checks.check_max_seqlen("max_seqlen_q", max_seqlen_q)
    checks.check_max_seqlen("max_seqlen_k", max_seqlen_k)
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k)
    return _forward(q, k, v, lengths, softmax_scale, causal, window_size, softcap, out, return_lse)


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int | None, int | None],
    softcap: float,
    out: torch.Tensor | None,
    return_lse: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    options = (softmax_scale, causal, window_size, softcap, return_lse)
    try:
        # True == 1 and hashes alike, but only one of them is a bool
        key = (
            q.shape, q.stride(), q.dtype, q.get_device(), k.shape, k.stride(), k.dtype, k.get_device(),
            v.shape, v.stride(), v.dtype, v.get_device(), _signature(out),
            lengths if lengths is DENSE else tuple(map(_signature, lengths[:4])),
            options, causal.__class__, return_lse.__class__,
        )  # fmt: skip
        call = calls.known.get(key)
    except (AttributeError, TypeError):
        key = call = None
    if call is None:
        call = prepare(q, k, v, lengths, *options, out)
        if key is not None:
            calls.remember(key, call)
    if q.requires_grad or k.requires_grad or v.requires_grad or (out is not None and out.requires_grad):
        checks.check_forward_only(q, k, v, out)
        q, k, v = q.detach(), k.detach(), v.detach()
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k = lengths
    if checks.VALUE_CHECKS and lengths is not DENSE:
        checks.check_length_values("q", q, cu_seqlens_q, seqused_q, max_seqlen_q)
        checks.check_length_values("k", k, cu_seqlens_k, seqused_k, max_seqlen_k)

    result = q.new_empty(call.out_shape) if out is None else out
    lse = q.new_empty(call.lse_shape, dtype=torch.float32) if return_lse else None
    if call.launcher is not None:
        target = (
            result if out is None else target_for(out, (q, k, v), call.reaches, call.writable, cu_seqlens_q is not None)
        )
        if not call.readable or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
            q, k, v = aligned(q), aligned(k), aligned(v)
        given = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, None, None)
        arguments = (q, k, v, target, lse, given, NO_MODIFIERS, call.numbers)
        if call.device_index is not None and call.device_index != torch.cuda.current_device():
            with torch.cuda.device(call.device_index):
                call.launcher(*arguments)
        else:
            call.launcher(*arguments)
        if out is not None and target.data_ptr() != out.data_ptr():
            out.detach().copy_(target)
    return (result, lse) if return_lse else result


def _signature(tensor: torch.Tensor | None) -> tuple | None:
    """A tensor without its address and contents."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device())
