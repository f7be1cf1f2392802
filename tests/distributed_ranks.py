"""One of several processes on gloo, with CPU tensors that the reference or the simulator computes.

    python tests/distributed_ranks.py RANK WORLD_SIZE FOLDER

What test_distributed.py starts. Runs every case below on every rank and writes what failed to FOLDER/RANK.json. The
last case ends the last rank.
"""

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import stand_in
import torch
import torch.distributed as dist
from oracle import assert_result, marks
from peak_memory import peak_bytes

from flash_attn_sm120.distributed import (
    decode_context_parallel,
    ring_attention,
    ring_attention_varlen,
    shard,
    shard_varlen,
    unshard_varlen,
    zigzag_attention,
    zigzag_attention_varlen,
)
from flash_attn_sm120.launchers import launches_on_cpu
from flash_attn_sm120.matrix import LSE_SLACK, largest_difference
from flash_attn_sm120.simulator import simulate

CASES = []
GROUPS = {}  # of each size, the first ranks
TIMEOUT = timedelta(seconds=120)
SEED = int(os.environ.get("FLASH_ATTN_SM120_SEED", "0"))


def case(function):
    CASES.append(function)
    return function


def rand(*shape, dtype=torch.bfloat16):
    """The same on every rank, as all have the same seed."""
    return torch.randn(shape, dtype=dtype)


def members(size):
    """The group of the first `size` ranks and this one's rank in it, None on the others."""
    group = GROUPS[size]
    rank = dist.get_rank(group)
    return (group, rank) if rank >= 0 else (None, None)


def assert_own(found, q, k, v, seqlens, rank, size, **options):
    """out and lse of a rank are its tokens' in attention over the whole sequences."""
    where = marks("cpu", *seqlens)
    whole_out, whole_lse = found
    parts = [torch.zeros(q.shape[0], *whole_out.shape[1:], dtype=q.dtype), torch.zeros(whole_lse.shape[0], q.shape[0])]
    outs = [None] * size
    dist.all_gather_object(outs, (whole_out, whole_lse), group=GROUPS[size])
    for (out, lse), r in zip(outs, range(size), strict=True):
        assert out.shape[0] == lse.shape[1] == len(shard_varlen(q, seqlens, r, size))
    parts = [unshard_varlen([out for out, _ in outs], seqlens), unshard_varlen([lse for _, lse in outs], seqlens, 1)]
    assert_result(*parts, q, k, v, cu_seqlens_q=where, cu_seqlens_k=where, **options)


LENGTHS = [[37], [64], [5, 0, 130, 1, 48], [3], [0, 0]]


@case
def zigzag_varlen_is_attention_over_whole_sequences():
    for size in (1, 2, 3, 4):
        for index, seqlens in enumerate(LENGTHS):
            dtype = (torch.bfloat16, torch.float16)[index % 2]
            q, k, v = (rand(sum(seqlens), heads, d, dtype=dtype) for heads, d in ((8, 64), (4, 64), (4, 32)))
            sink = rand(8)
            group, rank = members(size)
            if group is None:
                continue
            own = [shard_varlen(x, seqlens, rank, size) for x in (q, k, v)]
            for ring, options in (
                (False, {"pieces": 4}),
                (False, {"window_size": (20, 0), "softcap": 3.0, "learnable_sink": sink, "pieces": 2}),
                (False, {"causal": False, "softmax_scale": 0.3}),
                (True, {"pieces": 2}),
                (True, {"causal": False, "softcap": 3.0, "learnable_sink": sink, "pieces": 4, "check_ranks": False}),
            ):
                function = ring_attention_varlen if ring else zigzag_attention_varlen
                found = function(*own, seqlens, group, **options)
                same = {name: value for name, value in options.items() if name not in ("pieces", "check_ranks")}
                if sum(seqlens):
                    assert_own(found, q, k, v, seqlens, rank, size, **{"causal": True, **same})
                else:
                    assert found[0].shape == (0, 8, 32) and found[1].shape == (8, 0)


@case
def a_batch_is_its_sequences():
    size = dist.get_world_size()
    rank = dist.get_rank()
    for batch, seqlen, given in ((1, 64, None), (3, 48, None), (2, 51, 51)):
        q, k, v = (rand(batch, seqlen, heads, 64) for heads in (4, 2, 2))
        own = [shard(x, rank, size) for x in (q, k, v)]
        for function in (zigzag_attention, ring_attention):
            out, lse = function(*own, seqlen=given)
            assert out.shape == own[0].shape and lse.shape == (batch, 4, own[0].shape[1]) and lse.is_contiguous()
            exact = [stand_in.reference.attention(q, k, v, causal=True)[i] for i in range(2)]
            assert largest_difference(out, shard(exact[0], rank, size)) < 0.02
            assert largest_difference(lse, shard(exact[1], rank, size, dim=2)) < LSE_SLACK
        # strides of a larger tensor
        wide = [torch.cat((x, x), 2)[:, :, : x.shape[2]] for x in own]
        assert torch.equal(ring_attention(*wide, seqlen=given)[0], out)


