"""Calls as an inference server makes them, at random: pages, few rows, splits, ranks. Everything but the numbers."""

import math
from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st
from oracle import SPEED, assert_right, ints, marks, rand

from flash_attn_sm120 import flash_attn_combine, flash_attn_func, flash_attn_varlen_func, reference
from flash_attn_sm120.dispatch import DECODE_ROWS
from flash_attn_sm120.matrix import LSE_SLACK, SLACK, largest_difference

# A page size, a pair of head dims, a mask and each feature are compilations, so they are few.
HEAD_DIMS = [(64, 64), (128, 128), (192, 128), (80, 48), (256, 256)]
PAGE_SIZES = [8, 16, 16, 16, 32, 48, 64, 128, 256, 784]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
LAYOUTS = ["rows first", "heads first", "halves", "halves, heads first"]
WILD = (-12345, 2**31 - 1)  # page numbers that nobody may follow


@dataclass(frozen=True)
class Case:
    """A call. scales: how k_descale and v_descale come, "" for none. shared: sequences begin with the same pages.
    changes: more arguments, as they are."""

    lengths_q: list
    lengths_k: list
    heads_kv: int = 2
    ratio: int = 4
    head_dims: tuple = (64, 64)
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    page_size: int = 16
    layout: str = "rows first"
    shared: bool = False
    packed: bool = True
    used: bool | None = None  # whether seqused_q is given; None: where rows aren't packed
    lse: bool = True
    mask: str = "causal"
    window: tuple = (None, None)
    softcap: float = 0.0
    sink: torch.dtype | None = None
    slopes: str = ""
    scales: str = ""
    chunk: int = 0
    num_splits: int = 0
    spare: int = 0
    seed: int = 0
    changes: dict = field(default_factory=dict)

    @property
    def heads(self) -> int:
        return self.heads_kv * self.ratio


