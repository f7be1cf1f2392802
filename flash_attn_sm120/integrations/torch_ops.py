"""torch.library operators, which torch.compile and torch.export take as they are; importing this module defines them.

flash_attn_sm120::fwd, ::varlen_fwd, ::paged_fwd and ::combine return (out, lse); the ones named *_out write a tensor
that is given and return lse. In a compiled function flash_attn_func, flash_attn_varlen_func and flash_attn_combine
become these by themselves. Arguments mean what they mean there, with these differences: window_size is two ints, a
descale that is a number has a name of its own, dropout needs the seed's tensor, lse is empty, of shape (0,), where
return_lse is False. They run on CUDA tensors, and on CPU tensors while flash_attn_sm120.simulator.simulate is open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flash_attn_sm120 import checks, interface
from flash_attn_sm120.calls import Options, Tensors
from flash_attn_sm120.changes import UNCHANGED
from flash_attn_sm120.dropout import seed_tensor

NAMESPACE = "flash_attn_sm120"
OPTIONS = (
    "float? softmax_scale=None, bool causal=False, SymInt window_left=-1, SymInt window_right=-1, float softcap=0.0, "
    "Tensor? learnable_sink=None, Tensor? alibi_slopes=None, SymInt attention_chunk=0, "
    "Tensor? k_descale=None, Tensor? v_descale=None, float? k_descale_number=None, float? v_descale_number=None, "
    "SymInt num_splits=0, SymInt cp_world_size=1, SymInt cp_rank=0, Tensor? cp_tot_seqused_k=None, "
    "float dropout_p=0.0, Tensor? dropout_seed=None, bool return_lse=False"
)
MOST = "SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None"
ARGUMENTS = {
    "fwd": f"Tensor q, Tensor k, Tensor v, *, Tensor? seqused_k=None, {OPTIONS}",
    "varlen_fwd": (
        f"Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, {MOST}, *, "
        f"Tensor? seqused_q=None, Tensor? seqused_k=None, {OPTIONS}"
    ),
    "paged_fwd": (
        f"Tensor q, Tensor k, Tensor v, Tensor page_table, Tensor seqused_k, Tensor? cu_seqlens_q=None, {MOST}, *, "
        f"Tensor? seqused_q=None, {OPTIONS}"
    ),
    "combine": (
        "Tensor out_partial, Tensor lse_partial, *, ScalarType? out_dtype=None, Tensor? cu_seqlens=None, "
        "Tensor? seqused=None, Tensor? learnable_sink=None, bool return_lse=True"
    ),
}
LENGTHS = Tensors._fields[:6]

_library = torch.library.Library(NAMESPACE, "DEF")


def in_graph(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensors: tuple,
    options: tuple,
    out: torch.Tensor | None,
    changes: tuple,
    return_rng_state: bool,
) -> Any:
    """A call of flash_attn_func or flash_attn_varlen_func as an operator of the graph that is being traced.

    tensors, options: the fields of calls.Tensors and calls.Options, as the caller gave them. changes: the arguments of
    changes.changes_of but q. Mods and sparse blocks leave the graph. Returns and raises as those functions do.
    """
    dropout_p, seed, *others = changes
    if not all(other is None for other in others):
        return _outside(q, k, v, tensors, options, out, changes, return_rng_state)
    given, chosen = Tensors(*tensors), Options(*options)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            checks.refuse(name, "a torch.Tensor", checks.describe(tensor), TypeError)
    by_name = {name: value for name, value in given._asdict().items() if isinstance(value, torch.Tensor)}
    checks.check_forward_only({"q": q, "k": k, "v": v, "out": out, **by_name})
    dropout_p = dropout_p or 0.0
    seed = seed_tensor(seed, q.device) if dropout_p else None
    left, right = (-1, -1) if chosen.window_size is None else chosen.window_size
    named: dict[str, Any] = {
        "softmax_scale": chosen.softmax_scale,
        "causal": chosen.causal,
        "window_left": -1 if left is None else left,
        "window_right": -1 if right is None else right,
        "softcap": chosen.softcap or 0.0,
        "attention_chunk": 0 if chosen.attention_chunk is None else chosen.attention_chunk,
        "num_splits": 0 if chosen.num_splits is None else chosen.num_splits,
        "cp_world_size": 1 if chosen.cp_world_size is None else chosen.cp_world_size,
        "cp_rank": 0 if chosen.cp_rank is None else chosen.cp_rank,
        "dropout_p": dropout_p,
        "dropout_seed": seed,
        "return_lse": chosen.return_lse,
        **by_name,
    }
    for name in ("k_descale", "v_descale"):
        value = getattr(given, name)
        if value is not None and not isinstance(value, torch.Tensor):
            named[f"{name}_number"] = value
    if given.page_table is not None:
        if given.cu_seqlens_k is not None:
            checks.refuse("cu_seqlens_k", "None beside page_table (seqused_k gives the lengths)", "a tensor")
        if given.seqused_k is None:
            checks.refuse("seqused_k", "int32 of shape (batch,) beside page_table", "None")
        kind = "paged_fwd"
    else:
        lengths = (given.cu_seqlens_q, given.cu_seqlens_k, given.seqused_q, chosen.max_seqlen_q, chosen.max_seqlen_k)
        kind = "fwd" if all(value is None for value in lengths) else "varlen_fwd"
    if kind != "fwd":
        named |= {"max_seqlen_q": chosen.max_seqlen_q, "max_seqlen_k": chosen.max_seqlen_k}
    if out is None:
        result, lse = getattr(torch.ops.flash_attn_sm120, kind)(q, k, v, **named)
    else:
        result, lse = out, getattr(torch.ops.flash_attn_sm120, f"{kind}_out")(q, k, v, out=out, **named)
    results = (result, lse) if chosen.return_lse else (result,)
    results = (*results, seed) if return_rng_state else results
    return results if len(results) > 1 else result


def combine_in_graph(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    out: torch.Tensor | None,
    named: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A call of flash_attn_combine as an operator of the graph that is being traced. named: its other arguments."""
    if out is None:
        result, lse = torch.ops.flash_attn_sm120.combine(out_partial, lse_partial, **named)
    else:
        result, lse = out, torch.ops.flash_attn_sm120.combine_out(out_partial, lse_partial, out=out, **named)
    return result, lse if named["return_lse"] else None


