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
    byte_permute,
    fp8_to_f16,
    load_global_v4_if,
    load_shared_v2,
    load_shared_v4,
    mma_m16n8k16,
    pack_pair,
)
from flash_attn_sm120.device.softmax import quad_reduce

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


class Keys8(HeldQ):
    """K and V of 8 bits. layouts: of 16-bit elements, two columns each; chunks of 128 or 64 bytes."""

    columns_together = 4

    def __init__(self, config, lane: Int32, shared: Int32):
        super().__init__(config, lane, shared)
        self.config, self.lane, self.kind = config, lane, KINDS[config.problem.kv_dtype]
        self.group, self.quad = lane // 4, lane % 4
        self.scales = None

    def _units(self, layout) -> int:
        """16-byte units of a row of K that a lane reads in a chunk."""
        return layout.units // 4

    def load_q(self, rows: list[Int64]) -> list:
        """Starts the loads of the thread's rows, of which `rows` are the addresses: [k step][row] -> two pairs of
        columns; those that don't exist are 0."""
        problem, layout = self.config.problem, self.config.layout_k
        units = self._units(layout)
        words = []
        for chunk in range(layout.chunks):
            for unit in range(units):
                own = chunk * layout.row_bytes + (self.quad * units + unit) * 16
                for first in (0, 8):
                    loaded = [self._eight(row, own + first, problem.head_dim) for row in rows]
                    words += [[pairs[two : two + 2] for pairs in loaded] for two in (0, 2)]
        return words

    def prepare_q(self, words: list) -> list:
        """What load_q gave as tSrQ [k step][m] -> A operand of f16."""
        rows = len(words[0])
        if self.config.problem.dtype == "bfloat16":
            self.scales = [self._to_f16(words, r) for r in range(rows)]
        tSrQ = [
            [[step[2 * m + half][right] for right in range(2) for half in range(2)] for m in range(rows // 2)]
            for step in words
        ]
        return self.keep(tSrQ)

    def _eight(self, row: Int64, col: Int32, head_dim: int) -> list[Int32]:
        """Columns col to col + 7 of a row of Q, in pairs; head_dim is a multiple of 16."""
        padded = self.config.layout_k.cols * 2 > head_dim
        return load_global_v4_if(row + Int64(col * 2), Int32(col < head_dim) if padded else Int32(1))

    def _to_f16(self, words: list, r: int) -> Float32:
        """Pairs of bf16 of row r become pairs of f16; returns what scores of the row have to be multiplied by."""
        values = [[floats(pair) for pair in step[r]] for step in words]
        largest = Float32(0.0)
        for low, high in (pair for step in values for pair in step):
            for value in (low, high):
                largest = cute.arch.fmax(largest, cute.arch.fmax(value, -value))
        largest = quad_reduce(largest, cute.arch.fmax)
        up, down = f16_scale(largest)
        for step, pairs in zip(words, values, strict=True):
            step[r] = [pack_pair(low * up, high * up, "f16") for low, high in pairs]
        return down

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
