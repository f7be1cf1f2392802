"""flash_attn_func and flash_attn_varlen_func: check, default, launch.

Names and order are those of flash-attn 2 and its CuTe successor, so that a call moves over by changing the import.
Idea: Dao, FlashAttention-2 (2023); split keys: Dao et al., Flash-Decoding (2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.compiler import is_compiling

from flash_attn_sm120 import calls, checks
from flash_attn_sm120.arguments import Modifiers
from flash_attn_sm120.block_sparse import BlockSparseTensors
from flash_attn_sm120.calls import Call, Options, Tensors
from flash_attn_sm120.changes import UNCHANGED, Changes, changes_of, kernel_fields
from flash_attn_sm120.changes import signature as change_signature
from flash_attn_sm120.checks_serving import check_num_splits, check_q_descale, one_of
from flash_attn_sm120.dispatch import use_decode
from flash_attn_sm120.prepare import check_values, prepare
from flash_attn_sm120.scheduling import SchedulerMetadata, splits_of
from flash_attn_sm120.strides import aligned, aligned_pool, target_for
from flash_attn_sm120.workspace import partials, tickets

NO_TENSORS: tuple = (None,) * len(Tensors._fields)
NO_MODIFIERS = Modifiers()
KEYS_STEP = 256  # max_seqlen_k counts in steps


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    learnable_sink: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    attention_chunk: int = 0,
    seqused_k: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    q_descale: float | None = None,
    k_descale: torch.Tensor | float | None = None,
    v_descale: torch.Tensor | float | None = None,
    num_splits: int = 0,
    scheduler_metadata: SchedulerMetadata | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    aux_tensors: Sequence[torch.Tensor] | None = None,
    aux_scalars: Sequence[int | float] | None = None,
    block_sparse_tensors: BlockSparseTensors | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    return_rng_state: bool = False,
    **later: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(q @ k^T * softmax_scale) @ v for each head. Forward only.

    q: (batch, seqlen_q, heads, head_dim), bfloat16 or float16, on a GPU of compute capability 9.0 or later.
    k: (batch, seqlen_k, heads_kv, head_dim), v: (batch, seqlen_k, heads_kv, head_dim_v); heads % heads_kv == 0, query
        head h reads KV head h // (heads // heads_kv). head_dim and head_dim_v: multiples of 8 up to 256.
        Any strides with a contiguous last dimension. A tensor whose address isn't a multiple of 16 bytes, or whose
        strides aren't, is copied first. dtype of q, or float8_e4m3fn or float8_e5m2, then with head_dim and head_dim_v
        that are multiples of 16; rows of bfloat16 q that have an element of 2^24 or more are NaN then, but in calls of
        at most 16 rows.
    softmax_scale: 1 / sqrt(head_dim) if None.
    causal: query row i sees the columns up to i + seqlen_k - seqlen_q (the last row is aligned with the last column).
    window_size: (left, right), the row sees columns from i + seqlen_k - seqlen_q - left to + right; -1 or None is
        unbounded. causal makes right 0. Blocks outside the window are never loaded.
    softcap: scores become softcap * tanh(score / softcap), after the scale; 0 is off.
    learnable_sink (s_aux): (heads,) bfloat16 or float32, one more logit for each row of a head that has no value; lse
        counts it. Source: Agarwal et al., gpt-oss (2025).
    alibi_slopes: (heads,) or (batch, heads) float32; after the softcap, slope * |i + seqlen_k - seqlen_q - column| is
        taken off the score. Source: Press et al., ALiBi (2022).
    attention_chunk: c > 0: a row at p = i + seqlen_k - seqlen_q sees only columns of its own chunk, from p // c * c to
        p // c * c + c - 1, within causal and window_size; 0 is off.
    seqused_k: int32 (batch,), how many of seqlen_k columns each batch entry has.
    page_table (block_table): int32 (batch, pages): k and v are pools (num_pages, page_size, heads_kv, head_dim and
        head_dim_v), page_size a multiple of 8; row r of batch entry b is row r % page_size of page
        page_table[b, r // page_size]. seqused_k is needed; entries beyond a length are never read. Pools are never
        copied: addresses and strides must be multiples of 16 bytes. Source: Kwon et al., PagedAttention (2023).
    k_descale, v_descale: float32 (batch, heads_kv), (1,) or (), or a number; k and v are multiplied by it. More than 0.
    q_descale: None or 1.
    num_splits: how many parts the keys are cut into, which other thread blocks work on; the last of them combines;
        1: whole, up to 64; 0: chosen from sizes. More than one, or at most 16 rows, is the decode kernel's.
    scheduler_metadata: of get_scheduler_metadata; stands for num_splits where that is 0.
    cp_world_size, cp_rank, cp_tot_seqused_k: context parallel. k and v hold every cp_world_size-th key of a sequence,
        from key cp_rank on, of cp_tot_seqused_k, int32 (batch,); masks and slopes count positions over all ranks. The
        results of all ranks go to flash_attn_combine.
    dropout_p: from 0 to below 1, rounded to a multiple of 2^-39: the chance that a weight is dropped after the softmax;
        the others are multiplied by 1 / (1 - dropout_p), lse is without dropout.
    dropout_seed: an int from 0 to 2^64 - 1, or int64 of shape (2,) on the GPU with its low and high 32 bits, which a
        replayed graph reads anew; None draws one from PyTorch's generator. What is dropped follows from it, the batch
        entry, head, row and column alone: flash_attn_sm120.dropout_mask. Source: Salmon et al., Philox (2011).
    score_mod: score_mod(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors) -> score, of scores after the
        scale; mask_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors) -> whether the row sees the column, beside
        causal and window_size. Functions for CuTe DSL, most often @cute.jit: score is a Float32 TensorSSA, batch to
        kv_idx are Int32 ones, of as many elements as the function's attribute __vec_size__ says (1 without), all of one
        row, columns in neighbouring pairs; seqlen_info has seqlen_q, seqlen_k, offset_q and offset_k (first rows in
        packed tensors). Compiled once for the same code. Ready-made: flash_attn_sm120.mods.
        Source: PyTorch, FlexAttention (2024).
    aux_tensors, aux_scalars: what mods get as aux_tensors: tensors of any dtype and strides, then Int32 or Float32.
        The q_idx and kv_idx that they get with it are places that exist.
    block_sparse_tensors: a BlockSparseTensors, which blocks of rows and columns are computed; mask_mod is asked in the
        blocks of its mask list alone. Rows without a block are 0, their lse -inf.
    out: (batch, seqlen_q, heads, head_dim_v), written in place and returned.
    return_lse: also return the natural log of each row's sum of exponentials.
    return_rng_state: also return dropout's seed, (2,) int64 on the GPU, or None without dropout.
    later: deterministic (this forward always is) and pack_gqa (forced off: it would change the speed, not the result)
        are accepted, return_attn_probs at its neutral value only.

    dropout, mods and block_sparse_tensors don't go with num_splits > 1 and context parallel; score_mod not with softcap
    and alibi_slopes, which there are mods for; block_sparse_tensors not with float8.

    Returns out, or (out, lse) with lse (batch, heads, seqlen_q) float32. A row that sees nothing is 0, its lse the
    sink, or -inf without one.

    Raises ValueError (shape, value, device), TypeError (kind, dtype) or NotImplementedError (valid, but not offered),
    before any launch, in the form `argument: expected ..., got ...`.
    """
    if later:
        checks.check_later("flash_attn_func", later)
    if isinstance(q, torch.Tensor) and q.dim() == 3:
        hint = f"{checks.describe(q)} (packed tensors go to flash_attn_varlen_func)"
        checks.refuse("q", "(batch, seqlen_q, heads, head_dim)", hint)
    if block_table is not None:
        page_table = one_of("page_table", page_table, "block_table", block_table)
    if s_aux is not None:
        learnable_sink = one_of("learnable_sink", learnable_sink, "s_aux", s_aux)
    if q_descale is not None:
        check_q_descale(q_descale)
    if scheduler_metadata is not None:
        num_splits = splits_of(scheduler_metadata, num_splits)
    tensors = NO_TENSORS
    if not (
        seqused_k is page_table is cp_tot_seqused_k is learnable_sink is alibi_slopes is k_descale is v_descale is None
    ):
        lengths = (None, None, None, seqused_k, page_table, cp_tot_seqused_k)
        tensors = (*lengths, learnable_sink, alibi_slopes, k_descale, v_descale)
    options = (
        softmax_scale, causal, window_size, softcap, return_lse, num_splits,
        attention_chunk, cp_world_size, cp_rank, None, None,
    )  # fmt: skip
    given = UNCHANGED
    if dropout_p or not (score_mod is mask_mod is aux_tensors is aux_scalars is block_sparse_tensors is None):
        given = (dropout_p, dropout_seed, score_mod, mask_mod, aux_tensors, aux_scalars, block_sparse_tensors)
    if is_compiling():
        return _in_graph(q, k, v, tensors, options, out, given, return_rng_state)
    return _forward(q, k, v, tensors, options, out, given, return_rng_state)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    learnable_sink: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    attention_chunk: int = 0,
    q_descale: float | None = None,
    k_descale: torch.Tensor | float | None = None,
    v_descale: torch.Tensor | float | None = None,
    num_splits: int = 0,
    scheduler_metadata: SchedulerMetadata | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    aux_tensors: Sequence[torch.Tensor] | None = None,
    aux_scalars: Sequence[int | float] | None = None,
    block_sparse_tensors: BlockSparseTensors | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    return_rng_state: bool = False,
    **later: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """flash_attn_func for sequences of different lengths: packed one behind the other, padded, or keys in pages.

    q: (total_q, heads, head_dim) with cu_seqlens_q, or (batch, seqlen_q, heads, head_dim) without.
    k, v: (total_k, heads_kv, head_dim / head_dim_v) with cu_seqlens_k, or (batch, seqlen_k, heads_kv, ...) without, or
        pools with page_table; q may be packed and k padded, or the other way round.
    cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), contiguous, from 0: sequence b is rows cu_seqlens[b] to [b + 1].
        cu_seqlens_k doesn't go with page_table, where seqused_k has the lengths.
    max_seqlen_q, max_seqlen_k: the longest lengths, or more. Where q is packed, max_seqlen_q of at most 16 makes a
        call the decode kernel's. num_splits = 0 goes by max_seqlen_k, or by what the tensors have room for. The
        result doesn't depend on them.
    seqused_q, seqused_k: int32 (batch,), how many rows of each sequence take part, packed or padded. The rows of q
        beyond seqused_q become 0, their lse -inf.
    The rest as in flash_attn_func; masks align at the end of each sequence.

    Returns out of q's form with head_dim_v columns, or (out, lse) with lse float32 (heads, total_q) for packed q,
    (batch, heads, seqlen_q) for padded q. Rows of a packed q past cu_seqlens_q[-1] belong to no sequence and are not
    written.

    Raises as flash_attn_func does. What tensors of lengths and pages contain is on the device, and reading it would
    wait for the GPU: with FLASH_ATTN_SM120_CHECK=1 in the environment at import it is checked on every call (first
    value 0, never falling, within the tensor, seqused within its sequence or table, max_seqlen not too small, pages
    within the pool, scales more than 0, a rank's share of the keys); otherwise the kernel clamps lengths and pages so
    that nothing outside the tensors is touched.
    """
    if later:
        checks.check_later("flash_attn_varlen_func", later)
    if block_table is not None:
        page_table = one_of("page_table", page_table, "block_table", block_table)
    if s_aux is not None:
        learnable_sink = one_of("learnable_sink", learnable_sink, "s_aux", s_aux)
    if q_descale is not None:
        check_q_descale(q_descale)
    if scheduler_metadata is not None:
        num_splits = splits_of(scheduler_metadata, num_splits)
    tensors = (
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table,
        cp_tot_seqused_k, learnable_sink, alibi_slopes, k_descale, v_descale,
    )  # fmt: skip
    given = UNCHANGED
    if dropout_p or not (score_mod is mask_mod is aux_tensors is aux_scalars is block_sparse_tensors is None):
        given = (dropout_p, dropout_seed, score_mod, mask_mod, aux_tensors, aux_scalars, block_sparse_tensors)
    if is_compiling():
        options = (
            softmax_scale, causal, window_size, softcap, return_lse, num_splits,
            attention_chunk, cp_world_size, cp_rank, max_seqlen_q, max_seqlen_k,
        )  # fmt: skip
        return _in_graph(q, k, v, tensors, options, out, given, return_rng_state)
    options = (
        softmax_scale, causal, window_size, softcap, return_lse, num_splits, attention_chunk, cp_world_size, cp_rank,
        *most_of(max_seqlen_q, max_seqlen_k, num_splits),
    )  # fmt: skip
    return _forward(q, k, v, tensors, options, out, given, return_rng_state, max_seqlen_q, max_seqlen_k)


