"""Attention in plain PyTorch: the oracle that every kernel is held against, on any device.

In float32 it is the truth. In the inputs' dtype it is what a PyTorch user would get by writing the formula down, and
its error is the yardstick for the kernels' error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flash_attn_sm120.arguments import SeqlenInfo
from flash_attn_sm120.dropout import kept, seed_words

if TYPE_CHECKING:
    from flash_attn_sm120.block_sparse import BlockSparseTensors

SCORES_AT_ONCE = 1 << 26  # scores held at a time, so that long sequences fit: 256 MB in float32


@dataclass(frozen=True)
class Options:
    """What the formula needs besides q, k and v; window sides as ints, None for unbounded."""

    softmax_scale: float
    window_left: int | None
    window_right: int | None
    softcap: float
    attention_chunk: int
    cp_world_size: int
    cp_rank: int
    dtype: torch.dtype
    score_mod: Callable | None = None
    mask_mod: Callable | None = None
    aux: tuple = ()
    dropout_p: float = 0.0
    dropout_key: tuple[int, int] = (0, 0)

    @property
    def masked(self) -> bool:
        return self.attention_chunk > 0 or not (self.window_left is None and self.window_right is None)


@dataclass(frozen=True)
class Factors:
    """What one sequence's heads have of their own, each (heads,) float32 or None."""

    k_descale: torch.Tensor | None
    v_descale: torch.Tensor | None
    sink: torch.Tensor | None
    slopes: torch.Tensor | None

    def of(self, heads: slice) -> Factors:
        """Those of some heads."""
        own = (self.k_descale, self.v_descale, self.sink, self.slopes)
        return Factors(*(None if factor is None else factor[heads] for factor in own))


@dataclass(frozen=True)
class Blocks:
    """Which places of a sequence lists name: (heads, seqlen_q, seqlen_k), and those that mask_mod is asked about."""

    listed: torch.Tensor
    asked: torch.Tensor


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    k_descale: torch.Tensor | float | None = None,
    v_descale: torch.Tensor | float | None = None,
    learnable_sink: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    attention_chunk: int = 0,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    aux_tensors: Sequence[torch.Tensor] | None = None,
    aux_scalars: Sequence[int | float] | None = None,
    block_sparse_tensors: BlockSparseTensors | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) for the arguments of flash_attn_func and flash_attn_varlen_func, with their meaning.

    q (batch, seqlen_q, heads, head_dim), or (total_q, heads, head_dim) with cu_seqlens_q; k and v likewise, or pools
        (num_pages, page_size, heads_kv, head_dim) with page_table (batch, pages) and seqused_k.
    score_mod, mask_mod: PyTorch functions with the arguments of the kernels' (batch (), head (heads, 1, 1), q_idx
        (rows, 1), kv_idx (1, seqlen_k)), or the kernels' with such ones as attribute in_torch.
    dtype: of the products and the softmax; None: that of q. out has it too; lse is float32, (batch, heads, seqlen_q) or
        (heads, total_q).
    Rows that see nothing are 0, their lse the sink, or -inf without one. Rows beyond seqused_q and rows that no
    sequence names are 0, their lse -inf.
    """
    dtype = q.dtype if dtype is None else dtype
    left, right = (None if side in (None, -1) else side for side in window_size or (-1, -1))
    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    right = 0 if causal else right
    options = Options(
        scale, left, right, softcap or 0.0, attention_chunk, cp_world_size, cp_rank, dtype,
        *(getattr(mod, "in_torch", mod) for mod in (score_mod, mask_mod)), (*(aux_tensors or ()), *(aux_scalars or ())),
        dropout_p, seed_words(dropout_seed) if dropout_p else (0, 0),
    )  # fmt: skip
    heads, heads_kv = q.shape[-2], k.shape[-2]
    out = torch.zeros((*q.shape[:-1], v.shape[-1]), dtype=dtype, device=q.device)
    lse_shape = (heads, q.shape[0]) if cu_seqlens_q is not None else (q.shape[0], heads, q.shape[1])
    lse = torch.full(lse_shape, -math.inf, dtype=torch.float32, device=q.device)

    rows_q = _sequences(q, cu_seqlens_q, seqused_q)
    paged = page_table is not None
    rows_k = _pages(page_table, seqused_k, k.shape[1]) if paged else _sequences(k, cu_seqlens_k, seqused_k)
    descales = [_a_query_head(factor, len(rows_q), heads, heads_kv, q.device) for factor in (k_descale, v_descale)]
    with _full_precision():
        for b, (index_q, index_k) in enumerate(zip(rows_q, rows_k, strict=True)):
            q_b, k_b, v_b = q[index_q], k[index_k], v[index_k]
            factors = Factors(
                *(None if factor is None else factor[b] for factor in descales),
                sink=None if learnable_sink is None else learnable_sink.float(),
                slopes=None if alibi_slopes is None else alibi_slopes.expand(len(rows_q), heads)[b].float(),
            )
            if q_b.shape[0] == 0 or (k_b.shape[0] == 0 and learnable_sink is None):
                continue
            total = k_b.shape[0] if cp_tot_seqused_k is None else int(cp_tot_seqused_k[b])
            starts = [0 if cu_seqlens is None else int(cu_seqlens[b]) for cu_seqlens in (cu_seqlens_q, cu_seqlens_k)]
            info = SeqlenInfo(q_b.shape[0], k_b.shape[0], *starts)
            blocks = _blocks(block_sparse_tensors, b, heads, info) if block_sparse_tensors is not None else None
            lse_b = lse[:, index_q] if cu_seqlens_q is not None else lse[index_q[0]][:, index_q[1]]
            _one_sequence(q_b, k_b, v_b, out[index_q], lse_b, total, factors, options, b, info, blocks)
    return out, lse


def combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    seqused: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) in float32 of attention over all keys, from that over parts of them: flash_attn_combine's arguments.

    out_partial (num_splits, batch, seqlen_q, heads, d), or (num_splits, total_q, heads, d); lse_partial without the d.
    A part whose lse is -inf counts for nothing, whatever its out holds. lse has out's order: (..., heads).
    """
    logits = lse_partial.float()
    if learnable_sink is not None:
        logits = torch.cat((logits, learnable_sink.float().expand(1, *logits.shape[1:])))
    lse = torch.logsumexp(logits, dim=0)
    weights = torch.exp(lse_partial.float() - torch.where(lse == -math.inf, 0.0, lse))[..., None]
    out = torch.where(weights == 0.0, 0.0, weights * out_partial.float()).sum(0)
    if cu_seqlens is None and seqused is None:
        return out, lse
    used = torch.zeros(lse.shape[:-1], dtype=torch.bool, device=lse.device)
    for rows in _sequences(out, cu_seqlens, seqused):
        used[rows] = True
    return out.masked_fill(~used[..., None, None], 0.0), lse.masked_fill(~used[..., None], -math.inf)


