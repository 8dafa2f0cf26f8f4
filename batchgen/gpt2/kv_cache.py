"""Keys and values of what has been read so far: one arena of memory, cut into segments."""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.params import Array

# Attention sums values over blocks of this many keys, block after block. The sum of a block is one product, so a
# block of keys gives the same bits whether its product was shared by many sequences or made for one alone.
BLOCK = 64

# Scores are computed for a multiple of this many keys: OpenBLAS's small-matrix kernels round a ragged last
# column differently from a full one.
LANES = 16


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(slots=True, eq=False)
class Segment:
    """The keys and values of consecutive positions, shared by every sequence that starts with them.

    A sequence's context is a path of segments: `parent` holds the positions before `start`. Only the last of a
    path may be shorter than a multiple of BLOCK, so blocks lie at the same positions whatever is shared.
    """

    k: Array  # [n_layer, n_head, d_head, n_cap], keys in columns: a score is a sum over rows, vectorised over keys
    v: Array  # [n_layer, n_head, n_cap, d_head]
    start: int
    offset: int  # where in the arena it lies, for giving it back
    parent: "Segment | None" = None
    length: int = 0  # positions written
    path: tuple["Segment", ...] = field(init=False)

    def __post_init__(self) -> None:
        self.path = (*(self.parent.path if self.parent else ()), self)

    @property
    def end(self) -> int:
        return self.start + self.length


class KVArena:
    """All the cache memory of an engine; first fit, lowest address first, so that warm pages are used again.

    The pages are touched only as they are used. They start as zeros, since attention reads up to LANES - 1
    columns past the last key and needs them finite.
    """

    def __init__(self, config: GPT2Config, n_tokens: int) -> None:
        """Room for n_tokens positions in all (rounded up to LANES), of every layer's keys and values."""
        self.config = config
        self.floats_per_token = 2 * config.n_layer * config.n_embd
        self.n_tokens = round_up(n_tokens, LANES)
        self.memory = np.zeros(self.n_tokens * self.floats_per_token, np.float32)
        self.clear()

    def clear(self) -> None:
        """Take everything back; segments handed out before must not be used any more."""
        self.free: list[tuple[int, int]] = [(0, self.n_tokens)]  # (offset, size) in tokens, by offset, coalesced

    def allocate(self, n_tokens: int, start: int, parent: Segment | None = None) -> Segment | None:
        """A segment with room for n_tokens positions from `start` on, or None where nothing that large is free."""
        size = round_up(max(n_tokens, 1), LANES)
        for index, (offset, room) in enumerate(self.free):
            if room >= size:
                self.free[index : index + 1] = [(offset + size, room - size)] if room > size else []
                return self._segment(offset, size, start, parent)
        return None

    def release(self, segment: Segment) -> None:
        """Give a segment's memory back, joined with its free neighbours."""
        insort(self.free, (segment.offset, segment.v.shape[2]))
        self.free = list(_coalesce(self.free))

    def _segment(self, offset: int, size: int, start: int, parent: Segment | None) -> Segment:
        c = self.config
        first = offset * self.floats_per_token
        half = size * self.floats_per_token // 2
        k = self.memory[first : first + half].reshape(c.n_layer, c.n_head, c.d_head, size)
        v = self.memory[first + half : first + 2 * half].reshape(c.n_layer, c.n_head, size, c.d_head)
        return Segment(k, v, start, offset, parent)


def _coalesce(free: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    offset, size = free[0]
    for next_offset, next_size in free[1:]:
        if offset + size == next_offset:
            size += next_size
        else:
            yield offset, size
            offset, size = next_offset, next_size
    yield offset, size
