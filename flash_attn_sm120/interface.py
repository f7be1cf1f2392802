"""flash_attn_func and flash_attn_varlen_func: check, default, launch.

Names and order are those of flash-attn 2 and its CuTe successor, so that a call moves over by changing the import.
Idea: Dao, FlashAttention-2 (2023).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from flash_attn_sm120 import checks
from flash_attn_sm120.problem import AttentionProblem

MAX_ROW_STRIDE = 2**30  # elements; the kernels count the bytes from row to row in 31 bits

_launchers: dict[tuple, Callable] = {}
_targets: dict[int, str] = {}
_lock = threading.Lock()
_cpu_load: Callable[[AttentionProblem], Callable] | None = None


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
    return _forward(q, k, v, (None,) * 6, softmax_scale, causal, window_size, softcap, out, return_lse)


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
    GPU: with FLASH_ATTN_SM120_CHECK=1 in the environment it is checked on every call (first value 0, never falling,
    within the tensor, seqused within its sequence, max_seqlen not too small); otherwise the kernel clamps the values so
    that nothing outside the tensors is touched.
    """
    if later:
        checks.check_later("flash_attn_varlen_func", later)
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
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k = lengths
    checks.check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    batch = checks.check_lengths(q, k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    checks.check_max_seqlen("max_seqlen_q", max_seqlen_q)
    checks.check_max_seqlen("max_seqlen_k", max_seqlen_k)
    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    softmax_scale = checks.check_softmax_scale(softmax_scale, head_dim)
    softcap = checks.check_softcap(softcap)
    mask, window_left, window_right = checks.check_mask(causal, window_size)
    checks.check_flag("return_lse", return_lse)
    if out is not None:
        checks.check_out(out, q, head_dim_v)
    if q.requires_grad or k.requires_grad or v.requires_grad or (out is not None and out.requires_grad):
        checks.check_forward_only(q, k, v, out)
        q, k, v = q.detach(), k.detach(), v.detach()

    packed_q, packed_k = cu_seqlens_q is not None, cu_seqlens_k is not None
    varlen = packed_q or packed_k or seqused_q is not None or seqused_k is not None
    if varlen and checks.value_checks_on():
        checks.check_length_values("q", q, cu_seqlens_q, seqused_q, max_seqlen_q)
        checks.check_length_values("k", k, cu_seqlens_k, seqused_k, max_seqlen_k)

    empty = batch == 0 or q.shape[0 if packed_q else 1] == 0
    if empty:
        _check_device(q.device)
    else:
        key = (
            q.dtype, head_dim, head_dim_v, mask, softcap != 0.0, return_lse, packed_q, packed_k,
            seqused_q is not None, seqused_k is not None, q.device,
        )  # fmt: skip
        launcher = _launchers.get(key) or _load(*key)

    result = q.new_empty((*q.shape[:-1], head_dim_v)) if out is None else out
    lse = None
    if return_lse:
        shape = (q.shape[1], q.shape[0]) if packed_q else (q.shape[0], q.shape[2], q.shape[1])
        lse = q.new_empty(shape, dtype=torch.float32)
    if not empty:
        target = result
        if out is not None:
            target = _writable(out.detach() if out.requires_grad else out, q, k, v)
        arguments = (
            _aligned(q), _aligned(k), _aligned(v), target, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
            softmax_scale, softcap, window_left, window_right,
        )  # fmt: skip
        if q.is_cuda and q.get_device() != torch.cuda.current_device():
            with torch.cuda.device(q.device):
                launcher(*arguments)
        else:
            launcher(*arguments)
        if out is not None and target.data_ptr() != out.data_ptr():
            out.detach().copy_(target)
    return (result, lse) if return_lse else result


def _load(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    mask: str,
    softcap: bool,
    lse: bool,
    packed_q: bool,
    packed_k: bool,
    seqused_q: bool,
    seqused_k: bool,
    device: torch.device,
) -> Callable:
    """First call of its kind on this device: find the launcher and keep it under its key."""
    _check_device(device)
    features = (mask, softcap, lse, packed_q, packed_k, seqused_q, seqused_k)
    problem = AttentionProblem(checks.DTYPE_NAMES[dtype], head_dim, head_dim_v, *features)
    if device.type == "cpu":
        return _cpu_load(problem)
    from flash_attn_sm120.compile import load

    launcher = load(problem, _target(device.index))
    _launchers[(dtype, head_dim, head_dim_v, *features, device)] = launcher
    return launcher


def _check_device(device: torch.device) -> None:
    """The last check, so that a wrong call is told so on a machine without a GPU too."""
    if device.type == "cuda":
        _target(device.index)
    elif device.type != "cpu" or _cpu_load is None:
        hint = f"{device} (flash_attn_sm120.simulator.simulate runs the kernels on a CPU, to test them)"
        checks.refuse("q", "a tensor on a CUDA device", hint)


def _target(index: int) -> str:
    target = _targets.get(index)
    if target is None:
        with _lock:
            if index not in _targets:
                _targets[index] = checks.target_of(torch.cuda.get_device_capability(index))
            target = _targets[index]
    return target


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where the kernel can read it: strides of whole 16 bytes from an address of whole 16 bytes, and
    rows less than 2 GB apart."""
    strides = tensor.stride()
    if strides[-3] >= MAX_ROW_STRIDE:
        return tensor.clone(memory_format=torch.contiguous_format)
    # Three or four dimensions, the last of stride 1: this names all the others.
    if not (strides[0] | strides[1] | strides[-2]) % 8 and not tensor.data_ptr() % 16:
        return tensor
    shape = tensor.shape
    # The stride of a dimension of size 1 is never followed, but the launcher looks at it all the same.
    whole = tuple(8 if size == 1 else stride for size, stride in zip(shape[:-1], strides[:-1], strict=True))
    if not any(stride % 8 for stride in whole) and not tensor.data_ptr() % 16:
        return tensor.as_strided(shape, (*whole, 1))
    return tensor.clone(memory_format=torch.contiguous_format)


def _writable(out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """out itself, or a temporary where the kernel can't write it directly or would overwrite what it still reads.

    The temporary starts as a copy, as rows of a packed out that belong to no sequence keep what they hold.
    """
    first, last = _extent(out)
    for tensor in inputs:
        begin, end = _extent(tensor)
        if begin < last and first < end:
            return out.clone(memory_format=torch.contiguous_format)
    strides = out.stride()
    if any(stride % 8 for stride in strides[:-1]) or first % 16 or strides[-3] >= MAX_ROW_STRIDE:
        return out.clone(memory_format=torch.contiguous_format)
    return out


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte, and the byte behind the last, that the tensor's elements take."""
    first = tensor.data_ptr()
    if tensor.is_contiguous() or tensor.numel() == 0:
        return first, first + tensor.numel() * tensor.element_size()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (reach + 1) * tensor.element_size()


@contextmanager
def launches_on_cpu(load: Callable[[AttentionProblem], Callable]) -> Iterator[None]:
    """While open, CPU tensors are accepted and go to `load(problem)`, which takes a launcher's arguments. For tests."""
    global _cpu_load
    before, _cpu_load = _cpu_load, load
    try:
        yield
    finally:
        _cpu_load = before
