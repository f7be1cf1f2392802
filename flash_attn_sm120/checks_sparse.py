"""What the public functions refuse of block sparsity; as checks.py says it."""

from __future__ import annotations

import operator
from typing import Any

import torch

from flash_attn_sm120.checks import describe, refuse
from flash_attn_sm120.problem import AUX_DTYPES

ARGUMENT = "block_sparse_tensors"
LISTS = ("mask", "full")
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
FORM = "block_sparse.BlockSparseTensors"
AUX_NAMES = {getattr(torch, name): name for name in AUX_DTYPES}


def check_size(name: str, value: Any, least: int = 0) -> int:
    """An int of at least `least`, below 2^31."""
    if isinstance(value, (bool, torch.Tensor)):
        refuse(name, "an int", describe(value), TypeError)
    try:
        value = operator.index(value)
    except TypeError:
        refuse(name, "an int", describe(value), TypeError)
    if not least <= value < 2**31:
        refuse(name, f"an int from {least} to 2^31 - 1", value)
    return value


def check_block_size(name: str, value: Any) -> tuple[int, int]:
    """(rows, columns) of a sparse block, given so or as one int for both."""
    sides = (value, value) if not isinstance(value, (tuple, list)) else tuple(value)
    expected = "(rows, columns) or one int for both, rows a multiple of 64 and columns a multiple of 32"
    if len(sides) != 2:
        refuse(name, expected, describe(value))
    for side, unit in zip(sides, (64, 32), strict=True):
        if isinstance(side, bool) or not hasattr(side, "__index__") or isinstance(side, torch.Tensor):
            refuse(name, expected, describe(value), TypeError)
        if side.__index__() <= 0 or side.__index__() % unit:
            refuse(name, expected, describe(value))
    return sides[0].__index__(), sides[1].__index__()


