"""Every variant compiles for both targets without spilling, and an SM holds as many blocks as the plan says; those of
prefill are audited for sm_120a in test_variants.py, which builds them to run them.

Dense calls of head_dim 128 without softcap are predicted to reach 90% of the mma.sync ceiling or more.
"""

import pytest
from oracle import variant_name

from flash_attn_sm120 import compile as compiler
from flash_attn_sm120 import cubin
from flash_attn_sm120.dispatch import Plan, choose, decode_memory
from flash_attn_sm120.occupancy import RESERVED_BYTES, occupancy
from flash_attn_sm120.problem import AttentionProblem, CombineProblem, padded
from flash_attn_sm120.static_model import predict
from flash_attn_sm120.variants import changed_variants, decode_variants, dual_group_variants, variants


@pytest.mark.parametrize("problem", [*variants(), *changed_variants(), *dual_group_variants()], ids=variant_name)
def test_variant_has_no_stack_and_two_matrix_warps_a_sub_partition(problem):
    built, plan = compiler.build_best(problem, "sm_121a", keep=True)
    audit(problem, plan, built.__cubin__)


def audit(problem: AttentionProblem, plan: Plan, binary: bytes) -> None:
    """Of a prefill kernel."""
    (kernel,) = cubin.read(binary)
    assert kernel.stack_bytes == 0
    assert kernel.shared_bytes == RESERVED_BYTES  # of static shared memory, only what the driver reserves
    held = occupancy(kernel.registers, plan.num_warps + plan.loading_warps, plan.smem_bytes, plan.num_warps)
    assert held.blocks >= plan.blocks_per_sm
    assert held.warps_a_sub_partition >= 2
    prediction = predict(binary, int(held.warps_a_sub_partition))
    columns = padded(problem.head_dim) + padded(problem.head_dim_v)
    assert prediction.hmma == plan.tile_m // plan.num_warps * plan.tile_n * columns // (16 * 8 * 16)
    if (
        problem.head_dim == problem.head_dim_v == 128
        and plan.kernel == "forward_tma"
        and not (problem.softcap or problem.modded)
    ):
        assert min(prediction.percent.values()) >= 90


@pytest.mark.parametrize("arch", ["sm_120a", "sm_121a"])
@pytest.mark.parametrize("problem", decode_variants(), ids=str)
def test_decode_has_no_stack_and_enough_in_flight(problem, arch):
    """A decode waits for memory: an SM holds the tiles in flight that the plan counts on, 36 KB and more."""
    plan = choose(problem, arch)
    (kernel,) = cubin.read(compiler.build(problem, plan, arch, keep=True).__cubin__)
    assert kernel.stack_bytes == 0
    assert kernel.shared_bytes == RESERVED_BYTES
    held = occupancy(kernel.registers, plan.num_warps, plan.smem_bytes)
    assert held.blocks >= plan.blocks_per_sm
    memory = decode_memory(problem, plan.tile_m, plan.tile_n, plan.num_warps, plan.stages)
    tile_bytes = 2 * plan.tile_n * min(memory.columns_k, memory.columns_v)
    assert plan.blocks_per_sm * plan.num_warps * plan.stages * tile_bytes >= 36 << 10


@pytest.mark.parametrize("arch", ["sm_120a", "sm_121a"])
@pytest.mark.parametrize("head_dim_v", [64, 128, 256])
def test_combine_has_no_stack(head_dim_v, arch):
    (kernel,) = cubin.read(
        compiler.build(CombineProblem("bfloat16", head_dim_v, lse=True), None, arch, keep=True).__cubin__
    )
    assert kernel.stack_bytes == 0