@case
def decode_over_shared_keys_is_decode_over_all():
    for size in (1, 2, 4):
        batch, heads, heads_kv, dim = 3, 8, 2, 64
        lengths = torch.tensor([57, 2, 131], dtype=torch.int32)
        q, rows, sink = rand(batch, 2, heads, dim), rand(7, heads, dim), rand(heads)
        k, v = rand(batch, 131, heads_kv, dim), rand(batch, 131, heads_kv, 32)
        group, rank = members(size)
        if group is None:
            continue
        own = [x[:, rank::size].contiguous() for x in (k, v)]
        for options in ({}, {"window_size": (40, 0), "learnable_sink": sink, "softcap": 3.0}):
            out, lse = decode_context_parallel(q, *own, lengths, group, **options)
            assert out.dtype == q.dtype and out.shape == (batch, 2, heads, 32)
            assert_result(out, lse, q, k, v, seqused_k=lengths, causal=True, **options)
        where = marks("cpu", 1, 0, 4)  # two of the packed rows belong to no sequence
        out, lse = decode_context_parallel(
            rows, *paged(own, rank, size), lengths, group, cu_seqlens_q=where, max_seqlen_q=4,
            page_table=torch.arange(17 * batch, dtype=torch.int32).view(batch, 17),
        )  # fmt: skip
        exact, exact_lse = stand_in.reference.attention(rows, k, v, cu_seqlens_q=where, seqused_k=lengths, causal=True)
        assert largest_difference(out[:5], exact[:5]) < 0.02
        assert largest_difference(lse[:, :5], exact_lse[:, :5]) < LSE_SLACK


def paged(own, rank, size):
    """k and v (batch, keys, heads, dim) as pools of 17 pages of 8 rows a sequence."""
    return [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 136 - x.shape[1])).reshape(-1, 8, *x.shape[2:]) for x in own]


def raises_everywhere(kind, text, call):
    """Says what isn't so. Called on every rank, none of which is left waiting."""
    try:
        call()
    except Exception as error:
        as_said = type(error) is kind and text in str(error)
        return "" if as_said else f"{kind.__name__} {text!r} expected, got {error!r}"
    return f"{kind.__name__} {text!r} expected, got none"


@case
def what_is_wrong_on_one_rank_is_an_error_on_every_one():
    rank, size = dist.get_rank(), dist.get_world_size()
    q, k, v = (rand(16, heads, 64) for heads in (4, 2, 2))
    wrong, problems = rank == 2, []

    def zigzag(*tensors, seqlens=(64,), **options):
        return zigzag_attention_varlen(*tensors, seqlens, **options)

    on_meta = [x.to("meta") for x in (q, k, v)]
    float8 = [x.to(torch.float8_e4m3fn) for x in (k, v)]
    learned = k.clone().requires_grad_()
    shorter = [x[:-1] for x in (q, k, v)]
    half = [x.half() for x in (q, k, v)]
    batch = [x[None] for x in (q, k, v)]
    for kind, text, call in (
        (ValueError, "16 tokens, those of rank 2", lambda: zigzag(*(shorter if wrong else (q, k, v)))),
        (ValueError, "v: expected shape (15, 2", lambda: zigzag(q, k[:-1] if wrong else k, v)),
        (TypeError, "dtype: expected bfloat16 on every rank", lambda: zigzag(*(half if wrong else (q, k, v)))),
        (ValueError, "seqlens: expected", lambda: zigzag(q, k, v, seqlens=(63, 1) if wrong else (64,))),
        (ValueError, "seqlens", lambda: zigzag_attention(*([x[:, 2:] for x in batch] if wrong else batch))),
        (ValueError, "chunks differ", lambda: zigzag_attention(*([x[:, 1:] for x in batch] if wrong else batch))),
        (ValueError, "q: expected a tensor on a CUDA device", lambda: zigzag(*(on_meta if wrong else (q, k, v)))),
        (NotImplementedError, "window_size: expected", lambda: zigzag(q, k, v, window_size=(3, 3), causal=False)),
        (ValueError, "window_size: expected", lambda: zigzag(q, k, v, window_size=(3 + wrong, 0))),
        (ValueError, "softmax_scale: expected", lambda: zigzag(q, k, v, softmax_scale=-1.0 if wrong else None)),
        (ValueError, "sink: expected", lambda: zigzag(q, k, v, learnable_sink=q[0, :, 0] if wrong else None)),
        (ValueError, "pieces: expected a number that divides", lambda: zigzag(q, k, v, pieces=3 if wrong else 2)),
        (ValueError, "pieces: expected", lambda: zigzag(q, k, v, pieces=1 if wrong else 2)),
        (TypeError, "call: expected", lambda: (ring_attention_varlen if wrong else zigzag)(q, k, v, seqlens=[64])),
        (TypeError, "seqlens: expected a list", lambda: zigzag(q, k, v, seqlens=torch.tensor([64]))),
        (NotImplementedError, "no gradient", lambda: zigzag(q, learned if wrong else k, v)),
        (TypeError, "k: expected", lambda: zigzag(q, 7 if wrong else k, v)),
        (NotImplementedError, "k: expected bfloat16 as q", lambda: zigzag(q, *(float8 if wrong else (k, v)))),
        (TypeError, "check_ranks: expected", lambda: zigzag(q, k, v, check_ranks=1 if wrong else True)),
    ):  # fmt: skip
        problems.append(raises_everywhere(kind, text, call))
    total = torch.tensor([16 * size], dtype=torch.int32)
    for kind, text, call in (
        (TypeError, "cp_tot_seqused_k: expected", lambda: decode(q, k, v, total.long() if wrong else total)),
        (ValueError, "q: expected", lambda: decode(q[: 15 if wrong else 16], k, v, total)),
        (ValueError, "learnable_sink: expected", lambda: decode(q, k, v, total, learnable_sink=q[0, :3, 0])),
    ):
        problems.append(raises_everywhere(kind, text, call))
    problems.append(raises_everywhere(TypeError, "group: expected", lambda: zigzag(q, k, v, group=7)))
    assert not any(problems), [text for text in problems if text]
    assert zigzag(q, k, v)[0].shape == q.shape  # and they are still in step


