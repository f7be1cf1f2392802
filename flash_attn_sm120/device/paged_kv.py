"""Where the rows of K and V lie, in one tensor or in the pages of a pool, and how a warp loads a granule of them.

A granule is tile_n keys from a multiple of tile_n on; it is looked up in units of rows that share a page.
"""

from __future__ import annotations

import math

import cutlass
from cutlass import Int32, Int64, cute

from flash_attn_sm120.device.ptx import cp_async_16_at, load_global_b32_if, prefetch_l2
from flash_attn_sm120.device.seqlen import Sequence, clamp, head_address, sequence
from flash_attn_sm120.device.tile import VECTOR, TileLayout
from flash_attn_sm120.problem import AttentionProblem

LINE_BYTES = 128


def key_sequence(problem: AttentionProblem, mK: cute.Tensor, batch: Int32, lengths) -> Sequence:
    """The keys of a sequence. mK as sequence() takes it, or a pool (num_pages, page_size, heads_kv, d)."""
    if not problem.page_size:
        return sequence(mK, batch, lengths.cu_seqlens_k, lengths.seqused_k)
    room = lengths.page_table.shape[1] * problem.page_size
    length = room if lengths.seqused_k is None else clamp(lengths.seqused_k[batch], Int32(0), room)
    return Sequence(Int32(0), Int32(0), length, room)


def divide(value: Int32, divisor) -> Int32:
    """value // divisor for value >= 0, divisor > 0."""
    if isinstance(divisor, int) and divisor & (divisor - 1) == 0:
        return value >> (divisor.bit_length() - 1)
    return Int32(cutlass.Uint32(value) // cutlass.Uint32(divisor))


@cute.jit
def prefetch_table(table: cute.Tensor, index: Int32):
    """Asks for line `index` of the page table to be brought into L2, before it is known which of them are needed."""
    line = index * (LINE_BYTES // 4)
    if line < table.shape[0] * table.shape[1]:
        prefetch_l2(table.iterator.toint() + Int64(line) * 4)


class RowSource:
    """K or V of one (batch, head_kv): a lane's part of the address of its rows."""

    def __init__(self, tensor: cute.Tensor, layout: TileLayout, seq: Sequence, head: Int32, packed: bool, cols: int):
        """cols: bytes of a row that exist; the layout may have more, which become zeros."""
        self.layout, self.cols = layout, cols
        self.lane = cute.arch.lane_idx()
        self.lane_row, self.unit = self.lane // layout.units, self.lane % layout.units
        self.rows_a_pass = 32 // layout.units
        address, row_stride = head_address(tensor, seq, head, packed)
        self.row_stride = Int64(row_stride)
        self.page_stride = Int64(0) if packed else Int64(tensor.stride[0]) * (tensor.element_type.width // 8)
        self.address = address + Int64(self.lane_row) * self.row_stride + Int64(self.unit * 16)

    def load(self, shared: Int32, first_key: Int32, starts: list[Int64], bounds: tuple[Int32, Int32]) -> None:
        """Starts the copy of a granule. starts: where the rows of each unit lie, bytes from `address`; rows outside
        bounds become zeros and aren't read."""
        layout = self.layout
        unit_rows = layout.rows // len(starts)
        row_bytes = layout.chunk_cols * 2
        for step in range(layout.rows // self.rows_a_pass):
            row = step * self.rows_a_pass
            unit = row // unit_rows
            if unit_rows % self.rows_a_pass:  # 16 rows a pass, 8 in a unit
                after = starts[unit + 1] - unit_rows * self.row_stride
                start = cutlass.select_(self.lane_row < unit_rows, starts[unit], after)
            else:
                start = starts[unit] + (row - unit * unit_rows) * self.row_stride
            key = first_key + row + self.lane_row
            inside = (key >= bounds[0]) & (key < bounds[1])
            # a layout's swizzle may have a longer period than the rows of a pass
            target = shared + layout.unit_offset(self.lane_row + row, self.unit) - row * row_bytes
            for chunk in range(layout.chunks):
                first_col = chunk * row_bytes
                exists = inside
                if first_col + row_bytes > self.cols:
                    exists = inside & (first_col + self.unit * 2 * VECTOR < self.cols)
                offset = chunk * layout.chunk_bytes + row * row_bytes
                cp_async_16_at(target, self.address + start, Int32(exists) * 16, offset, first_col)


class KeysAndValues:
    """K and V of one (batch, head_kv); K and V share the page numbers.

    bounds: keys that are needed, begin <= key < end, to be set before a load; none other is read.
    """

    def __init__(self, config, mK: cute.Tensor, mV: cute.Tensor, batch: Int32, seq: Sequence, head: Int32, lengths):
        problem = config.problem
        self.page_size, self.tile_n, self.length = problem.page_size, config.plan.tile_n, seq.length
        self.bounds = None
        element_bytes = 1 if problem.kv_dtype else 2
        places = ((mK, config.layout_k, problem.head_dim), (mV, config.layout_v, problem.head_dim_v))
        self.k, self.v = (
            RowSource(tensor, layout, seq, head, problem.packed_k, cols * element_bytes)
            for tensor, layout, cols in places
        )
        self.unit_rows = math.gcd(problem.page_size, self.tile_n) if problem.page_size else self.tile_n
        if problem.page_size:
            table = lengths.page_table
            self.num_pages = mK.shape[0]
            self.table = table.iterator.toint() + Int64(batch) * Int64(table.stride[0]) * 4
            self.last_page = divide(cutlass.max(seq.length, Int32(1)) - 1, self.page_size)

    @property
    def units(self) -> int:
        return self.tile_n // self.unit_rows

    def page_numbers(self, granule: Int32) -> list[Int32]:
        """The page of each unit, inside the pool whatever the table holds; [] where there are no pages. Entries beyond
        the sequence aren't read."""
        if not self.page_size:
            return []
        pages = []
        for unit in range(self.units):
            key = granule * self.tile_n + unit * self.unit_rows
            index = cutlass.min(divide(key, self.page_size), self.last_page)
            page = load_global_b32_if(self.table + Int64(index) * 4, Int32(self.length > 0))
            pages.append(clamp(page, Int32(0), self.num_pages - 1))
        return pages

    def load_k(self, shared: Int32, granule: Int32, pages: list[Int32]) -> None:
        self._load(self.k, shared, granule, pages)

    def load_v(self, shared: Int32, granule: Int32, pages: list[Int32]) -> None:
        self._load(self.v, shared, granule, pages)

    def _load(self, source: RowSource, shared: Int32, granule: Int32, pages: list[Int32]) -> None:
        first_key = granule * self.tile_n
        starts = [Int64(first_key) * source.row_stride]
        if self.page_size:
            starts = []
            for unit, page in enumerate(pages):
                key = first_key + unit * self.unit_rows
                row = key - divide(key, self.page_size) * self.page_size
                starts.append(Int64(page) * source.page_stride + Int64(row) * source.row_stride)
        source.load(shared, first_key, starts, self.bounds)