def check_block_sparse(
    sparse: Any,
    batch: int,
    heads: int,
    seqlen_q: int | None,
    seqlen_k: int | None,
    device: torch.device,
    exact: bool,
) -> None:
    """Kind, dtype, shape, strides and device of every list. Reads no values.

    heads: of q. seqlen_q, seqlen_k: of all sequences, or the most that one has; None where that isn't known. exact: the
    lists have as many rows of blocks as seqlen_q, else at least as many; n_blocks may be any number from 1, if exact to
    that of seqlen_k.

    Raises TypeError for kinds and dtypes, ValueError for shapes and values."""
    from flash_attn_sm120.block_sparse import BlockSparseTensors

    if not isinstance(sparse, BlockSparseTensors):
        refuse(ARGUMENT, FORM, describe(sparse), TypeError)
    rows, cols = check_block_size(f"{ARGUMENT}.block_size", sparse.block_size)
    if sparse.mask_block_cnt is None and sparse.full_block_cnt is None:
        refuse(ARGUMENT, "mask_block_cnt and mask_block_idx, full_block_cnt and full_block_idx, or all four", "neither")
    m_blocks = None if seqlen_q is None else -(-seqlen_q // rows)
    for kind in LISTS:
        cnt, idx = (getattr(sparse, f"{kind}_block_{part}") for part in ("cnt", "idx"))
        if cnt is None and idx is None:
            continue
        _check_list(kind, "cnt", cnt, 3, device)
        _check_list(kind, "idx", idx, 4, device)
        name = f"{ARGUMENT}.{kind}_block_cnt"
        for axis, size, what in ((0, batch, "batch"), (1, heads, "heads")):
            if cnt.shape[axis] not in (1, size):
                expected = f"1 or {size}" if size != 1 else "1"
                refuse(name, f"{expected} as dimension {axis} ({what})", describe(cnt))
        if m_blocks is not None and (cnt.shape[2] != m_blocks if exact else cnt.shape[2] < m_blocks):
            expected = f"{'' if exact else 'at least '}{m_blocks} blocks of {rows} rows as dimension 2"
            refuse(name, f"{expected} (seqlen_q is {seqlen_q})", describe(cnt))
        name = f"{ARGUMENT}.{kind}_block_idx"
        if idx.shape[:3] != cnt.shape:
            refuse(name, f"shape ({', '.join(map(str, cnt.shape))}, n_blocks) as {kind}_block_cnt", describe(idx))
        if idx.shape[3] == 0:
            refuse(name, "at least one n_block", describe(idx))
        if exact and seqlen_k is not None and idx.shape[3] > max(1, -(-seqlen_k // cols)):
            expected = f"at most {max(1, -(-seqlen_k // cols))} blocks of {cols} columns as dimension 3"
            refuse(name, f"{expected} (seqlen_k is {seqlen_k})", describe(idx))
        if idx.stride(3) != 1:
            refuse(name, "a last dimension of stride 1", f"strides {idx.stride()}")
    if sparse.mask_block_cnt is not None and sparse.full_block_cnt is not None:
        mask, full = sparse.mask_block_cnt.shape[2], sparse.full_block_cnt.shape[2]
        if mask != full:
            refuse(f"{ARGUMENT}.full_block_cnt", f"{mask} m_blocks as mask_block_cnt", full)


def _check_list(kind: str, part: str, tensor: Any, rank: int, device: torch.device) -> None:
    name = f"{ARGUMENT}.{kind}_block_{part}"
    dims = "batch or 1, heads or 1, m_blocks" + (", n_blocks" if rank == 4 else "")
    expected = f"int32 of shape ({dims})"
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.int32:
        refuse(name, expected, describe(tensor), TypeError)
    if tensor.dim() != rank:
        refuse(name, expected, describe(tensor))
    if tensor.device != device:
        refuse(name, f"a tensor on {device} as q", describe(tensor))


def check_block_sparse_values(sparse: Any, seqlen_k: int | None) -> None:
    """What the lists say, read back from the device: counts that fit, blocks that exist, ascending, each in one list.

    sparse: BlockSparseTensors that check_block_sparse has passed. seqlen_k: of all sequences, or the most that one has;
    None where that isn't known. Raises ValueError, which names the list, batch, head, m_block, position and value."""
    cols, found = sparse.block_size[1], []
    last = 2**31 - 1 if seqlen_k is None else -(-seqlen_k // cols) - 1
    for kind in LISTS:
        cnt, idx = (getattr(sparse, f"{kind}_block_{part}") for part in ("cnt", "idx"))
        if cnt is None:
            continue
        cnt, idx = cnt.cpu(), idx.cpu()
        room = idx.shape[3]
        _refuse_first(f"{kind}_block_cnt", (cnt < 0) | (cnt > room), cnt, f"from 0 to {room}, the n_blocks of idx")
        valid = torch.arange(room) < cnt[..., None]
        name = f"{kind}_block_idx"
        expected = (
            f"from 0 to {last}" if seqlen_k is None else f"from 0 to {last}, the blocks of {cols} columns in seqlen_k"
        )
        _refuse_first(name, valid & ((idx < 0) | (idx > last)), idx, expected)
        falls = torch.nn.functional.pad(idx[..., 1:] <= idx[..., :-1], (1, 0))
        _refuse_first(name, valid & falls, idx, "indices that rise from position to position")
        found.append((valid, idx))
    if len(found) == 2:
        _refuse_shared(*found)


def _refuse_shared(mask: tuple[torch.Tensor, torch.Tensor], full: tuple[torch.Tensor, torch.Tensor]) -> None:
    """(valid, idx) of both lists: none names a block that the other names. A list that serves all counts for each."""
    rows = torch.broadcast_shapes(mask[1].shape[:3], full[1].shape[:3])
    blocks, spare = [], -1  # places without a block hold numbers that differ
    for valid, idx in (mask, full):
        numbers = spare - torch.arange(idx.shape[3])
        spare -= idx.shape[3]
        blocks.append(torch.where(valid, idx.long(), numbers).expand(*rows, -1))
    ordered = torch.cat(blocks, 3).sort(3).values
    twice = ordered[..., 1:] == ordered[..., :-1]
    if twice.any():
        place = twice.nonzero()[0].tolist()
        block = int(ordered[tuple(place)])
        place[3] = int((blocks[1][tuple(place[:3])] == block).nonzero()[0])
        expected = "no block that mask_block_idx names as well"
        refuse(f"{ARGUMENT}.full_block_idx", expected, f"{block} at {_where(place)}")


def _refuse_first(name: str, wrong: torch.Tensor, values: torch.Tensor, expected: str) -> None:
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        refuse(f"{ARGUMENT}.{name}", expected, f"{int(values[tuple(place)])} at {_where(place)}")


def _where(place: list[int]) -> str:
    names = ("batch", "head", "m_block", "position")
    return ", ".join(f"{name} {index}" for name, index in zip(names, place, strict=False))


def check_mask(mask: Any) -> None:
    """A token-level mask."""
    expected = "bool of shape (batch or 1, heads or 1, seqlen_q, seqlen_k)"
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        refuse("mask", expected, describe(mask), TypeError)
    if mask.dim() != 4:
        refuse("mask", expected, describe(mask))


def check_aux(aux_tensors: Any, aux_scalars: Any, device: torch.device) -> tuple[tuple[str, int] | str, ...]:
    """What a mod reads, as ClassifyProblem.aux has it."""
    for name, given in (("aux_tensors", aux_tensors), ("aux_scalars", aux_scalars)):
        if not isinstance(given, (tuple, list)):
            refuse(name, "a tuple or list", describe(given), TypeError)
    entries: list[tuple[str, int] | str] = []
    for index, tensor in enumerate(aux_tensors):
        name = f"aux_tensors[{index}]"
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in AUX_NAMES:
            refuse(name, f"a tensor of one of {', '.join(AUX_NAMES.values())}", describe(tensor), TypeError)
        if tensor.dim() == 0:
            refuse(name, "a tensor of at least one dimension", describe(tensor))
        if tensor.device != device:
            refuse(name, f"a tensor on {device}", describe(tensor))
        entries.append((AUX_NAMES[tensor.dtype], tensor.dim()))
    for index, value in enumerate(aux_scalars):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            refuse(f"aux_scalars[{index}]", "an int or a float", describe(value), TypeError)
        if isinstance(value, int) and not -(2**31) <= value < 2**31:
            refuse(f"aux_scalars[{index}]", "an int of 32 bits", value)
        entries.append("int32" if isinstance(value, int) else "float32")
    return tuple(entries)


def check_sequence_tensors(tensors: dict[str, Any], batch: int | None, device: torch.device) -> int:
    """Form of cu_seqlens_q, cu_seqlens_k, seqused_q and seqused_k, each of which may be None; returns the batch.

    batch: what was asked for, None for theirs, or 1 where there are none."""
    source = "batch"
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        packed = name.startswith("cu_")
        expected = f"contiguous int32 of shape ({'batch + 1' if packed else 'batch'},)"
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.int32:
            refuse(name, expected, describe(tensor), TypeError)
        if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.shape[0] <= packed:
            refuse(name, expected, describe(tensor))
        if tensor.device != device:
            refuse(name, f"a tensor on {device}", describe(tensor))
        found = tensor.shape[0] - packed
        if batch is None:
            batch, source = found, name
        elif found != batch:
            refuse(name, f"a batch of {batch} as {source}", found)
    return 1 if batch is None else batch


def check_maxima(tensors: dict[str, Any], seqlen_q: int, seqlen_k: int) -> None:
    """No sequence is longer than was said; waits for the device."""
    for side, most in (("q", seqlen_q), ("k", seqlen_k)):
        cu_seqlens, seqused = tensors[f"cu_seqlens_{side}"], tensors[f"seqused_{side}"]
        lengths = seqused
        if lengths is None and cu_seqlens is not None:
            lengths = cu_seqlens.diff()
        if lengths is not None and int(lengths.max()) > most:
            refuse(f"seqlen_{side}", f"at least {int(lengths.max())}, the longest sequence", most)
