"""The rules for splits are plain arithmetic."""

import itertools
import subprocess
import sys

import pytest

from flash_attn_sm120.arguments import Numbers
from flash_attn_sm120.checks import UNBOUNDED
from flash_attn_sm120.dispatch import MAX_SPLITS, Plan
from flash_attn_sm120.prepare import keys_in_sight
from flash_attn_sm120.splits import num_splits, tickets

PLAN = Plan("decode", 16, 32, 4, 3, 2, 49152)


def test_the_number_of_splits_is_in_bounds():
    for sizes in itertools.product((1, 48, 188), (0, 1, 7, 300), (1, 8), (1, 5), (0, 1, 300, 8192, 1 << 20)):
        assert 1 <= num_splits(PLAN, *sizes) <= MAX_SPLITS, sizes


def test_a_batch_of_one_is_split_and_a_full_gpu_is_not():
    assert num_splits(PLAN, 188, 1, 8, 1, 65536) > 4
    assert num_splits(PLAN, 188, 1, 1, 1, 1) == 1
    assert num_splits(PLAN, 188, 400, 8, 1, 4096) == 1


@pytest.mark.parametrize("left, right", [(UNBOUNDED, UNBOUNDED), (UNBOUNDED, 0), (3, 0), (0, 0), (4, 2)])
@pytest.mark.parametrize("chunk", [0, 1, 5, 64])
def test_keys_in_sight_bounds_what_rows_see(left, right, chunk):
    numbers = Numbers(window_left=left, window_right=right, attention_chunk=chunk)
    for keys, rows in itertools.product((0, 1, 9, 40), (1, 2, 7)):
        seen = set()
        for row in range(keys - rows, keys):
            for column in range(keys):
                own_chunk = not chunk or column // chunk == row // chunk
                if row - left <= column <= row + right and own_chunk:
                    seen.add(column)
        bound = keys_in_sight(keys, rows, numbers)
        assert len(seen) <= bound <= keys
        if not chunk and keys >= rows + left:
            assert bound == len(seen) + right


def test_there_is_a_ticket_for_every_tile():
    for heads_kv, ratio, batch, rows in itertools.product((1, 3), (1, 5, 16), (1, 4), (1, 3, 40)):
        tiles = batch * heads_kv * -(-rows * ratio // PLAN.tile_m)
        heads = heads_kv * ratio
        assert tickets(PLAN, heads_kv, heads, (batch, rows, heads, 64), batch) >= tiles
        assert tickets(PLAN, heads_kv, heads, (batch * rows, heads, 64), batch) >= tiles


def test_splits_are_pure_python():
    code = "import sys, flash_attn_sm120.splits; sys.exit(int(bool({'torch', 'cutlass'} & set(sys.modules))))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
