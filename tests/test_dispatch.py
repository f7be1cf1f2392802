"""The tile table against SM120's limits, for every head_dim that a call may have."""

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest

from flash_attn_sm120.dispatch import (
    COMMON_TILES,
    NARROW_TILES,
    TILES,
    barrier_bytes,
    can_implement,
    candidates,
    choose,
    plan_for,
)
from flash_attn_sm120.occupancy import REGISTERS, SHARED_BYTES, SHARED_BYTES_A_BLOCK, SUB_PARTITIONS, occupancy
from flash_attn_sm120.problem import MASKS, SPARSE_UNITS, AttentionProblem, Mod
from flash_attn_sm120.variants import changed_variants, dual_group_variants, variants

HEAD_DIMS = range(8, 257, 8)


def is_narrow(row):
    return replace(row, persistent=False) in NARROW_TILES


def is_common(row):
    return replace(row, persistent=False) in COMMON_TILES


ROWS = [(kernel, row) for kernel, rows in TILES.items() for row in rows]


@pytest.mark.parametrize("kernel", TILES)
def test_every_head_dim_fits_shared_memory_as_the_plan_says(kernel):
    for head_dim, head_dim_v in itertools.product(HEAD_DIMS, HEAD_DIMS):
        plan = plan_for(kernel, AttentionProblem("bfloat16", head_dim, head_dim_v))
        assert plan.smem_bytes <= SHARED_BYTES_A_BLOCK, (head_dim, head_dim_v)
        assert plan.blocks_per_sm * (plan.smem_bytes + 1024) <= SHARED_BYTES, (head_dim, head_dim_v)


@pytest.mark.parametrize("kernel, row", ROWS, ids=lambda x: x if isinstance(x, str) else f"{x.head_dim}-{x.head_dim_v}")
def test_every_tile_gives_two_matrix_warps_a_sub_partition(kernel, row):
    features = {"kv_dtype": "float8_e4m3fn" if row.ways[0] in ("fp8", "fp8_boxes") else "", "mask": row.masks[0]}
    if row.ways == ("fp8_boxes",):
        features |= {"page_size": 16, "seqused_k": True, "v_descale": True}
    if is_narrow(row):
        features["sparse_block"] = (row.tile_m, max(row.tile_n, SPARSE_UNITS[1]))
    plan = plan_for(kernel, AttentionProblem("bfloat16", row.head_dim, row.head_dim_v, **features))
    assert (plan.tile_m, plan.stages) == (row.tile_m, row.stages) or is_common(row)
    assert plan.blocks_per_sm * plan.num_warps >= 2 * SUB_PARTITIONS
    warps = plan.num_warps + plan.loading_warps
    share = REGISTERS // (plan.blocks_per_sm * warps * 32) // 8 * 8
    assert occupancy(min(share, 255), warps, plan.smem_bytes).blocks >= plan.blocks_per_sm
    assert plan.tile_m % (16 * plan.num_warps) == 0
    assert plan.tile_n % 16 == 0


