"""replace_execute_grouped_attention_with_fused_varlen: the drop-in for ring attention's grouped call.

Its arguments are those of execute_grouped_attention in ring-flash-attention's zigzag_llama3_flash_attn_varlen (Zhu and
contributors, 2025), and the chunks' numbers.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch

from flash_attn_sm120 import checks
from flash_attn_sm120.checks import describe, refuse
from flash_attn_sm120.dual_group import check_no_dropout, fused_zigzag_llama3_flash_attn_varlen_forward

Ranges = Sequence[tuple[int, int]]


def replace_execute_grouped_attention_with_fused_varlen(
    chunk_q_list: Sequence[torch.Tensor],
    chunk_cu_seqlens_q_list: Sequence[torch.Tensor],
    chunk_indices_list: Sequence[torch.Tensor],
    kv_buffer: torch.Tensor,
    kv_slices: Sequence[tuple[Ranges, torch.Tensor]],
    nheads: int,
    head_dim: int,
    softmax_scale: float | None,
    dropout_p: float,
    causal: bool,
    window_size: Sequence[int | None],
    alibi_slopes: None,
    deterministic: bool,
    world_size: int,
    cu_seqlens_k: torch.Tensor,
    chunk_idx_0: int,
    chunk_idx_1: int,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Attention of a rank's early and late chunks over the keys of all ranks, in one launch. Forward only.

    A sequence of 2 * world_size chunks of one size is spread in a zigzag: rank r has chunks r and
    2 * world_size - 1 - r of it, one behind the other, sequence after sequence.

    chunk_q_list: [q0, q1], (tokens, nheads, head_dim) each: the rows of the rank's early chunks, one of each sequence,
        and those of its late chunks.
    chunk_cu_seqlens_q_list: [cu_seqlens_q0, cu_seqlens_q1], int32 (batch + 1,): where each sequence's rows lie in them.
    chunk_indices_list: [indices0, indices1], int64 (tokens,) each: the places of q0's and q1's rows in the rank's own
        order; together every place once.
    kv_buffer: (2, total_k, heads_kv, head_dim): K and V of all ranks as an all-gather leaves them, rank after rank,
        each rank's rows in its own order. It is brought into the order of positions by one copy.
    kv_slices: [(ranges, cu_seqlens), ...] of q0 and of q1: for each sequence that has keys, (first, end) of the keys
        that the group sees, in the order of positions; what they say must agree with chunk_idx_0 and chunk_idx_1. The
        cu_seqlens beside them aren't looked at.
    nheads, head_dim: those of chunk_q_list.
    softmax_scale, causal, window_size: as in fused_zigzag_llama3_flash_attn_varlen_forward.
    dropout_p: 0. alibi_slopes: None. deterministic: accepted, as this forward always is.
    world_size: ranks.
    cu_seqlens_k: int32 (batch + 1,): where each sequence's keys lie on one rank.
    chunk_idx_0, chunk_idx_1: the rank's chunks, r and 2 * world_size - 1 - r: q0 sees the first chunk_idx_0 + 1 chunks
        of each sequence, q1 the first chunk_idx_1 + 1.

    Returns (out, lse, chunk_info): out (tokens of q0 and q1, nheads, head_dim_v) and lse float32 (nheads, tokens) in
    the rank's own order; chunk_info {"chunk_indices_list", "chunk_cu_seqlens_q_list", "kv_slices"} as they came.

    Reads no values from the device. Raises ValueError, TypeError or NotImplementedError before any launch, in the form
    `argument: expected ..., got ...`: for other than two groups, dropout, slopes, and arguments that contradict each
    other.
    """
    lists = {
        "chunk_q_list": chunk_q_list,
        "chunk_cu_seqlens_q_list": chunk_cu_seqlens_q_list,
        "chunk_indices_list": chunk_indices_list,
        "kv_slices": kv_slices,
    }
    _check_lists(lists)
    check_no_dropout(dropout_p)
    if alibi_slopes is not None:
        refuse("alibi_slopes", "None for two query groups", describe(alibi_slopes), NotImplementedError)
    checks.check_flag("deterministic", deterministic)
    _check_chunks(world_size, chunk_idx_0, chunk_idx_1)
    _check_queries(chunk_q_list, chunk_indices_list, nheads, head_dim)
    _check_keys(kv_buffer, cu_seqlens_k, world_size)
    slices = [ranges for ranges, _ in kv_slices]
    sequences = _sequences(slices, kv_buffer.shape[1], world_size, (chunk_idx_0, chunk_idx_1))
    k, v = in_order_of_positions(kv_buffer, sequences, world_size)

    chunk = (cu_seqlens_k[1:] - cu_seqlens_k[:-1]) // 2
    limits = [(chunk * (index + 1)).int() for index in (chunk_idx_0, chunk_idx_1)]
    (q0, q1), (marks0, marks1) = chunk_q_list, chunk_cu_seqlens_q_list
    out0, out1, lse0, lse1 = fused_zigzag_llama3_flash_attn_varlen_forward(
        q0, q1, k, v, marks0, marks1, cu_seqlens_k * world_size, None, None, None, limits[0], limits[1], softmax_scale,
        causal, window_size=window_size,
    )  # fmt: skip
    tokens = out0.shape[0] + out1.shape[0]
    out = out0.new_empty(tokens, *out0.shape[1:])
    lse = lse0.new_empty(nheads, tokens)
    for own_out, own_lse, indices in zip((out0, out1), (lse0, lse1), chunk_indices_list, strict=True):
        out.index_copy_(0, indices, own_out)
        lse.index_copy_(1, indices, own_lse)
    return out, lse, {name: given for name, given in lists.items() if name != "chunk_q_list"}


