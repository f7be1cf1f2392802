"""The tile table against SM120's limits, for every head_dim that a call may have."""

import itertools
import subprocess
import sys

import pytest

from flash_attn_sm120.dispatch import FORWARD_TILES, choose, variants
from flash_attn_sm120.occupancy import REGISTERS, SHARED_BYTES, SHARED_BYTES_A_BLOCK, SUB_PARTITIONS, occupancy
from flash_attn_sm120.problem import AttentionProblem

HEAD_DIMS = range(8, 257, 8)


def test_every_head_dim_fits_shared_memory_as_the_plan_says():
    for head_dim, head_dim_v in itertools.product(HEAD_DIMS, HEAD_DIMS):
        plan = choose(AttentionProblem("bfloat16", head_dim, head_dim_v))
        assert plan.smem_bytes <= SHARED_BYTES_A_BLOCK, (head_dim, head_dim_v)
        assert plan.blocks_per_sm * (plan.smem_bytes + 1024) <= SHARED_BYTES, (head_dim, head_dim_v)


@pytest.mark.parametrize("row", FORWARD_TILES, ids=lambda row: f"{row.head_dim}-{row.head_dim_v}")
def test_every_tile_gives_two_matrix_warps_a_sub_partition(row):
    plan = choose(AttentionProblem("bfloat16", row.head_dim, row.head_dim_v))
    assert plan.blocks_per_sm * plan.num_warps >= 2 * SUB_PARTITIONS
    assert plan.blocks_per_sm * plan.num_warps * 32 * 255 <= REGISTERS
    assert occupancy(255, plan.num_warps, plan.smem_bytes).blocks >= plan.blocks_per_sm
    assert plan.tile_m % (16 * plan.num_warps) == 0
    assert plan.tile_n % 16 == 0


def test_the_table_is_searched_from_small_to_large():
    dims = [(row.head_dim, row.head_dim_v) for row in FORWARD_TILES]
    assert dims == sorted(dims)
    assert dims[-1] == (256, 256)


def test_variants_cover_each_row_and_each_feature():
    problems = variants()
    assert len(problems) == len(set(problems))
    tiles = {(plan.tile_m, plan.tile_n, plan.num_warps) for plan in map(choose, problems)}
    assert tiles == {(row.tile_m, row.tile_n, row.num_warps) for row in FORWARD_TILES}
    for mask in ("full", "causal", "local"):
        own = [problem for problem in problems if problem.mask == mask]
        for feature in ("softcap", "packed_q", "packed_k", "seqused_q", "seqused_k", "lse"):
            assert {getattr(problem, feature) for problem in own} == {False, True}, (mask, feature)
        assert {problem.dtype for problem in own} == {"bfloat16", "float16"}


def test_dispatch_is_pure_python():
    code = (
        "import sys, flash_attn_sm120.dispatch as d; d.variants(); assert not {'torch', 'cutlass'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_problem_refuses_what_no_kernel_is_for():
    for wrong in ({"dtype": "float32"}, {"head_dim": 12}, {"head_dim_v": 264}, {"head_dim": 0}, {"mask": "diagonal"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            AttentionProblem(**{"dtype": "bfloat16", "head_dim": 64, "head_dim_v": 64, **wrong})
