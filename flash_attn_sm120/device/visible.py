"""Which columns a query row sees, as one interval: masks, windows, chunks and context-parallel ranks all give one.

Plain arithmetic, on ints or Int32. Positions and global columns count the tokens of the whole sequence; with context
parallelism local column j of a rank is global column j * cp_world_size + cp_rank.
"""

from __future__ import annotations

from typing import Any

from flash_attn_sm120.problem import AttentionProblem

Int = Any  # int or cutlass.Int32


def minimum(a: Int, b: Int) -> Int:
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    from cutlass import cutlass_dsl

    return cutlass_dsl.min(a, b)


def maximum(a: Int, b: Int) -> Int:
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    from cutlass import cutlass_dsl

    return cutlass_dsl.max(a, b)


def visible_columns(problem: AttentionProblem, position: Int, seqlen_k: Int, total_k: Int, numbers: Any) -> tuple:
    """(begin, end): a row at `position` sees local columns begin <= j < end; end <= begin where it sees none. Neither
    falls as the position grows.

    position: row + total_k - seqlen_q, below 0 where the row lies before the first key. seqlen_k: local columns;
    total_k: columns of all ranks, seqlen_k without context parallelism. numbers: arguments.Numbers.
    """
    begin, end = 0, total_k
    if problem.mask != "full":
        right = numbers.window_right if problem.mask == "local" else 0
        end = minimum(end, position + right + 1)
    if problem.mask == "local":
        begin = position - numbers.window_left
    if problem.chunked:
        chunk = numbers.attention_chunk
        first = maximum(position, 0) // chunk * chunk
        is_there = minimum(maximum(position + 1, 0), 1)
        begin = maximum(begin, first)
        end = minimum(end, (first + chunk) * is_there)
    if problem.context_parallel:
        world, rank = numbers.cp_world_size, numbers.cp_rank
        begin, end = (maximum(bound - rank + world - 1, 0) // world for bound in (begin, end))
    return maximum(begin, 0), maximum(minimum(end, seqlen_k), 0)


def same_columns(problem: AttentionProblem) -> bool:
    """Every row of a sequence sees the same columns."""
    return problem.mask == "full" and not problem.chunked


def starts_at_first(problem: AttentionProblem) -> bool:
    """Every row of a sequence sees its columns from the first on."""
    return problem.mask != "local" and not problem.chunked


def is_band(problem: AttentionProblem) -> bool:
    """A row sees the columns of a window around its position that exist, and no other rule counts."""
    return not (problem.chunked or problem.context_parallel)