def in_order_of_positions(kv_buffer: torch.Tensor, sequences: list[tuple[int, int]], world_size: int) -> torch.Tensor:
    """(2, total_k, heads_kv, head_dim) of each rank's chunks, rank after rank -> the same, sequence after sequence.

    sequences: (first key, keys) of each."""
    of_ranks = kv_buffer.unflatten(1, (world_size, -1))
    ordered = torch.empty_like(kv_buffer, memory_format=torch.contiguous_format)
    for first, keys in sequences:
        own = of_ranks[:, :, first // world_size : (first + keys) // world_size].unflatten(2, (2, -1))
        chunks = ordered[:, first : first + keys].unflatten(1, (2 * world_size, -1))
        chunks[:, :world_size].copy_(own[:, :, 0])
        chunks[:, world_size:].copy_(own[:, :, 1].flip(1))
    return ordered


def _check_lists(lists: dict[str, Any]) -> None:
    for name, given in lists.items():
        if not isinstance(given, (list, tuple)):
            refuse(name, "a list", describe(given), TypeError)
        if len(given) != 2:
            kind = NotImplementedError if len(given) > 2 else ValueError
            refuse(name, "two groups", f"{len(given)}", kind)
    for ranges_and_marks in lists["kv_slices"]:
        if not isinstance(ranges_and_marks, (list, tuple)) or len(ranges_and_marks) != 2:
            refuse("kv_slices", "(ranges, cu_seqlens) of each group", describe(ranges_and_marks), TypeError)


def _check_chunks(world_size: Any, *indices: Any) -> None:
    for name, value in (("world_size", world_size), ("chunk_idx_0", indices[0]), ("chunk_idx_1", indices[1])):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            refuse(name, "an int", describe(value), TypeError)
    if world_size < 1:
        refuse("world_size", "an int >= 1", world_size)
    if not 0 <= indices[0] < world_size:
        refuse("chunk_idx_0", f"from 0 to {world_size - 1}, an early chunk of {world_size} ranks", indices[0])
    if not world_size <= indices[1] < 2 * world_size:
        expected = f"from {world_size} to {2 * world_size - 1}, a late chunk of {world_size} ranks"
        refuse("chunk_idx_1", expected, indices[1])


def _check_queries(qs: Sequence, indices: Sequence, nheads: Any, head_dim: Any) -> None:
    for group, (q, own) in enumerate(zip(qs, indices, strict=True)):
        name = f"chunk_q_list[{group}]"
        if not isinstance(q, torch.Tensor):
            refuse(name, "a torch.Tensor", describe(q), TypeError)
        if q.dim() != 3 or q.shape[1:] != (nheads, head_dim):
            refuse(name, f"(tokens, nheads {nheads}, head_dim {head_dim})", describe(q))
        name = f"chunk_indices_list[{group}]"
        if not isinstance(own, torch.Tensor) or own.dtype != torch.int64:
            refuse(name, "an int64 tensor", describe(own), TypeError)
        if own.shape != q.shape[:1] or own.device != q.device:
            refuse(name, f"shape {tuple(q.shape[:1])} on {q.device} as chunk_q_list[{group}]", describe(own))


def _check_keys(kv_buffer: Any, cu_seqlens_k: Any, world_size: int) -> None:
    for name, given in (("kv_buffer", kv_buffer), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(given, torch.Tensor):
            refuse(name, "a torch.Tensor", describe(given), TypeError)
    if kv_buffer.dim() != 4 or kv_buffer.shape[0] != 2:
        refuse("kv_buffer", "(2, total_k, heads_kv, head_dim)", describe(kv_buffer))
    if kv_buffer.shape[1] % world_size:
        refuse("kv_buffer", f"as many keys from each of {world_size} ranks", describe(kv_buffer))
    if cu_seqlens_k.dtype != torch.int32:
        refuse("cu_seqlens_k", "int32 of shape (batch + 1,)", describe(cu_seqlens_k), TypeError)
    if cu_seqlens_k.dim() != 1 or cu_seqlens_k.shape[0] == 0:
        refuse("cu_seqlens_k", "int32 of shape (batch + 1,)", describe(cu_seqlens_k))


def _sequences(slices: list[Ranges], total: int, world_size: int, indices: tuple[int, int]) -> list[tuple[int, int]]:
    """(first key, keys) of each sequence that has keys, from the ranges, which are checked against the chunks."""
    starts = [int(first) for first, _ in slices[1]]
    ends = [*starts[1:], total]
    if (starts[0] if starts else total) != 0:
        refuse("kv_slices", f"ranges that begin at 0 and follow one another, to {total}", list(slices[1]))
    sequences = [(start, end - start) for start, end in zip(starts, ends, strict=True)]
    for group, (ranges, index) in enumerate(zip(slices, indices, strict=True)):
        expected = []
        for first, keys in sequences:
            if keys <= 0 or keys % (2 * world_size):
                refuse("kv_slices", f"sequences of whole chunks, {2 * world_size} each", f"{keys} keys from {first} on")
            expected.append((first, first + (index + 1) * (keys // (2 * world_size))))
        if [(int(first), int(end)) for first, end in ranges] != expected:
            name = f"kv_slices[{group}]"
            refuse(name, f"{expected} for chunk {index} of {2 * world_size}", list(ranges))
    return sequences
