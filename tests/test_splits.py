"""How many parts the host asks for."""

from dataclasses import replace

import pytest

from flash_attn_sm120.dispatch import MAX_SPLITS, choose
from flash_attn_sm120.problem import AttentionProblem
from flash_attn_sm120.splits import Splits, choose_splits
from flash_attn_sm120.variants import decode_variants

PROBLEM = AttentionProblem("bfloat16", 128, 128, decode=True)
SMS = 132


def splits(batch, heads, heads_kv, seqlen_k, seqlen_q=1, num_splits=0, packed=False):
    shape = (batch * seqlen_q, heads, 128) if packed else (batch, seqlen_q, heads, 128)
    return choose_splits(PROBLEM, SMS, shape, heads_kv, batch, seqlen_q, seqlen_k, num_splits)


@pytest.mark.parametrize("batch, heads, heads_kv, seqlen_k", [(64, 32, 8, 4096), (64, 64, 8, 4096), (16, 32, 32, 8192)])
def test_enough_sequences_stay_whole(batch, heads, heads_kv, seqlen_k):
    assert splits(batch, heads, heads_kv, seqlen_k) == Splits(1)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_few_sequences_fill_the_gpu_once(batch):
    found = splits(batch, 32, 8, 8192)
    assert found.num_splits == 16 and 8 * found.slots <= SMS < 8 * (found.slots + 1)


def test_short_sequences_stay_whole():
    assert splits(1, 32, 8, 256).num_splits == 1


def test_one_is_off():
    assert splits(1, 32, 8, 65536, num_splits=1) == Splits(1)


@pytest.mark.parametrize("num_splits", [2, 5, 1000])
def test_a_number_is_taken_for_every_sequence(num_splits):
    found = splits(3, 32, 8, 65536, num_splits=num_splits)
    assert found.num_splits == min(num_splits, MAX_SPLITS) and found.slots == 3 * num_splits


def test_every_row_has_a_ticket():
    assert splits(3, 32, 8, 8192, seqlen_q=5).tickets == 3 * 2 * 8 * 16
    assert splits(3, 32, 8, 8192, seqlen_q=5, packed=True).tickets == (15 * 4 // 16 + 3) * 8 * 16


@pytest.mark.parametrize("problem", decode_variants(), ids=str)
def test_both_plans_have_one_tile_of_rows(problem):
    """Tickets and slots count tiles of the split plan, the decision those of the whole one."""
    assert len({choose(replace(problem, split=split)).tile_m for split in (False, True)}) == 1