@torch.compiler.disable(
    reason="score_mod, mask_mod, aux_tensors, aux_scalars and block_sparse_tensors aren't arguments of an operator: "
    "such a call runs outside of the compiled graph, and fullgraph=True refuses it"
)
def _outside(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensors: tuple,
    options: tuple,
    out: torch.Tensor | None,
    changes: tuple,
    return_rng_state: bool,
) -> Any:
    """As in_graph, right away."""
    if torch.compiler.is_exporting():
        names = ("score_mod", "mask_mod", "aux_tensors", "aux_scalars", "block_sparse_tensors")
        name, value = next((name, value) for name, value in zip(names, changes[2:], strict=True) if value is not None)
        checks.refuse(name, "None in torch.export", checks.describe(value), NotImplementedError)
    return _call(q, k, v, tensors, options, out, changes, return_rng_state)


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensors: tuple,
    options: tuple,
    out: torch.Tensor | None,
    changes: tuple,
    return_rng_state: bool = False,
) -> Any:
    """What the public functions do, from the fields of calls.Tensors and calls.Options."""
    *fixed, max_seqlen_q, max_seqlen_k = options
    most = interface.most_of(max_seqlen_q, max_seqlen_k, Options(*options).num_splits)
    options = (*fixed, *most)
    return interface._forward(q, k, v, tensors, options, out, changes, return_rng_state, max_seqlen_q, max_seqlen_k)


def _run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None, named: dict[str, Any]) -> Any:
    """An operator's work. named: its arguments besides; those with their default may be missing."""
    get = named.get
    factors = []
    for name in ("k_descale", "v_descale"):
        tensor, number = get(name), get(f"{name}_number")
        if tensor is not None and number is not None:
            checks.refuse(f"{name}_number", f"None beside {name}", number)
        factors.append(number if tensor is None else tensor)
    tensors = (*map(get, LENGTHS), get("learnable_sink"), get("alibi_slopes"), *factors)
    options = (
        get("softmax_scale"), get("causal", False), (get("window_left", -1), get("window_right", -1)),
        get("softcap", 0.0), get("return_lse", False), get("num_splits", 0), get("attention_chunk", 0),
        get("cp_world_size", 1), get("cp_rank", 0), get("max_seqlen_q"), get("max_seqlen_k"),
    )  # fmt: skip
    dropout_p, seed, changes = get("dropout_p", 0.0), get("dropout_seed"), UNCHANGED
    if dropout_p:
        if seed is None:
            checks.refuse("dropout_seed", "int64 of shape (2,) beside dropout_p", "None")
        changes = (dropout_p, seed, *UNCHANGED[2:])
    return _call(q, k, v, tensors, options, out, changes)


