"""What the public functions refuse, and in which words: `argument: expected ..., got ...`.

Nothing here launches or allocates on a device. Only `check_length_values` reads what a tensor holds, and waits for it.
"""

from __future__ import annotations

import itertools
import math
import numbers
import operator
import os
import warnings
from typing import Any, NoReturn

import torch

from flash_attn_sm120.problem import MAX_HEAD_DIM

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
FLOAT8_NAMES = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
UNBOUNDED = 2**30
FLOAT32 = torch.finfo(torch.float32)
# Whether the contents of length tensors are checked, which waits for the device.
VALUE_CHECKS = os.environ.get("FLASH_ATTN_SM120_CHECK") == "1"

# Accepted by name for callers of other packages; a value outside the tuple asks for what isn't offered yet.
LATER = {
    "return_attn_probs": (None, False),
}
# Honoured whatever they say: the forward is deterministic, and pack_gqa only names a way to the same numbers.
WITHOUT_EFFECT = ("deterministic", "pack_gqa")


def refuse(name: str, expected: str, got: Any, kind: type[Exception] = ValueError) -> NoReturn:
    raise kind(f"{name}: expected {expected}, got {got}")


def describe(value: Any) -> str:
    """A value in an error message: tensors by dtype, shape and device, the rest by type and repr."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)} on {value.device}"
    if value is None:
        return "None"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def check_later(function: str, options: dict[str, Any]) -> None:
    """Options beyond the signature: neutral values pass, others raise NotImplementedError, unknown names TypeError."""
    for name, value in options.items():
        if name in WITHOUT_EFFECT:
            if value is not None and not isinstance(value, bool):
                refuse(name, "bool or None", describe(value), TypeError)
        elif name not in LATER:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        elif value is not None and not (isinstance(value, (int, float)) and value in LATER[name]):
            neutral = " or ".join(str(n) for n in LATER[name])
            refuse(name, f"{neutral} (the rest is not implemented yet)", describe(value), NotImplementedError)


def check_tensors(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, paged: bool) -> None:
    """Kind, dtype, rank, shape, last stride and device of q, k and v against each other. paged: k and v are pools."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            refuse(name, "a torch.Tensor", describe(tensor), TypeError)
    dtype, device = q.dtype, q.device
    if dtype not in DTYPE_NAMES:
        refuse("q", "bfloat16 or float16", describe(q), TypeError)
    if k.dtype != dtype and k.dtype not in FLOAT8_NAMES:
        refuse("k", f"{DTYPE_NAMES[dtype]} as q, or {' or '.join(FLOAT8_NAMES.values())}", describe(k), TypeError)
    if v.dtype != k.dtype:
        refuse("v", f"{str(k.dtype).removeprefix('torch.')} as k", describe(v), TypeError)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.device != device:
            refuse(name, f"a tensor on {device} as q", describe(tensor))
    shape_q, shape_k, shape_v = q.shape, k.shape, v.shape
    _check_rank("q", q, "seqlen_q, heads, head_dim", cu_seqlens_q)
    if not paged:
        _check_rank("k", k, "seqlen_k, heads_kv, head_dim", cu_seqlens_k)
    elif k.dim() != 4:
        refuse("k", "a pool (num_pages, page_size, heads_kv, head_dim) beside page_table", describe(k))
    if shape_v[:-1] != shape_k[:-1] or len(shape_v) != len(shape_k):
        refuse("v", f"shape {(*shape_k[:-1], 'head_dim_v')} to go with k", describe(v))
    head_dim, head_dim_v = shape_q[-1], shape_v[-1]
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        refuse("q", f"a head_dim that is a multiple of 8 from 8 to {MAX_HEAD_DIM}", f"{head_dim} ({describe(q)})")
    if shape_k[-1] != head_dim:
        refuse("k", f"head_dim {head_dim} as q", f"{shape_k[-1]} ({describe(k)})")
    if head_dim_v % 8 or not 8 <= head_dim_v <= MAX_HEAD_DIM:
        refuse("v", f"a head_dim_v that is a multiple of 8 from 8 to {MAX_HEAD_DIM}", f"{head_dim_v} ({describe(v)})")
    heads, heads_kv = shape_q[-2], shape_k[-2]
    if heads == 0:
        refuse("q", "at least one head", describe(q))
    if heads_kv == 0 or heads % heads_kv:
        refuse("k", f"a number of heads_kv that divides q's {heads} heads", f"{heads_kv} ({describe(k)})")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(-1) != 1:
            refuse(name, "a last dimension of stride 1", f"strides {tensor.stride()}")


