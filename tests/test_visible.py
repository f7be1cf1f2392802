"""The interval of columns that a row sees, against the definition, column by column."""

import itertools

import pytest

from flash_attn_sm120.arguments import Numbers
from flash_attn_sm120.device.visible import visible_columns
from flash_attn_sm120.problem import AttentionProblem


def seen(mask, chunk, window, world, rank, position, total_k):
    """Local columns by the definition."""
    found = []
    for local, column in enumerate(range(rank, total_k, world)):
        sees = True
        if mask != "full":
            sees &= column <= position + (window[1] if mask == "local" else 0)
        if mask == "local":
            sees &= column >= position - window[0]
        if chunk:
            sees &= position // chunk == column // chunk
        if sees:
            found.append(local)
    return found


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("chunk", [0, 1, 4, 16])
@pytest.mark.parametrize("mask, window", [("full", (0, 0)), ("causal", (0, 0)), ("local", (3, 0)), ("local", (2, 4))])
def test_interval(mask, window, chunk, world):
    problem = AttentionProblem(
        "bfloat16", 64, 64, mask=mask, chunked=chunk > 0, context_parallel=world > 1, decode=True
    )
    for rank, total_k, position in itertools.product(range(world), range(12), range(-5, 12)):
        numbers = Numbers(1.0, 0.0, *window, chunk, world, rank)
        local_k = len(range(rank, total_k, world))
        begin, end = visible_columns(problem, position, local_k, total_k, numbers)
        wanted = seen(mask, chunk, window, world, rank, position, total_k)
        assert list(range(begin, end)) == wanted, (rank, total_k, position)
