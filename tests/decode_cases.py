"""Random cases of the decode kernels, and what they should give: gathered and computed row by row in float32.

Launches go to a compiled problem directly; the interface has its own tests.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from flash_attn_sm120.arguments import Arguments, Lengths, Modifiers, Numbers, Partials
from flash_attn_sm120.problem import AttentionProblem
from flash_attn_sm120.splits import choose_splits

FP8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


@dataclass
class Case:
    """One call. lengths_q, lengths_k: of each sequence; numbers beyond them: memory that must not be read."""

    lengths_q: list[int]
    lengths_k: list[int]
    heads_kv: int = 2
    group: int = 4
    head_dim: int = 128
    head_dim_v: int = 0
    dtype: str = "bfloat16"
    kv_dtype: str = ""
    page_size: int = 0
    heads_first: bool = False
    packed_q: bool = False
    packed_k: bool = False
    seqused_q: bool = False
    seqused_k: bool = True
    mask: str = "full"
    window: tuple[int, int] = (0, 0)
    softcap: float = 0.0
    sink: str = ""
    alibi: bool = False
    descale: bool = False
    chunk: int = 0
    world: int = 1
    rank: int = 0
    num_splits: int = 1
    lse: bool = True
    shared_pages: bool = False
    row_sizes: bool = False  # rows of q differ by powers of two

    @property
    def dv(self) -> int:
        return self.head_dim_v or self.head_dim

    @property
    def problem(self) -> AttentionProblem:
        return AttentionProblem(
            self.dtype, self.head_dim, self.dv, mask=self.mask, softcap=self.softcap > 0, lse=self.lse,
            packed_q=self.packed_q, packed_k=self.packed_k, seqused_q=self.seqused_q, seqused_k=self.seqused_k,
            kv_dtype=self.kv_dtype, page_size=self.page_size, k_descale=self.descale, v_descale=self.descale,
            sink=self.sink, alibi=self.alibi, chunked=self.chunk > 0, context_parallel=self.world > 1, decode=True,
            split=self.num_splits > 1,
        )  # fmt: skip


@dataclass
class Inputs:
    """What a case launches with, and its sequences one by one: q[b] (seqlen_q, heads, d), k[b], v[b]."""

    arguments: Arguments
    partials: Partials | None
    q: list[torch.Tensor]
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    total_k: list[int]

    @property
    def call(self) -> tuple:
        return (*self.arguments, self.partials)


def marks(lengths, device):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def make(case: Case, device="cpu") -> Inputs:
    dtype = getattr(torch, case.dtype)
    heads, batch = case.heads_kv * case.group, len(case.lengths_q)
    total_k = list(case.lengths_k)
    local_k = [max(0, -(-(n - case.rank) // case.world)) for n in total_k]
    randn = lambda *shape: torch.randn(shape, device=device)  # noqa: E731
    narrow = FP8.get(case.kv_dtype, dtype)
    q = [randn(n, heads, case.head_dim).to(dtype) for n in case.lengths_q]
    if case.row_sizes:
        q = [part * 2.0 ** torch.randint(-20, 4, (*part.shape[:-1], 1), device=device) for part in q]
        q = [part.to(dtype) for part in q]
    k = [randn(n, case.heads_kv, case.head_dim).to(narrow) for n in local_k]
    v = [randn(n, case.heads_kv, case.dv).to(narrow) for n in local_k]

    room_q = [n + (b % 3 if case.seqused_q else 0) for b, n in enumerate(case.lengths_q)]
    lengths = {}
    if case.packed_q:
        tail = 3  # rows that no sequence names
        mQ = torch.full((sum(room_q) + tail, heads, case.head_dim), math.nan, dtype=dtype, device=device)
        lengths["cu_seqlens_q"] = starts = marks(room_q, device)
        for b, part in enumerate(q):
            mQ[starts[b] : starts[b] + len(part)] = part
    else:
        assert case.seqused_q or len(set(case.lengths_q)) == 1
        mQ = torch.full((batch, max(room_q), heads, case.head_dim), math.nan, dtype=dtype, device=device)
        for b, part in enumerate(q):
            mQ[b, : len(part)] = part
    if case.seqused_q:
        lengths["seqused_q"] = ints(case.lengths_q, device)
    if case.seqused_k:
        lengths["seqused_k"] = ints(local_k, device)
    mK, mV = _store(case, k, v, local_k, narrow, lengths, device)
    if case.world > 1:
        lengths["cp_tot_seqused_k"] = ints(total_k, device)

    modifiers = {}
    if case.sink:
        modifiers["learnable_sink"] = randn(heads).to(getattr(torch, case.sink))
    if case.alibi:
        modifiers["alibi_slopes"] = torch.rand(batch, heads, device=device) * 0.3
    if case.descale:
        for name in ("k_descale", "v_descale"):
            modifiers[name] = torch.rand(batch, case.heads_kv, device=device) + 0.5
    numbers = Numbers(1 / math.sqrt(case.head_dim), case.softcap, *case.window, case.chunk, case.world, case.rank)
    out = torch.full((*mQ.shape[:-1], case.dv), math.nan, dtype=dtype, device=device)
    lse_shape = (heads, mQ.shape[0]) if case.packed_q else (batch, heads, mQ.shape[1])
    lse = torch.full(lse_shape, math.nan, device=device) if case.lse else None
    arguments = Arguments(mQ, mK, mV, out, lse, Lengths(**lengths), Modifiers(**modifiers), numbers)
    partials = None
    if case.num_splits > 1:
        sizes = (case.heads_kv, batch, max([*room_q, 1]), max([*local_k, 1]))
        splits = choose_splits(case.problem, 132, mQ.shape, *sizes, num_splits=case.num_splits)
        partials = Partials(
            torch.full((case.num_splits, *out.shape), math.nan, device=device),
            torch.full((case.num_splits, *lse_shape), math.nan, device=device),
            torch.zeros(splits.tickets, dtype=torch.int32, device=device),
            splits.slots,
        )
    return Inputs(arguments, partials, q, k, v, total_k)


def _poison(shape, dtype, device):
    return torch.full(shape, math.nan, device=device).to(dtype)


def _store(case: Case, k, v, local_k, dtype, lengths: dict, device) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V in the case's form, NaN wherever no sequence lies; page numbers permuted, wild beyond the lengths."""
    batch, room = len(local_k), max([*local_k, 1]) + (5 if case.seqused_k else 0)
    if case.packed_k:
        rooms = [n + (2 if case.seqused_k else 0) for n in local_k]
        lengths["cu_seqlens_k"] = starts = marks(rooms, device)
        stores = [_poison((max(sum(rooms), 1), case.heads_kv, part[0].shape[-1]), dtype, device) for part in (k, v)]
        for store, parts in zip(stores, (k, v), strict=True):
            for b, part in enumerate(parts):
                store[starts[b] : starts[b] + len(part)] = part
        return tuple(stores)
    if not case.page_size:
        if not case.seqused_k:
            room = local_k[0]
            assert len(set(local_k)) == 1
        stores = [_poison((batch, room, case.heads_kv, part[0].shape[-1]), dtype, device) for part in (k, v)]
        for store, parts in zip(stores, (k, v), strict=True):
            for b, part in enumerate(parts):
                store[b, : len(part)] = part
        return tuple(stores)
    pages = -(-room // case.page_size)
    num_pages = batch * pages + 2
    order = torch.randperm(num_pages, device=device)[: batch * pages].reshape(batch, pages)
    table = torch.full((batch, pages), -12345, dtype=torch.int32, device=device)
    if case.heads_first:
        shape, back = (num_pages, 2, case.heads_kv, case.page_size), (0, 2, 1, 3)
        both = _poison((*shape, max(case.head_dim, case.dv)), dtype, device)
        stores = [both[:, i, :, :, :d].permute(*back) for i, d in enumerate((case.head_dim, case.dv))]
    else:
        stores = [
            _poison((num_pages, case.page_size, case.heads_kv, d), dtype, device) for d in (case.head_dim, case.dv)
        ]
    for b, length in enumerate(local_k):
        used = -(-length // case.page_size)
        table[b, :used] = order[b, :used].int()
        if case.shared_pages and b and min(length, local_k[0]) >= case.page_size:
            table[b, 0] = table[0, 0]
            k[b][: case.page_size], v[b][: case.page_size] = k[0][: case.page_size], v[0][: case.page_size]
        for i in range(used):
            rows = slice(i * case.page_size, min((i + 1) * case.page_size, length))
            for store, parts in zip(stores, (k, v), strict=True):
                store[table[b, i].item(), : rows.stop - rows.start] = parts[b][rows]
    lengths["page_table"] = table
    return tuple(stores)


def expected(case: Case, inputs: Inputs) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(out (seqlen_q, heads, d_v), lse (heads, seqlen_q)) of each sequence, in float64."""
    modifiers, results = inputs.arguments.modifiers, []
    for b, (q, k, v) in enumerate(zip(inputs.q, inputs.k, inputs.v, strict=True)):
        keys, values = (x.to(torch.float64).repeat_interleave(case.group, 1) for x in (k, v))
        if case.descale:
            keys = keys * modifiers.k_descale[b].double().repeat_interleave(case.group)[None, :, None]
            values = values * modifiers.v_descale[b].double().repeat_interleave(case.group)[None, :, None]
        scores = torch.einsum("qhd,khd->hqk", q.double(), keys) / math.sqrt(case.head_dim)
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        position = torch.arange(len(q), device=q.device)[:, None] + inputs.total_k[b] - len(q)
        column = torch.arange(len(k), device=q.device)[None, :] * case.world + case.rank
        if case.alibi:
            scores = scores - modifiers.alibi_slopes[b].double()[:, None, None] * (position - column).abs()
        visible = torch.ones_like(position + column, dtype=torch.bool)
        if case.mask != "full":
            visible &= column <= position + (case.window[1] if case.mask == "local" else 0)
        if case.mask == "local":
            visible &= column >= position - case.window[0]
        if case.chunk:
            first = position.div(case.chunk, rounding_mode="floor") * case.chunk
            visible &= (column >= first) & (column < first + case.chunk)
        scores = scores.masked_fill(~visible, -math.inf)
        if case.sink:
            sink = modifiers.learnable_sink.double()[:, None, None].expand(-1, len(q), 1)
            scores = torch.cat([scores, sink], -1)
            values = torch.cat(
                [values, torch.zeros_like(values[:1]) if len(v) else values.new_zeros(1, *values.shape[1:])]
            )
        lse = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse)[..., None])
        results.append((torch.einsum("hqk,khd->qhd", weights, values), lse))
    return results


def check(case: Case, inputs: Inputs) -> float:
    """Raises where out or lse is off, or a row that no sequence names was written; returns out's largest error."""
    out, lse = inputs.arguments.out, inputs.arguments.lse
    dtype = getattr(torch, case.dtype)
    worst, start = 0.0, 0
    if inputs.partials is not None:
        assert not inputs.partials.tickets.any(), "tickets are left"
    for b, (o, log_sum) in enumerate(expected(case, inputs)):
        n = len(o)
        room = out.shape[1] - n if not case.packed_q else (b % 3 if case.seqused_q else 0)
        rows = (slice(start, start + n),) if case.packed_q else (b, slice(0, n))
        rest = (slice(start + n, start + n + room),) if case.packed_q else (b, slice(n, n + room))
        start += n + room
        scale = max(o.abs().max().item(), 1e-3) if n else 1.0
        error = (out[rows].double() - o).abs().max().item() if n else 0.0
        # P and out are rounded
        limit = scale * torch.finfo(dtype).eps * 2 + (2e-3 if dtype == torch.float16 else 1.5e-2) * 0.5
        assert error <= limit, f"sequence {b}: out is off by {error}, at most {limit}"
        worst = max(worst, error)
        assert (out[rest] == 0).all(), f"sequence {b}: rows beyond seqused_q aren't 0"
        if lse is None:
            continue
        found = lse[:, rows[0]] if case.packed_q else lse[rows[0]][:, rows[1]]
        assert torch.equal(found == -math.inf, log_sum == -math.inf), f"sequence {b}: lse disagrees on empty rows"
        finite = log_sum != -math.inf
        difference = (found.double() - log_sum)[finite].abs().max().item() if finite.any() else 0.0
        assert difference <= 2e-3, f"sequence {b}: lse is off by {difference}"
        behind = lse[:, rest[0]] if case.packed_q else lse[rest[0]][:, rest[1]]
        assert (behind == -math.inf).all(), f"sequence {b}: lse beyond seqused_q isn't -inf"
    if case.packed_q:
        assert out[start:].isnan().all(), "rows past the last sequence were written"
    return worst
