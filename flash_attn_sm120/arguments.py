"""The arguments of a launcher and of every kernel's __call__, in their order; the stream follows, implicitly, last.

On the host the fields hold tensors and numbers, while a kernel is compiled the DSL's values; a tensor that a problem
lacks is None. SeqlenInfo is an argument of mods.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Lengths(NamedTuple):
    """How long the sequences of a batch are and where their rows lie; int32."""

    cu_seqlens_q: Any = None  # (batch + 1,)
    cu_seqlens_k: Any = None  # (batch + 1,)
    seqused_q: Any = None  # (batch,)
    seqused_k: Any = None  # (batch,)
    page_table: Any = None  # (batch, pages)
    cp_tot_seqused_k: Any = None  # (batch,)


class Dropout(NamedTuple):
    """Which weights are dropped, and what the others are multiplied by."""

    seed: Any  # (2,) int64, 32 bits each
    threshold: Any  # of dropout.thresholds, int32
    carry: Any  # likewise
    factor: Any  # float32


class BlockLists(NamedTuple):
    """Of each row of sparse blocks, the columns of those to be computed, ascending; int32.

    cnt (batch, heads, m_blocks), idx (batch, heads, m_blocks, n_blocks)."""

    mask_cnt: Any  # blocks that mask_mod applies to
    mask_idx: Any
    full_cnt: Any  # blocks that it doesn't
    full_idx: Any


class Modifiers(NamedTuple):
    """Tensors that change what is computed."""

    learnable_sink: Any = None  # (heads,) bfloat16 or float32
    alibi_slopes: Any = None  # (batch, heads) float32
    k_descale: Any = None  # (batch, heads_kv) float32
    v_descale: Any = None  # (batch, heads_kv) float32
    dropout: Dropout | None = None
    blocks: BlockLists | None = None
    aux: tuple | None = None  # what mods read: tensors of any dtype and rank, then numbers


class Numbers(NamedTuple):
    """Scalars; those that a problem lacks are not read."""

    softmax_scale: Any = 1.0
    softcap: Any = 0.0
    window_left: Any = 0
    window_right: Any = 0
    attention_chunk: Any = 0
    cp_world_size: Any = 1
    cp_rank: Any = 0


class Arguments(NamedTuple):
    """What a launcher takes. q, k, v and out as flash_attn_func and flash_attn_varlen_func describe them."""

    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any = None
    lengths: Lengths = Lengths()
    modifiers: Modifiers = Modifiers()
    numbers: Numbers = Numbers()


class Queue(NamedTuple):
    """How the thread blocks of a launch share its tiles. A launcher of the TMA kernel takes it after Arguments, or None
    where its plan isn't persistent."""

    ticket: Any  # (at least 1,) int32, 0 before a launch and after
    sm_count: Any  # multiprocessors of the GPU


class GroupLengths(NamedTuple):
    """How long the sequences of two query groups and of their keys are; int32."""

    cu_seqlens_q0: Any  # (batch + 1,)
    cu_seqlens_q1: Any  # (batch + 1,)
    cu_seqlens_k: Any  # (batch + 1,)
    max_kv_len_q0: Any  # of the first keys of a sequence, how many group 0 sees: a number, or (batch,)
    max_kv_len_q1: Any  # likewise


class DualGroupArguments(NamedTuple):
    """What the launcher of a dual-group problem takes in place of Arguments; all packed."""

    q0: Any  # (total_q0, heads, head_dim)
    q1: Any  # (total_q1, heads, head_dim)
    k: Any  # (total_k, heads_kv, head_dim)
    v: Any  # (total_k, heads_kv, head_dim_v)
    out0: Any  # (total_q0, heads, head_dim_v)
    out1: Any  # (total_q1, heads, head_dim_v)
    lse0: Any  # (heads, total_q0) or, padded, (batch * heads, at least the longest of q0's sequences)
    lse1: Any  # likewise
    lengths: GroupLengths
    learnable_sink: Any = None  # (heads,) bfloat16 or float32
    numbers: Numbers = Numbers()


class Partials(NamedTuple):
    """What the blocks of a split decode tell one another. A launcher of a decode problem takes it after Arguments, None
    where the problem isn't split. out and lse hold anything, tickets zeros, before a launch and after."""

    out: Any  # (num_splits, *q.shape[:-1], head_dim_v) float32
    lse: Any  # (num_splits, *shape of lse) float32
    tickets: Any  # (at least Splits.tickets,) int32
    slots: Any  # parts, for each of their m_blocks, that all sequences make if they are cut evenly


class CombineArguments(NamedTuple):
    """What the combine kernel's launcher takes. out and lse in the order of the forward's, whose parts these are."""

    out_partial: Any  # (num_splits, batch, seqlen_q, heads, head_dim_v) or (num_splits, total_q, heads, head_dim_v)
    lse_partial: Any  # (num_splits, batch, heads, seqlen_q) or (num_splits, heads, total_q), any strides
    out: Any  # (batch, seqlen_q, heads, head_dim_v) or (total_q, heads, head_dim_v)
    lse: Any = None  # (batch, heads, seqlen_q) or (heads, total_q)
    cu_seqlens: Any = None  # (batch + 1,) int32
    seqused: Any = None  # (batch,) int32
    learnable_sink: Any = None  # (heads,) bfloat16 or float32


class ClassifyArguments(NamedTuple):
    """What the launcher of a ClassifyProblem takes. The tensors of lists are int32; idx beyond cnt isn't written."""

    mask_block_cnt: Any  # (batch, heads, m_blocks)
    mask_block_idx: Any  # (batch, heads, m_blocks, n_blocks)
    full_block_cnt: Any  # as mask_block_cnt
    full_block_idx: Any  # as mask_block_idx
    lengths: tuple = Lengths()
    aux: tuple = ()  # the mask_mod's tensors, then its scalars
    seqlen_q: Any = 0  # of every sequence, or the most that one has
    seqlen_k: Any = 0


class SeqlenInfo(NamedTuple):
    """What mods are told of a sequence: Int32 in a kernel, ints in the reference."""

    seqlen_q: Any
    seqlen_k: Any
    offset_q: Any  # its first row in a packed tensor, 0 otherwise
    offset_k: Any  # likewise
