"""flash_attn_func and flash_attn_varlen_func: check, default, launch.

Names and order are those of flash-attn 2 and its CuTe successor, so that a call moves over by changing the import.
Idea: Dao, FlashAttention-2 (2023).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from flash_attn_sm120 import checks
from flash_attn_sm120.problem import AttentionProblem

MAX_ROW_STRIDE = 2**30  # elements; the kernels count the bytes from row to row in 31 bits

MAX_CALLS = 4096  # kept; a server sees few, a sweep over lengths starts anew
DENSE = (None,) * 6

_calls: dict[tuple, _Call] = {}
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


class _Call(NamedTuple):
    """What all calls with the same arguments but for addresses and contents have in common; checked once."""

    launcher: Callable | None  # None: there is nothing to compute
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...] | None
    numbers: tuple[float, float, int, int, None]  # softmax_scale, softcap, window_left, window_right, dropout_seed
    readable: bool  # q, k and v have strides that the kernel can follow
    writable: bool  # out, if given, has
    reaches: tuple[int, ...]  # bytes that q, k, v and out extend over, where out is given
    device_index: int | None


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
        call = _calls.get(key)
    except (AttributeError, TypeError):
        key = call = None
    if call is None:
        call = _prepare(q, k, v, lengths, *options, out)
        if key is not None:
            if len(_calls) >= MAX_CALLS:
                _calls.clear()
            _calls[key] = call
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
        target = result if out is None else _target_for(out, q, k, v, call, cu_seqlens_q is not None)
        if not call.readable or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
            q, k, v = _aligned(q), _aligned(k), _aligned(v)
        arguments = (q, k, v, target, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, *call.numbers)
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


def _prepare(
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
) -> _Call:
    """Every check that needs no address and no contents; finds the launcher."""
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
        _check_device(q.device)
    else:
        lengths_given = (packed_q, packed_k, seqused_q is not None, seqused_k is not None)
        # strides choose between kernels for dense calls only
        tma_strides = any(lengths_given) or all(map(_has_tma_strides, (q, k, v)))
        features = (mask, softcap != 0.0, return_lse, *lengths_given, tma_strides)
        launcher = _load(q.dtype, head_dim, head_dim_v, *features, q.device)
    lse_shape = None
    if return_lse:
        lse_shape = (q.shape[1], q.shape[0]) if packed_q else (q.shape[0], q.shape[2], q.shape[1])
    return _Call(
        launcher,
        (*q.shape[:-1], head_dim_v),
        lse_shape,
        (softmax_scale, softcap, window_left, window_right, None),
        readable=all(map(_has_whole_strides, (q, k, v))),
        writable=out is None or _has_whole_strides(out),
        reaches=() if out is None else tuple(map(_reach, (q, k, v, out))),
        device_index=q.device.index if q.is_cuda else None,
    )


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
    tma_strides: bool,
    device: torch.device,
) -> Callable:
    """The launcher for a problem on this device."""
    _check_device(device)
    features = (mask, softcap, lse, packed_q, packed_k, seqused_q, seqused_k, tma_strides)
    key = (dtype, head_dim, head_dim_v, *features, device)
    launcher = _launchers.get(key)
    if launcher is None:
        problem = AttentionProblem(checks.DTYPE_NAMES[dtype], head_dim, head_dim_v, *features)
        if device.type == "cpu":
            return _cpu_load(problem)
        from flash_attn_sm120.compile import load

        launcher = _launchers[key] = load(problem, _target(device.index))
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


def _has_whole_strides(tensor: torch.Tensor) -> bool:
    """Strides of whole 16 bytes, rows less than 2 GB apart: what a kernel can follow."""
    strides = tensor.stride()
    return not any(stride % 8 for stride in strides[:-1]) and strides[-3] < MAX_ROW_STRIDE


def _has_tma_strides(tensor: torch.Tensor) -> bool:
    """Whether a tensor map can hold the strides: those of a repeated dimension it can't."""
    return all(stride > 0 or size == 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where the kernel can read it, else a copy."""
    if tensor.data_ptr() % 16 == 0:
        if _has_whole_strides(tensor):
            return tensor
        # The stride of a dimension of size 1 is never followed, but the launcher looks at it all the same.
        places = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
        view = tensor.as_strided(tensor.shape, (*(8 if size == 1 else stride for size, stride in places), 1))
        if _has_whole_strides(view):
            return view
    return tensor.clone(memory_format=torch.contiguous_format)


def _target_for(
    out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: _Call, packed: bool
) -> torch.Tensor:
    """out itself, or a temporary where the kernel can't write it directly or would overwrite what it still reads."""
    *reaches, reach = call.reaches
    first = out.data_ptr()
    apart = all(
        tensor.data_ptr() >= first + reach or first >= tensor.data_ptr() + own
        for tensor, own in zip((q, k, v), reaches, strict=True)
    )
    if apart and call.writable and first % 16 == 0:
        return out.detach() if out.requires_grad else out
    if packed:  # rows that no sequence names keep what they hold
        return out.detach().clone(memory_format=torch.contiguous_format)
    return torch.empty(out.shape, dtype=out.dtype, device=out.device)


def _reach(tensor: torch.Tensor) -> int:
    """Bytes from the tensor's address to the end of its last element."""
    if tensor.numel() == 0:
        return 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


@contextmanager
def launches_on_cpu(load: Callable[[AttentionProblem], Callable]) -> Iterator[None]:
    """While open, CPU tensors are accepted and go to `load(problem)`, which takes a launcher's arguments. For tests."""
    global _cpu_load
    before, _cpu_load = _cpu_load, load
    _calls.clear()
    try:
        yield
    finally:
        _cpu_load = before
        _calls.clear()
