"""choose(problem) -> Plan: which kernel and which tile. Pure Python, imports neither torch nor cutlass."""

from __future__ import annotations

from dataclasses import dataclass

from flash_attn_sm120.problem import AttentionProblem


@dataclass(frozen=True, slots=True)
class Plan:
    kernel: str
    tile_m: int
    tile_n: int
    num_warps: int
    stages: int
    blocks_per_sm: int
    smem_bytes: int


def choose(problem: AttentionProblem, tile=(256, 64, 8, 1, 1)) -> Plan:
    tile_m, tile_n, warps, stages, blocks = tile
    d = -(-problem.head_dim // 16) * 16
    dv = -(-problem.head_dim_v // 16) * 16
    smem = 2 * (tile_m * d + stages * tile_n * (d + dv))
    smem = max(smem, 2 * tile_m * dv) + 32
    return Plan("forward", tile_m, tile_n, warps, stages, blocks, smem)
