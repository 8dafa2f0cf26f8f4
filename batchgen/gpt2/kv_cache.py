"""The cache of keys and values: one arena of memory, cut into segments.

In each layer and head, a segment holds its keys, then its values. Keys lie in blocks of BLOCK positions, each block
[d_head, up to BLOCK], so that scores are vectorised over keys; values are [positions, d_head]. The kernels of
attention.py find them by a segment's `base` and `size`. Numbers are float32, or bfloat16 kept as uint16.
"""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.weights import aligned, round_up
from batchgen.types import Precision

BLOCK = 64  # keys in a block; sequences share whole blocks
LANES = 16  # a segment's room is a multiple of this many positions: a vector of keys

Numbers = npt.NDArray[np.float32] | npt.NDArray[np.uint16]


@dataclass(slots=True, eq=False)
class Segment:
    """The keys and values of consecutive positions, shared by every sequence that starts with them.

    A sequence's context is a path of segments: `parent` holds the positions before `start`. Every segment of a path
    but the last is full and has a multiple of BLOCK positions, so that blocks begin at the same positions with and
    without sharing.
    """

    memory: Numbers  # the arena's
    start: int  # first position
    offset: int  # in the arena, in positions
    size: int  # room, in positions
    base: int  # in the arena, in numbers
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

    The operating system provides a page when it is first used.
    """

    def __init__(self, config: GPT2Config, n_tokens: int, precision: Precision = "float32") -> None:
        """Room for the keys and values of n_tokens positions (rounded up to LANES), in every layer."""
        self.config = config
        self.n_tokens = round_up(n_tokens, LANES)
        self._per_token = 2 * config.n_layer * config.n_embd
        number = np.uint16 if precision == "int8" else np.float32
        self.memory: Numbers = aligned((self.n_tokens * self._per_token,), number)  # type: ignore[assignment]
        self.clear()

    def clear(self) -> None:
        """Free all segments; none of them may be used afterwards."""
        self.free: list[tuple[int, int]] = [(0, self.n_tokens)]  # (offset, size) in positions, by offset, joined

    def allocate(self, n_tokens: int, start: int, parent: Segment | None = None) -> Segment | None:
        """A segment with room for n_tokens positions from `start` on, or None if no free range is large enough."""
        size = round_up(max(n_tokens, 1), LANES)
        for index, (offset, room) in enumerate(self.free):
            if room >= size:
                self.free[index : index + 1] = [(offset + size, room - size)] if room > size else []
                return self.at(offset, size, start, parent)
        return None

    def at(self, offset: int, size: int, start: int, parent: Segment | None = None) -> Segment:
        """A segment in a range that the caller has allocated."""
        return Segment(self.memory, start, offset, size, offset * self._per_token, parent)

    def release(self, segment: Segment) -> None:
        """Free a segment's memory and join it with its free neighbours."""
        insort(self.free, (segment.offset, segment.size))
        self.free = list(_join_adjacent(self.free))
