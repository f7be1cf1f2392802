"""Where a tile's elements lie in shared memory: each in its own place, and no bank conflicts on the way in or out."""

import pytest

from flash_attn_sm120.device.tile import ELEMENT_BYTES, VECTOR, TileLayout

COLS = range(16, 257, 16)


def place(layout, row, col):
    chunk, within = divmod(col, layout.chunk_cols)
    offset = chunk * layout.chunk_bytes + layout.unit_offset(row, within // VECTOR)
    return offset + within % VECTOR * ELEMENT_BYTES


@pytest.mark.parametrize("cols", COLS)
def test_every_element_has_its_own_place(cols):
    layout = TileLayout(32, cols)
    places = sorted(place(layout, row, col) for row in range(32) for col in range(cols))
    assert places == list(range(0, layout.bytes, ELEMENT_BYTES))


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("rows_first", [True, False])
def test_matrix_addresses_name_the_16_by_16_blocks(cols, rows_first):
    layout = TileLayout(32, cols)
    for row in (0, 16):
        for col in range(0, cols, 16):
            for lane in range(32):
                matrix = lane // 8
                down, right = (matrix % 2, matrix // 2) if rows_first else (matrix // 2, matrix % 2)
                lane_row, lane_unit = row + 8 * down + lane % 8, right
                chunk, within = divmod(col, layout.chunk_cols)
                own = layout.matrix(0, lane, 0, rows_first)
                address = (own.address ^ (within // 16 * 32)) + chunk * layout.chunk_bytes + row * layout.row_bytes
                assert address == place(layout, lane_row, col + 8 * lane_unit)


@pytest.mark.parametrize("cols", COLS)
def test_eight_rows_of_one_unit_lie_in_eight_bank_groups(cols):
    layout = TileLayout(64, cols)
    for first in range(0, 64, 8):
        for unit in range(layout.units):
            groups = {layout.unit_offset(row, unit) // 16 % 8 for row in range(first, first + 8)}
            assert len(groups) == 8
