"""Thread blocks that take one tile after another, on few multiprocessors so that they do."""

import pytest
import torch
from oracle import assert_right, rand

from flash_attn_sm120 import calls, flash_attn_func, launchers, mods, workspace

CASES = [  # head_dim, seqlen_q, seqlen_k, multiprocessors, options; more tiles than thread blocks
    (64, 700, 100, 1, {"causal": True}),  # most tiles see no key
    (96, 300, 70, 1, {}),
    (128, 600, 130, 2, {"causal": True}),
    (256, 260, 200, 1, {"window_size": (90, 5)}),
]


@pytest.fixture
def tickets(monkeypatch):
    """Every int32 that a launch was given to count in."""
    given, make = [], workspace.tickets

    def taken(*arguments):
        given.append(make(*arguments))
        return given[-1]

    monkeypatch.setattr("flash_attn_sm120.interface.tickets", taken)
    return given


@pytest.fixture
def multiprocessors(monkeypatch):
    def pretend(count):
        monkeypatch.setattr(launchers, "sm_count", lambda _: count)
        calls.forget()

    yield pretend
    calls.forget()


@pytest.mark.parametrize("head_dim, seqlen_q, seqlen_k, count, options", CASES, ids=lambda x: str(x))
def test_every_tile_is_computed_once(device, head_dim, seqlen_q, seqlen_k, count, options, multiprocessors, tickets):
    multiprocessors(count)
    on, rows = device.torch_device, device.pick((7 * seqlen_q, 5 * seqlen_k), (seqlen_q, seqlen_k))
    heads = device.pick(6, 2)
    q, k, v = rand(on, 1, rows[0], heads, head_dim), *(rand(on, 1, rows[1], heads // 2, head_dim) for _ in range(2))
    for _ in range(device.pick(3, 1)):
        assert_right(q, k, v, **options)
    assert tickets and not any(ticket[0] for ticket in tickets), "a ticket is left"


def test_a_mod_reads_its_own_tile(device, multiprocessors):
    multiprocessors(1)
    on, rows = device.torch_device, device.pick(900, 200)
    q, k, v = (rand(on, 2, rows, 1, 64) for _ in range(3))
    ids = (torch.arange(rows, device=on, dtype=torch.int32) // 50).expand(2, -1).contiguous()
    ids[1] //= 2
    assert_right(q, k, v, causal=True, mask_mod=mods.document(), aux_tensors=[ids])


def test_launches_on_two_streams_have_tickets_of_their_own(gpu):
    q = rand(gpu, 4, 2000, 8, 64)
    expected = flash_attn_func(q, q, q, causal=True)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for _ in range(100):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(flash_attn_func(q, q, q, causal=True))
        torch.cuda.synchronize()
        assert all(torch.equal(out, expected) for out in found)
        found.clear()


def test_graphs_that_run_at_once_have_tickets_of_their_own(gpu):
    q = rand(gpu, 4, 2000, 8, 64)
    expected = flash_attn_func(q, q, q, causal=True)
    graphs, outs = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph in graphs:
        with torch.cuda.graph(graph):
            outs.append([flash_attn_func(q, q, q, causal=True) for _ in range(3)])
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(50):
        for out in (out for each in outs for out in each):
            out.zero_()
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(out, expected) for each in outs for out in each)
