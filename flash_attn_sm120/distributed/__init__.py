"""Attention over several GPUs, on torch.distributed: each rank has some tokens of a sequence, or some of its keys."""

from flash_attn_sm120.distributed.decode import decode_context_parallel
from flash_attn_sm120.distributed.gathered import zigzag_attention, zigzag_attention_varlen
from flash_attn_sm120.distributed.ring import ring_attention, ring_attention_varlen
from flash_attn_sm120.distributed.shards import shard, shard_varlen, unshard, unshard_varlen

__all__ = [
    "decode_context_parallel",
    "ring_attention",
    "ring_attention_varlen",
    "shard",
    "shard_varlen",
    "unshard",
    "unshard_varlen",
    "zigzag_attention",
    "zigzag_attention_varlen",
]
