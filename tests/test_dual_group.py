"""Two query groups in one launch: against the reference, against a call for each, and zigzag ranks put together.

FLASH_ATTN_SM120_EXAMPLES says how many random calls; a GPU gets the full sizes.
"""

import math
import os

import dual_group_cases
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from oracle import marks, rand

from flash_attn_sm120 import (
    flash_attn_varlen_func,
    fused_zigzag_llama3_flash_attn_varlen_forward,
    replace_execute_grouped_attention_with_fused_varlen,
)
from flash_attn_sm120.matrix import largest_difference

EXAMPLES = int(os.environ.get("FLASH_ATTN_SM120_EXAMPLES", "5"))
RATIOS = [1, 2, 3, 4, 8]


def zigzag(rank, world, length):
    """(chunk, limits) of a rank's two chunks of a sequence."""
    chunk = length // (2 * world)
    return chunk, [(rank + 1) * chunk, (2 * world - rank) * chunk]


@pytest.mark.parametrize("head_dim, dtype", [(64, torch.bfloat16), (128, torch.float16)])
@pytest.mark.parametrize("world", [2, 4])
def test_one_sequence(device, head_dim, dtype, world):
    """seqlen_local 128 and 256, heads 8 and 16; without a GPU an eighth of the rows and a quarter of the heads."""
    for i, (local, heads) in enumerate((local, heads) for local in (128, 256) for heads in (8, 16)):
        local, heads = device.pick((local, heads), (local // 8, heads // 4))
        separate = i == 0 and (device.size == "full" or (world, head_dim) == (2, 64))
        for rank in device.pick(range(world), [(i + 1) % world]):
            chunk, limits = zigzag(rank, world, local * world)
            dual_group_cases.run(
                device.torch_device, [[chunk], [chunk]], [local * world], limits, heads=(heads, heads),
                head_dims=(head_dim, head_dim), dtype=dtype, as_tensors=head_dim == 128, separate=separate,
            )  # fmt: skip


@pytest.mark.parametrize("head_dim, dtype", [(64, torch.bfloat16), (128, torch.float16)])
def test_several_sequences(device, head_dim, dtype):
    """Q from 30 to 120 rows, KV from 400 to 800; without a GPU a third of that."""
    for lengths_q, lengths_k, limits in (
        ([[30, 80], [50, 120]], [400, 800], [250, 700]),
        ([[30, 80, 60], [120, 45, 99]], [600, 400, 777], [200, 777]),
    ):
        size = device.pick(1, 3)
        groups = [[length // size for length in lengths] for lengths in lengths_q]
        dual_group_cases.run(
            device.torch_device, groups, [n // size for n in lengths_k], [n // size for n in limits],
            heads=device.pick((8, 2), (4, 1)), head_dims=(head_dim, head_dim), dtype=dtype,
            as_tensors=head_dim == 128, spare=3,
        )  # fmt: skip


@pytest.mark.parametrize("full", [False, True])
def test_groups_without_rows_or_keys(device, full):
    """One group, none, ranges of 0; a window between whose ranges blocks lie that nobody sees."""
    run, on = dual_group_cases.run, device.torch_device
    way = {"head_dims": (192, 128), "causal": False, "padded_lse": True} if full else {}
    if full:
        way["learnable_sink"] = rand(on, 4)
    run(on, [[0, 0], [40, 3]], [70, 20], [70, 70], **way)
    run(on, [[40, 3], [0, 0]], [70, 20], [0, 70], **way)
    run(on, [[5, 40, 0], [7, 0, 0]], [60, 0, 33], [0, 70], **way)
    if not full:
        way = {"head_dims": (128, 128), "causal": False}
        run(on, [[40], [70]], [700], [90, 650], window_size=(33, 0), **way)
        run(on, [[70], [40]], [700], [650, 200], window_size=(20, 30), **way)


def test_keys_behind_every_range_are_not_read(device):
    """NaN behind the longest range with rows, and in the sequence that nobody sees."""
    on = device.torch_device
    q0, q1 = rand(on, 40, 2, 64), rand(on, 20, 2, 64)
    k, v = rand(on, 200, 1, 64), rand(on, 200, 1, 64)
    lengths = (marks(on, 40, 0), marks(on, 20, 0), marks(on, 150, 50))
    for limits in ((70, 100), (100, 70)):
        end = max(limits)
        right = fused_zigzag_llama3_flash_attn_varlen_forward(q0, q1, k, v, *lengths, 40, 20, 150, *limits)
        assert not any(x.isnan().any() for x in right)
        poisoned = [x.clone() for x in (k, v)]
        for x in poisoned:
            x[end:] = math.nan
        found = fused_zigzag_llama3_flash_attn_varlen_forward(q0, q1, *poisoned, *lengths, 40, 20, 150, *limits)
        assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))


@st.composite
def dual_calls(draw, problems, longest):
    """Everything about a call but the numbers in it."""
    problem = draw(st.sampled_from(problems))
    batch = draw(st.integers(1, 4))
    length = st.one_of(st.sampled_from([0, 1, 31, 32, 33, 64]), st.integers(0, longest))
    rows = st.lists(length.map(lambda n: min(n, longest)), min_size=batch, max_size=batch)
    keys = st.lists(st.integers(0, 3 * longest), min_size=batch, max_size=batch)
    limit = keys if problem.seqused_k else st.integers(0, 4 * longest)
    side = st.sampled_from([0, 5, 40, None])
    return {
        "problem": problem, "rows": [draw(rows), draw(rows)], "keys": draw(keys), "limits": [draw(limit), draw(limit)],
        "ratio": draw(st.sampled_from(RATIOS)), "heads_kv": draw(st.integers(1, 2)), "spare": draw(st.integers(0, 5)),
        "window": (draw(st.integers(0, 99)), draw(side)), "seed": draw(st.integers(0, 2**31)),
    }  # fmt: skip


def run_dual_call(call, device):
    torch.manual_seed(call["seed"])
    problem = call["problem"]
    heads = call["heads_kv"] * call["ratio"]
    options = {"window_size": call["window"]} if problem.mask == "local" else {}
    if problem.softcap:
        options["softcap"] = 3.0
    if problem.sink:
        options["learnable_sink"] = rand(device, heads, dtype=getattr(torch, problem.sink))
    dual_group_cases.run(
        device, call["rows"], call["keys"], call["limits"], heads=(heads, call["heads_kv"]), spare=call["spare"],
        head_dims=(problem.head_dim, problem.head_dim_v), dtype=getattr(torch, problem.dtype),
        causal=problem.mask == "causal", as_tensors=problem.seqused_k, padded_lse=problem.padded_lse, **options,
    )  # fmt: skip


def test_random_calls(device):
    from flash_attn_sm120.variants import dual_group_variants

    problems = dual_group_variants()
    problems = device.pick(problems, [problems[i] for i in (0, 2, 3)])  # which other tests have compiled

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
    @given(dual_calls(problems, device.pick(700, 70)))
    def body(call):
        note(str(call))
        run_dual_call(call, device.torch_device)

    body()


def test_zigzag_ranks_together_are_causal_attention(device):
    """Through the drop-in: each rank's rows of its chunks, keys as an all-gather leaves them."""
    for world in device.pick((1, 2, 3, 4, 8), (3,)):
        put_ranks_together(device, world)


def put_ranks_together(device, world):
    on, dtype = device.torch_device, torch.float16
    chunks = device.pick([128, 0, 200], [24, 0, 9])  # rows of one, of each sequence
    lengths = [2 * world * chunk for chunk in chunks]
    q, k, v = (rand(on, sum(lengths), heads, 128, dtype=dtype) for heads in (4, 2, 2))
    where = marks(on, *lengths)
    expected, expected_lse = flash_attn_varlen_func(q, k, v, where, where, causal=True, return_lse=True)

    places = [[] for _ in range(world)]  # of each rank's rows
    starts = where.tolist()[:-1]
    for start, chunk in zip(starts, chunks, strict=True):
        for rank in range(world):
            for index in (rank, 2 * world - 1 - rank):
                places[rank].append(torch.arange(start + index * chunk, start + (index + 1) * chunk, device=on))
    kv_buffer = torch.stack([torch.cat([x[torch.cat(own)] for own in places]) for x in (k, v)])
    local = marks(on, *(2 * chunk for chunk in chunks))
    for rank in range(world):
        groups = (rank, 2 * world - 1 - rank)
        slices = []
        for index in groups:
            ranges = [(s, s + (index + 1) * c) for s, c in zip(starts, chunks, strict=True) if c]
            slices.append((ranges, marks(on, *((index + 1) * chunk for chunk in chunks))))
        own = torch.cat(places[rank])
        sizes = [chunk for chunk in chunks for _ in range(2)]
        parts = torch.arange(len(own), device=on).split(sizes)
        indices = [torch.cat(parts[group::2]) for group in range(2)]
        marks_q = [marks(on, *chunks)] * 2
        out, lse, info = replace_execute_grouped_attention_with_fused_varlen(
            [q[own][at] for at in indices], marks_q, indices, kv_buffer, slices, 4, 128, 128**-0.5, 0.0, True,
            (-1, -1), None, False, world, local, *groups,
        )  # fmt: skip
        assert largest_difference(out, expected[own]) <= 4e-3
        assert largest_difference(lse, expected_lse[:, own]) <= 1e-4
        assert info == {
            "chunk_indices_list": indices, "chunk_cu_seqlens_q_list": marks_q, "kv_slices": slices
        }  # fmt: skip