def decode(q, k, v, total, **options):
    return decode_context_parallel(q[None], k[None], v[None], total, **options)


@case
def a_rings_memory_does_not_grow_with_the_ranks():
    """Bytes of tensors beyond the inputs at the same tokens a rank; gathered keys grow, those of a ring don't."""
    peaks = {}
    for size in (3, 4):
        seqlens = (256 * size,)
        group, _ = members(size)
        if group is None:
            continue
        q, k, v = (rand(256, heads, 64) for heads in (2, 2, 2))
        for name, function in (("ring", ring_attention_varlen), ("zigzag", zigzag_attention_varlen)):
            peaks[name, size] = peak_bytes(lambda: function(q, k, v, seqlens, group, causal=False))  # noqa: B023
    if dist.get_rank() < 3:
        assert peaks["ring", 4] <= peaks["ring", 3], peaks
        assert peaks["zigzag", 4] > peaks["zigzag", 3] + 256 * 2 * 128, peaks


@case
def the_kernels_give_the_same_in_the_simulator():
    """Two ranks: K and V in rows beside each other, heads in pieces, results written in place."""
    seqlens = [75]
    q, k, v = (rand(75, heads, 64) for heads in (4, 2, 2))
    token, total = rand(1, 1, 4, 64), torch.tensor(seqlens, dtype=torch.int32)
    group, rank = members(2)
    if group is None:
        return
    own = [shard_varlen(x, seqlens, rank, 2) for x in (q, k, v)]
    with simulate("sm_120a"):
        for function, options in ((zigzag_attention_varlen, {"pieces": 2}), (ring_attention_varlen, {"pieces": 2})):
            assert_own(function(*own, seqlens, group, **options), q, k, v, seqlens, rank, 2, causal=True)
        found = decode_context_parallel(token, k[None, rank::2], v[None, rank::2], total, group)
    assert_result(*found, token, k[None], v[None], causal=True)


@case
def a_rank_that_is_gone_is_an_error_on_the_others():
    """Not a wait: of the backend, at the latest after the group's timeout."""
    rank = dist.get_rank()
    if rank == dist.get_world_size() - 1:
        os._exit(3)
    q, k, v = (rand(16, heads, 64) for heads in (4, 2, 2))
    for function, options in ((zigzag_attention_varlen, {}), (ring_attention_varlen, {"check_ranks": False})):
        try:
            function(q, k, v, [64], **options)
        except RuntimeError:
            continue
        raise AssertionError(f"{function.__name__} went on without a rank")


def main():
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=TIMEOUT)
    GROUPS.update({count: dist.new_group(list(range(count))) for count in range(1, size)})
    GROUPS[size] = dist.group.WORLD
    failed = {}
    with launches_on_cpu(stand_in.load):
        for index, function in enumerate(CASES):
            torch.manual_seed(SEED + index)
            try:
                function()
            except Exception:
                failed[function.__name__] = traceback.format_exc()
                break  # ranks that go on alone would wait for this one
    (folder / f"{rank}.json").write_text(json.dumps({"ran": [each.__name__ for each in CASES], "failed": failed}))
    sys.stdout.flush()
    os._exit(0)  # no goodbye to a group that has lost a rank


if __name__ == "__main__":
    main()