def most_of(max_seqlen_q: Any, max_seqlen_k: Any, num_splits: Any) -> tuple[int | None, int | None]:
    """The last two of a call's options. The plain kernel has no use for them: its calls don't differ by them."""
    checks.check_max_seqlen("max_seqlen_q", max_seqlen_q)
    checks.check_max_seqlen("max_seqlen_k", max_seqlen_k)
    if num_splits.__class__ is not int:
        num_splits = check_num_splits(num_splits)
    if not use_decode(max_seqlen_q, num_splits):
        return None, None
    return max_seqlen_q, max_seqlen_k and -(-max_seqlen_k // KEYS_STEP) * KEYS_STEP


def _in_graph(*call: Any) -> Any:
    from flash_attn_sm120.integrations import torch_ops

    return torch_ops.in_graph(*call)


def _with_rng_state(result: Any, changes: Changes | None) -> tuple:
    state = None if changes is None else changes.dropout_seed
    return (*result, state) if isinstance(result, tuple) else (result, state)


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensors: tuple,
    options: tuple,
    out: torch.Tensor | None,
    given: tuple,
    return_rng_state: bool = False,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Any:
    """tensors and options: the fields of calls.Tensors and calls.Options; plain tuples are made in less time. given:
    what changes_of takes after q, or UNCHANGED itself."""
    changes = None if given is UNCHANGED else changes_of(q, *given)
    key: tuple | None
    try:
        # True == 1 and hashes alike, but only one of them is a bool
        key = (
            q.shape, q.stride(), q.dtype, q.get_device(), k.shape, k.stride(), k.dtype, k.get_device(),
            v.shape, v.stride(), v.dtype, v.get_device(), signature(out),
            tensors if tensors is NO_TENSORS else tuple(map(signature, tensors)),
            options, options[1].__class__, options[4].__class__, changes and change_signature(changes),
        )  # fmt: skip
        call = calls.known.get(key)
    except (AttributeError, TypeError):
        key = call = None
    if call is None:
        call = prepare(q, k, v, Tensors(*tensors), Options(*options), out, changes)
        if key is not None:
            calls.remember(key, call)
    if q.requires_grad or k.requires_grad or v.requires_grad or (out is not None and out.requires_grad):
        checks.check_forward_only({"q": q, "k": k, "v": v, "out": out})
        q, k, v = q.detach(), k.detach(), v.detach()
    if checks.VALUE_CHECKS and not (tensors is NO_TENSORS and changes is None):
        check_values(q, k, Tensors(*tensors), call, max_seqlen_q, max_seqlen_k, changes)

    result: Any = q.new_empty(call.out_shape) if out is None else out
    lse = q.new_empty(call.lse_shape, dtype=torch.float32) if call.lse_shape is not None else None
    if call.launcher is not None:
        packed = tensors[0] is not None
        target = result if out is None else target_for(out, (q, k, v), call.reaches, call.writable, packed)
        if not call.readable or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
            q = aligned(q)
            k, v = (aligned(k), aligned(v)) if tensors[4] is None else (aligned_pool("k", k), aligned_pool("v", v))
        if call.device_index is not None and call.device_index != torch.cuda.current_device():
            with torch.cuda.device(call.device_index):
                _launch(call, q, k, v, target, lse, tensors, changes)
        else:
            _launch(call, q, k, v, target, lse, tensors, changes)
        if out is not None and target.data_ptr() != out.data_ptr():
            out.detach().copy_(target)
    if lse is not None:
        result = (result, lse)
    return _with_rng_state(result, changes) if return_rng_state else result


def _launch(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    tensors: tuple,
    changes: Changes | None,
) -> None:
    """On tensors that kernels can follow. tensors: as in _forward."""
    lengths: tuple = tensors[:6]
    modifiers: tuple = NO_MODIFIERS
    if lengths[5] is not None and not call.context_parallel:
        lengths = (*lengths[:5], None)
    if call.modifiers is not None:
        modifiers = (*[way(given) for way, given in zip(call.modifiers, tensors[6:], strict=True)], None, None, None)
    if changes is not None:
        modifiers = (*modifiers[:4], *kernel_fields(changes, call.batch, call.heads, q.device))
    if call.takes_queue:
        queue = (tickets(1, q.device), call.sm_count) if call.sm_count else None
        call.launcher(q, k, v, out, lse, lengths, modifiers, call.numbers, queue)
        return
    if not call.num_splits:
        call.launcher(q, k, v, out, lse, lengths, modifiers, call.numbers)
        return
    shared = partials(q, call) if call.num_splits > 1 else None
    call.launcher(q, k, v, out, lse, lengths, modifiers, call.numbers, shared)


def signature(tensor: torch.Tensor | float | None) -> Any:
    """A tensor without its address and contents; a number with its type."""
    if tensor is None:
        return None
    if isinstance(tensor, (int, float)):
        return tensor, tensor.__class__
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device()
