"""The decode kernel against float64, row by row: on a GPU if there is one, else in the simulator."""

import functools

import pytest
import torch
from decode_cases import Case, check, make

from flash_attn_sm120 import flash_attn_func, modifiers, workspace
from flash_attn_sm120.compile import build
from flash_attn_sm120.dispatch import choose
from flash_attn_sm120.loader import load

pytest.importorskip("cutlass")
PAGED = {"page_size": 16, "mask": "causal"}
CASES = {
    "dense": Case([1], [100]),
    "dense, no lengths": Case([1, 1], [77, 77], seqused_k=False),
    "float16": Case([2], [70], dtype="float16"),
    "pages, one of them shared": Case([1, 1, 1], [100, 0, 33], page_size=16, shared_pages=True),
    "pages of 48, heads first": Case([1, 1], [100, 130], page_size=48, heads_first=True),
    "pages of 8": Case([1, 1], [100, 53], page_size=8, mask="causal"),
    "pages of 24": Case([1, 1], [100, 53], page_size=24),
    "tokens before the first key": Case([5, 5], [100, 3], **PAGED),
    "window": Case([3, 3], [200, 40], group=8, page_size=16, mask="local", window=(40, 0)),
    "window to the right": Case([3, 3], [90, 2], mask="local", window=(1, 2)),
    "packed": Case([3, 0, 7, 1], [60, 30, 5, 100], mask="causal", packed_q=True, packed_k=True, seqused_k=False),
    "packed, used": Case([3, 0, 5], [60, 30, 90], mask="causal", seqused_q=True, packed_q=True, packed_k=True),
    "padded, used": Case([3, 0, 5], [60, 30, 90], mask="causal", seqused_q=True),
    "softcap": Case([2], [70], softcap=2.0, mask="causal"),
    "sink": Case([3, 3], [70, 1], sink="bfloat16", mask="causal"),
    "alibi": Case([3, 3], [70, 20], alibi=True, mask="causal"),
    "alibi and softcap": Case([3, 3], [70, 20], alibi=True, softcap=3.0, mask="local", window=(30, 2)),
    "chunks": Case([5, 5], [130, 67], chunk=32, **PAGED),
    "chunks, not causal": Case([5, 5], [70, 3], chunk=16),
    "descale": Case([1], [50], descale=True),
    "head_dim 64": Case([2, 2], [150, 33], head_dim=64, **PAGED),
    "head_dim 80, pages of 8": Case([2, 2], [150, 33], head_dim=80, page_size=8, mask="causal"),
    "head_dim 96": Case([2, 2], [150, 33], head_dim=96, **PAGED),
    "head_dim 40, 72": Case([2, 2], [150, 33], head_dim=40, head_dim_v=72, mask="causal"),
    "head_dim 192, 128": Case([2, 2], [150, 33], head_dim=192, head_dim_v=128, mask="causal"),
    "head_dim 256": Case([2, 2], [150, 33], head_dim=256, **PAGED),
    "one head": Case([1], [90], group=1, heads_kv=3, page_size=16),
    "a group of 3": Case([7, 7], [90, 20], group=3, **PAGED),
    "e4m3": Case([1, 1], [150, 33], kv_dtype="float8_e4m3fn", page_size=16, descale=True),
    "e5m2, float16": Case([2, 2], [150, 33], kv_dtype="float8_e5m2", dtype="float16", page_size=24, mask="causal"),
    "e4m3, head_dim 64": Case([2, 2], [150, 33], kv_dtype="float8_e4m3fn", head_dim=64, **PAGED),
    "e4m3, head_dim 80": Case([2, 2], [150, 33], kv_dtype="float8_e4m3fn", head_dim=80, mask="causal"),
    "e5m2, head_dim 192, 128": Case([2], [90], kv_dtype="float8_e5m2", head_dim=192, head_dim_v=128),
    "e4m3, rows of all sizes": Case([5, 5], [150, 33], group=8, row_sizes=True, kv_dtype="float8_e4m3fn", **PAGED),
    "e4m3, head_dim 256": Case([2, 2], [90, 33], kv_dtype="float8_e4m3fn", head_dim=256, mask="causal"),
}
SPLIT = {
    "33 sequences": Case([1] * 33, [3] * 32 + [600], heads_kv=1, group=1, head_dim=64, page_size=16),
    "e4m3, rows of all sizes": Case([5], [600], group=8, row_sizes=True, kv_dtype="float8_e4m3fn", **PAGED),
    "uneven": Case([1, 1, 1], [900, 0, 33], page_size=16),
    "packed": Case([3, 0, 7, 1], [160, 30, 5, 700], mask="causal", packed_q=True),
    "two tiles of rows": Case([16], [500], group=4, heads_kv=1, **PAGED),
    "sink, used": Case([3, 2, 2], [570, 1, 0], sink="float32", mask="causal", seqused_q=True),
    "window": Case([2, 2], [900, 300], page_size=16, mask="local", window=(300, 0)),
    "e4m3": Case([1, 1], [700, 33], kv_dtype="float8_e4m3fn", page_size=16),
    "head_dim 192": Case([1, 1], [400, 33], head_dim=192),
    "head_dim 256, no lse": Case([1, 1], [400, 33], head_dim=256, lse=False, **PAGED),
}


