"""Into how many parts a decode is cut at most: from sizes that the host knows, without a look at the GPU's memory.

How many parts a sequence really has is decided on the device, by its length among those of the batch (device/pieces.py).
"""

from __future__ import annotations

from dataclasses import replace

from flash_attn_sm120.dispatch import MAX_SPLITS, Plan, plan_for
from flash_attn_sm120.problem import AttentionProblem

KEYS_WORTH_A_SPLIT = 256  # fewer keys are read sooner than their parts are combined
FULL_WAVES = 0.9  # share of the slots of whole waves of blocks, from which on whole sequences keep the GPU busy
MANY_WAVES = 4  # the last of which matters little


def num_splits(problem: AttentionProblem, sms: int, batch: int, heads_kv: int, rows: int, max_seqlen_k: int) -> int:
    """The size of the first dimension of the partials, for problem.split; 1: don't split.

    problem: a decode, split or not. sms: multiprocessors. rows: of a sequence and KV head, max_seqlen_q * heads //
    heads_kv. max_seqlen_k: an upper bound, for a page table its width times page_size.
    """
    whole, cut = (plan_for("decode", replace(problem, split=split)) for split in (False, True))
    m_blocks = -(-rows // whole.tile_m)
    blocks, slots = batch * heads_kv * m_blocks, sms * whole.blocks_per_sm
    waves = -(-blocks // slots)
    if max_seqlen_k <= KEYS_WORTH_A_SPLIT or waves > MANY_WAVES or blocks >= FULL_WAVES * waves * slots:
        return 1
    longest = batch * m_blocks * -(-max_seqlen_k // (cut.tile_n * cut.num_warps))
    return max(1, min(sms * cut.blocks_per_sm // heads_kv, longest, MAX_SPLITS))


def tickets(plan: Plan, heads: int, heads_kv: int, q_shape: tuple[int, ...], batch: int) -> int:
    """How many tickets a launch counts with. q_shape: (batch, seqlen_q, heads, d) or (total_q, heads, d)."""
    heads_per_kv = heads // heads_kv
    if len(q_shape) == 3:
        tiles = q_shape[0] * heads_per_kv // plan.tile_m + batch
    else:
        tiles = batch * -(-q_shape[1] * heads_per_kv // plan.tile_m)
    return tiles * heads_kv * plan.tile_m
