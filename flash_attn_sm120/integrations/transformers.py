"""transformers on these kernels: register(), then attn_implementation="flash_attn_sm120". transformers 5.

A mask function hears once for each forward which keys there are, and says it in a form that costs the layers little; an
attention function does the layers' calls. Both can be part of a graph of torch.compile.

What the mask function hands to the layers is None where every query and key is one of a sequence that ends with both;
else an int32 tensor of four dimensions, which transformers passes on as it is:
    (fields, 1, 1, batch): how many keys each batch entry has; then, where queries end elsewhere than keys do, how many
        queries; then, where keys have to be brought to the front, their places in that order (seqlen_k fields), then
        those of queries (seqlen_q fields). Fields are 1, 2, 1 + seqlen_k or 2 + seqlen_k + seqlen_q.
    (1, 1, sequences + 1, 1): cu_seqlens of packed sequences, over all rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch

from flash_attn_sm120.checks import describe, refuse
from flash_attn_sm120.interface import flash_attn_func, flash_attn_varlen_func

if TYPE_CHECKING:
    from torch import nn

NAME = "flash_attn_sm120"
# What models hand to every attention function, of no meaning to this one.
OTHERS = (
    "position_ids", "cache_position", "position_embeddings", "use_cache", "return_dict", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "logits_to_keep", "token_type_ids", "mm_token_type_ids", "seq_idx",
)  # fmt: skip
PLAIN = ("causal_mask_function", "bidirectional_mask_function")
OVERLAYS = ("sliding_window_overlay", "sliding_window_bidirectional_overlay", "chunked_overlay")
PACKED = "packed_sequence_mask_function"
REMAPPED = "remap_positions_for_packed_sequence"

_masks: Any = None  # transformers.masking_utils, once registered


def register() -> None:
    """Makes "flash_attn_sm120" an attention implementation of transformers; once is enough, more does no harm.

    Raises ImportError without transformers, NotImplementedError where it is older than 5."""
    import transformers
    from transformers import masking_utils
    from transformers import modeling_flash_attention_utils as loader

    global _masks

    if int(transformers.__version__.split(".")[0]) < 5:
        refuse("transformers", "5 or later", transformers.__version__, NotImplementedError)
    _masks = masking_utils
    transformers.AttentionInterface.register(NAME, attention)
    transformers.AttentionMaskInterface.register(NAME, mask)
    # a name with "flash" in it is one of a package, to be imported, and models have lists of those that they take
    _before(loader, "_lazy_imports", _imports_before)
    _before(transformers.PreTrainedModel, "_check_and_adjust_attn_implementation", _check_before)


def _before(owner: Any, name: str, make: Callable) -> None:
    """Puts what `make` makes of a function of transformers in its place, once."""
    original = getattr(owner, name)
    if not hasattr(original, NAME):
        made = make(original, owner)
        setattr(made, NAME, True)
        setattr(owner, name, made)


def _imports_before(original: Callable, loader: Any) -> Callable:
    """The loader of flash attention packages, for which this one is loaded."""

    def lazy_imports(implementation: str | None, *rest: Any, **named: Any) -> tuple:
        if implementation == NAME:
            return flash_attn_func, flash_attn_varlen_func, None, loader._pad_input, loader._unpad_input
        return original(implementation, *rest, **named)

    return lazy_imports


def _check_before(original: Callable, _: Any) -> Callable:
    """A model's look at the implementation's name, which all of them take if it is this one."""

    def check(self: Any, attn_implementation: str | None, *rest: Any, **named: Any) -> str:
        return NAME if attn_implementation == NAME else original(self, attn_implementation, *rest, **named)

    return check


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """A layer's attention, as transformers calls it.

    query: (batch, heads, seqlen_q, head_dim), key and value: (batch, heads_kv, seqlen_k, head_dim and head_dim_v), all
        keys that a cache holds, whether written or not; bfloat16 or float16.
    attention_mask: of the mask function beside. sliding_window: a query sees that many keys up to its own, without
        is_causal (the module's if None) as many behind it. s_aux: (heads,) sinks.
    cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: of packed sequences in a batch of 1.

    Returns ((batch, seqlen_q, heads, head_dim_v), None): there are no weights. Raises as flash_attn_func does,
    TypeError for unknown options, NotImplementedError for weights, masks of the caller's own and paged caches.
    """
    _check(module, sliding_window, others)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    reach = -1 if sliding_window is None else sliding_window - 1
    options: dict[str, Any] = {"softmax_scale": scaling, "causal": causal, "window_size": (reach, reach)}
    options |= {"softcap": softcap or 0.0, "dropout_p": dropout}
    if s_aux is not None:
        options["learnable_sink"] = s_aux.float() if s_aux.dtype == torch.float16 else s_aux
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        return _by_cu_seqlens(q, k, v, attention_mask, lengths, options), None
    if attention_mask is None:
        return cast(torch.Tensor, flash_attn_func(q, k, v, **options)), None
    return _masked(q, k, v, attention_mask, options), None


def _check(module: nn.Module, sliding_window: int | None, others: dict[str, Any]) -> None:
    """Nothing that is asked for is passed over."""
    if others.get("output_attentions"):
        refuse("output_attentions", "False (there are no weights)", True, NotImplementedError)
    if others.get("cache") is not None:
        refuse("cache", "None (no continuous batching)", type(others["cache"]).__name__, NotImplementedError)
    for name, value in others.items():
        if name not in OTHERS and value is not None and value is not False:
            refuse(name, "no such option", describe(value), TypeError)
    kinds, layer = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    if kinds is not None and layer is not None and layer < len(kinds):
        if kinds[layer] == "sliding_attention" and sliding_window is None:
            refuse("sliding_window", "an int in a layer of sliding attention", "None", NotImplementedError)


def _by_cu_seqlens(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention_mask: Any, lengths: tuple, options: dict[str, Any]
) -> torch.Tensor:
    """Packed sequences whose lengths the caller gives."""
    if q.shape[0] != 1:
        refuse("cu_seq_lens_q", "a batch of 1 beside it", q.shape[0])
    if lengths[0] is None or lengths[1] is None:
        refuse("cu_seq_lens_q", "cu_seq_lens_k beside it", "one of them")
    if attention_mask is not None and not (_is_layout(attention_mask) and attention_mask.shape[2] > 1):
        refuse("attention_mask", "None beside cu_seq_lens_q", describe(attention_mask))
    where_q, where_k = (where.to(torch.int32) for where in lengths[:2])
    out = flash_attn_varlen_func(q[0], k[0], v[0], where_q, where_k, *lengths[2:], **options)
    return cast(torch.Tensor, out).unsqueeze(0)


def _is_layout(given: Any) -> bool:
    return isinstance(given, torch.Tensor) and given.dtype == torch.int32 and given.dim() == 4


def _masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """With what the mask function made."""
    batch, seqlen_q, seqlen_k = *q.shape[:2], k.shape[1]
    if not _is_layout(layout):
        expected = "None, or a padding mask (batch, tokens) that went through the model's own masks"
        refuse("attention_mask", expected, describe(layout), NotImplementedError)
    if layout.shape[2] > 1:
        where = layout.flatten()
        packed = flash_attn_varlen_func(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), where, where, **options)
        return cast(torch.Tensor, packed).unflatten(0, (batch, seqlen_q))
    fields = layout.shape[0]
    if fields not in (1, 2, 1 + seqlen_k, 2 + seqlen_k + seqlen_q) or layout.shape[3] != batch:
        expected = f"one for {batch} sequences of {seqlen_q} queries and {seqlen_k} keys"
        refuse("attention_mask", expected, describe(layout))
    used_k, used_q, order_q = layout[0, 0, 0], None, None
    rows = torch.arange(batch, device=q.device)[:, None]
    places = layout[:, 0, 0].T
    if fields == 2 or fields > 1 + seqlen_k:
        used_q = layout[1, 0, 0]
    if fields > 2:
        order_k = places[:, fields - seqlen_k :] if used_q is None else places[:, 2 : 2 + seqlen_k]
        k, v = k[rows, order_k], v[rows, order_k]
        if used_q is not None:
            order_q = places[:, 2 + seqlen_k :]
            q = q[rows, order_q]
    out = cast(torch.Tensor, flash_attn_varlen_func(q, k, v, seqused_q=used_q, seqused_k=used_k, **options))
    if order_q is None:
        return out
    restored = torch.empty_like(out)
    restored[rows, order_q] = out
    return restored


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **others: Any,
) -> torch.Tensor | None:
    """What the attention function takes as attention_mask, see above; called once for each kind of layer.

    attention_mask: (batch, tokens) bool, True where there is one. q_offset, kv_offset: positions of the first query and
    key. Outside of a graph it waits for the device where there is a padding mask.
    Raises NotImplementedError for masks other than causal, sliding, chunked, bidirectional, padded and packed ones.
    """
    names = patterns(mask_function)
    if use_vmap or names is None:
        expected = "a causal, sliding, bidirectional or packed mask, without functions on top"
        refuse("mask_function", expected, getattr(mask_function, "__qualname__", mask_function), NotImplementedError)
    traced = torch.compiler.is_compiling()
    if PACKED in names or (traced and names == {"and_masks"} and not allow_is_causal_skip and q_length > 1):
        return _packed(mask_function, batch_size, q_length, device, traced)
    positional = names != {"bidirectional_mask_function"}
    # of the keys that a cache holds, the last query is at the last one that is written
    written = q_offset + q_length - kv_offset if positional else kv_length
    if attention_mask is None:
        if isinstance(written, torch.Tensor) or written != kv_length:
            filled = torch.as_tensor(written, device=device, dtype=torch.int32)
            return filled.expand(1, 1, 1, batch_size).contiguous()
        return None
    missing = max(kv_offset + kv_length - attention_mask.shape[1], 0)
    there = torch.nn.functional.pad(attention_mask, (0, missing))[:, kv_offset : kv_offset + kv_length].bool()
    if positional:
        slots = torch.arange(kv_length, device=device)
        there = there & (slots < written)
        queries = there[:, torch.arange(q_length, device=device) + (written - q_length)]
    else:
        queries = None
    windowed = bool(names & {"and_masks", *OVERLAYS[:2]})
    return (_traced_layout if traced else _layout)(there, queries, windowed)


def patterns(mask_function: Any) -> set[str] | None:
    """Names of what a mask function of transformers is made of, None where that is not known.

    In a graph that is traced an intersection is {"and_masks"}: there its parts can't be looked at."""
    for name in PLAIN:
        if mask_function is getattr(_masks, name):
            return {name}
    if torch.compiler.is_compiling():
        return {"and_masks"} if mask_function.__code__.co_name == "and_mask" else None
    outer, nested, _ = getattr(mask_function, "__qualname__", "").partition(".<locals>.")
    if not nested or mask_function.__module__ != _masks.__name__:
        return None
    if outer in (*OVERLAYS, PACKED):
        return {outer}
    if outer not in ("and_masks", REMAPPED):
        return None
    cells = dict(zip(mask_function.__code__.co_freevars, mask_function.__closure__, strict=True))
    inner = cells["mask_functions"].cell_contents if outer == "and_masks" else (cells["mask_function"].cell_contents,)
    found: set[str] = set()
    for part in map(patterns, inner):
        if part is None:
            return None
        found |= part
    return found


def _packed(mask_function: Any, batch: int, seqlen: int, device: torch.device | str, traced: bool) -> torch.Tensor:
    """cu_seqlens of sequences that lie behind one another: one begins at each row that doesn't see the row before."""
    entry = torch.arange(batch, device=device)[:, None]
    row = torch.arange(seqlen, device=device)[None]
    joined = mask_function(entry, torch.zeros_like(entry), row, (row - 1).clamp(min=0)) & (row > 0)
    joined = joined.expand(batch, seqlen).flatten()
    total = batch * seqlen
    if traced:  # as many as there may be, the last ones empty
        places = torch.arange(total, device=device)
        begins = torch.where(joined, total, places).sort().values
    else:
        begins = (~joined).nonzero().flatten()
    where = torch.nn.functional.pad(begins, (0, 1), value=total)
    return where.to(torch.int32)[None, None, :, None]


def _layout(there: torch.Tensor, queries: torch.Tensor | None, windowed: bool) -> torch.Tensor | None:
    """The least that says which keys (batch, seqlen_k) and which queries (batch, seqlen_q) there are; reads them."""
    fully, in_front, in_one_piece = there.all(), ~_starts(there).any(), _in_one_piece(there)
    last = torch.ones_like(fully) if queries is None else ~(queries[:, :-1] & ~queries[:, 1:]).any()
    fully, in_front, in_one_piece, queries_last = torch.stack((fully, in_front, in_one_piece, last)).tolist()
    if windowed and not in_one_piece:
        refuse("attention_mask", "padding at the ends only in a sliding window", "padding between", NotImplementedError)
    if fully:
        return None
    keys = there.sum(1, dtype=torch.int32)[None]
    if in_front:
        fields = [keys] if queries is None or queries_last else [keys, queries.sum(1, dtype=torch.int32)[None]]
    elif queries is None or queries_last:
        fields = [keys, _to_the_front(there)]
    else:
        fields = [keys, queries.sum(1, dtype=torch.int32)[None], _to_the_front(there), _to_the_front(queries)]
    return torch.cat(fields)[:, None, None].contiguous()


def _starts(there: torch.Tensor) -> torch.Tensor:
    """Where tokens follow padding."""
    return there[:, 1:] & ~there[:, :-1]


def _in_one_piece(there: torch.Tensor) -> torch.Tensor:
    """Whether no padding lies between the tokens of a sequence; ()."""
    return (_starts(there).sum(1) + there[:, 0] <= 1).all()


def _traced_layout(there: torch.Tensor, queries: torch.Tensor | None, windowed: bool) -> torch.Tensor:
    """One that is right whatever the masks hold, which a graph can't look at; it can fail by it when it runs."""
    if windowed:
        torch._assert_async(_in_one_piece(there), "attention_mask: expected padding at the ends only in a window")
    fields = [there.sum(1, dtype=torch.int32)[None]]
    if there.shape[1] > 1:
        fields.append(_to_the_front(there))
    if queries is not None and queries.shape[1] > 1:
        fields = [fields[0], queries.sum(1, dtype=torch.int32)[None], *fields[1:], _to_the_front(queries)]
    return torch.cat(fields)[:, None, None].contiguous()


def _to_the_front(there: torch.Tensor) -> torch.Tensor:
    """(tokens, batch) int32: the places of those that there are, in their order, then of the others."""
    return (~there).to(torch.int8).argsort(dim=1, stable=True).to(torch.int32).T