def _check_rank(name: str, tensor: torch.Tensor, dims: str, cu_seqlens: Any) -> None:
    rank = tensor.dim()
    if cu_seqlens is None:
        if rank == 3:
            refuse(f"cu_seqlens_{name}", f"int32 of shape (batch + 1,), as {name} has three dimensions", "None")
        if rank != 4:
            refuse(
                name, f"(batch, {dims}), or packed (total, heads, head_dim) with cu_seqlens_{name}", describe(tensor)
            )
    elif rank == 4:
        refuse(f"cu_seqlens_{name}", f"None, as {name} has four dimensions", describe(cu_seqlens))
    elif rank != 3:
        refuse(name, f"packed (total, {dims.partition(', ')[2]})", describe(tensor))


def check_lengths(
    q: torch.Tensor, k: torch.Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any, seqused_q: Any, seqused_k: Any, paged: bool
) -> int:
    """Form of the length tensors, and that all sides name the same batch; returns it. Reads no values.

    paged: k is a pool and names no batch."""
    batch, source = -1, ""
    for name, tensor, cu_seqlens, seqused in (("q", q, cu_seqlens_q, seqused_q), ("k", k, cu_seqlens_k, seqused_k)):
        found = batch if paged and name == "k" else tensor.shape[0]
        if cu_seqlens is not None:
            found = _check_length_tensor(f"cu_seqlens_{name}", cu_seqlens, q.device, "batch + 1") - 1
            if found < 0:
                refuse(f"cu_seqlens_{name}", "int32 of shape (batch + 1,)", describe(cu_seqlens))
        own = name if cu_seqlens is None else f"cu_seqlens_{name}"
        if not source:
            batch, source = found, own
        elif found != batch:
            refuse(own, f"a batch of {batch} as {source}", found)
        if seqused is not None:
            used = _check_length_tensor(f"seqused_{name}", seqused, q.device, "batch")
            if used != batch:
                refuse(f"seqused_{name}", f"a batch of {batch} as {source}", used)
    return batch


def check_combined_lengths(out_partial: torch.Tensor, cu_seqlens: Any, seqused: Any) -> None:
    """Form of flash_attn_combine's length tensors, and that they go with its rows. Reads no values."""
    packed, device = out_partial.dim() == 4, out_partial.device
    if cu_seqlens is not None:
        if not packed:
            refuse("cu_seqlens", "None, as out_partial has five dimensions", describe(cu_seqlens))
        if _check_length_tensor("cu_seqlens", cu_seqlens, device, "batch + 1") == 0:
            refuse("cu_seqlens", "int32 of shape (batch + 1,)", describe(cu_seqlens))
    if seqused is not None:
        if packed and cu_seqlens is None:
            refuse("cu_seqlens", "int32 of shape (batch + 1,) beside seqused and a packed out_partial", "None")
        batch = cu_seqlens.shape[0] - 1 if packed else out_partial.shape[1]
        if _check_length_tensor("seqused", seqused, device, "batch") != batch:
            refuse("seqused", f"a batch of {batch}", describe(seqused))


def _check_length_tensor(name: str, tensor: Any, device: torch.device, size: str) -> int:
    if not isinstance(tensor, torch.Tensor):
        refuse(name, f"an int32 tensor of shape ({size},)", describe(tensor), TypeError)
    if tensor.dtype != torch.int32:
        refuse(name, f"int32 of shape ({size},)", describe(tensor), TypeError)
    if tensor.dim() != 1:
        refuse(name, f"int32 of shape ({size},)", describe(tensor))
    if tensor.device != device:
        refuse(name, f"a tensor on {device} as its companions", describe(tensor))
    if tensor.shape[0] > 1 and tensor.stride(0) != 1:
        refuse(name, "a contiguous tensor", f"strides {tensor.stride()}")
    return tensor.shape[0]


def check_max_seqlen(name: str, value: Any) -> None:
    """A hint that the kernels don't need; still, a wrong one is a caller's mistake."""
    if value is None or (value.__class__ is int and value >= 0):
        return
    if isinstance(value, (bool, torch.Tensor)) or not isinstance(value, numbers.Integral):
        refuse(name, "int or None", describe(value), TypeError)
    if value < 0:
        refuse(name, "an int >= 0", value)


