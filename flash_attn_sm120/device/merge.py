"""The warps of a block bring their rows together, and write them to out and lse or to the partials of a split."""

from __future__ import annotations

import math

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute

from flash_attn_sm120.device.mainloop_decode import DecodeLoop
from flash_attn_sm120.device.parts import add_parts, lane_columns, load_parts, part_weights
from flash_attn_sm120.device.pieces import Piece
from flash_attn_sm120.device.ptx import (
    exp2,
    load_fresh_f32,
    load_fresh_v4_f32,
    load_shared_b32,
    load_shared_f32,
    log2,
    pack_pair,
    reciprocal,
    store_global_v2,
    store_global_v4,
    store_global_v4_f32,
    store_shared_b32,
    store_shared_f32,
    take_ticket,
)
from flash_attn_sm120.device.rows import RowTile
from flash_attn_sm120.device.softmax import NEG_INF
from flash_attn_sm120.dispatch import MAX_SPLITS

PARTS_AT_ONCE = 16  # loads in flight while parts are brought together


class Merge:
    """shared: of the block, free but for what this writes; a warp stages its O in its own ring."""

    def __init__(self, config, loop: DecodeLoop, rows: RowTile, piece: Piece, shared: Int32, warp: Int32, modifiers):
        self.config, self.loop, self.rows, self.piece, self.modifiers = config, loop, rows, piece, modifiers
        self.shared, self.warp, self.lane = shared, warp, loop.lane
        self.group, self.quad = self.lane // 4, self.lane % 4
        self.notes = shared + config.memory.notes_offset
        self.row_bytes = config.memory.staged_row_bytes
        self.own_rows = config.plan.tile_m // 8

    @cute.jit
    def run(self, mO: cute.Tensor, mLSE: cute.Tensor | None, partials: cutlass.Constexpr, head_kv: Int32):
        self.note()
        cute.arch.sync_threads()
        lses = self.stage(head_kv)
        cute.arch.sync_threads()
        if cutlass.const_expr(not self.config.problem.split):
            self.store(mO, mLSE, lses, False)
        else:
            if self.piece.splits == 1:
                self.store(mO, mLSE, lses, False)
            else:
                self.store(partials.out, partials.lse, lses, True)
                cute.arch.sync_threads()
                if self.is_last(partials.tickets, head_kv):
                    self.combine(mO, mLSE, partials)

    def store(self, mO: cute.Tensor, mLSE: cute.Tensor | None, lses: list, partial: bool) -> None:
        self.store_lse(mLSE, lses, partial)
        self.store_out(mO, partial)

    @cute.jit
    def note(self):
        """The warp's maximum and sum of each row."""
        statistics = self.loop.statistics()
        if self.quad == 0:
            for r in cutlass.range_constexpr(self.own_rows):
                row = self.warp * self.config.plan.tile_m + 8 * r + self.group
                store_shared_f32(self.notes + row * 8, statistics[r])

    def stage(self, head_kv: Int32) -> list[Float32]:
        """Puts the warp's share of the normalised O into its ring; returns the rows' natural-log LSE."""
        config, tOrO = self.config, self.loop.tOrO
        staged = self.shared + self.warp * config.memory.ring_bytes
        descale = Float32(1.0)
        if config.problem.v_descale:
            descale = self.modifiers.v_descale[self.rows.batch, head_kv]
        lses = []
        for r in range(self.own_rows):
            factor, lse = self.factor(r)
            lses.append(lse)
            factor = factor * descale
            own_row = staged + (8 * r + self.group) * self.row_bytes
            for n in range(tOrO.shape[1]):
                values = [tOrO[r // 2, n, 2 * (r % 2) + i] * factor for i in range(2)]
                lane_col, col = self.loop.operands.column(n, 0)
                _, right = self.loop.operands.column(n, 1)
                place = own_row + lane_col * 4
                if right == col + 1:
                    store_shared_f32(place + col * 4, values)
                else:
                    store_shared_f32(place + col * 4, values[:1])
                    store_shared_f32(place + right * 4, values[1:])
        return lses

    def factor(self, r: int) -> tuple[Float32, Float32]:
        """(what the warp's O of row r is multiplied by, LSE of the row over all warps)."""
        config = self.config
        row = 8 * r + self.group
        notes = [
            load_shared_f32(self.notes + (warp * config.plan.tile_m + row) * 8, 2)
            for warp in range(config.plan.num_warps)
        ]
        own = load_shared_f32(self.notes + (self.warp * config.plan.tile_m + row) * 8, 2)
        top = notes[0][0]
        for row_max, _ in notes[1:]:
            top = cute.arch.fmax(top, row_max)
        sink = None
        if config.problem.sink:
            sink = self.sink(row)
            top = cute.arch.fmax(top, sink)
        base = cutlass.select_(top == NEG_INF, Float32(0.0), top)
        total = Float32(0.0) if sink is None else exp2(sink - base)
        for row_max, row_sum in notes:
            total = total + exp2(row_max - base) * row_sum
        is_row = self.rows.first_row + row < self.rows.seq_q.length * self.rows.heads_per_kv
        empty = (total == 0.0) | (is_row == Boolean(False))
        factor = cutlass.select_(empty, Float32(0.0), exp2(own[0] - base) * reciprocal(total))
        lse = cutlass.select_(empty, Float32(NEG_INF), (base + log2(total)) * math.log(2.0))
        return factor, lse

    def sink(self, row: Int32) -> Float32:
        """In base 2; counts once, in a sequence's first part."""
        value = Float32(self.modifiers.learnable_sink[self.rows.head(row)]) * math.log2(math.e)
        if self.config.problem.split:
            value = cutlass.select_(self.piece.split == 0, value, Float32(NEG_INF))
        return value

    @cute.jit
    def store_lse(self, mLSE: cute.Tensor | None, lses: list, partial: cutlass.Constexpr):
        if cutlass.const_expr(mLSE is not None):
            if (self.warp == 0) & (self.quad == 0):
                for r in cutlass.range_constexpr(self.own_rows):
                    row = 8 * r + self.group
                    if row < self.rows.rows_left:
                        offset = self.rows.lse_offset(mLSE, row)
                        if cutlass.const_expr(partial):
                            offset = offset + Int64(self.piece.split) * Int64(mLSE.stride[0])
                        write(mLSE, offset, lses[r])

    @cute.jit
    def store_out(self, mO: cute.Tensor, partial: cutlass.Constexpr):
        """All threads add the warps' shares up: 8 columns at a time of 16 bits, 4 of float32."""
        config = self.config
        thread, _, _ = cute.arch.thread_idx()
        cols = 4 if partial else 8
        units = config.problem.head_dim_v // cols
        threads = 32 * config.plan.num_warps
        for turn in cutlass.range_constexpr(-(-config.plan.tile_m * units // threads)):
            place = thread + turn * threads
            row = place // units
            if (row < config.plan.tile_m) & (row < self.rows.rows_left):
                unit = place - row * units
                values = self.added(row, unit * cols, cols)
                address = self.rows.out_address(mO, row) + Int64(unit * 16)
                if cutlass.const_expr(partial):
                    address = address + Int64(self.piece.split) * Int64(mO.stride[0]) * 4
                    store_global_v4_f32(address, values)
                else:
                    pairs = [pack_pair(*values[i : i + 2], config.dtype) for i in range(0, 8, 2)]
                    store_global_v4(address, pairs)

    def added(self, row: Int32, col: Int32, cols: int) -> list[Float32]:
        place = self.shared + row * self.row_bytes + col * 4
        values = [Float32(0.0)] * cols
        for warp in range(self.config.plan.num_warps):
            for first in range(0, cols, 4):
                share = load_shared_f32(place + (warp * self.config.memory.ring_bytes + first * 4), 4)
                values[first : first + 4] = [a + b for a, b in zip(values[first : first + 4], share, strict=True)]
        return values

    @cute.jit
    def is_last(self, tickets: cute.Tensor, head_kv: Int32):
        """Whether all other parts of these rows have been stored; for all threads."""
        thread, _, _ = cute.arch.thread_idx()
        if thread == 0:
            place = self.rows.tile_number() * self.rows.heads_kv + head_kv
            ticket = take_ticket(tickets.iterator.toint() + Int64(place) * 4, self.piece.splits - 1)
            store_shared_b32(self.notes, ticket)
        cute.arch.sync_threads()
        return load_shared_b32(self.notes) == self.piece.splits - 1

    @cute.jit
    def combine(self, mO: cute.Tensor, mLSE: cute.Tensor | None, partials: cutlass.Constexpr):
        """The rows of the tile from their parts, a warp a row."""
        rows = cutlass.min(self.rows.rows_left, Int32(self.config.plan.tile_m))
        for row in cutlass.range(self.warp, rows, self.config.plan.num_warps, unroll=1):
            self.combine_row(mO, mLSE, partials, row)

    @cute.jit
    def combine_row(
        self, mO: cute.Tensor, mLSE: cute.Tensor | None, partials: cutlass.Constexpr, row: Int32
    ):
        columns = lane_columns(self.config.problem.head_dim_v, self.lane)
        sums = cute.make_rmem_tensor((4 * len(columns),), Float32)
        sums.fill(0.0)
        first_parts = self.load(partials.out, row, columns, 0)  # on their way while the weights are
        weights, lse = part_weights(self.part_lses(partials.lse, row))
        self.add(sums, first_parts, weights, 0)
        for first in cutlass.range_constexpr(PARTS_AT_ONCE, MAX_SPLITS, PARTS_AT_ONCE):
            if first < self.piece.splits:
                self.add(sums, self.load(partials.out, row, columns, first), weights, first)
        target = self.rows.out_address(mO, row) + Int64(self.lane * 8)
        for turn in cutlass.range_constexpr(len(columns)):
            if columns[turn]:
                pairs = [pack_pair(sums[4 * turn + i], sums[4 * turn + i + 1], self.config.dtype) for i in (0, 2)]
                store_global_v2(target + turn * 256, pairs)
        if cutlass.const_expr(mLSE is not None):
            if self.lane == 0:
                write(mLSE, self.rows.lse_offset(mLSE, row), lse)

    def load(self, mPartial: cute.Tensor, row: Int32, columns: list, first: int) -> list:
        address = self.rows.out_address(mPartial, row) + Int64(self.lane * 16)
        step, splits = Int64(mPartial.stride[0]) * 4, self.piece.splits
        place = (address, step, first, 1, PARTS_AT_ONCE)
        return load_parts(*place, lambda number: number < splits, columns, load_fresh_v4_f32)

    def add(self, sums: cute.Tensor, loaded: list, weights: list[Float32], first: int) -> None:
        own = [cute.arch.shuffle_sync(weights[(first + i) // 32], (first + i) % 32) for i in range(PARTS_AT_ONCE)]
        add_parts(sums, loaded, own)

    @cute.jit
    def part_lses(self, mLSE: cute.Tensor, row: Int32) -> list:
        """Of part lane, lane + 32, ..."""
        lses = []
        offset = self.rows.lse_offset(mLSE, row)
        for first in cutlass.range_constexpr(0, MAX_SPLITS, 32):
            split, value = Int32(first + self.lane), Float32(NEG_INF)
            if split < self.piece.splits:
                place = offset + Int64(split) * Int64(mLSE.stride[0])
                value = load_fresh_f32(mLSE.iterator.toint() + place * 4)
            lses.append(value)
        return lses


def write(tensor: cute.Tensor, offset: Int64, value: Float32) -> None:
    """offset: elements."""
    cute.make_tensor(tensor.iterator + offset, cute.make_layout(1))[0] = value