def _bound(kind: str, rest: tuple, named: dict[str, Any]) -> dict[str, Any]:
    """Arguments after q, k and v, by name."""
    return {**dict(zip(_POSITIONAL[kind], rest, strict=False)), **named}


_POSITIONAL = {
    "fwd": (),
    "varlen_fwd": ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
    "paged_fwd": ("page_table", "seqused_k", "cu_seqlens_q", "max_seqlen_q", "max_seqlen_k"),
}


def _kernel(kind: str) -> Callable:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **named: Any) -> tuple:
        result = _run(q, k, v, None, _bound(kind, rest, named))
        return result if isinstance(result, tuple) else (result, q.new_empty(0, dtype=torch.float32))

    return run


def _kernel_out(kind: str) -> Callable:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, out: torch.Tensor, **named: Any) -> Any:
        result = _run(q, k, v, out, _bound(kind, rest, named))
        return result[1] if isinstance(result, tuple) else q.new_empty(0, dtype=torch.float32)

    return run


def _fake_lse(q: torch.Tensor, named: dict[str, Any]) -> torch.Tensor:
    if not named.get("return_lse", False):
        return q.new_empty(0, dtype=torch.float32)
    packed = named.get("cu_seqlens_q") is not None
    shape = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(shape, dtype=torch.float32)


def _fake(kind: str) -> Callable:
    def shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **named: Any) -> tuple:
        checks.check_forward_only({"q": q, "k": k, "v": v})
        return q.new_empty((*q.shape[:-1], v.shape[-1])), _fake_lse(q, _bound(kind, rest, named))

    return shapes


def _fake_out(kind: str) -> Callable:
    def shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        out = named.pop("out")
        checks.check_forward_only({"q": q, "k": k, "v": v, "out": out})
        return _fake_lse(q, _bound(kind, rest, named))

    return shapes


def _combine(out_partial: torch.Tensor, lse_partial: torch.Tensor, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from flash_attn_sm120.combine import combine

    result, lse = combine(out_partial, lse_partial, **named)
    return result, out_partial.new_empty(0) if lse is None else lse


def _combine_out(out_partial: torch.Tensor, lse_partial: torch.Tensor, **named: Any) -> torch.Tensor:
    return _combine(out_partial, lse_partial, **named)[1]


def _fake_combine_lse(out_partial: torch.Tensor, return_lse: bool) -> torch.Tensor:
    if not return_lse:
        return out_partial.new_empty(0)
    *before, rows, heads = out_partial.shape[1:-1]
    return out_partial.new_empty((*before, heads, rows)).mT


def _fake_combine(out_partial: torch.Tensor, lse_partial: torch.Tensor, **named: Any) -> tuple:
    checks.check_forward_only({"out_partial": out_partial, "lse_partial": lse_partial})
    result = out_partial.new_empty(out_partial.shape[1:], dtype=named.get("out_dtype") or torch.float32)
    return result, _fake_combine_lse(out_partial, named.get("return_lse", True))


def _fake_combine_out(out_partial: torch.Tensor, lse_partial: torch.Tensor, **named: Any) -> torch.Tensor:
    checks.check_forward_only({"out_partial": out_partial, "lse_partial": lse_partial, "out": named["out"]})
    return _fake_combine_lse(out_partial, named.get("return_lse", True))


def _define(name: str, schema: str, kernel: Callable, fake: Callable) -> None:
    _library.define(f"{name}({schema}", tags=torch.Tag.pt2_compliant_tag)
    for key in ("CUDA", "CPU"):
        _library.impl(name, kernel, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


for _kind in _POSITIONAL:
    _define(_kind, f"{ARGUMENTS[_kind]}) -> (Tensor, Tensor)", _kernel(_kind), _fake(_kind))
    _define(f"{_kind}_out", f"{ARGUMENTS[_kind]}, Tensor(a!) out) -> Tensor", _kernel_out(_kind), _fake_out(_kind))
_define("combine", f"{ARGUMENTS['combine']}) -> (Tensor, Tensor)", _combine, _fake_combine)
_define("combine_out", f"{ARGUMENTS['combine']}, Tensor(a!) out) -> Tensor", _combine_out, _fake_combine_out)