def check_length_values(
    name: str,
    tensor: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    seqused: torch.Tensor | None,
    max_seqlen: int | None,
    capacity: int | None = None,
) -> None:
    """What the lengths of one side (name "q" or "k") say, read back from the device.

    capacity: rows of every sequence where the tensor is a pool."""
    if capacity is not None:
        rooms = [capacity] * (0 if seqused is None else seqused.shape[0])
    elif cu_seqlens is None:
        rooms = [tensor.shape[1]] * tensor.shape[0]
    else:
        marks = cu_seqlens.tolist()
        if marks[0] != 0:
            refuse(f"cu_seqlens_{name}", "0 as the first value", marks[0])
        rooms = [end - start for start, end in itertools.pairwise(marks)]
        if any(room < 0 for room in rooms):
            index = next(i for i, room in enumerate(rooms) if room < 0)
            refuse(
                f"cu_seqlens_{name}", "values that never fall", f"{marks[index]}, {marks[index + 1]} at index {index}"
            )
        if marks[-1] > tensor.shape[0]:
            refuse(f"cu_seqlens_{name}", f"a last value of at most {tensor.shape[0]}, the rows of {name}", marks[-1])
    lengths = rooms
    if seqused is not None:
        lengths = seqused.tolist()
        for index, (length, room) in enumerate(zip(lengths, rooms, strict=True)):
            if not 0 <= length <= room:
                refuse(f"seqused_{name}", f"from 0 to {room}, the rows of sequence {index}", length)
    if max_seqlen is not None and lengths and max(lengths) > max_seqlen:
        refuse(f"max_seqlen_{name}", f"at least {max(lengths)}, the longest sequence", max_seqlen)


def check_softmax_scale(value: Any, head_dim: int) -> float:
    """Given, or 1 / sqrt(head_dim)."""
    if value is None:
        return 1.0 / math.sqrt(head_dim)
    value = _real("softmax_scale", value)
    if not 0.0 < value <= FLOAT32.max:
        refuse("softmax_scale", "a finite number > 0", value)
    return value


def check_softcap(value: Any) -> float:
    value = 0.0 if value is None else _real("softcap", value)
    if value != 0.0 and not FLOAT32.tiny <= value <= FLOAT32.max:
        refuse("softcap", "a finite number > 0, or 0 for none", value)
    return value


def _real(name: str, value: Any) -> float:
    if isinstance(value, (bool, torch.Tensor)) or not isinstance(value, numbers.Real):
        refuse(name, "a number", describe(value), TypeError)
    return float(value)


def check_flag(name: str, value: Any) -> None:
    if value is not True and value is not False:
        refuse(name, "bool", describe(value), TypeError)


def check_mask(causal: Any, window_size: Any) -> tuple[str, int, int]:
    """(mask of the AttentionProblem, window_left, window_right); a side that is absent is UNBOUNDED.

    causal makes the right side 0; a window that is only that is the causal mask.
    """
    check_flag("causal", causal)
    if window_size is None:
        window_size = (-1, -1)
    if not isinstance(window_size, (tuple, list)):
        refuse("window_size", "(left, right)", describe(window_size), TypeError)
    if len(window_size) != 2:
        refuse("window_size", "(left, right)", describe(window_size))
    left, right = (_window_side(side) for side in window_size)
    if causal:
        right = 0
    if left == UNBOUNDED and right in (0, UNBOUNDED):
        return ("full" if right else "causal"), left, right
    return "local", left, right


def _window_side(side: Any) -> int:
    if side is None:
        return UNBOUNDED
    if isinstance(side, (bool, torch.Tensor)):
        refuse("window_size", "ints or None", describe(side), TypeError)
    try:
        side = operator.index(side)
    except TypeError:
        refuse("window_size", "ints or None", describe(side), TypeError)
    if side < -1:
        refuse("window_size", "ints >= 0, or -1 or None for unbounded", side)
    return UNBOUNDED if side == -1 else min(side, UNBOUNDED)


def check_out(out: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """out can take the result of this form: no two elements in one place."""
    if not isinstance(out, torch.Tensor):
        refuse("out", "a torch.Tensor", describe(out), TypeError)
    if out.dtype != dtype:
        refuse("out", str(dtype).removeprefix("torch."), describe(out), TypeError)
    if out.shape != shape:
        refuse("out", f"shape {shape}", describe(out))
    if out.device != device:
        refuse("out", f"a tensor on {device} as the inputs", describe(out))
    if out.stride(-1) != 1:
        refuse("out", "a last dimension of stride 1", f"strides {out.stride()}")
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(out.stride(), shape, strict=True) if size > 1):
        if stride <= reach:
            refuse("out", "strides that keep its elements apart", f"strides {out.stride()} of shape {shape}")
        reach += (size - 1) * stride


def check_forward_only(tensors: dict[str, torch.Tensor | None]) -> None:
    """Raises where autograd would expect a backward, which there is none of."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                refuse(
                    name, "no gradient (forward only: use torch.no_grad())", "requires_grad=True", NotImplementedError
                )


def target_of(capability: tuple[int, int]) -> str:
    """The compile target for a GPU's compute capability, such as "sm_120a" for (12, 0); warns off 12.x."""
    major, minor = capability
    if major < 9:
        refuse("device", "a GPU of compute capability 9.0 or later", f"{major}.{minor}", NotImplementedError)
    if major != 12:
        warnings.warn(
            f"flash_attn_sm120 is tuned for compute capability 12.x and runs on {major}.{minor} with the same tiles",
            stacklevel=2,
        )
    return f"sm_{major}{minor}a"
