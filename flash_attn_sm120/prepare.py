"""From a call's arguments to a Call: every check that needs no address and no contents, the problem, its launcher."""

from __future__ import annotations

import torch

from flash_attn_sm120 import checks, launchers
from flash_attn_sm120.arguments import Numbers
from flash_attn_sm120.calls import Call
from flash_attn_sm120.problem import AttentionProblem
from flash_attn_sm120.strides import has_tma_strides, has_whole_strides, reach


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int | None, int | None],
    softcap: float,
    return_lse: bool,
    out: torch.Tensor | None,
) -> Call:
    """Raises as flash_attn_func does. lengths: cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, and more."""
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, *_ = lengths
    checks.check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    batch = checks.check_lengths(q, k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    softmax_scale = checks.check_softmax_scale(softmax_scale, head_dim)
    softcap = checks.check_softcap(softcap)
    mask, window_left, window_right = checks.check_mask(causal, window_size)
    checks.check_flag("return_lse", return_lse)
    if out is not None:
        checks.check_out(out, q, head_dim_v)
    checks.check_forward_only(q, k, v, out)

    packed_q, packed_k = cu_seqlens_q is not None, cu_seqlens_k is not None
    launcher = None
    if batch == 0 or q.shape[0 if packed_q else 1] == 0:
        launchers.check_device(q.device)
    else:
        given = (packed_q, packed_k, seqused_q is not None, seqused_k is not None)
        # strides choose between kernels for dense calls only
        tma_strides = any(given) or all(map(has_tma_strides, (q, k, v)))
        features = (mask, softcap != 0.0, return_lse, *given, tma_strides)
        problem = AttentionProblem(checks.DTYPE_NAMES[q.dtype], head_dim, head_dim_v, *features)
        launcher = launchers.load(problem, q.device)
    lse_shape = None
    if return_lse:
        lse_shape = (q.shape[1], q.shape[0]) if packed_q else (q.shape[0], q.shape[2], q.shape[1])
    return Call(
        launcher,
        (*q.shape[:-1], head_dim_v),
        lse_shape,
        Numbers(softmax_scale, softcap, window_left, window_right),
        readable=all(map(has_whole_strides, (q, k, v))),
        writable=out is None or has_whole_strides(out),
        reaches=() if out is None else tuple(map(reach, (q, k, v, out))),
        device_index=q.device.index if q.is_cuda else None,
    )
