"""A launcher that computes with the reference what a kernel would: tests of tests, and of the way to the kernels."""

import torch

from flash_attn_sm120 import reference
from flash_attn_sm120.arguments import (
    Arguments,
    CombineArguments,
    DualGroupArguments,
    GroupLengths,
    Lengths,
    Modifiers,
    Numbers,
    Partials,
)
from flash_attn_sm120.checks import UNBOUNDED
from flash_attn_sm120.dispatch import choose
from flash_attn_sm120.dropout import OWN_BITS, WORD
from flash_attn_sm120.problem import AttentionProblem, CombineProblem


def load(problem):
    if isinstance(problem, CombineProblem):
        return combine_launcher(problem)
    return dual_group_launcher(problem) if problem.dual_group else launcher(problem)


def launcher(problem: AttentionProblem):
    def launch(*values):
        given, rest = Arguments(*values[:8]), list(values[8:])
        lengths, modifiers, numbers = Lengths(*given.lengths), Modifiers(*given.modifiers), Numbers(*given.numbers)
        check_form(problem, given, lengths, modifiers, rest)
        left, right = (None if side >= UNBOUNDED else side for side in (numbers.window_left, numbers.window_right))
        options = {"softmax_scale": numbers.softmax_scale, "softcap": numbers.softcap}
        options |= {"window_size": (left, right), "attention_chunk": numbers.attention_chunk}
        if problem.context_parallel:
            options |= {"cp_world_size": numbers.cp_world_size, "cp_rank": numbers.cp_rank}
        options |= {name: value for name, value in lengths._asdict().items() if value is not None}
        options |= {name: value for name, value in modifiers._asdict().items() if value is not None}
        if (dropout := options.pop("dropout", None)) is not None:
            options |= {
                "dropout_p": (dropout.threshold << 32 | dropout.carry & WORD) / (1 << OWN_BITS + 32),
                "dropout_seed": dropout.seed,
            }
        out, lse = reference.attention(given.q, given.k, given.v, **options)
        rows = slice(None if lengths.cu_seqlens_q is None else int(lengths.cu_seqlens_q[-1]))
        write(given.out, given.lse, out, lse, rows, problem.packed_q)

    return launch


def dual_group_launcher(problem: AttentionProblem):
    """Each group by itself; its range is how much of its sequences is used."""

    def launch(*values):
        given = DualGroupArguments(*values)
        lengths, numbers = GroupLengths(*given.lengths), Numbers(*given.numbers)
        check_groups(problem, given, lengths)
        left, right = (None if side >= UNBOUNDED else side for side in (numbers.window_left, numbers.window_right))
        options = {"softmax_scale": numbers.softmax_scale, "softcap": numbers.softcap, "window_size": (left, right)}
        options |= {"cu_seqlens_k": lengths.cu_seqlens_k, "learnable_sink": given.learnable_sink}
        keys = lengths.cu_seqlens_k.diff()
        for q, to, lse_to, marks, limit in zip(
            (given.q0, given.q1),
            (given.out0, given.out1),
            (given.lse0, given.lse1),
            lengths[:2],
            lengths[3:],
            strict=True,
        ):
            used = torch.minimum(keys, torch.as_tensor(limit, dtype=torch.int32))
            out, lse = reference.attention(q, given.k, given.v, cu_seqlens_q=marks, seqused_k=used, **options)
            write(to, lse_to, out, lse, slice(int(marks[-1])), packed=True)

    return launch


def check_groups(problem, given, lengths):
    """What a problem of two groups says is what comes."""
    assert problem.packed_q and problem.packed_k and problem.lse and not problem.padded_lse
    assert name_of(given.learnable_sink) == problem.sink
    assert all(isinstance(limit, torch.Tensor) == problem.seqused_k for limit in lengths[3:])
    for tensor in given[:6]:
        assert name_of(tensor) == problem.dtype and tensor.data_ptr() % 16 == 0 and tensor.stride(-1) == 1
        assert not any(stride * tensor.element_size() % 16 for stride in tensor.stride()[:-1])
    batch = lengths.cu_seqlens_k.shape[0]
    assert all(marks.shape == (batch,) and marks.dtype == torch.int32 for marks in lengths[:3])


