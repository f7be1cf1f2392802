"""What is known of a call from the form of its arguments (shapes, strides, dtypes, options), kept from call to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flash_attn_sm120.arguments import Numbers

MAX_CALLS = 4096  # kept; a server sees few, a sweep over lengths starts anew


class Tensors(NamedTuple):
    """A call's tensors besides q, k, v and out, in the order of arguments.Lengths and arguments.Modifiers."""

    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    seqused_q: Any = None
    seqused_k: Any = None
    page_table: Any = None
    cp_tot_seqused_k: Any = None
    learnable_sink: Any = None
    alibi_slopes: Any = None
    k_descale: Any = None  # or a number
    v_descale: Any = None  # or a number


class Options(NamedTuple):
    """A call's numbers, as they came."""

    softmax_scale: Any
    causal: Any
    window_size: Any
    softcap: Any
    return_lse: Any
    num_splits: Any
    attention_chunk: Any
    cp_world_size: Any = 1
    cp_rank: Any = 0
    max_seqlen_q: int | None = None  # where a packed call might be the decode kernel's
    max_seqlen_k: int | None = None  # likewise; rounded up, so that a growing length is seldom a new call


class Call(NamedTuple):
    """What all calls with the same arguments but for addresses and contents have in common; checked once."""

    launcher: Any  # a callable, or None: there is nothing to compute
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...] | None
    numbers: Numbers
    readable: bool  # q, k and v have strides that the kernel can follow
    writable: bool  # out, if given, has
    reaches: tuple[int, ...]  # bytes that q, k, v and out extend over, where out is given
    device_index: int | None
    modifiers: tuple[Callable, ...] | None = None  # what makes arguments.Modifiers of what is given; None: all None
    context_parallel: bool = False
    num_splits: int = 0  # 1 or more for a decode launcher
    lse_rows: tuple[int, ...] = ()  # shape that lse has, asked for or not
    tickets: int = 0  # of a split launch
    slots: int = 0  # likewise
    takes_queue: bool = False  # the launcher takes an arguments.Queue, or None where sm_count is 0
    sm_count: int = 0
    batch: int = 0
    heads: int = 0


known: dict[tuple, Any] = {}


def remember(key: tuple, call: Any) -> None:
    if len(known) >= MAX_CALLS:
        known.clear()
    known[key] = call


def forget() -> None:
    known.clear()