@functools.lru_cache(maxsize=64)
def kept(problem):
    return build(problem, choose(problem), "sm_120a", keep=True)


def run(case: Case, device) -> tuple:
    """Launches the case; in the simulator every row of out must be written, by one block or in order."""
    inputs = make(case, device.torch_device)
    if device.torch_device.type == "cuda":
        load(case.problem, "sm_{}{}a".format(*torch.cuda.get_device_capability()))(*inputs.call)
        return inputs
    from flash_attn_sm120.simulator import launch

    out = inputs.arguments.out
    if case.packed_q:
        out = out[: int(inputs.arguments.lengths.cu_seqlens_q[-1])]
    names = [*inputs.arguments._fields, "partials"]
    launch(kept(case.problem), inputs.call, names=names, outputs={"out": out})
    return inputs


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_whole(case, device):
    check(case, run(case, device))


@pytest.mark.parametrize("num_splits", [2, 3, 8])
@pytest.mark.parametrize("case", SPLIT.values(), ids=SPLIT)
def test_split(case, num_splits, device):
    case.num_splits = num_splits
    inputs = run(case, device)
    check(case, inputs)
    used = (~inputs.partials.lse.isnan()).flatten(1).any(1).sum().item()
    assert used > 1, "nothing was split"


def test_more_parts_than_lanes(device):
    case = Case([1], [2400], heads_kv=1, group=2, head_dim=192, num_splits=40)
    inputs = run(case, device)
    check(case, inputs)
    used = (~inputs.partials.lse.isnan()).flatten(1).any(1).sum().item()
    assert used > 32


@pytest.mark.parametrize("num_splits", [1, 3])
def test_room_behind_the_only_sequence(num_splits, device):
    """More blocks than it has tiles of rows; make leaves rows that no sequence names."""
    case = Case([1], [500], group=16, packed_q=True, mask="causal", num_splits=num_splits)
    check(case, run(case, device))


def test_split_agrees_with_whole(device):
    torch.manual_seed(5)
    whole = run(Case([2], [600], **PAGED), device)
    torch.manual_seed(5)
    parts = run(Case([2], [600], num_splits=4, **PAGED), device)
    a, b = whole.arguments, parts.arguments
    assert torch.equal(a.k.nan_to_num(), b.k.nan_to_num())
    assert (a.lse - b.lse).abs().max() < 1e-5
    assert (a.out.float() - b.out.float()).abs().max() <= torch.finfo(torch.bfloat16).eps * a.out.abs().max()


@pytest.mark.parametrize("mask, window", [("causal", (0, 0)), ("local", (50, 0))])
@pytest.mark.parametrize("rank", [0, 2])
def test_context_parallel(rank, mask, window, device):
    case = Case([4, 4], [130, 67], world=3, rank=rank, mask=mask, window=window, page_size=16, alibi=True)
    check(case, run(case, device))


def test_ranks_together_are_the_whole(device):
    """Each rank's out and lse, weighted by exp(lse), give what one GPU with all keys gives."""
    world, whole = 2, None
    torch.manual_seed(11)
    case = Case([2], [90], mask="causal", seqused_k=False)
    whole = run(case, device)
    outs, lses = [], []
    for rank in range(world):
        part = make(Case([2], [90], mask="causal", world=world, rank=rank), device.torch_device)
        rows = slice(rank, 90, world)
        keys, values = whole.arguments.k[:, rows], whole.arguments.v[:, rows]
        part.arguments.q.copy_(whole.arguments.q)
        part.arguments.k[:, : keys.shape[1]], part.arguments.v[:, : keys.shape[1]] = keys, values
        launch_made(Case([2], [90], mask="causal", world=world, rank=rank), part, device)
        outs.append(part.arguments.out.float())
        lses.append(part.arguments.lse)
    lse = torch.logsumexp(torch.stack(lses), 0)
    weights = [torch.exp(x - lse).transpose(1, 2)[..., None] for x in lses]
    out = sum(w * o for w, o in zip(weights, outs, strict=True))
    assert (lse - whole.arguments.lse).abs().max() < 1e-4
    assert (out - whole.arguments.out.float()).abs().max() < 0.02


