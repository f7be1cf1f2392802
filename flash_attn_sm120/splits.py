"""Into how many parts a decode is cut: from sizes that the host knows, without a look at the GPU's memory.

How many parts a sequence really has is decided on the device, by its share of the batch's keys (device/pieces.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from flash_attn_sm120.dispatch import MAX_SPLITS, Plan, plan_for
from flash_attn_sm120.problem import AttentionProblem

KEYS_WORTH_A_SPLIT = 256  # fewer keys are read sooner than their parts are combined
FULL_WAVES = 0.9  # share of the slots of whole waves of blocks, from which on whole sequences keep the GPU busy
MANY_WAVES = 4  # the last of which matters little


@dataclass(frozen=True, slots=True)
class Splits:
    """num_splits: the most parts of a sequence, the first dimension of the partials; 1: launch without partials.
    slots: arguments.Partials.slots. tickets: the size of arguments.Partials.tickets."""

    num_splits: int
    slots: int = 0
    tickets: int = 0


@lru_cache(maxsize=256)
def decode_ways(problem: AttentionProblem) -> tuple[tuple[AttentionProblem, Plan], tuple[AttentionProblem, Plan]]:
    """The problem as a decode of whole sequences, and of parts of them."""
    whole, cut = (replace(problem, decode=True, split=split) for split in (False, True))
    return (whole, plan_for("decode", whole)), (cut, plan_for("decode", cut))


def choose_splits(
    problem: AttentionProblem,
    sms: int,
    q_shape: tuple[int, ...],
    heads_kv: int,
    batch: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_splits: int = 0,
) -> Splits:
    """problem: one that the decode kernel can do. sms: multiprocessors. q_shape: (batch, seqlen_q, heads, d), or
    (total_q, heads, d).

    max_seqlen_q, max_seqlen_k: upper bounds, of keys in pages the table's width times page_size. num_splits: 0 to
    choose, 1 for no split, n for up to n parts of every sequence; at most MAX_SPLITS count.
    """
    (_, whole), (_, cut) = decode_ways(problem)
    heads_per_kv = q_shape[-2] // heads_kv
    m_blocks = -(-max_seqlen_q * heads_per_kv // cut.tile_m)
    tiles = m_blocks * batch
    if len(q_shape) == 3:
        tiles = q_shape[0] * heads_per_kv // cut.tile_m + batch
    if num_splits == 0:
        blocks, resident = heads_kv * m_blocks * batch, sms * whole.blocks_per_sm
        waves = -(-blocks // resident)
        busy = waves > MANY_WAVES or blocks >= FULL_WAVES * waves * resident
        slots = sms * cut.blocks_per_sm // heads_kv
        if max_seqlen_k > KEYS_WORTH_A_SPLIT and not busy:
            longest = -(-max_seqlen_k // (cut.tile_n * cut.num_warps))
            num_splits = min(-(-slots // max(m_blocks, 1)), longest)
    else:
        slots = num_splits * tiles
    num_splits = min(num_splits, MAX_SPLITS)
    if num_splits <= 1:
        return Splits(1)
    return Splits(num_splits, slots, tiles * heads_kv * cut.tile_m)
