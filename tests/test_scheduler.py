"""The order of tiles: each exactly once, heaviest first among the heads that share L2."""

import pytest

from flash_attn_sm120.device.scheduler import L2_BYTES_FOR_KV, dense_tile, heads_in_l2


@pytest.mark.parametrize("m_blocks", [1, 3, 8])
@pytest.mark.parametrize("heads,batch", [(1, 1), (5, 1), (4, 3), (7, 2)])
@pytest.mark.parametrize("group", [1, 2, 5, 100])
def test_dense_tiles_are_visited_once_each(m_blocks, heads, batch, group):
    tiles = [dense_tile(block, m_blocks, heads, batch, group) for block in range(m_blocks * heads * batch)]
    places = [(tile.batch, tile.head, tile.m_block) for tile in tiles]
    assert sorted(places) == [(b, h, m) for b in range(batch) for h in range(heads) for m in range(m_blocks)]
    for first in range(0, heads * batch, group):
        section = tiles[first * m_blocks : (first + group) * m_blocks]
        order = [tile.m_block for tile in section]
        assert order == sorted(order, reverse=True)
        together = {tile.batch * heads + tile.head for tile in section}
        assert together == set(range(first, min(first + group, heads * batch)))


def test_heads_in_l2():
    assert heads_in_l2(1, 16384, 512) == L2_BYTES_FOR_KV // (16384 * 512) == 2
    assert heads_in_l2(4, 16384, 512) == 8
    assert heads_in_l2(4, 1 << 22, 1024) == 4
    assert heads_in_l2(1, 0, 512) > 0
