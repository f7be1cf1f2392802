"""Attention over several ranks: the arithmetic of zigzag here, the rest in four processes on gloo."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flash_attn_sm120.distributed import agreement, shard, shard_varlen, unshard, unshard_varlen
from flash_attn_sm120.distributed.checks import MOST_PIECES, PIECE_BYTES, check_pieces
from flash_attn_sm120.distributed.layout import Zigzag
from flash_attn_sm120.distributed.merge import Total
from flash_attn_sm120.distributed.ranks import Ranks, ranks_of
from flash_attn_sm120.distributed.shards import positions, rows_of_ranks

HERE = Path(__file__).parent
WORLD = 4
SECONDS = 300


def test_four_ranks(tmp_path):
    """Every case of distributed_ranks.py, on every rank; the last rank ends in the last case, on purpose."""
    processes = [start(rank, tmp_path) for rank in range(WORLD)]
    try:
        texts = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = {file.name: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    failed = [text for one in found.values() for text in one["failed"].values()]
    assert not failed, "\n".join(failed)
    assert sorted(found) == [f"{rank}.json" for rank in range(WORLD - 1)], "\n".join(texts)
    assert [process.returncode for process in processes] == [0] * (WORLD - 1) + [3]
    assert all(len(one["ran"]) >= 6 for one in found.values())


def start(rank, folder):
    command = [sys.executable, HERE / "distributed_ranks.py", str(rank), str(WORLD), folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(HERE.parent)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("seqlens", [(64,), (5, 0, 130, 1), (3, 47), (), (1000,)])
def test_every_token_is_on_one_rank(seqlens, world):
    layout = Zigzag(seqlens, world)
    places = [positions(layout, rank) for rank in range(world)]
    assert torch.equal(torch.cat(places).sort().values, torch.arange(sum(seqlens)))
    assert [len(own) for own in places] == [layout.tokens(rank) for rank in range(world)]
    sizes = [len(chunk) for rank in range(world) for pair in Zigzag((97,), world).chunks(rank) for chunk in pair]
    assert max(sizes) - min(sizes) <= 1
    for rank, own in enumerate(places):
        pairs = layout.chunks(rank)
        assert len(own) == sum(len(chunk) for pair in pairs for chunk in pair)
        assert all(early.stop <= late.start for early, late in pairs)
    room = torch.full((world, max(layout.most_tokens, 1)), -1)
    for rank, own in enumerate(places):
        room[rank, : len(own)] = own
    ordered = room.flatten()[rows_of_ranks(layout, torch.device("cpu"))]
    assert torch.equal(ordered, torch.arange(sum(seqlens)))


def test_a_causal_ranks_work_is_its_share():
    """To within the pairs of a token of each chunk."""
    for world, seqlen in ((2, 1024), (4, 1003)):
        work = [sum(sum(chunk) for chunk in Zigzag((seqlen,), world).chunks(rank)[0]) for rank in range(world)]
        assert max(work) - min(work) <= 2 * seqlen


def test_unshard_is_the_way_back():
    seqlens = (5, 0, 130, 1)
    for world in (1, 3, 4):
        x, lse = torch.randn(136, 2, 3), torch.randn(2, 140)  # with columns that no sequence has
        parts = [shard_varlen(x, seqlens, rank, world) for rank in range(world)]
        assert torch.equal(unshard_varlen(parts, seqlens), x)
        parts = [shard_varlen(lse, seqlens, rank, world, 1) for rank in range(world)]
        assert torch.equal(unshard_varlen(parts, seqlens, 1), lse[:, :136])
        x = torch.randn(2, 51, 3)
        assert torch.equal(unshard([shard(x, rank, world) for rank in range(world)]), x)
        assert torch.equal(unshard([shard(x.mT, rank, world, 2) for rank in range(world)], 2), x.mT)
    x = torch.arange(16)[None]
    assert shard(x, 1, 4).tolist() == [[2, 3, 12, 13]] and shard(x, 0, 4).tolist() == [[0, 1, 14, 15]]


X = torch.zeros(2, 8, 3)


@pytest.mark.parametrize(
    "call, kind, text",
    [
        (lambda: shard([1], 0, 2), TypeError, "x: expected a torch.Tensor"),
        (lambda: shard(X, 2, 2), ValueError, "rank: expected from 0 to world_size - 1 = 1, got 2"),
        (lambda: shard(X, 0, 0), ValueError, "world_size: expected an int >= 1"),
        (lambda: shard(X, True, 2), TypeError, "rank: expected an int, got bool"),
        (lambda: shard(X, 0, 2, 3), ValueError, "dim: expected less than 3"),
        (lambda: shard_varlen(X, [3], 0, 2), ValueError, "seqlens: expected a sum of at most 2"),
        (lambda: shard_varlen(X, [-3], 0, 2), ValueError, r"seqlens\[0\]: expected an int >= 0"),
        (lambda: shard_varlen(X, [1.5], 0, 2), TypeError, r"seqlens\[0\]: expected an int"),
        (lambda: unshard(X), TypeError, "parts: expected a list"),
        (lambda: unshard([]), TypeError, "parts: expected a list"),
        (lambda: unshard([X, X[:, :6]]), ValueError, r"parts\[0\]: expected 7 tokens"),
        (lambda: unshard([X, X.half()]), TypeError, r"parts\[1\]: expected float32 as parts\[0\]"),
        (lambda: unshard([X, X[:1]]), ValueError, r"parts\[1\]: expected a shape that differs"),
        (lambda: unshard_varlen([X, X], [7]), ValueError, r"parts\[0\]: expected 3 tokens"),
        (lambda: ranks_of(None), ValueError, "group: expected torch.distributed.init_process_group"),
    ],
)
def test_wrong_shards_are_refused(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


def test_a_group_sends_what_it_has_a_backend_for():
    nccl, gloo = Ranks(None, 0, 2, {"cuda": "nccl"}), Ranks(None, 0, 2, {"cpu": "gloo", "cuda": "gloo"})
    both = Ranks(None, 0, 2, {"cpu": "gloo", "cuda": "nccl"})
    for ranks, device, good in (
        (nccl, "cuda", True), (nccl, "cpu", False), (gloo, "cpu", True), (gloo, "cuda", False), (both, "cuda", True),
        (both, "cpu", True), (both, "meta", False),
    ):  # fmt: skip
        if good:
            ranks.check_device(torch.device(device))
            continue
        with pytest.raises(ValueError, match=f"group: expected a backend that sends {device} tensors"):
            ranks.check_device(torch.device(device))
    assert both.talk_device(X) == gloo.talk_device(7) == torch.device("cpu")
    assert Ranks(None, 0, 2, {"meta": "other"}).talk_device(X.to("meta")) == torch.device("meta")


def test_ranks_on_different_devices_are_told():
    answers = [{"call": "zigzag_attention", "device": kind} for kind in ("cuda", "cuda", "cpu")]
    with pytest.raises(ValueError, match="device: expected cuda on every rank as on rank 0, got cpu on rank 2"):
        agreement.compare(answers)


def test_an_error_fits_its_message():
    kind, text = agreement.failure(KeyError("\u2603" * 5000))
    assert kind == "RuntimeError" and len(json.dumps({"error": [kind, text]}).encode()) <= agreement.MESSAGE_BYTES


def test_pieces():
    assert check_pieces(None, 8, 0) == 1 and check_pieces(None, 8, PIECE_BYTES) == 8 == MOST_PIECES
    assert check_pieces(None, 6, PIECE_BYTES // 2) == 3 and check_pieces(None, 7, PIECE_BYTES // 2) == 1
    assert check_pieces(6, 12, 1) == 6


def test_the_benchmark_counts_what_runs_under_attention():
    under = runpy.run_path(str(HERE.parent / "benchmarks" / "distributed.py"))["under"]
    ours = "kernel_cutlass_kernel_flash_attn_sm120kernelsdual_group"
    spans = [("ncclDevKernel_SendRecv", 0, 10), (ours, 5, 4), (ours, 6, 2), ("ncclAllGather", 20, 10), (ours, 15, 30)]
    spans += [("elementwise", 2, 4), ("elementwise", 60, 100)]
    found = under([{"name": name, "ts": start, "dur": length} for name, start, length in spans])
    assert found["share_under_attention"] == 14 / 20 and found["nccl_kernels"] == 2
    assert found["share_under_others"] == 17 / 20
    assert found["attention_ms"] == 0.034 and found["first_to_last_ms"] == 0.045


def test_merge_is_attention_over_both_parts():
    rows, heads, dim = 5000, 2, 8
    outs, lses = torch.randn(3, rows, heads, dim), torch.randn(3, heads, rows) * 4
    lses[torch.rand(lses.shape) < 0.4] = -math.inf
    lses[:, 0, :9] = -math.inf  # rows that see nothing at all
    outs[(lses == -math.inf).mT] = 0.0
    sink = torch.randn(heads).bfloat16()
    weights = torch.softmax(torch.cat((lses, sink.float()[None, :, None].expand(1, -1, rows))).double(), 0)
    expected = (weights[:3].mT[..., None] * outs.double()).sum(0)
    expected_lse = torch.logsumexp(torch.cat((lses, sink.float()[None, :, None].expand(1, -1, rows))), 0)
    total = Total(outs[0])
    total.out.fill_(math.nan)
    for i in range(3):
        total.add(outs[i, :100], lses[i, :, :100], anew=i == 0)
        total.add(outs[i, 100:], lses[i, :, 100:], 100, anew=i == 0)
    assert (total.lse[0, :9] == -math.inf).all() and (total.out[:9, 0] == 0.0).all()
    out, lse = torch.empty(rows, heads, dim), torch.empty(heads, rows)
    total.write(out, lse, sink)
    assert (out - expected).abs().max() < 1e-5 and (lse - expected_lse).abs().max() < 1e-5
