"""Which KV blocks a tile visits and masks, against brute force over every (row, column) pair."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_attn_sm120.device.block_range import block_range


def visible(mask, row, col, seqlen_q, seqlen_k, left, right):
    diagonal = row + seqlen_k - seqlen_q
    if mask == "full":
        return True
    if mask == "causal":
        return col <= diagonal
    return diagonal - left <= col <= diagonal + right


lengths = st.integers(1, 90)
windows = st.one_of(st.integers(0, 100), st.just(2**30))


@settings(max_examples=400, deadline=None)
@given(
    mask=st.sampled_from(["full", "causal", "local"]),
    seqlen_q=lengths,
    seqlen_k=st.integers(0, 90),
    left=windows,
    right=windows,
    tile_m=st.sampled_from([16, 32]),
    tile_n=st.sampled_from([8, 16, 32]),
)
def test_against_brute_force(mask, seqlen_q, seqlen_k, left, right, tile_m, tile_n):
    for m_block in range(-(-seqlen_q // tile_m)):
        blocks = block_range(mask, m_block, tile_m, tile_n, seqlen_q, seqlen_k, left, right)
        assert 0 <= blocks.begin <= blocks.end
        assert blocks.begin <= blocks.left_edge
        assert blocks.right_edge <= blocks.end
        rows = range(m_block * tile_m, min((m_block + 1) * tile_m, seqlen_q))
        needed = [
            n
            for n in range(-(-seqlen_k // tile_n))
            if any(
                visible(mask, row, col, seqlen_q, seqlen_k, left, right)
                for row in rows
                for col in range(n * tile_n, min((n + 1) * tile_n, seqlen_k))
            )
        ]
        if needed:
            assert (blocks.begin, blocks.end) == (needed[0], needed[-1] + 1)
        for n in range(blocks.begin, blocks.end):
            columns = range(n * tile_n, (n + 1) * tile_n)
            whole = all(
                col < seqlen_k and visible(mask, row, col, seqlen_q, seqlen_k, left, right)
                for row in rows
                for col in columns
            )
            unmasked = blocks.left_edge <= n < blocks.right_edge
            assert whole or not unmasked, "a block that hides something goes unmasked"
            assert unmasked or not whole or len(rows) < tile_m, "a whole block is masked for nothing"


@pytest.mark.parametrize("window,blocks", [(127, 5), (1023, 33)])
def test_a_window_visits_a_constant_number_of_blocks(window, blocks):
    for m_block in range(50, 128):
        visited = block_range("local", m_block, 128, 32, 16384, 16384, window, 0)
        assert blocks <= visited.end - visited.begin <= blocks + 3
