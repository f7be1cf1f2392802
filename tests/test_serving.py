"""Servers' calls at random on the kernels: pages, few rows, splits, ranks. FLASH_ATTN_SM120_EXAMPLES says how many."""

import math

import pytest
import serving_cases
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from oracle import SPEED, assert_right, ints, marks, rand
from serving_cases import Case, cases
from test_hypothesis import EXAMPLES

from flash_attn_sm120 import flash_attn_combine, flash_attn_func, reference
from flash_attn_sm120.matrix import LSE_SLACK, SLACK, largest_difference

RANKED = max(EXAMPLES // 2, 1)  # as each is two to four calls
BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2


def each(strategy, body, count=EXAMPLES):
    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
    @given(strategy)
    def examples(case):
        note(str(case))
        body(case)

    examples()


def prefill(device):
    rows, keys, most_heads = device.pick((400, 1500, 24), (60, 90, 8))
    return cases(rows=rows, keys=keys, most_heads=most_heads, splits=(0, 1))


def decode(device):
    keys, most_heads = device.pick((3000, 48), (120, 16))
    return cases(rows=16, keys=keys, most_heads=most_heads, splits=(0, 32))


def test_paged_prefill(device):
    each(prefill(device), lambda case: serving_cases.run(case, device.torch_device))


def test_padded_prefill(device):
    each(prefill(device), lambda case: serving_cases.run_padded(case, device.torch_device))


def test_paged_decode(device):
    each(decode(device), lambda case: serving_cases.run(case, device.torch_device))


def test_padded_decode(device):
    each(decode(device), lambda case: serving_cases.run_padded(case, device.torch_device))


def test_splits_change_nothing(device):
    each(decode(device), lambda case: serving_cases.run_split_and_whole(case, device.torch_device))


def test_ranks_of_a_prefill(device):
    pairs = st.tuples(prefill(device), st.integers(2, 4))
    each(pairs, lambda pair: serving_cases.run_ranks(*pair, device.torch_device), RANKED)


def test_ranks_of_a_decode(device):
    pairs = st.tuples(decode(device), st.integers(2, 4))
    each(pairs, lambda pair: serving_cases.run_ranks(*pair, device.torch_device), RANKED)


@pytest.mark.parametrize("page_size", sorted(set(serving_cases.PAGE_SIZES)))
@pytest.mark.parametrize("kv_dtype", [None, E4M3])
@pytest.mark.parametrize("rows", [1, 40])
def test_every_page_size(rows, kv_dtype, page_size, device):
    case = Case(
        [rows, 1, rows], [130, 0, 61], page_size=page_size, kv_dtype=kv_dtype, head_dims=(128, 128), shared=True
    )
    serving_cases.run(case, device.torch_device)


LONG = {"head_dims": (128, 128), "heads_kv": 1, "ratio": 2, "shared": True}


@pytest.mark.parametrize(
    "case",
    [
        Case([70, 1, 290], [330, 0, 201], kv_dtype=E5M2, dtype=torch.float16, scales="number", page_size=8, **LONG),
        Case([70, 260], [129, 300], kv_dtype=E4M3, mask="local", window=(90, 5), page_size=48, packed=False, **LONG),
        Case([290], [321], kv_dtype=E4M3, mask="full", layout="halves, heads first", spare=3, **LONG),
    ],
)
def test_pages_of_bytes_over_many_blocks(case, device):
    """The mbarriers of the loading warps and what is converted in place, over and over."""
    serving_cases.run(case, device.torch_device)


@pytest.mark.parametrize("kv_dtype", [E4M3, E5M2])
def test_every_finite_value_of_v(kv_dtype, device):
    """bfloat16 P is rounded to f16 where V is 8-bit: subnormal values count, the largest don't overflow."""
    on = device.torch_device
    q, k = rand(on, 2, 40, 2, 128), rand(on, 12, 16, 1, 128).to(kv_dtype)
    v = torch.arange(k.numel(), device=on).mul(37).to(torch.uint8).view(kv_dtype)  # each byte in each column
    v = v.float().nan_to_num(0.0, 0.0, 0.0).to(kv_dtype).view(k.shape)
    v[:6] = v[:6].float().mul(2.0**-12).to(kv_dtype)
    table, used = torch.randperm(12).view(2, 6).int().to(on), ints(on, 90, 51)
    assert_right(q, k, v, page_table=table, seqused_k=used, causal=True)


@pytest.mark.parametrize("layout", serving_cases.LAYOUTS)
@pytest.mark.parametrize("rows", [2, 40])
def test_every_pool(rows, layout, device):
    case = Case([rows, rows - 1], [90, 47], layout=layout, mask="local", window=(20, 3), packed=False, spare=2)
    serving_cases.run(case, device.torch_device)


@pytest.mark.parametrize("kv_dtype", [None, E4M3])
@pytest.mark.parametrize("rows", [1, 20])
def test_keys_far_outside_a_window_are_not_read(rows, kv_dtype, device):
    case = Case([rows, 1], [700, 900], mask="local", window=(30, 0), heads_kv=1, kv_dtype=kv_dtype)
    serving_cases.run_far_window(case, device.torch_device, 256)


@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize("chunk", [16, 48, 1000])
def test_chunks_end_where_pages_do_and_do_not(rows, chunk, device):
    serving_cases.run(Case([rows, rows], [96, 131], chunk=chunk, mask="full"), device.torch_device)
    serving_cases.run(Case([rows, rows], [96, 131], chunk=chunk, mask="causal"), device.torch_device)


@pytest.mark.parametrize("seqlen_q", [1, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_that_see_nothing_have_the_sink(dtype, seqlen_q, device):
    on = device.torch_device
    q, k, sink = rand(on, 2, seqlen_q, 4, 64), rand(on, 2, 9, 2, 64), rand(on, 4, dtype=dtype)
    out, lse = assert_right(q, k, k, seqused_k=ints(on, 0, 9), learnable_sink=sink)
    assert (out[0] == 0).all()
    torch.testing.assert_close(lse[0], sink.float()[:, None].expand(4, seqlen_q), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_dtype", [BF16, E4M3])
def test_a_pool_that_no_tensor_map_holds(kv_dtype, device):
    """One page repeated: stride 0 keeps TMA away."""
    on = device.torch_device
    q, page = rand(on, 2, 40, 4, 128), rand(on, 1, 16, 2, 128).to(kv_dtype)
    pool, table = page.expand(9, -1, -1, -1), torch.randint(0, 9, (2, 6), dtype=torch.int32, device=on)
    out = flash_attn_func(q, pool, pool, page_table=table, seqused_k=ints(on, 90, 51), causal=True)
    same = flash_attn_func(
        q, pool.contiguous(), pool.contiguous(), page_table=table, seqused_k=ints(on, 90, 51), causal=True
    )
    rows = page.to(BF16)[:, torch.arange(90, device=on) % 16].expand(2, -1, -1, -1)
    exact = assert_right(q, rows, rows, seqused_k=ints(on, 90, 51), causal=True)[0]
    assert largest_difference(out, exact) < 0.01 and largest_difference(same, exact) < 0.01


@pytest.mark.parametrize("seqlen_q", [3, 40])
def test_neighbours_of_huge_rows_keep_their_bits(seqlen_q, device):
    """8-bit keys are multiplied in f16, which bfloat16 rows don't fit without being divided."""
    on = device.torch_device
    exponents = torch.randint(-40, 21, (2, seqlen_q, 4, 1), device=on)
    q = (rand(on, 2, seqlen_q, 4, 64, dtype=torch.float32) * exponents.float().exp2()).to(BF16)
    k, v = (rand(on, 2, 50, 2, 64, dtype=torch.float32).to(E4M3) for _ in range(2))
    assert_right(q, k, v, causal=True)


def test_rows_of_any_size_beside_each_other(device):
    """Over 8-bit pages; what isn't finite stays in its row."""
    on = device.torch_device
    exponents = torch.randint(-60, 21, (2, 70, 2, 1), device=on)
    q = (rand(on, 2, 70, 2, 128, dtype=torch.float32) * exponents.float().exp2()).to(BF16)
    q[0, 3], q[0, 4] = 0, 1e-38
    pool = [rand(on, 12, 16, 1, 128).to(E4M3) for _ in range(2)]
    table = torch.randperm(12).view(2, 6).int().to(on)
    options = {"page_table": table, "seqused_k": ints(on, 90, 51)}
    out, _ = assert_right(q, *pool, **options)
    q[0, 20] = q[0, 20].sign() * 2.0**80  # beyond f16 even when divided
    strange = ((0, 11, 0, math.inf), (0, 13, 1, math.nan), (1, 33, 0, -math.inf))
    for batch, row, head, value in strange:
        q[batch, row, head, 9] = value
    other = flash_attn_func(q, *pool, **options)
    for batch, row, head, _ in (*strange, (0, 20, slice(None), None)):
        assert other[batch, row, head].isnan().all()
        other[batch, row, head] = out[batch, row, head]
    assert torch.equal(out, other)


@pytest.mark.parametrize("num_splits", [1, 2, 31, 128])
@pytest.mark.parametrize("packed", [False, True])
def test_combine(packed, num_splits, device):
    on, shape = device.torch_device, (2, 5, 3, 72)
    parts, lse_parts = torch.randn(num_splits, *shape, device=on), torch.randn(num_splits, *shape[:-1], device=on) * 3
    empty = torch.rand(lse_parts.shape, device=on) < 0.3
    parts[empty], lse_parts[empty] = math.nan, -math.inf
    lse_parts[:, 0, 2] = -math.inf
    where = None
    if packed:
        parts, lse_parts, where = parts.flatten(1, 2), lse_parts.flatten(1, 2), ints(on, 0, 3, 8)
    exact, exact_lse = reference.combine(parts, lse_parts)
    for dtype in (torch.float32, BF16, torch.float16):
        out = torch.full(exact.shape, math.nan, dtype=dtype, device=on)
        result, lse = flash_attn_combine(parts, lse_parts, out=out, cu_seqlens=where)
        rows = slice(8) if packed else slice(None)
        assert result is out and (not packed or out[8:].isnan().all())
        eps = max(torch.finfo(dtype).eps, 4 * torch.finfo(torch.float32).eps)
        torch.testing.assert_close(out[rows].float(), exact[rows], rtol=eps, atol=1e-5)
        torch.testing.assert_close(lse[rows], exact_lse[rows], rtol=1e-5, atol=1e-5)
    alone, none = flash_attn_combine(parts, lse_parts, return_lse=False)
    assert none is None and torch.equal(alone[rows], flash_attn_combine(parts, lse_parts, cu_seqlens=where)[0][rows])


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("sink", [None, BF16, torch.float32])
@pytest.mark.parametrize("packed", [False, True])
def test_combine_with_a_sink_and_used_rows(packed, sink, used, device):
    on, lengths = device.torch_device, [4] * 40 if packed else [4] * 3  # more sequences than lanes
    parts, lse_parts = torch.randn(5, len(lengths), 4, 3, 40, device=on), torch.randn(5, len(lengths), 4, 3, device=on)
    empty = torch.rand(lse_parts.shape, device=on) < 0.4
    parts[empty], lse_parts[empty] = math.nan, -math.inf
    lse_parts[:, 1, 0] = -math.inf
    options = {"learnable_sink": None if sink is None else rand(on, 3, dtype=sink)}
    if used:
        options["seqused"] = torch.randint(0, 5, (len(lengths),), dtype=torch.int32, device=on)
        options["seqused"][1] = 1
    if packed:
        parts, lse_parts, options["cu_seqlens"] = parts.flatten(1, 2), lse_parts.flatten(1, 2), marks(on, *lengths)
    exact, exact_lse = reference.combine(parts, lse_parts, **options)
    out, lse = flash_attn_combine(parts, lse_parts, out=torch.full_like(exact, math.nan), **options)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-5)
    row = (4,) if packed else (1, 0)
    assert (out[row] == 0).all()
    expected = torch.full((3,), -math.inf, device=on) if sink is None else options["learnable_sink"].float()
    torch.testing.assert_close(lse[row], expected, rtol=1e-5, atol=1e-5)


def test_wild_lengths_and_pages_touch_nothing_outside(device):
    """Lengths beyond the table and page numbers beyond the pool are clamped: the simulator and memcheck watch."""
    on = device.torch_device
    q, k = rand(on, 2, 3, 4, 64), rand(on, 4, 16, 2, 64)
    table = torch.tensor([[0, 99, -7], [2**31 - 1, 1, -(2**31)]], dtype=torch.int32, device=on)
    for seqlen_q in (3, 20):
        q = rand(on, 2, seqlen_q, 4, 64)
        for used in ((48, 30), (1000, -5), (2**31 - 1, 2**31 - 1)):
            out = flash_attn_func(q, k, k, page_table=table, seqused_k=ints(on, *used), causal=True)
            assert out.isfinite().all()


GRAPHS = {
    "one split": Case([1] * 4, [900, 7, 300, 64], num_splits=1),
    "splits": Case([1] * 4, [900, 7, 300, 64], num_splits=8, sink=BF16),
    "chosen": Case([2] * 3, [900, 0, 300], num_splits=0, mask="local", window=(100, 0), slopes="heads"),
    "float8": Case([1] * 4, [900, 7, 300, 64], num_splits=0, kv_dtype=E4M3, scales="each", head_dims=(128, 128)),
    "prefill": Case([40] * 3, [900, 41, 300]),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_follows_lengths_tables_and_keys(name, gpu):
    """1,000 replays, everything but the shapes changed in place before each."""
    case = GRAPHS[name]
    q, k, v, lengths, options = serving_cases.steady(case, gpu)
    table, used = lengths["page_table"], lengths["seqused_k"]
    capacity = table.shape[1] * case.page_size
    serving_cases.call(q, k, v, lengths, options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = serving_cases.call(q, k, v, lengths, options)
    k.copy_(torch.randn(k.shape, device=gpu))
    v.copy_(torch.randn(v.shape, device=gpu))
    formula = {name: value for name, value in options.items() if name not in SPEED}
    for turn in range(1000):
        q.copy_(torch.randn(q.shape, device=gpu))
        table.copy_(torch.randint(0, len(k), table.shape, device=gpu))
        used.copy_(torch.randint(0, capacity + 1, used.shape, device=gpu))
        out.fill_(math.nan)
        lse.fill_(math.nan)
        graph.replay()
        exact, exact_lse = reference.attention(q, k, v, **lengths, **formula)
        rounded, rounded_lse = reference.attention(q, k, v, **lengths, **formula, dtype=None)
        limit = 2 * largest_difference(rounded, exact) + torch.finfo(case.dtype).eps * serving_cases.top(exact) + SLACK
        assert largest_difference(out, exact) <= limit, turn
        limit = 2 * largest_difference(rounded_lse, exact_lse) + LSE_SLACK
        assert largest_difference(lse, exact_lse) <= limit, turn


@pytest.mark.gpu
def test_a_decode_call_waits_for_nothing(gpu):
    case = GRAPHS["splits"]
    q, k, v, lengths, options = serving_cases.steady(case, gpu)
    serving_cases.call(q, k, v, lengths, options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        serving_cases.call(q, k, v, lengths, options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_splits_on_two_streams_at_a_time(gpu):
    case = Case([1] * 4, [900, 700, 300, 64], num_splits=8)
    q, k, v, lengths, options = serving_cases.steady(case, gpu)
    expected, _ = serving_cases.call(q, k, v, lengths, options)
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in range(2)], []
    for _ in range(200):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(serving_cases.call(q, k, v, lengths, options)[0])
    torch.cuda.synchronize()
    for out in found:
        assert torch.equal(out, expected)