def _sequences(tensor: torch.Tensor, cu_seqlens: torch.Tensor | None, seqused: torch.Tensor | None) -> list:
    """For each sequence, the index of its used rows in the tensor."""
    if cu_seqlens is None:
        starts, rooms = [0] * tensor.shape[0], [tensor.shape[1]] * tensor.shape[0]
    else:
        marks = cu_seqlens.tolist()
        starts, rooms = marks[:-1], [end - start for start, end in itertools.pairwise(marks)]
    lengths = rooms if seqused is None else seqused.tolist()
    rows = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    return rows if cu_seqlens is not None else [(batch, row) for batch, row in enumerate(rows)]


def _pages(page_table: torch.Tensor, seqused_k: torch.Tensor, page_size: int) -> list:
    """For each sequence, the index of its rows in a pool; table entries beyond its length are not looked at."""
    rows = []
    for numbers, length in zip(page_table, seqused_k.tolist(), strict=True):
        column = torch.arange(length, device=page_table.device)
        used = numbers[: -(-length // page_size)].long()
        rows.append((used[column // page_size], column % page_size))
    return rows


def _a_query_head(
    factor: torch.Tensor | float | None, batch: int, heads: int, heads_kv: int, device: torch.device
) -> torch.Tensor | None:
    """A factor a KV head (batch, heads_kv), or one for all, as (batch, heads)."""
    if factor is None:
        return None
    factor = torch.as_tensor(factor, dtype=torch.float32, device=device)
    return factor.expand(batch, heads_kv).repeat_interleave(heads // heads_kv, 1)


def _one_sequence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    total: int,
    factors: Factors,
    options: Options,
    batch: int,
    info: SeqlenInfo,
    blocks: Blocks | None,
) -> None:
    """q (seqlen_q, heads, d), k, v (seqlen_k, heads_kv, d or d_v); fills out (seqlen_q, heads, d_v) and its lse.

    total: keys of the sequence, on all ranks.
    """
    seqlen_q, heads = q.shape[:2]
    seqlen_k, heads_kv = k.shape[:2]
    ratio = heads // heads_kv
    kv_heads_at_once = max(1, SCORES_AT_ONCE // (ratio * seqlen_q * max(1, seqlen_k)))
    rows_at_once = max(1, SCORES_AT_ONCE // (ratio * max(1, seqlen_k)))
    for first in range(0, heads_kv, kv_heads_at_once):
        last = min(first + kv_heads_at_once, heads_kv)
        own = slice(first * ratio, last * ratio)
        keys = k[:, first:last].to(options.dtype).permute(1, 2, 0).repeat_interleave(ratio, 0)
        values = v[:, first:last].to(options.dtype).transpose(0, 1).repeat_interleave(ratio, 0)
        for row in range(0, seqlen_q, rows_at_once):
            rows = slice(row, min(row + rows_at_once, seqlen_q))
            queries = q[rows, own].to(options.dtype).transpose(0, 1)
            diagonal = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + (total - seqlen_q)
            column = torch.arange(seqlen_k, device=q.device)[None, :] * options.cp_world_size + options.cp_rank
            changes = _Changes(options, batch, own, rows, info, blocks, q.device)
            o, log_sum = _rows(queries, keys, values, diagonal, column, factors.of(own), options, changes)
            out[rows, own] = o.transpose(0, 1)
            lse[own, rows] = log_sum


def _blocks(sparse: BlockSparseTensors, batch: int, heads: int, info: SeqlenInfo) -> Blocks:
    """Of one sequence."""
    listed, asked = sparse.to_dense(info.seqlen_q, info.seqlen_k)
    return Blocks(*(places[batch % places.shape[0]].expand(heads, -1, -1) for places in (listed, asked)))


@dataclass(frozen=True)
class _Changes:
    """Mods, lists and dropout of some heads and rows of a sequence."""

    options: Options
    batch: int
    heads: slice
    rows: slice
    info: SeqlenInfo
    blocks: Blocks | None
    device: torch.device

    def _places(self) -> tuple[torch.Tensor, ...]:
        """What mods get between the score and seqlen_info."""
        sizes = (self.heads, self.rows, slice(0, self.info.seqlen_k))
        head, row, column = (torch.arange(part.start, part.stop, device=self.device) for part in sizes)
        return torch.tensor(self.batch, device=self.device), head[:, None, None], row[:, None], column[None, :]

    def of_scores(self, scores: torch.Tensor) -> torch.Tensor:
        if self.options.score_mod is None:
            return scores
        return self.options.score_mod(scores, *self._places(), self.info, self.options.aux).to(scores.dtype)

    def of_visible(self, visible: torch.Tensor | None) -> torch.Tensor | None:
        """visible: (rows, seqlen_k) or None; the result may have heads as well."""
        found = []
        if self.options.mask_mod is not None:
            found.append(self.options.mask_mod(*self._places(), self.info, self.options.aux).bool())
        if self.blocks is not None:
            listed, asked = (places[self.heads, self.rows] for places in (self.blocks.listed, self.blocks.asked))
            found = [listed & (~asked | mask) for mask in found] or [listed]
        for mask in found:
            visible = mask if visible is None else visible & mask
        return visible

    def of_weights(self, weights: torch.Tensor) -> torch.Tensor:
        p = self.options.dropout_p
        if not p:
            return weights
        batches, heads, rows = (
            range(self.batch, self.batch + 1),
            range(self.heads.start, self.heads.stop),
            range(self.rows.start, self.rows.stop),
        )
        keep = kept(batches, heads, rows, self.info.seqlen_k, p, self.options.dropout_key, self.device)[0]
        return torch.where(keep, weights / (1.0 - p), 0.0)


def _visible(diagonal: torch.Tensor, column: torch.Tensor, options: Options) -> torch.Tensor | None:
    """(rows, seqlen_k) bool, or None where all is visible. diagonal: (rows, 1), the column that a row is aligned with;
    the last row is aligned with the last column. column: (1, seqlen_k)."""
    if not options.masked:
        return None
    visible = torch.ones(diagonal.shape[0], column.shape[1], dtype=torch.bool, device=diagonal.device)
    if options.window_left is not None:
        visible &= column >= diagonal - options.window_left
    if options.window_right is not None:
        visible &= column <= diagonal + options.window_right
    if options.attention_chunk:
        first = diagonal // options.attention_chunk * options.attention_chunk
        visible &= (column >= first) & (column < first + options.attention_chunk)
    return visible


def _rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    diagonal: torch.Tensor,
    column: torch.Tensor,
    factors: Factors,
    options: Options,
    changes: _Changes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (heads, rows, d), k (heads, d, seqlen_k), v (heads, seqlen_k, d_v) -> out (heads, rows, d_v) and its lse.

    diagonal (rows, 1) and column (1, seqlen_k): positions, counted over all ranks.
    """
    scores = q @ k
    scores *= options.softmax_scale
    if factors.k_descale is not None:
        scores *= factors.k_descale[:, None, None]
    if options.softcap:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if factors.slopes is not None:
        scores -= factors.slopes[:, None, None] * (diagonal - column).abs()
    scores = changes.of_scores(scores)
    visible = changes.of_visible(_visible(diagonal, column, options))
    if visible is not None:
        scores.masked_fill_(~visible, -math.inf)
    if factors.sink is not None:
        sink = factors.sink.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat((scores, sink), dim=-1)
    lse = torch.logsumexp(scores.float(), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : column.shape[1]]
    if visible is not None:
        # A row without a column is 0 / 0 to softmax, and 0 to us.
        weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    out = changes.of_weights(weights) @ v
    if factors.v_descale is not None:
        out *= factors.v_descale[:, None, None]
    return out, lse


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products in float32, whatever the process has chosen."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)