@st.composite
def cases(draw, *, rows, keys, most_heads, splits=(0, 0), page_sizes=PAGE_SIZES):
    """rows: of a sequence at most. keys: of a sequence at most. splits: (least, most)."""
    ratio = draw(st.sampled_from([n for n in (1, 2, 3, 4, 5, 7, 8, 12, 16) if n <= most_heads]))
    batch = draw(st.integers(1, 4))
    side = st.one_of(st.none(), st.integers(0, keys))

    def lengths(most):
        length = st.one_of(st.sampled_from([0, 1, 15, 16, 17, 64, 65]), st.integers(0, most))
        return draw(st.lists(length.map(lambda n: min(n, most)), min_size=batch, max_size=batch))

    head_dims = draw(st.sampled_from(HEAD_DIMS))
    return Case(
        lengths_q=lengths(rows),
        lengths_k=lengths(keys),
        heads_kv=draw(st.integers(1, max(1, min(3, most_heads // ratio)))),
        ratio=ratio,
        head_dims=head_dims,
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16])),
        kv_dtype=draw(st.sampled_from([None, None, *FLOAT8])),
        page_size=draw(st.sampled_from(page_sizes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        shared=draw(st.booleans()),
        packed=draw(st.booleans()),
        mask=draw(st.sampled_from(["full", "causal", "causal", "local"])),
        window=(draw(side), draw(side)),
        softcap=draw(st.sampled_from([0.0, 0.0, 2.5, 30.0])),
        sink=draw(st.sampled_from([None, None, torch.bfloat16, torch.float32])),
        slopes=draw(st.sampled_from(["", "", "heads", "batch"])),
        scales=draw(st.sampled_from(["", "number", "one", "(1,)", "each"])),
        chunk=draw(st.sampled_from([0, 0, 0, 1, 7, 64, 100])),
        num_splits=draw(st.integers(*splits)),
        spare=draw(st.integers(0, 5)),
        seed=draw(st.integers(0, 2**31)),
    )


def options_of(case: Case, device) -> dict:
    """What doesn't depend on where the keys are."""
    batch, options = len(case.lengths_q), {"softcap": case.softcap, "attention_chunk": case.chunk}
    if case.mask == "causal":
        options["causal"] = True
    elif case.mask == "local":
        options["window_size"] = case.window
    if case.num_splits != 1:
        options["num_splits"] = case.num_splits
    if case.sink is not None:
        options["learnable_sink"] = rand(device, case.heads, dtype=case.sink) * 2
    if case.slopes:
        shape = (case.heads,) if case.slopes == "heads" else (batch, case.heads)
        options["alibi_slopes"] = torch.rand(shape, device=device) * 0.3
    for name in ("k_descale", "v_descale") if case.scales else ():
        if case.scales == "number":
            options[name] = 0.25 + torch.rand(()).item()
        else:
            shape = {"one": (), "(1,)": (1,), "each": (batch, case.heads_kv)}[case.scales]
            options[name] = 0.25 + torch.rand(shape, device=device)
    return options | case.changes


def queries(case: Case, device) -> tuple[torch.Tensor, dict]:
    """q and its lengths; rows that no sequence has are NaN."""
    lengths, longest = case.lengths_q, max(case.lengths_q)
    used = not case.packed if case.used is None else case.used
    room = longest + case.spare if longest > DECODE_ROWS else min(longest + case.spare, DECODE_ROWS)
    rows = (sum(lengths) + case.spare,) if case.packed else (len(lengths), room)
    q = torch.full((*rows, case.heads, case.head_dims[0]), math.nan, dtype=case.dtype, device=device)
    start = 0
    for b, length in enumerate(lengths):
        own = q[start : start + length] if case.packed else q[b, : length if used else room]
        own.copy_(torch.randn(own.shape, device=device))
        start += length
    found = {"cu_seqlens_q": marks(device, *lengths), "max_seqlen_q": longest} if case.packed else {}
    return q, found | ({"seqused_q": ints(device, *lengths)} if used else {})


def sequences(case: Case, device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """k and v (seqlen_k, heads_kv, d) of each sequence; with shared pages they begin alike."""
    kv_dtype = case.kv_dtype or case.dtype
    found = []
    for length in case.lengths_k:
        pair = [torch.randn(length, case.heads_kv, d, device=device).to(kv_dtype) for d in case.head_dims]
        if case.shared and found:
            alike = min(length, found[0][0].shape[0]) // case.page_size * case.page_size
            for own, first in zip(pair, found[0], strict=True):
                own[:alike] = first[:alike]
        found.append(tuple(pair))
    return found


def pools(case: Case, keys: list, device) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Pools and page table: pages in any order, NaN wherever no sequence has a row, wild numbers beyond a length."""
    size, batch = case.page_size, len(keys)
    lengths = [k.shape[0] for k, _ in keys]
    counts = [-(-length // size) for length in lengths]
    num_pages = sum(counts) + 2
    pool_k, pool_v = empty_pools(case, num_pages, device)
    order = torch.randperm(num_pages).tolist()
    table = torch.tensor(WILD * (batch * (max(counts) + 1))).view(batch, -1)[:, : max(counts) + 1].clone()
    for b, (pair, count) in enumerate(zip(keys, counts, strict=True)):
        alike = min(lengths[b], lengths[0]) // size if case.shared and b else 0
        for i in range(count):
            table[b, i] = page = table[0, i] if i < alike else order.pop()
            for pool, rows in zip((pool_k, pool_v), pair, strict=True):
                own = rows[i * size : (i + 1) * size]
                pool[page, : len(own)] = own
    lengths = {"seqused_k": ints(device, *lengths), "page_table": table.int().to(device)}
    return pool_k, pool_v, lengths


def empty_pools(case: Case, num_pages: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(num_pages, page_size, heads_kv, d) of NaN in the case's layout."""
    dtype, halves, heads_first = case.kv_dtype or case.dtype, "halves" in case.layout, "heads first" in case.layout

    def blank(*shape):
        return torch.full(shape, math.nan, device=device).to(dtype)

    rows = (case.heads_kv, case.page_size) if heads_first else (case.page_size, case.heads_kv)
    if halves:
        both = blank(num_pages, 2, *rows, max(case.head_dims))
        found = [both[:, i, ..., :d] for i, d in enumerate(case.head_dims)]
    else:
        found = [blank(num_pages, *rows, d) for d in case.head_dims]
    return tuple(pool.transpose(1, 2) if heads_first else pool for pool in found)


def run(case: Case, device) -> None:
    """One paged call against the reference."""
    torch.manual_seed(case.seed)
    q, lengths_q = queries(case, device)
    k, v, lengths_k = pools(case, sequences(case, device), device)
    assert_right(q, k, v, with_lse=case.lse, **lengths_q, **lengths_k, **options_of(case, device))


def run_padded(case: Case, device) -> None:
    """The same keys without pages."""
    torch.manual_seed(case.seed)
    q, lengths_q = queries(case, device)
    keys, kv_dtype = sequences(case, device), case.kv_dtype or case.dtype
    shape = (len(keys), max(case.lengths_k) + case.spare, case.heads_kv)
    k, v = (torch.full((*shape, d), math.nan, device=device).to(kv_dtype) for d in case.head_dims)
    for b, pair in enumerate(keys):
        for tensor, rows in zip((k, v), pair, strict=True):
            tensor[b, : len(rows)] = rows
    lengths_k = {"seqused_k": ints(device, *case.lengths_k)}
    assert_right(q, k, v, with_lse=case.lse, **lengths_q, **lengths_k, **options_of(case, device))


def named(case: Case, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Without the rows that no sequence names."""
    rows = slice(sum(case.lengths_q))
    return (out[rows], lse[:, rows]) if case.packed else (out, lse)


def top(tensor: torch.Tensor) -> float:
    """The largest finite absolute value."""
    finite = tensor[tensor.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def run_split_and_whole(case: Case, device) -> None:
    """The result doesn't depend on the number of splits beyond rounding."""
    torch.manual_seed(case.seed)
    q, lengths_q = queries(case, device)
    k, v, lengths_k = pools(case, sequences(case, device), device)
    options = options_of(case, device) | lengths_q | lengths_k
    results = []
    for num_splits in (1, case.num_splits):
        options["num_splits"] = num_splits
        results.append(named(case, *flash_attn_varlen_func(q, k, v, **options, return_lse=True)))
    (whole, whole_lse), (split, split_lse) = results
    error, limit = largest_difference(split, whole), 2 * torch.finfo(case.dtype).eps * top(whole) + SLACK
    assert error <= limit, f"out differs by {error}, at most {limit} is allowed"
    error, limit = largest_difference(split_lse, whole_lse), 1e-5 * max(1.0, top(whole_lse))
    assert error <= limit, f"lse differs by {error}, at most {limit} is allowed"


def run_ranks(case: Case, world: int, device) -> None:
    """Every rank against the reference, and all of them combined against the whole; the sink is the first rank's."""
    torch.manual_seed(case.seed)
    case = replace(case, shared=False)
    q, lengths_q = queries(case, device)
    keys, options = sequences(case, device), options_of(case, device)
    sink = options.pop("learnable_sink", None)
    outs, lses = [], []
    for rank in range(world):
        local = replace(case, lengths_k=[len(k[rank::world]) for k, _ in keys])
        k, v, lengths_k = pools(local, [(k[rank::world], v[rank::world]) for k, v in keys], device)
        ranks = {"cp_world_size": world, "cp_rank": rank, "cp_tot_seqused_k": ints(device, *case.lengths_k)}
        own = {"learnable_sink": sink} if rank == 0 and sink is not None else {}
        out, lse = named(case, *assert_right(q, k, v, **lengths_q, **lengths_k, **ranks, **own, **options))
        outs.append(out.float())
        lses.append(lse.mT)
    where = lengths_q.get("cu_seqlens_q")
    out, lse = flash_attn_combine(torch.stack(outs), torch.stack(lses), out_dtype=case.dtype, cu_seqlens=where)
    k, v, lengths_k = pools(case, keys, device)
    whole = {**lengths_q, **lengths_k, **options, "learnable_sink": sink}
    whole = {name: value for name, value in whole.items() if name not in SPEED}
    exact, exact_lse = named(case, *reference.attention(q, k, v, **whole))
    _, rounded_lse = named(case, *reference.attention(q, k, v, **whole, dtype=None))
    # parts are rounded before they are combined
    error, limit = largest_difference(out, exact), 3 * torch.finfo(case.dtype).eps * top(exact) + SLACK
    assert error <= limit, f"out is off by {error}, at most {limit} is allowed"
    error, limit = largest_difference(lse.mT, exact_lse), 2 * largest_difference(rounded_lse, exact_lse) + LSE_SLACK
    assert error <= limit, f"lse is off by {error}, at most {limit} is allowed"


def run_far_window(case: Case, device, far: int) -> None:
    """Keys that are `far` columns and more before what any row sees are NaN: a window's blocks are all that is read."""
    torch.manual_seed(case.seed)
    q, lengths_q = queries(case, device)
    k, v, lengths_k = pools(case, sequences(case, device), device)
    clean = k.clone(), v.clone()
    for b, (rows, length) in enumerate(zip(case.lengths_q, case.lengths_k, strict=True)):
        for i in range(max(0, length - rows - case.window[0] - far) // case.page_size):
            page = lengths_k["page_table"][b, i]
            k[page], v[page] = math.nan, math.nan
    assert_right(q, k, v, clean=clean, **lengths_q, **lengths_k, **options_of(case, device))


def steady(case: Case, device) -> tuple:
    """(tensors of a dense decode call, its options), to be changed in place: a graph's."""
    torch.manual_seed(case.seed)
    batch, rows = len(case.lengths_q), max(case.lengths_q)
    q = rand(device, batch, rows, case.heads, case.head_dims[0], dtype=case.dtype)
    k, v, lengths = pools(replace(case, shared=False), sequences(case, device), device)
    return q, k, v, lengths, options_of(case, device)


def call(q, k, v, lengths, options):
    return flash_attn_func(q, k, v, **lengths, **options, return_lse=True)
