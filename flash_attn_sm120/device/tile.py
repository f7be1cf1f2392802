"""A matrix tile in shared memory: where each element lies, and how cp.async fills it and ldmatrix reads it."""

from __future__ import annotations

from dataclasses import dataclass

from cutlass import Int32, Int64

from flash_attn_sm120.device.ptx import cp_async_16, ldmatrix_x4

ELEMENT_BYTES = 2
VECTOR = 8  # elements in 16 bytes, the unit of cp.async, of an ldmatrix row and of the swizzle


def padded_head_dim(head_dim: int) -> int:
    """Columns that the matrix instructions see: head_dim rounded up to their depth of 16."""
    return (head_dim + 15) // 16 * 16


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
        steps = range(self.chunk_cols // 16)
        return SharedMatrix(self, [shared + self.unit_offset(row, unit + 2 * step) for step in steps], offset)


@dataclass(frozen=True)
class SharedMatrix:
    """A tile as ldmatrix reads it; addresses: this lane's, for the block at row 0 of each 16-column step of a chunk."""

    layout: TileLayout
    addresses: list[Int32]
    offset: int

    def load(self, row: int, col: int, transpose: bool = False) -> list[Int32]:
        """The 16 x 16 block at (row, col) as four 8 x 8, in the order in which mma.sync wants them side by side.

        rows_first (Q as A, and V transposed as B): rows 0-7, 8-15 of columns 0-7, then of columns 8-15.
        Otherwise (K as B): columns 0-7, 8-15 of rows 0-7, then of rows 8-15.
        """
        chunk, within = divmod(col, self.layout.chunk_cols)
        offset = self.offset + chunk * self.layout.chunk_bytes + row * self.layout.row_bytes
        return ldmatrix_x4(self.addresses[within // 16] + offset, transpose=transpose)


def load_tile(
    layout: TileLayout,
    shared: Int32,
    glob: Int64,
    row_stride: Int64,
    thread: Int32,
    num_threads: int,
    cols: int,
    rows_left: Int32 | None = None,
) -> None:
    """Starts the copy of a tile from global rows `row_stride` bytes apart; the caller commits and waits.

    Rows from rows_left on and columns from `cols` on become zeros. rows_left None: every row is there.
    """
    unit, first_row = thread % layout.units, thread // layout.units
    rows_a_pass = num_threads // layout.units
    if rows_a_pass <= layout.rows:
        places = [
            (chunk, first_row + step * rows_a_pass)
            for chunk in range(layout.chunks)
            for step in range(layout.rows // rows_a_pass)
        ]
    else:
        chunks_a_pass = rows_a_pass // layout.rows
        first_chunk = first_row // layout.rows
        places = [
            (first_chunk + step * chunks_a_pass, first_row % layout.rows)
            for step in range(-(-layout.chunks // chunks_a_pass))
        ]
    for chunk, row in places:
        size, enabled = 16, None
        if rows_left is not None:
            size = Int32(row < rows_left) * 16
        col = chunk * layout.chunk_cols + unit * VECTOR
        if cols < layout.cols:
            size = size * Int32(col < cols)
        if not isinstance(chunk, int) and layout.chunks % (rows_a_pass // layout.rows):
            enabled = Int32(chunk < layout.chunks)
        cp_async_16(
            shared + chunk * layout.chunk_bytes + layout.unit_offset(row, unit),
            glob + Int64(row) * row_stride + Int64(col * ELEMENT_BYTES),
            size,
            enabled,
        )
