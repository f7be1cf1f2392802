"""The rows of a decode tile: query token after query token, each with the query heads of one KV head."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import cutlass
from cutlass import Float32, Int32, Int64, cute

from flash_attn_sm120.device.alibi import add_alibi
from flash_attn_sm120.device.mask import apply_bounds
from flash_attn_sm120.device.pieces import Piece
from flash_attn_sm120.device.ptx import load_shared_v4, store_shared_v4
from flash_attn_sm120.device.seqlen import Sequence
from flash_attn_sm120.device.visible import same_columns, visible_columns


class Heads(NamedTuple):
    """How query heads share KV heads."""

    heads_kv: Any
    per_kv: Any
    reciprocal: Any  # 1 / per_kv, float32

    def token_of(self, row: Int32) -> Int32:
        """row // per_kv, for the first 2^21 rows: three instructions where a division takes dozens."""
        return Int32((Float32(row) + 0.5) * self.reciprocal)


def write_note(shared: Int32, piece: Piece, splits: Int32, head_kv: Int32, seq_q: Sequence) -> None:
    """Keeps a tile in shared memory, so that no register holds it through the main loop. splits: how many parts the
    sequence has."""
    store_shared_v4(shared, (piece.batch, piece.m_block, piece.split, splits))
    store_shared_v4(shared + 16, (head_kv, seq_q.start, seq_q.length, seq_q.room))