def launch_made(case: Case, inputs, device) -> None:
    if device.torch_device.type == "cuda":
        load(case.problem, "sm_{}{}a".format(*torch.cuda.get_device_capability()))(*inputs.call)
        return
    from flash_attn_sm120.simulator import launch

    names = [*inputs.arguments._fields, "partials"]
    launch(kept(case.problem), inputs.call, names=names, outputs={"out": inputs.arguments.out})


def test_pages_outside_the_pool_are_clamped(device):
    """A wild entry within the length touches nothing outside the pool; in the simulator that would raise."""
    case = Case([1], [64], page_size=16)
    inputs = make(case, device.torch_device)
    inputs.arguments.lengths.page_table[0, 1:3] = torch.tensor([1 << 30, -(1 << 30)], dtype=torch.int32)
    launch_made(case, inputs, device)


def test_a_length_beyond_the_table_is_clamped(device):
    case = Case([1], [61], page_size=16)
    inputs = make(case, device.torch_device)
    table = inputs.arguments.lengths.page_table
    rows = table.shape[1] * 16
    table.clamp_(0)
    inputs.arguments.k.nan_to_num_()
    inputs.arguments.v.nan_to_num_()
    inputs.arguments.lengths.seqused_k.fill_(rows)
    launch_made(case, inputs, device)
    expected = inputs.arguments.out.clone()
    inputs.arguments.lengths.seqused_k.fill_(1 << 30)
    launch_made(case, inputs, device)
    assert torch.equal(inputs.arguments.out, expected)


def test_a_graph_follows_the_lengths(gpu):
    """Captured once, replayed with other lengths and tables in place; tickets come back to 0 each time."""

    class On:
        torch_device = gpu

    base = Case([1] * 4, [3000, 3000, 3000, 3000], page_size=16, num_splits=16)
    inputs = make(base, gpu)
    launch_made(base, inputs, On)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_made(base, inputs, On)
    for turn in range(200):
        torch.manual_seed(turn)
        lengths = torch.randint(0, 3001, (4,)).tolist()
        fresh = make(Case([1] * 4, lengths, page_size=16, num_splits=16), gpu)
        rows = fresh.arguments.k.shape[0]
        inputs.arguments.q.copy_(fresh.arguments.q)
        inputs.arguments.k[:rows].copy_(fresh.arguments.k)
        inputs.arguments.v[:rows].copy_(fresh.arguments.v)
        width = fresh.arguments.lengths.page_table.shape[1]
        inputs.arguments.lengths.page_table[:, :width].copy_(fresh.arguments.lengths.page_table)
        inputs.arguments.lengths.seqused_k.copy_(fresh.arguments.lengths.seqused_k)
        inputs.arguments.out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        inputs.q, inputs.k, inputs.v, inputs.total_k = fresh.q, fresh.k, fresh.v, fresh.total_k
        check(base, inputs)


def test_what_is_kept_is_not_in_a_pool_of_a_graph(gpu):
    """While PyTorch warms a CUDA graph up, allocations go to the graph's pool, whose memory it hands out again."""
    q = torch.randn(1, 1, 8, 64, device=gpu, dtype=torch.bfloat16)
    k = torch.randn(1, 4096, 8, 64, device=gpu, dtype=torch.bfloat16)
    workspace._tickets.clear()
    modifiers._constants.clear()
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        flash_attn_func(q, k, k, num_splits=4, v_descale=0.5)
    torch.cuda.synchronize()
    kept = [*workspace._tickets.values(), *modifiers._constants.values()]
    assert len(kept) == 2
    own = [part for part in torch.cuda.memory_snapshot() if tuple(part["segment_pool_id"]) == tuple(pool.id)]
    assert own, "the call allocated nothing in the pool, so this shows nothing"
    for tensor in kept:
        place = tensor.data_ptr()
        assert not any(part["address"] <= place < part["address"] + part["total_size"] for part in own)
