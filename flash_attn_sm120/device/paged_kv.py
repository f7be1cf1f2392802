"""Where the rows of K and V lie, in one tensor or in the pages of a pool, and how a warp copies a tile of them.

A tile is tile_n keys from a multiple of tile_n on. A thread has neighbouring rows of it, so that most often one page
number serves them all; K and V share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cutlass
from cutlass import Int32, Int64, cute

from flash_attn_sm120.device.ptx import computed_here, cp_async_16, load_global_b32_if, prefetch_l2
from flash_attn_sm120.device.seqlen import Sequence, clamp, divide, head_address
from flash_attn_sm120.device.tile import VECTOR, TileLayout

LINE_BYTES = 128
PAGE_UNIT = 8  # rows of a page come in multiples of it
LANES = 32


@cute.jit
def prefetch_table(table: cute.Tensor, index: Int32):
    """Asks for line `index` of the page table to be brought into L2, before it is known which of them are needed."""
    line = index * (LINE_BYTES // 4)
    if line < table.shape[0] * table.shape[1]:
        prefetch_l2(table.iterator.toint() + Int64(line) * 4)


@dataclass(frozen=True)
class ThreadRows:
    """What a thread copies of a tile: rows first, first + step, ..., `count` of them, of each every width-th unit, from
    `unit` on."""

    first: Int32
    unit: Int32
    step: int
    count: int
    width: int

    def offset(self, layout: TileLayout, i: int, unit: int | Int32) -> Int32:
        """layout.unit_offset of the i-th row, in such a form that what rows have in common is computed once."""
        beyond = i * self.step
        whole = (beyond - beyond % 8) * layout.row_bytes
        if self.step == 1 and self.count % 8 == 0:
            return self.first * layout.row_bytes + layout.unit_offset(beyond % 8, unit) + whole
        return layout.unit_offset(self.first + beyond % 8, unit) + whole


@dataclass(frozen=True)
class Sharing:
    """How `threads` share the copying of a tile of `rows` rows: `width` of them a row; all powers of two.

    thread: which of them one is. It is called for each copy, so that what follows from it needs no register between two
    copies where thread_anew() stands behind it. neighbours: a thread's rows follow one another, else neighbours' do.
    """

    thread: Callable[[], Int32]
    threads: int
    width: int
    rows: int
    neighbours: bool

    @property
    def count(self) -> int:
        """Rows of a thread."""
        return self.rows * self.width // self.threads

    def own(self) -> ThreadRows:
        thread = self.thread()
        group, unit = thread >> self.width.bit_length() - 1, thread & self.width - 1
        if self.neighbours:
            return ThreadRows(group * self.count, unit, 1, self.count, self.width)
        return ThreadRows(group, unit, self.threads // self.width, self.count, self.width)


def row_width(config, source: type) -> int:
    """Threads that share a row of K or V: as many as its chunks have loads, of whichever has fewer."""
    return min(config.layout_k.units, config.layout_v.units) // source.units_a_load


def warps_that_copy(config, source: type) -> int:
    """As many as the plan says, but none without a row of a tile of K or V; with pages so many that no thread has more
    than 8 rows, which one page has all."""
    shares = config.plan.tile_n * row_width(config, source)
    least = shares // (LANES * PAGE_UNIT) if config.problem.paged else 1
    return max(least, min(config.plan.copying_warps, shares // LANES))


class RowSource:
    """The rows of one (batch, head) of a tensor, to be copied with cp.async in units of 16 bytes."""

    units_a_load = 1  # of 16 bytes in shared memory
    once = False  # whether one thread block alone reads them

    def __init__(self, tensor: cute.Tensor, layout: TileLayout, seq: Sequence, head: Int32, packed: bool, cols: int):
        """cols: columns of a row that exist; the layout may have more, which become zeros."""
        self.layout = layout
        self.row_bytes = cols * tensor.element_type.width // 8
        self.address, row_stride = head_address(tensor, seq, head, packed)
        self.row_stride = Int64(row_stride)
        self.page_stride = Int64(0) if packed else Int64(tensor.stride[0]) * (tensor.element_type.width // 8)

    @staticmethod
    def inside(row: Int32, begin: Int32 | None, end: Int32 | None) -> cutlass.Boolean:
        inside = cutlass.Boolean(True)
        if end is not None:
            inside = row < end
        if begin is not None:
            inside = inside & (row >= begin)
        return inside

    def load(
        self, own: ThreadRows, shared: Int32, first_row: Int32, start: Int64, begin: Int32 | None, end: Int32 | None
    ) -> None:
        """Starts the copy of a tile. start: where the thread's first row begins, bytes from `address`; rows before
        `begin` or from `end` on become zeros and aren't read. None where there are no such rows in the tile."""
        layout = self.layout
        for i, first_unit, address, exists in self.units(own, first_row, start, begin, end):
            chunk, unit = divmod(first_unit, layout.units)
            beyond = i * own.step * layout.row_bytes
            target = shared + own.offset(layout, i, own.unit + unit) - beyond
            offset = chunk * layout.chunk_bytes + beyond
            cp_async_16(target, address, exists * 16, offset, first_unit * 16, self.once)

    def units(
        self, own: ThreadRows, first_row: Int32, start: Int64, begin: Int32 | None, end: Int32 | None
    ) -> Iterator[tuple[int, int, Int64, Int32]]:
        """What a thread has of a tile, as load takes it: (its i-th row, first unit of `width`, address but for that
        unit, 1 where its own unit exists)."""
        start = self.address + start + Int64(own.unit * 16)
        for i in range(own.count):
            address = start + i * (own.step * self.row_stride)
            inside = self.inside(first_row + own.first + i * own.step, begin, end)
            for first_unit in range(0, self.layout.cols // VECTOR, own.width):
                exists, first_byte = inside, first_unit * 16
                if first_byte + own.width * 16 > self.row_bytes:
                    exists = inside & (first_byte + own.unit * 16 < self.row_bytes)
                yield i, first_unit, address, Int32(exists)


class RowsReadOnce(RowSource):
    """Those that would only take the room in L2 of what all calls read: lengths, tables, parameters, instructions."""

    once = True


class KeysAndValues:
    """K and V of one (batch, head_kv), tile by tile.

    bounds: keys that are needed, begin <= key < end, begin None for 0; to be set before a load; none other is read.
    """

    def __init__(
        self,
        config,
        mK: cute.Tensor,
        mV: cute.Tensor,
        batch: Int32,
        seq: Sequence,
        head: Int32,
        lengths,
        thread: Callable[[], Int32],
        warps: int = 1,
        source: type = RowSource,
    ):
        """thread: which of those of the `warps` that copy a tile one is, see Sharing."""
        problem = config.problem
        self.page_size, self.tile_n, self.length = problem.page_size, config.plan.tile_n, seq.length
        self.bounds = None
        places = ((mK, config.layout_k, problem.head_dim), (mV, config.layout_v, problem.head_dim_v))
        self.k, self.v = (source(tensor, layout, seq, head, problem.packed_k, cols) for tensor, layout, cols in places)
        # so that all rows of a thread are in one page
        neighbours = problem.page_size % self.tile_n != 0
        self.sharing = Sharing(thread, LANES * warps, row_width(config, source), self.tile_n, neighbours)
        assert not neighbours or PAGE_UNIT % self.sharing.count == 0
        if problem.page_size:
            table = lengths.page_table
            self.num_pages = mK.shape[0]
            self.table = table.iterator.toint() + Int64(batch) * Int64(table.stride[0]) * 4
            self.last_page = divide(cutlass.max(seq.length, Int32(1)) - 1, self.page_size)
        # Page numbers of the tile whose K was loaded last, and of the one whose K comes next.
        self._page, self._next_page = (cute.make_rmem_tensor((1,), Int32) for _ in range(2))

    def page_number(self, tile: Int32) -> Int32 | None:
        """Of the thread's rows, as the table has it; None where there are no pages. Entries beyond the sequence aren't
        read."""
        if not self.page_size:
            return None
        key = cutlass.max(tile * self.tile_n + self.sharing.own().first, Int32(0))
        index = cutlass.min(divide(key, self.page_size), self.last_page)
        return load_global_b32_if(self.table + Int64(index) * 4, Int32(self.length > 0))

    def hold(self, page: Int32 | None, next_page: Int32 | None) -> None:
        """Keeps the page numbers of two tiles for turn."""
        if self.page_size:
            self._page[0], self._next_page[0] = page, next_page

    def held(self) -> Int32 | None:
        return self._page[0] if self.page_size else None

    def turn(self, after: Int32) -> Int32 | None:
        """The page number of the tile whose K comes next, and has come then; that of tile `after` is looked up."""
        page = self._next_page[0] if self.page_size else None
        self.hold(page, self.page_number(after))
        return page

    def start(self, source: RowSource, own: ThreadRows, tile: Int32, page: Int32 | None) -> Int64:
        """What source.load takes; inside the pool whatever the table holds. Here, as page numbers are waited for."""
        key = tile * self.tile_n + own.first
        if page is None:
            return Int64(key) * source.row_stride
        row = key - divide(key, self.page_size) * self.page_size
        page = clamp(page, Int32(0), self.num_pages - 1)
        return Int64(page) * source.page_stride + Int64(row) * source.row_stride

    def load_k(self, shared: Int32, tile: Int32, page: Int32 | None) -> None:
        self.load(self.k, shared, tile, page)

    def load_v(self, shared: Int32, tile: Int32, page: Int32 | None) -> None:
        self.load(self.v, shared, tile, page)

    def load(self, source: RowSource, shared: Int32, tile: Int32, page: Int32 | None) -> None:
        own = self.sharing.own()
        source.load(own, shared, tile * self.tile_n, self.start(source, own, tile, page), *self.bounds)

    def load_whole(
        self, source: RowSource, shared: Int32, tile: Int32, page: Int32 | None, wait: Callable[[], None]
    ) -> None:
        """A tile of which all keys are needed. wait: until there is room for it."""
        own = self.sharing.own()
        start = computed_here(self.start(source, own, tile, page))
        wait()
        source.load(own, shared, tile * self.tile_n, start, None, None)
