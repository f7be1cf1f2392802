"""Arguments that change what is computed: dropout, mods with what they read, lists of blocks.

Checked and brought into the form that kernels take; a call without any of them does nothing here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from flash_attn_sm120.arguments import BlockLists, Dropout
from flash_attn_sm120.block_sparse import BlockSparseTensors
from flash_attn_sm120.checks import describe, refuse
from flash_attn_sm120.checks_sparse import check_aux, check_block_sparse, check_block_sparse_values
from flash_attn_sm120.dropout import check_dropout_p, seed_tensor, thresholds
from flash_attn_sm120.mod_key import mod_of
from flash_attn_sm120.problem import Mod
from flash_attn_sm120.workspace import lasting

UNCHANGED: tuple = (0.0, None, None, None, None, None, None)  # what changes_of takes after q, of a call without any
_no_blocks: dict[torch.device, torch.Tensor] = {}


class Changes(NamedTuple):
    """A call's, where it has any. aux: tensors, then numbers."""

    dropout_p: float = 0.0
    dropout_seed: torch.Tensor | None = None  # where dropout_p isn't 0
    score_mod: Mod | None = None
    mask_mod: Mod | None = None
    aux: tuple = ()
    aux_kinds: tuple = ()  # as AttentionProblem.aux
    blocks: BlockSparseTensors | None = None


def changes_of(
    q: Any,
    dropout_p: Any,
    dropout_seed: Any,
    score_mod: Any,
    mask_mod: Any,
    aux_tensors: Any,
    aux_scalars: Any,
    block_sparse_tensors: Any,
) -> Changes | None:
    """None where nothing is changed. Draws a seed where dropout has none."""
    p = check_dropout_p(dropout_p)
    device = q.device if isinstance(q, torch.Tensor) else torch.device("cpu")  # refused later
    mods = mod_of("score_mod", score_mod), mod_of("mask_mod", mask_mod)
    aux_tensors, aux_scalars = (() if given is None else given for given in (aux_tensors, aux_scalars))
    kinds = check_aux(aux_tensors, aux_scalars, device)
    aux = (*aux_tensors, *aux_scalars)
    if aux and mods == (None, None):
        name = "aux_tensors" if aux_tensors else "aux_scalars"
        refuse(name, "None without score_mod and mask_mod, which read it", describe(aux[0]))
    if block_sparse_tensors is not None and not isinstance(block_sparse_tensors, BlockSparseTensors):
        refuse("block_sparse_tensors", "a BlockSparseTensors", describe(block_sparse_tensors), TypeError)
    if p == 0.0 and mods == (None, None) and block_sparse_tensors is None:
        return None
    seed = seed_tensor(dropout_seed, device) if p else None
    return Changes(p, seed, *mods, aux, kinds, block_sparse_tensors)


def check_beside(
    changes: Changes, num_splits: int, cp_world_size: int, float8: bool, softcap: bool, alibi: bool
) -> None:
    """What changes don't go with. float8, softcap, alibi: whether the call has such keys, a softcap, slopes."""
    given = {
        "dropout_p": changes.dropout_p > 0.0,
        "score_mod": changes.score_mod is not None,
        "mask_mod": changes.mask_mod is not None,
        "block_sparse_tensors": changes.blocks is not None,
    }
    name = next(name for name, there in given.items() if there)
    if num_splits > 1:
        refuse("num_splits", f"0 or 1 beside {name}", num_splits, NotImplementedError)
    if cp_world_size > 1:
        refuse("cp_world_size", f"1 beside {name}", cp_world_size, NotImplementedError)
    if given["block_sparse_tensors"] and float8:
        refuse("k", "bfloat16 or float16 beside block_sparse_tensors", "float8", NotImplementedError)
    if given["score_mod"] and softcap:
        refuse("softcap", "0 beside score_mod (flash_attn_sm120.mods.softcap is one)", "both", NotImplementedError)
    if given["score_mod"] and alibi:
        expected = "None beside score_mod (flash_attn_sm120.mods.alibi is one)"
        refuse("alibi_slopes", expected, "both", NotImplementedError)


def check_blocks(
    changes: Changes, batch: int, heads: int, seqlen_q: int, seqlen_k: int, device: torch.device, exact: bool
) -> None:
    if changes.blocks is not None:
        if changes.mask_mod is None and changes.blocks.mask_block_cnt is not None:
            refuse("mask_mod", "a function, which the blocks of block_sparse_tensors' mask list are for", "None")
        check_block_sparse(changes.blocks, batch, heads, seqlen_q, seqlen_k, device, exact)


def check_change_values(changes: Changes, seqlen_k: int) -> None:
    """What lists contain; waits for the device."""
    if changes.blocks is not None:
        check_block_sparse_values(changes.blocks, seqlen_k)


def problem_fields(changes: Changes) -> dict[str, Any]:
    """Of AttentionProblem."""
    return {
        "dropout": changes.dropout_p > 0.0,
        "score_mod": changes.score_mod,
        "mask_mod": changes.mask_mod,
        "aux": changes.aux_kinds,
        "sparse_block": () if changes.blocks is None else changes.blocks.block_size,
    }


def signature(changes: Changes) -> tuple:
    """Without addresses, contents and the numbers that mods read."""
    blocks = changes.blocks
    lists = () if blocks is None else (*map(_form, blocks_of(blocks)), blocks.block_size)
    return changes.dropout_p, changes.score_mod, changes.mask_mod, tuple(map(_form, changes.aux)), lists


def _form(given: Any) -> Any:
    if isinstance(given, torch.Tensor):
        return given.shape, given.stride(), given.dtype, given.get_device()
    return given.__class__


def blocks_of(blocks: BlockSparseTensors) -> tuple:
    return blocks.mask_block_cnt, blocks.mask_block_idx, blocks.full_block_cnt, blocks.full_block_idx


def kernel_fields(changes: Changes, batch: int, heads: int, device: torch.device) -> tuple:
    """The last fields of arguments.Modifiers."""
    dropout = lists = None
    if changes.dropout_p:
        p = changes.dropout_p
        dropout = Dropout(changes.dropout_seed, *thresholds(p), 1.0 / (1.0 - p))
    if changes.blocks is not None:
        lists = BlockLists(*_lists(changes.blocks, batch, heads, device))
    aux = tuple(given.detach() if isinstance(given, torch.Tensor) else given for given in changes.aux)
    return dropout, lists, aux or None


def _lists(blocks: BlockSparseTensors, batch: int, heads: int, device: torch.device) -> list[torch.Tensor]:
    """Each for all of the batch and heads; one that isn't given names no block."""
    given = blocks_of(blocks)
    rows = next(cnt for cnt in given[::2] if cnt is not None).shape[2]
    lists = []
    for cnt, idx in (given[:2], given[2:]):
        if cnt is None:
            if device not in _no_blocks:
                if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    expected = "both lists, or a call before the capture"
                    refuse("block_sparse_tensors", expected, "one list in a capture")
                _no_blocks[device] = lasting(lambda: torch.zeros(1, dtype=torch.int32, device=device), device)
            nothing = _no_blocks[device]
            lists += [nothing.expand(batch, heads, rows), nothing.expand(batch, heads, rows, 1)]
        else:
            lists += [cnt.expand(batch, heads, -1), idx.expand(batch, heads, -1, -1)]
    return lists
