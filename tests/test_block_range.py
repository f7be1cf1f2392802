"""Which KV blocks a tile visits and masks, against brute force over every (row, column) pair."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_visible import seen

from flash_attn_sm120.arguments import Numbers
from flash_attn_sm120.device.block_range import block_range
from flash_attn_sm120.problem import AttentionProblem

lengths = st.integers(1, 90)
windows = st.one_of(st.integers(0, 100), st.just(2**30))


@settings(max_examples=800, deadline=None)
@given(
    mask=st.sampled_from(["full", "causal", "local"]),
    seqlen_q=lengths,
    total_k=st.integers(0, 90),
    left=windows,
    right=windows,
    chunk=st.sampled_from([0, 0, 0, 1, 7, 16, 50]),
    world=st.sampled_from([1, 1, 1, 2, 3]),
    rank=st.integers(0, 2),
    tile_m=st.sampled_from([16, 32]),
    tile_n=st.sampled_from([8, 16, 32]),
)
def test_against_brute_force(mask, seqlen_q, total_k, left, right, chunk, world, rank, tile_m, tile_n):
    rank = rank % world
    problem = AttentionProblem("bfloat16", 64, 64, mask=mask, chunked=chunk > 0, context_parallel=world > 1)
    numbers = Numbers(1.0, 0.0, left, right, chunk, world, rank)
    seqlen_k = len(range(rank, total_k, world))
    for m_block in range(-(-seqlen_q // tile_m)):
        blocks = block_range(problem, m_block, tile_m, tile_n, seqlen_q, seqlen_k, total_k, numbers)
        assert 0 <= blocks.begin <= blocks.end
        assert blocks.begin <= blocks.left_edge
        assert blocks.right_edge <= blocks.end
        positions = range(m_block * tile_m, min((m_block + 1) * tile_m, seqlen_q))
        shift = total_k - seqlen_q
        rows = [seen(mask, chunk, (left, right), world, rank, row + shift, total_k) for row in positions]
        needed = {col // tile_n for row in rows for col in row}
        assert needed <= set(range(blocks.begin, blocks.end)), "a block that a row sees is left out"
        if needed and world == 1:  # of a rank's columns neighbouring rows may see none
            assert needed == set(range(blocks.begin, blocks.end)), "a block that no row sees is visited"
        for n in range(blocks.begin, blocks.end):
            columns = set(range(n * tile_n, (n + 1) * tile_n))
            whole = all(columns <= set(row) for row in rows)
            unmasked = blocks.left_edge <= n < blocks.right_edge
            assert whole or not unmasked, "a block that hides something goes unmasked"
            assert unmasked or not whole or len(rows) < tile_m, "a whole block is masked for nothing"


@pytest.mark.parametrize("window,blocks", [(127, 5), (1023, 33)])
def test_a_window_visits_a_constant_number_of_blocks(window, blocks):
    problem, numbers = AttentionProblem("bfloat16", 64, 64, mask="local"), Numbers(window_left=window)
    for m_block in range(50, 128):
        visited = block_range(problem, m_block, 128, 32, 16384, 16384, 16384, numbers)
        assert blocks <= visited.end - visited.begin <= blocks + 3


def test_a_chunk_visits_its_own_blocks():
    problem, numbers = AttentionProblem("bfloat16", 64, 64, mask="causal", chunked=True), Numbers(attention_chunk=256)
    for m_block in range(128):
        visited = block_range(problem, m_block, 128, 32, 16384, 16384, 16384, numbers)
        assert visited.begin == m_block // 2 * 8
        assert visited.end == (m_block + 1) * 4