def combine_launcher(problem: CombineProblem):
    def launch(*values):
        given = CombineArguments(*values)
        assert (given.cu_seqlens is not None) == problem.cu_seqlens and (given.seqused is not None) == problem.seqused
        assert (given.lse is not None) == problem.lse and name_of(given.learnable_sink) == problem.sink
        assert given.out.dim() == 4 - problem.packed and name_of(given.out) == problem.dtype
        lengths = {"cu_seqlens": given.cu_seqlens, "seqused": given.seqused}
        sink = given.learnable_sink
        out, lse = reference.combine(given.out_partial, given.lse_partial.mT, **lengths, learnable_sink=sink)
        rows = slice(None if given.cu_seqlens is None else int(given.cu_seqlens[-1]))
        write(given.out, given.lse, out, lse.mT, rows, problem.packed)

    return launch


def write(to, lse_to, out, lse, rows, packed):
    """Packed rows that no sequence names are left alone."""
    to[rows if packed else ...] = out[rows if packed else ...].to(to.dtype)
    if lse_to is not None:
        lse_to[..., rows if packed else slice(None)] = lse[..., rows if packed else slice(None)]


def check_form(problem, given, lengths, modifiers, rest):
    """What a problem says is what comes."""
    flags = (problem.packed_q, problem.packed_k, problem.seqused_q, problem.seqused_k, problem.paged)
    assert [value is not None for value in lengths] == [*flags, problem.context_parallel]
    assert name_of(modifiers.learnable_sink) == problem.sink
    flags = (problem.alibi, problem.k_descale, problem.v_descale)
    assert [value is not None for value in modifiers[1:4]] == list(flags)
    assert name_of(given.k) == name_of(given.v) == (problem.kv_dtype or problem.dtype)
    assert name_of(given.q) == name_of(given.out) == problem.dtype and (given.lse is not None) == problem.lse
    assert not problem.paged or given.k.shape[1] == problem.page_size
    for tensor in (given.q, given.k, given.v, given.out):
        assert tensor.data_ptr() % 16 == 0 and tensor.stride(-1) == 1
        assert not any(stride * tensor.element_size() % 16 for stride in tensor.stride()[:-1])
    heads, heads_kv = given.q.shape[-2], given.k.shape[-2]
    batch = given.q.shape[0] if lengths.cu_seqlens_q is None else lengths.cu_seqlens_q.shape[0] - 1
    shapes = [(heads,), (batch, heads), (batch, heads_kv), (batch, heads_kv)]
    for tensor, shape in zip(modifiers[:4], shapes, strict=True):
        assert tensor is None or tensor.shape == shape
    plan = choose(problem, "sm_120a")
    queue = rest.pop() if plan.kernel == "forward_tma" else None
    assert (queue is not None) == plan.persistent
    if queue is not None:
        ticket, sm_count = queue
        assert ticket.dtype == torch.int32 and ticket.numel() >= 1 and (ticket == 0).all() and sm_count > 0
    assert len(rest) == problem.decode and (not rest or (rest[0] is not None) == problem.split)
    if problem.split:
        partials = Partials(*rest[0])
        assert partials.out.shape[1:] == given.out.shape and partials.out.dtype == torch.float32
        rows = given.q.shape[:1] if problem.packed_q else given.q.shape[1:2]
        assert partials.lse.shape[1:] == (*given.q.shape[: 0 if problem.packed_q else 1], heads, *rows)
        assert (partials.tickets == 0).all()
        partials.out.fill_(float("nan"))
        partials.lse.fill_(float("nan"))


def name_of(tensor) -> str:
    return "" if tensor is None else str(tensor.dtype).removeprefix("torch.")