class RowTile:
    """Rows m_block * tile_m on of a sequence; row M is token M // heads.per_kv, head M % heads.per_kv of the group."""

    def __init__(self, config, mQ: cute.Tensor, seq_q: Sequence, piece: Piece, head_kv: Int32, heads: Heads):
        self.config, self.mQ, self.seq_q, self.piece = config, mQ, seq_q, piece
        self.head_kv, self.heads = head_kv, heads
        self.first_row = piece.m_block * config.plan.tile_m
        self.rows_left = seq_q.room * heads.per_kv - self.first_row

    @staticmethod
    def from_note(config, mQ: cute.Tensor, shared: Int32, heads: Heads) -> tuple[RowTile, Int32]:
        """(The tile, the splits) as write_note has kept them."""
        batch, m_block, split, splits = load_shared_v4(shared)
        head_kv, start, length, room = load_shared_v4(shared + 16)
        seq_q = Sequence(start, Int32(0) if config.problem.packed_q else batch, length, room)
        piece = Piece(batch, m_block, split, Int32(0), cutlass.Boolean(True))
        return RowTile(config, mQ, seq_q, piece, head_kv, heads), splits

    def existing(self, row: Int32) -> Int32:
        """Row `row` of the tile in the sequence; those beyond the last are copies of it, never stored."""
        last = cutlass.max(self.seq_q.length, Int32(1)) * self.heads.per_kv - 1
        return cutlass.min(self.first_row + row, last)

    def head(self, row: Int32) -> Int32:
        return self.place(self.existing(row))[1]

    def tile_number(self) -> Int32:
        """Of all tiles of a KV head; some numbers of packed rows stay unused."""
        tile_m = self.config.plan.tile_m
        if self.config.problem.packed_q:
            return self.seq_q.start * self.heads.per_kv // tile_m + self.piece.batch + self.piece.m_block
        return self.piece.batch * cute.ceil_div(self.mQ.shape[1] * self.heads.per_kv, tile_m) + self.piece.m_block

    def out_address(self, tensor: cute.Tensor, row: Int32) -> Int64:
        """Of row `row` of the tile in a tensor of q's form; a leading dimension of splits is the caller's."""
        return self._address(tensor, self.seq_q, *self.place(self.first_row + row))

    def lse_offset(self, tensor: cute.Tensor, row: Int32) -> Int64:
        """Elements to row `row` of the tile in (batch, heads, seqlen_q) or, packed, (heads, total_q); a leading
        dimension of splits is the caller's."""
        token, head = self.place(self.first_row + row)
        strides = tensor.stride[-2:] if self.config.problem.packed_q else tensor.stride[-3:]
        offset = Int64(head) * Int64(strides[-2]) + Int64(self.seq_q.start + token) * Int64(strides[-1])
        if not self.config.problem.packed_q:
            offset = offset + Int64(self.piece.batch) * Int64(strides[0])
        return offset

    def place(self, row: Int32) -> tuple[Int32, Int32]:
        """(token, head) of row `row` of the sequence."""
        token = self.heads.token_of(row)
        return token, self.head_kv * self.heads.per_kv + row - token * self.heads.per_kv

    def _address(self, tensor: cute.Tensor, seq: Sequence, token: Int32, head: Int32) -> Int64:
        # counted from the end, as a dimension of splits may lead
        offset = Int64(seq.start + token) * Int64(tensor.stride[-3]) + Int64(head) * Int64(tensor.stride[-2])
        if not self.config.problem.packed_q:
            offset = offset + Int64(seq.batch) * Int64(tensor.stride[-4])
        return tensor.iterator.toint() + offset * (tensor.element_type.width // 8)


class VisibleRows(RowTile):
    """A tile and what its rows see of the keys. total_k: keys of all context-parallel ranks.

    A thread has rows 8 r + lane // 4.
    """

    def __init__(
        self, config, mQ: cute.Tensor, seq_q: Sequence, piece: Piece, head_kv: Int32, heads: Heads, seqlen_k: Int32,
        total_k: Int32, numbers,
    ):  # fmt: skip
        super().__init__(config, mQ, seq_q, piece, head_kv, heads)
        self.seqlen_k, self.total_k, self.numbers = seqlen_k, total_k, numbers
        self.shift = total_k - seq_q.length
        self.own_rows = [8 * r + cute.arch.lane_idx() // 4 for r in range(config.plan.tile_m // 8)]

        used = cutlass.max(seq_q.length, Int32(1))
        first_token = cutlass.min(heads.token_of(self.first_row), used - 1)
        last_row = cutlass.min(self.first_row + config.plan.tile_m, used * heads.per_kv) - 1
        begin, self.inner_end = self.columns(first_token)
        self.inner_begin, end = self.columns(heads.token_of(last_row))
        is_used = self.first_row < seq_q.length * heads.per_kv
        self.begin, self.end = begin, cutlass.select_(is_used, end, Int32(0))
        self.tokens = self.bounds = self.slopes = None

    def prepare(self, modifiers) -> None:
        """What the thread's rows need; the first loads don't wait for it."""
        self.tokens = [self.heads.token_of(self.existing(row)) for row in self.own_rows]
        if not same_columns(self.config.problem):
            self.bounds = [self.columns(token) for token in self.tokens]
        if self.config.problem.alibi:
            slopes, batch = modifiers.alibi_slopes, self.piece.batch
            self.slopes = [slopes[batch, self.head(row)] * math.log2(math.e) for row in self.own_rows]

    def columns(self, token: Int32) -> tuple[Int32, Int32]:
        """Local columns that the rows of a token see."""
        position = token + self.shift
        bounds = visible_columns(self.config.problem, position, self.seqlen_k, self.total_k, self.numbers)
        return Int32(bounds[0]), Int32(bounds[1])

    def q_address(self, row: Int32) -> Int64:
        return self._address(self.mQ, self.seq_q, *self.place(self.existing(row)))

    def exists(self, row: Int32) -> cutlass.Boolean:
        return cutlass.Boolean(self.first_row + row < self.seq_q.length * self.heads.per_kv)

    def mask(self, tSrS: cute.Tensor, first_col: Int32, lane: Int32) -> None:
        """Scores of columns that a row doesn't see become -inf."""
        bounds = [(self.begin, self.end)] * (2 * tSrS.shape[0]) if self.bounds is None else self.bounds
        apply_bounds(tSrS, bounds, first_col, lane)

    def add_alibi(self, tSrS: cute.Tensor, scale: Float32, first_col: Int32, lane: Int32, numbers) -> None:
        """The slopes' part of the scores, in base 2, which they are multiplied by `scale` into."""
        positions = [token + self.shift for token in self.tokens]
        add_alibi(self.config.problem, tSrS, scale, self.slopes, positions, first_col, lane, numbers)
