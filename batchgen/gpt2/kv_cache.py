"""The cache of keys and values: one arena of memory, cut into segments."""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.params import Array

# Attention sums values over blocks of this many keys, one product for each block. So a block gives the same bits
# whether one sequence reads it or many share it.
BLOCK = 64

# Scores are computed for a multiple of this many keys: OpenBLAS's small-matrix kernels round the columns of an
# incomplete last group differently.
LANES = 16


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(slots=True, eq=False)
class Segment:
    """The keys and values of consecutive positions, shared by every sequence that starts with them.

    A sequence's context is a path of segments: `parent` holds the positions before `start`. Every segment of a path
    but the last has a multiple of BLOCK positions, so blocks begin at the same positions with and without sharing.
    """

    k: Array  # [n_layer, n_head, d_head, capacity]: one key per column, so that scores are vectorised over keys
    v: Array  # [n_layer, n_head, capacity, d_head]
    start: int  # first position
    offset: int  # in the arena, in positions; KVArena.release needs it
    parent: "Segment | None" = None
    length: int = 0  # positions written
    path: tuple["Segment", ...] = field(init=False)  # from position 0 to this segment

    def __post_init__(self) -> None:
        self.path = (*(self.parent.path if self.parent else ()), self)

    @property
    def end(self) -> int:
        return self.start + self.length


def _join_adjacent(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Sorted (offset, size) ranges, the adjacent ones joined: (0, 16), (16, 32), (64, 16) -> (0, 48), (64, 16)."""
    offset, size = ranges[0]
    for next_offset, next_size in ranges[1:]:
        if offset + size == next_offset:
            size += next_size
        else:
            yield offset, size
            offset, size = next_offset, next_size
    yield offset, size


class KVArena:
    """All cache memory of an engine, allocated first fit from the lowest address, so that warm pages are used again.

    The operating system provides a page when it is first used. The memory starts as zeros because attention reads up
    to LANES - 1 columns past the last key, which must be finite.
    """

    def __init__(self, config: GPT2Config, n_tokens: int) -> None:
        """Room for the keys and values of n_tokens positions (rounded up to LANES), in every layer."""
        self.config = config
        self.floats_per_token = 2 * config.n_layer * config.n_embd
        self.n_tokens = round_up(n_tokens, LANES)
        self.memory = np.zeros(self.n_tokens * self.floats_per_token, np.float32)
        self.clear()

    def clear(self) -> None:
        """Free all segments; none of them may be used afterwards."""
        self.free: list[tuple[int, int]] = [(0, self.n_tokens)]  # (offset, size) in positions, by offset, joined

    def _views(self, offset: int, size: int) -> tuple[Array, Array]:
        """Keys [n_layer, n_head, d_head, size] and values [n_layer, n_head, size, d_head] at an offset."""
        c = self.config
        floats = self.memory[offset * self.floats_per_token : (offset + size) * self.floats_per_token]
        k, v = floats.reshape(2, -1)
        return k.reshape(c.n_layer, c.n_head, c.d_head, size), v.reshape(c.n_layer, c.n_head, size, c.d_head)

    def allocate(self, n_tokens: int, start: int, parent: Segment | None = None) -> Segment | None:
        """A segment with room for n_tokens positions from `start` on, or None if no free range is large enough."""
        size = round_up(max(n_tokens, 1), LANES)
        for index, (offset, room) in enumerate(self.free):
            if room >= size:
                self.free[index : index + 1] = [(offset + size, room - size)] if room > size else []
                return Segment(*self._views(offset, size), start, offset, parent)
        return None

    def release(self, segment: Segment) -> None:
        """Free a segment's memory and join it with its free neighbours."""
        insort(self.free, (segment.offset, segment.v.shape[2]))
        self.free = list(_join_adjacent(self.free))