@pytest.mark.parametrize("kv_dtype", ["", "float8_e4m3fn"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_block_has_its_registers_where_they_cannot_change_hands(head_dim, kv_dtype):
    plan = plan_for("forward", AttentionProblem("bfloat16", head_dim, head_dim, kv_dtype=kv_dtype), "sm_89")
    assert plan.blocks_per_sm == 1 and not plan.hands_over_registers
    row_registers = plan.tile_m // plan.num_warps * (head_dim + plan.tile_n) // 32  # of a matrix thread, for O and S
    assert row_registers < REGISTERS // (32 * (plan.num_warps + plan.loading_warps)) - 8


@pytest.mark.parametrize("kernel", TILES)
def test_the_tables_are_searched_from_small_to_large(kernel):
    narrow = [row for row in TILES[kernel] if is_narrow(row)]
    assert bool(narrow) == (kernel != "dual_group")  # which has neither lists nor functions of the caller
    for rows in filter(None, ([row for row in TILES[kernel] if row not in narrow], narrow)):
        dims = [(row.head_dim, row.head_dim_v) for row in rows]
        assert dims == sorted(dims)
        assert dims[-1] == (256, 256)


PAGED = {"page_size": 16, "seqused_k": True}


@pytest.mark.parametrize(
    "way, arch, options",
    [
        ("page_boxes", "sm_120a", PAGED),
        ("page_boxes", "sm_121a", PAGED | {"packed_q": True, "sink": "float32"}),
        ("pages", "sm_89", PAGED),
        ("pages", "sm_120a", PAGED | {"tma_strides": False}),
        ("pages", "sm_120a", PAGED | {"head_dim_v": 80}),
        ("fp8_boxes", "sm_120a", PAGED | {"kv_dtype": "float8_e5m2", "v_descale": True}),
        ("fp8", "sm_89", PAGED | {"kv_dtype": "float8_e5m2"}),
        ("fp8_boxes", "sm_120a", PAGED | {"kv_dtype": "float8_e5m2", "k_descale": True}),
        ("fp8", "sm_120a", PAGED | {"dtype": "float16", "kv_dtype": "float8_e5m2", "k_descale": True}),
        ("fp8", "sm_120a", PAGED | {"kv_dtype": "float8_e4m3fn", "tma_strides": False}),
        ("fp8", "sm_120a", PAGED | {"kv_dtype": "float8_e4m3fn", "head_dim_v": 64}),
        ("fp8", "sm_120a", {"kv_dtype": "float8_e4m3fn", "seqused_k": True}),
        ("cp_async", "sm_120a", {"seqused_k": True}),
    ],
)
def test_how_keys_are_loaded(way, arch, options):
    fields = {"dtype": "bfloat16", "head_dim": 128, "head_dim_v": 128} | options
    assert choose(AttentionProblem(**fields), arch).way == way


def test_what_lies_behind_the_notes_does_not_overlap():
    for options in ({}, {"kv_dtype": "float8_e4m3fn"}, {"kv_dtype": "float8_e4m3fn", "v_descale": True}):
        plan = choose(AttentionProblem("bfloat16", 128, 128, **PAGED | options))
        ends = (
            plan.note_offset + plan.note_bytes,
            plan.barrier_offset + barrier_bytes(plan.stages),
            plan.loader_barrier_offset + 8 * plan.loader_barriers,
            plan.factor_offset + plan.factor_bytes,
        )
        starts = (plan.barrier_offset, plan.loader_barrier_offset, plan.factor_offset, plan.smem_bytes)
        assert ends == starts
        assert plan.factor_offset % 8 == 0 and plan.smem_bytes <= SHARED_BYTES_A_BLOCK


VARLEN = ("packed_q", "packed_k", "seqused_q", "seqused_k")


@pytest.mark.parametrize("flags", list(itertools.product((False, True), repeat=4)))
@pytest.mark.parametrize("tma_strides", [False, True])
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_120a", "sm_121a"])
@pytest.mark.parametrize("head_dims", [(64, 64), (96, 96), (192, 128), (256, 256), (80, 80), (72, 64), (128, 40)])
def test_tma_only_where_the_rule_allows_it(flags, tma_strides, arch, head_dims):
    problem = AttentionProblem("bfloat16", *head_dims, **dict(zip(VARLEN, flags, strict=True)), tma_strides=tma_strides)
    allowed = not any(flags) and tma_strides and arch not in ("sm_80", "sm_89") and not any(d % 32 for d in head_dims)
    assert can_implement("forward_tma", problem, arch) == allowed
    assert can_implement("forward", problem, arch)
    assert choose(problem, arch).kernel == ("forward_tma" if allowed else "forward")


@pytest.mark.parametrize("paged, varlen, sparse, dropout", list(itertools.product((False, True), repeat=4)))
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120a", "sm_121a"])
def test_which_kernel_takes_which_combination(paged, varlen, sparse, dropout, arch):
    kernels = pytest.importorskip("flash_attn_sm120.compile").KERNELS
    features = {"page_size": 16 * paged, "seqused_k": varlen, "sparse_block": (128, 128) * sparse, "dropout": dropout}
    problem = AttentionProblem("bfloat16", 128, 128, **features)
    by_tma = not (paged or varlen or sparse or dropout) and arch != "sm_80"
    for kernel, expected in (("forward", True), ("forward_tma", by_tma)):
        assert can_implement(kernel, problem, arch) == expected
        assert kernels[kernel].can_implement(problem, arch) == expected
    assert choose(problem, arch).kernel == ("forward_tma" if by_tma else "forward")


def test_variants_cover_each_row_and_each_feature():
    pytest.importorskip("cutlass")
    problems = variants()
    assert len(problems) == len(set(problems))
    every = (*problems, *changed_variants(), *dual_group_variants())
    assert len(every) == len(set(every))
    taken = {
        (plan.kernel, plan.tile_m, plan.tile_n, plan.num_warps) for problem in every for plan in candidates(problem)
    }
    assert taken == {(kernel, row.tile_m, row.tile_n, row.num_warps) for kernel, row in ROWS}
    for mask in ("full", "causal", "local"):
        own = [problem for problem in problems if problem.mask == mask]
        for feature in ("softcap", "packed_q", "packed_k", "seqused_q", "seqused_k", "lse", "tma_strides"):
            assert {getattr(problem, feature) for problem in own} == {False, True}, (mask, feature)
        assert {problem.dtype for problem in own} == {"bfloat16", "float16"}


def test_dispatch_is_pure_python():
    code = (
        "import sys; from flash_attn_sm120.dispatch import choose; from flash_attn_sm120.variants import variants;"
        "list(map(choose, variants())); assert not {'torch', 'cutlass'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_problem_refuses_what_no_kernel_is_for():
    for wrong in ({"dtype": "float32"}, {"head_dim": 12}, {"head_dim_v": 264}, {"head_dim": 0}, {"mask": "diagonal"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            AttentionProblem(**{"dtype": "bfloat16", "head_dim": 64, "head_dim_v": 64, **wrong})


def test_what_the_largest_tile_serves():
    """A bias alone; lists alone."""

    def first(**features):
        return candidates(AttentionProblem("bfloat16", 128, 128, **features))[0]

    other = Mod("other", 1, lambda *_: None)
    biased = Mod("biased", 1, lambda *_: None)
    biased.function.bias = (biased.function, lambda *_: None)
    for mask in MASKS:
        for features in ({"score_mod": biased}, {"sparse_block": (256, 64)}):
            plan = first(mask=mask, **features)
            assert (plan.tile_m, plan.tile_n) == (256, 64)
    for features in ({"score_mod": other}, {"score_mod": biased, "mask_mod": other}):
        assert first(**features).tile_m == 128


def test_all_plans_of_a_problem_take_the_same_arguments():
    for problem in (*variants(), *changed_variants()):
        plans = candidates(problem)
        assert len({(plan.kernel, plan.persistent) for plan in plans}) == 1, problem
    shapes = itertools.product((64, 96, 128, 192, 256), ("full", "causal", "local"))
    persistent = {(d, mask) for d, mask in shapes if choose(AttentionProblem("bfloat16", d, d, mask)).persistent}
    assert {(64, "causal"), (96, "full"), (128, "causal"), (256, "full")} <= persistent
    assert persistent.isdisjoint({(64, "full"), (128, "full")})
    assert not choose(AttentionProblem("bfloat16", 64, 64, "causal", packed_q=True, packed_k=True)).persistent
