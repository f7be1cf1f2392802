"""A matrix tile in shared memory: where each element lies, and how ldmatrix reads it."""

from __future__ import annotations

from dataclasses import dataclass

from cutlass import Int32

from flash_attn_sm120.device.ptx import ldmatrix_x4
from flash_attn_sm120.problem import ELEMENT_BYTES

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
        """Byte offset in a chunk of the 16-byte unit `unit` of `row`; ints or Int32. Rows 8 apart have one phase."""
        phase = row >> (8 // self.units).bit_length() - 1 & self.units - 1
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
