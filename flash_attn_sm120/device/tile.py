"""A matrix tile in shared memory: where each element lies, and how cp.async fills it and ldmatrix reads it."""

from __future__ import annotations

from dataclasses import dataclass

from cutlass import Int32, Int64

from flash_attn_sm120.device.ptx import cp_async_16, ldmatrix_x4

ELEMENT_BYTES = 2
VECTOR = 8  # elements in 16 bytes, the unit of cp.async, of an ldmatrix row and of the swizzle


@dataclass(frozen=True)
class TileLayout:
    """`rows` x `cols` 16-bit elements, cols a multiple of 16.

    The columns are cut into chunks of 64, 32 or 16 (the widest that divides cols) that lie one behind the other, each
    row-major. Inside a chunk the 16-byte units of a row are XORed with the row's phase, so that eight rows of one
    unit column fall in eight different bank groups: the 128-, 64- and 32-byte swizzles of TMA.
    """

    rows: int
    cols: int

    @property
    def chunk_cols(self) -> int:
        return next(width for width in (64, 32, 16) if self.cols % width == 0)

    @property
    def chunks(self) -> int:
        return self.cols // self.chunk_cols

    @property
    def row_bytes(self) -> int:
        return self.chunk_cols * ELEMENT_BYTES

    @property
    def chunk_bytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def bytes(self) -> int:
        return self.chunks * self.chunk_bytes

    @property
    def units(self) -> int:
        """16-byte units in a row of a chunk."""
        return self.chunk_cols // VECTOR

    def unit_offset(self, row, unit):
        """Byte offset in a chunk of the 16-byte unit `unit` of `row`; ints or Int32."""
        phase = (row // (8 // self.units)) % self.units
        return row * self.row_bytes + (unit ^ phase) * 16

    def matrix(self, shared: Int32, lane: Int32, offset: int = 0, rows_first: bool = True) -> SharedMatrix:
        """The tile at byte shared + offset; a known offset costs no register. rows_first: see SharedMatrix.load."""
        if rows_first:
            row, unit = lane % 16, lane // 16
        else:
            row, unit = lane % 8 + lane // 16 * 8, lane // 8 % 2
        return SharedMatrix(self, shared + self.unit_offset(row, unit), offset)


@dataclass(frozen=True)
class SharedMatrix:
    """A tile as ldmatrix reads it. address: this lane's for the block at row 0, column 0; its tile is 128-byte aligned,
    so that the block k * 16 columns on in the same chunk is at address ^ (32 * k)."""

    layout: TileLayout
    address: Int32
    offset: int

    def load(self, row: int, col: int, transpose: bool = False) -> list[Int32]:
        """The 16 x 16 block at (row, col) as four 8 x 8, in the order in which mma.sync wants them side by side.

        rows_first (Q as A, and V transposed as B): rows 0-7, 8-15 of columns 0-7, then of columns 8-15.
        Otherwise (K as B): columns 0-7, 8-15 of rows 0-7, then of rows 8-15.
        """
        chunk, within = divmod(col, self.layout.chunk_cols)
        offset = self.offset + chunk * self.layout.chunk_bytes + row * self.layout.row_bytes
        return ldmatrix_x4(self.address, within // 16 * 32, offset, transpose=transpose)


def load_tile(
    layout: TileLayout,
    shared: Int32,
    glob: Int64,
    first_row: Int32,
    row_stride: Int32,
    thread: Int32,
    num_threads: int,
    cols: int,
    end_row: Int32 | None = None,
) -> None:
    """Starts the copy of global rows first_row, first_row + 1, ...; the caller commits and waits.

    glob: address of row 0; row_stride: bytes. Rows from end_row on and columns from `cols` on become zeros; end_row
    None: every row is there.
    """
    unit, row = thread % layout.units, thread // layout.units
    rows_a_pass = num_threads // layout.units
    if rows_a_pass <= layout.rows:
        steps = -(-layout.rows // rows_a_pass)
        places = [(chunk, step * rows_a_pass) for chunk in range(layout.chunks) for step in range(steps)]
        chunks_a_pass, own_chunk = 1, 0
    else:
        chunks_a_pass = rows_a_pass // layout.rows
        own_chunk, row = row // layout.rows, row % layout.rows
        places = [(chunk, 0) for chunk in range(0, layout.chunks, chunks_a_pass)]
    # rows_a_pass is a multiple of 8, the swizzle's period, so one offset serves all passes
    target = shared + own_chunk * layout.chunk_bytes + layout.unit_offset(row, unit)
    col = (own_chunk * layout.chunk_cols + unit * VECTOR) * ELEMENT_BYTES
    for chunk, row_offset in places:
        size, enabled = None, None
        if end_row is not None:
            size = Int32(first_row + row + row_offset < end_row) * 16
        col_offset = chunk * layout.chunk_cols * ELEMENT_BYTES
        if cols < layout.cols:
            size = (16 if size is None else size) * Int32(col + col_offset < cols * ELEMENT_BYTES)
        if row_offset + rows_a_pass > layout.rows and chunks_a_pass == 1:
            enabled = Int32(row + row_offset < layout.rows)
        if chunk + chunks_a_pass > layout.chunks:
            enabled = Int32(chunk + own_chunk < layout.chunks)
        cp_async_16(
            target,
            glob,
            first_row + row,
            row_stride,
            col,
            shared_offset=chunk * layout.chunk_bytes + row_offset * layout.row_bytes,
            row_offset=row_offset,
            col_offset=col_offset,
            size=size,
            enabled=enabled,
        )
