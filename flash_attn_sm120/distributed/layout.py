"""Which tokens of which sequence a rank has in a zigzag. Plain arithmetic.

A sequence is cut into 2 * world_size chunks, the first ones a token longer where it doesn't divide; rank r has chunk r
and chunk 2 * world_size - 1 - r, so that under a causal mask all ranks have about the same work. Idea: Zhu,
ring-flash-attention (2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Zigzag:
    """Whole sequences, packed one behind the other, over world_size ranks. A rank's own order is the early and then the
    late chunk of each sequence, one sequence behind the other."""

    seqlens: tuple[int, ...]
    world_size: int

    def starts(self, seqlen: int) -> list[int]:
        """First token of each chunk of a sequence, and its end."""
        size, longer = divmod(seqlen, 2 * self.world_size)
        return [index * size + min(index, longer) for index in range(2 * self.world_size + 1)]

    def chunks(self, rank: int) -> list[tuple[range, range]]:
        """The early and the late chunk of each sequence, as tokens counted from its first."""
        late = 2 * self.world_size - 1 - rank
        starts = [self.starts(seqlen) for seqlen in self.seqlens]
        return [(range(own[rank], own[rank + 1]), range(own[late], own[late + 1])) for own in starts]

    def tokens(self, rank: int) -> int:
        """How many a rank has."""
        return sum(len(chunk) for pair in self.chunks(rank) for chunk in pair)

    @cached_property
    def most_tokens(self) -> int:
        """That a rank has."""
        return max(self.tokens(rank) for rank in range(self.world_size))

    @property
    def total(self) -> int:
        return sum(self.seqlens)
