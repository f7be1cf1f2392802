"""ALiBi: a score loses slope * |position - column|. Source: Press et al., "Train Short, Test Long" (2022)."""

from __future__ import annotations

from cutlass import Float32, Int32, cute

from flash_attn_sm120.arguments import Numbers
from flash_attn_sm120.device.ptx import absolute, fma
from flash_attn_sm120.problem import AttentionProblem


def add_alibi(
    problem: AttentionProblem,
    tSrS: cute.Tensor,
    scale: Float32,
    slopes: list[Float32],
    positions: list[Int32],
    first_col: Int32,
    lane: Int32,
    numbers: Numbers,
) -> None:
    """score -> scale * score - slope * distance. slopes and positions: of each of the thread's rows, 8 apart; slopes in
    the units of the result. Columns are local ones, positions global, as in visible.py."""
    own_col = first_col + 2 * (lane % 4)
    step = Float32(1.0)
    if problem.context_parallel:
        own_col = own_col * numbers.cp_world_size + numbers.cp_rank
        step = Float32(numbers.cp_world_size)
    for r, (slope, position) in enumerate(zip(slopes, positions, strict=True)):
        from_first = Float32(position - own_col)
        for n in range(tSrS.shape[1]):
            for j in range(2):
                place = (r // 2, n, 2 * (r % 2) + j)
                distance = absolute(fma(step, Float32(-(8 * n + j)), from_first))
                tSrS[place] = fma(tSrS[place], scale, -slope * distance)
