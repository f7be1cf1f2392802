"""Products with 8-bit K and V: fragments straight from the bytes in shared memory, converted in registers to f16.

e4m3 and e5m2 are exact in f16. Rows of bfloat16 Q are brought into f16's range by a power of two each, which loses
nothing above 2^-31 of the row's largest element and is taken back from the scores.

The order of the columns of a product's sum is free, so K's lanes take 16 bytes side by side and Q is loaded to fit. Of
V a lane takes an eighth of four keys' columns, side by side; so the columns of O are in another order, see column().
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, Int64, cute

from flash_attn_sm120.device.decode_gemm import HeldQ, ScoreSum
from flash_attn_sm120.device.ptx import (
    absolute,
    byte_permute,
    fp8_to_f16,
    load_global_v4_if,
    load_shared_b32,
    load_shared_v2,
    load_shared_v4,
    mma_m16n8k16,
    pack_pair,
    store_shared_f32,
    store_shared_v4,
)
from flash_attn_sm120.device.rows import VisibleRows
from flash_attn_sm120.device.softmax import tree_reduce
from flash_attn_sm120.device.tile import VECTOR

KINDS = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
TOP_EXPONENT = 14  # of the largest element of a row of Q in f16; its own largest is 15
PAIRS_LOW, PAIRS_HIGH = 0x5140, 0x7362  # bytes 0 and 1, or 2 and 3, of two words in turn


def floats(pair: Int32) -> tuple[Float32, Float32]:
    """A packed pair of bf16, low first."""
    return (pair << 16).bitcast(Float32), (pair & Int32(-65536)).bitcast(Float32)


def f16_scale(largest: Float32) -> tuple[Float32, Float32]:
    """(power of two that brings a row with this largest absolute value to the top of f16's range, its inverse)."""
    exponent = (largest.bitcast(Int32) >> 23) & 255
    exponent = cutlass.min(cutlass.max(exponent, Int32(TOP_EXPONENT + 1)), Int32(254))
    up = ((127 + 127 + TOP_EXPONENT - exponent) << 23).bitcast(Float32)
    return up, ((exponent - TOP_EXPONENT) << 23).bitcast(Float32)


class SharedQ:
    """Q on its way to f16 A operands that fit Keys8: every thread of a block loads and converts a part of it, in units
    of the 16 bytes that a lane takes side by side, and all warps read all of it.

    It lies where the first warp's last tile will lie, so that warps wait for one another before and after they read.
    """

    sharers = 16  # threads of a row

    def __init__(self, config, lane: Int32, shared: Int32):
        memory, plan = config.memory, config.plan
        self.config, self.lane = config, lane
        self.shared = shared + (plan.stages - 1) * config.slot_bytes
        self.scales = shared + memory.notes_offset  # unused until the end
        self.rows_at_once = 32 * plan.num_warps // self.sharers
        self.units = config.layout_k.cols * 2 // VECTOR  # of a row
        assert plan.tile_m % self.rows_at_once == 0
        assert (plan.stages - 1) * config.slot_bytes + plan.tile_m * self.units * 16 <= memory.q_offset

    def _own(self) -> tuple[list[Int32], list[Int32]]:
        """The thread's rows of the tile, and its units of each."""
        thread, _, _ = cute.arch.thread_idx()
        rows = [thread // self.sharers + first for first in range(0, self.config.plan.tile_m, self.rows_at_once)]
        return rows, [thread % self.sharers + first for first in range(0, self.units, self.sharers)]

    def load(self, tile: VisibleRows) -> list:
        """[row][unit] -> four pairs of columns; rows and columns that don't exist are 0."""
        rows, units = self._own()
        inside = [unit * VECTOR < self.config.problem.head_dim for unit in units]
        loaded = []
        for row in rows:
            exists, places = tile.exists(row), [tile.q_address(row) + Int64(unit * 16) for unit in units]
            loaded.append(
                [load_global_v4_if(place, Int32(exists & own)) for place, own in zip(places, inside, strict=True)]
            )
        return loaded

    def take(self, loaded: list) -> tuple[list, list[Float32] | None]:
        """([k step][row] -> two pairs of columns of the lane's rows, what scores of each have to be multiplied by)."""
        scaled = self.config.problem.dtype == "bfloat16"
        for row, pieces in zip(self._own()[0], loaded, strict=True):
            self._store(row, self._to_f16(row, pieces) if scaled else pieces)
        cute.arch.sync_threads()
        words, rows = [], self.config.plan.tile_m // 8
        for piece in range(self.units // 4):
            pairs = [load_shared_v4(self._place(piece, r, self.lane)) for r in range(rows)]
            words += [[row[two : two + 2] for row in pairs] for two in (0, 2)]
        places = [self.scales + (8 * r + self.lane // 4) * 4 for r in range(rows)]
        scales = [load_shared_b32(place).bitcast(Float32) for place in places] if scaled else None
        cute.arch.sync_threads()
        return words, scales

    def _place(self, piece: int | Int32, r: int | Int32, lane: Int32) -> Int32:
        """Of a piece of a lane's row r."""
        return self.shared + (piece * (self.config.plan.tile_m // 8) + r) * 512 + lane * 16

    @cute.jit
    def _store(self, row: Int32, pieces: cutlass.Constexpr):
        together = self.config.layout_k.units // 2  # a lane's pieces of a chunk
        for unit, pairs in zip(self._own()[1], pieces, strict=True):
            if unit < self.units:
                lanes = unit // together  # chunk and quad
                piece = lanes // 4 * together + unit % together
                store_shared_v4(self._place(piece, row // 8, row % 8 * 4 + lanes % 4), pairs)

    @cute.jit
    def _to_f16(self, row: Int32, pieces: cutlass.Constexpr) -> list:
        """Pairs of bf16 of a row become pairs of f16."""
        values = [[floats(pair) for pair in pairs] for pairs in pieces]
        own = [absolute(value) for pairs in values for pair in pairs for value in pair]
        largest = tree_reduce(own, cute.arch.fmax)
        for step in range(self.sharers.bit_length() - 1):
            largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, offset=1 << step))
        up, down = f16_scale(largest)
        thread, _, _ = cute.arch.thread_idx()
        if thread % self.sharers == 0:
            store_shared_f32(self.scales + row * 4, [down])
        return [[pack_pair(low * up, high * up, "f16") for low, high in pairs] for pairs in values]


class Keys8(HeldQ):
    """K and V of 8 bits. layouts: of 16-bit elements, two columns each; chunks of 128 or 64 bytes."""

    columns_together = 4

    def __init__(self, config, lane: Int32, shared: Int32, ring: Int32):
        super().__init__(config, lane, ring)
        self.config, self.lane, self.kind = config, lane, KINDS[config.problem.kv_dtype]
        self.group, self.quad = lane // 4, lane % 4
        self.spread_q = SharedQ(config, lane, shared)
        self.scales = None

    def _units(self, layout) -> int:
        """16-byte units of a row of K that a lane reads in a chunk."""
        return layout.units // 4

    def load_q(self, tile: VisibleRows) -> list:
        """Starts the thread's loads of Q, before those of K and V, which they would queue behind."""
        return self.spread_q.load(tile)

    def prepare_q(self, tile: VisibleRows, loaded: list) -> list:
        """What all threads have loaded as tSrQ [k step][m] -> A operand of f16. All threads of the block come here."""
        words, self.scales = self.spread_q.take(loaded)
        tSrQ = [
            [[step[2 * m + half][right] for right in range(2) for half in range(2)] for m in range(len(step) // 2)]
            for step in words
        ]
        return self.keep(tSrQ)

    def scores(self, tSrQ: list, shared: Int32, tSrS: cute.Tensor) -> None:
        """tSrS = Q K^T"""
        layout = self.config.layout_k
        units = self._units(layout)
        total = ScoreSum(tSrS, len(tSrQ))
        k = 0
        for chunk in range(layout.chunks):
            for unit in range(units):
                # rows 8 n have the same phase
                place = shared + layout.unit_offset(self.group, self.quad * units + unit) + chunk * layout.chunk_bytes
                keys = [load_shared_v4(place + 8 * n * layout.row_bytes) for n in range(total.n_frags)]
                for word in range(4):
                    step = self.take(tSrQ, k, total.m_frags)
                    for n in range(total.n_frags):
                        total.add(k, n, step, fp8_to_f16(keys[n][word], self.kind), "f16")
                    k += 1
        total.store()
        if self.scales is not None:
            for m in range(total.m_frags):
                for n in range(total.n_frags):
                    for i in range(4):
                        tSrS[m, n, i] = tSrS[m, n, i] * self.scales[2 * m + i // 2]

    def accumulate(self, tOrP: list, shared: Int32, tOrO: cute.Tensor) -> None:
        """tOrO += P V"""
        layout = self.config.layout_v
        for k, parts in enumerate(tOrP):
            for chunk in range(layout.chunks):
                rows = []
                for row in (0, 1, 8, 9):
                    rows.append(self._load_v(shared + chunk * layout.chunk_bytes, 16 * k, row))
                first = chunk * layout.row_bytes // 8
                for word in range(len(rows[0])):
                    for pair, selector in enumerate((PAIRS_LOW, PAIRS_HIGH)):
                        low = fp8_to_f16(byte_permute(rows[0][word], rows[1][word], selector), self.kind)
                        high = fp8_to_f16(byte_permute(rows[2][word], rows[3][word], selector), self.kind)
                        for j in range(2):
                            n = first + 4 * word + 2 * pair + j
                            for m, pairs in enumerate(parts):
                                acc = [tOrO[m, n, i] for i in range(4)]
                                acc = mma_m16n8k16(pairs, [low[j], high[j]], acc, "f16")
                                for i in range(4):
                                    tOrO[m, n, i] = acc[i]

    def _load_v(self, shared: Int32, first_row: int, row: int) -> list[Int32]:
        """The lane's bytes of key first_row + 2 quad + row: an eighth of a chunk."""
        layout = self.config.layout_v
        key = self.quad * 2 + row
        if layout.units == 8:
            return load_shared_v4(shared + layout.unit_offset(key, self.group) + first_row * layout.row_bytes)
        place = layout.unit_offset(key, self.group // 2) + self.group % 2 * 8
        return load_shared_v2(shared + place, first_row * layout.row_bytes)

    def column(self, n: int, i: int) -> tuple[Int32, int]:
        """Column of out that value i of column block n of tOrO is: (of the lane, in addition)."""
        own = self.config.layout_v.row_bytes // 8  # columns of a chunk that a lane reads
        chunk, j = divmod(n, own)
        return self.quad * (2 * own), chunk * self.config.layout_v.row_bytes + own * (i % 2) + j

    @staticmethod
    def staged(col: Int32) -> Int32:
        """Byte of a row of O where four columns from `col` on are staged; a quad's lanes in different banks."""
        unit = col >> 2
        return (unit ^ (unit >> 3 & 3)) * 16
