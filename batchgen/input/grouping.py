"""Which rows of a window go to one chunk: equal work is done once, and all chunks take about the same time.

A window is a run of consecutive rows that is cut into chunks as a whole. The cut depends on its rows and on the rows of
a chunk alone, so that a resumed run cuts as before: costs are whole numbers, of which any machine makes the same sums.
They are in bytes of a prompt that is read; if they are wrong, time is lost and nothing else.
"""

import heapq
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from batchgen.types import MAX_INT, Rejected, Request, SamplingParams, TokenizedRequest

TOGETHER = 64  # chunks of a window; when their parts are merged, as many files are open
MOST_TOKENS = 4_096  # that count, of a prompt or a sample: a row with more is cut or rejected
MOST_BYTES = 4 * MOST_TOKENS
SHARED_BYTES = 256  # in common, to be kept together: about the 64 tokens of a block
TOKEN_BYTES = 10  # of a prompt, that cost as much as a generated token
SCORED = 2  # of so many bytes that are scored, one more is counted: they cost half as much again as those only read
GOLDEN = 2_654_435_769  # 2**32 by the golden ratio: the remainders of its multiples by 2**32 are spread evenly
GRAIN = 8  # units that cost more than this part of a chunk may be cut

Item: TypeAlias = Request | TokenizedRequest | Rejected
Key: TypeAlias = tuple[bytes, int]  # the prompts, and the number of the parameters

# ---- costs


@dataclass(frozen=True, slots=True)
class Row:
    """What an item costs: `alone` as the first of a chunk, `after` behind the row that was before it in a unit."""

    index: int
    key: Key
    samples: int  # what is generated or scored
    read_once: int  # bytes of the key that, if other rows begin with them, are read once for all
    common: int = 0  # of these, the bytes that the row before begins with
    is_copy: bool = False  # the same greedy request as that of the row before

    @property
    def alone(self) -> int:
        return self.samples + len(self.key[0])

    @property
    def after(self) -> int:
        return 0 if self.is_copy else self.alone - self.common


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows to keep together."""

    rows: list[Row]

    @property
    def cost(self) -> int:
        return self.rows[0].alone + sum(row.after for row in self.rows[1:])


def _bytes_of(prompt: str | tuple[int, ...]) -> bytes:
    """The beginning of the text, or four bytes for each token; 0xff is in no UTF-8."""
    if isinstance(prompt, str):
        return prompt[:MOST_BYTES].encode("utf-8", "surrogatepass")[:MOST_BYTES]
    return b"\xff" + b"".join(min(max(token, 0), MAX_INT).to_bytes(4, "big") for token in prompt[:MOST_TOKENS])


def _row(index: int, item: Item, numbers: dict[SamplingParams, int]) -> Row:
    if isinstance(item, Rejected):
        return Row(index, (b"", -1), 0, 0)
    params = item.params
    number = numbers.setdefault(params, len(numbers))
    if params.max_tokens == 0 and params.prompt_logprobs is not None:
        return _scored_row(index, item, number)
    prompts = (item.prompt, *item.others) if isinstance(item, Request) else [ids for _, ids in item.prompts]
    key = b"\xff\xff".join(map(_bytes_of, prompts))
    n = len(prompts) * params.n_sequences
    return Row(index, (key, number), TOKEN_BYTES * n * min(params.max_tokens, MOST_TOKENS), len(key))


def _scored_row(index: int, item: Request | TokenizedRequest, number: int) -> Row:
    """A row that is scored: its targets after its prompt, or all of its prompts, none of which is read with others."""
    prompts = (item.prompt, *item.others) if isinstance(item, Request) else [text for text, _ in item.prompts]
    prompt = b"\xff\xff".join(map(_bytes_of, prompts))
    if item.targets:
        targets = b"".join(b"\xff\xff" + _bytes_of(target) for target in item.targets)
        return Row(index, (prompt + targets, number), len(targets) // SCORED, len(prompt))
    beyond = max(len(item.prompt) - MOST_BYTES, 0)  # a text is read to its end, in windows
    length = b"\xff\xff%d" % beyond  # texts that begin alike are copies only if they are equally long
    return Row(index, (prompt + length, number), len(prompt) // SCORED + beyond + beyond // SCORED, 0)


def _n_common(a: bytes, b: bytes) -> int:
    """The length of the beginning that a and b have in common."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def sorted_rows(items: Sequence[Item]) -> list[Row]:
    """The rows in the order of their prompts: equal ones are adjacent, and so are those that begin alike."""
    numbers: dict[SamplingParams, int] = {}
    rows = sorted((_row(index, item, numbers) for index, item in enumerate(items)), key=lambda row: row.key)
    greedy = {number for params, number in numbers.items() if params.greedy}
    for at in range(1, len(rows)):
        before, row = rows[at - 1], rows[at]
        is_copy = before.key == row.key and row.key[1] in greedy
        common = min(_n_common(before.key[0], row.key[0]), row.read_once)
        rows[at] = replace(row, common=common, is_copy=is_copy)
    return rows


# ---- units


def find_units(rows: Iterable[Row], least: int = SHARED_BYTES) -> list[Unit]:
    """Cut sorted rows wherever two that are adjacent are not equal and have less than this in common."""
    units: list[Unit] = []
    for row in rows:
        if units and (row.is_copy or row.common >= least):
            units[-1].rows.append(row)
        else:
            units.append(Unit([row]))
    return units


def spread(unit: Unit) -> Unit:
    """The same rows in an order in which every stretch of them has cheap and dear ones alike.

    Rows that have more in common than the unit as a whole stay together.
    """
    common = min((row.common for row in unit.rows[1:] if not row.is_copy), default=0)
    members = sorted(find_units(unit.rows, common + SHARED_BYTES), key=lambda member: member.cost)
    order = sorted(range(len(members)), key=lambda rank: rank * GOLDEN % 2**32)
    rows = [[replace(members[rank].rows[0], common=common), *members[rank].rows[1:]] for rank in order]
    return Unit([row for member in rows for row in member])


def _fill(unit: Unit, room: int, most: int) -> tuple[list[Row], list[Row]]:
    """The unit's first rows, which fill the room: at least one, and at most so many; and the others."""
    cost, at = unit.rows[0].alone, 1
    while at < min(most, len(unit.rows)):
        row = unit.rows[at]
        if not row.is_copy and cost + row.after // 2 > room:
            break
        cost += row.after
        at += 1
    return unit.rows[:at], unit.rows[at:]


# ---- chunks


@dataclass(slots=True)
class Shares:
    """Chunks in the making."""

    most: int  # rows of each
    rows: list[list[int]]
    loads: list[int]

    def room(self, chunk: int) -> int:
        return self.most - len(self.rows[chunk])

    def put(self, chunk: int, rows: list[Row]) -> None:
        self.rows[chunk] += [row.index for row in rows]
        self.loads[chunk] += Unit(rows).cost

    def pour(self, units: Iterable[Unit], share: int) -> list[Unit]:
        """Fill one chunk after another up to its share, the last without end; returns what finds no room."""
        chunk, last = 0, len(self.rows) - 1
        left = list(units)[::-1]
        while left and chunk <= last:
            free = share - self.loads[chunk] if chunk < last else sys.maxsize
            if not self.room(chunk) or free < left[-1].rows[0].alone // 2:
                chunk += 1
                continue
            piece, rest = _fill(left.pop(), free, self.room(chunk))
            self.put(chunk, piece)
            if rest:
                left.append(Unit(rest))
                chunk += 1
        return left

    def deal(self, units: Iterable[Unit]) -> None:
        """Give the most expensive unit to the chunk that has least to do, and so on; one that has no room is cut."""
        free = [(load, len(self.rows[chunk]), chunk) for chunk, load in enumerate(self.loads) if self.room(chunk)]
        heapq.heapify(free)
        left = sorted(units, key=lambda unit: (unit.cost, -unit.rows[0].index))
        while left:
            chunk = heapq.heappop(free)[2]
            rows, room = left.pop().rows, self.room(chunk)
            self.put(chunk, rows[:room])
            if rows[room:]:
                left.append(Unit(rows[room:]))
            if self.room(chunk):
                heapq.heappush(free, (self.loads[chunk], len(self.rows[chunk]), chunk))


def share_out(items: Sequence[Item], n_chunk: int, most: int) -> list[list[int]]:
    """The indices of each chunk's items, ascending; so are the chunks' first ones. `most` items in each.

    Large units fill one chunk after another, and the small ones make the chunks even. Of more items than n_chunk - 1
    chunks can hold, each chunk has some.
    """
    if n_chunk == 1:
        return [list(range(len(items)))]
    units = find_units(sorted_rows(items))
    total = sum(unit.cost for unit in units)
    may_be_cut = [len(unit.rows) > 1 and unit.cost * n_chunk * GRAIN > total for unit in units]
    large = [spread(unit) for unit, is_large in zip(units, may_be_cut, strict=True) if is_large]
    small = [unit for unit, is_large in zip(units, may_be_cut, strict=True) if not is_large]
    for unit in large:  # where a unit is cut, what its rows have in common is read again
        total += (unit.rows[1].alone - unit.rows[1].after) * ((unit.cost * n_chunk - 1) // total)
    shares = Shares(most, [[] for _ in range(n_chunk)], [0] * n_chunk)
    shares.deal(small + shares.pour(large, total // n_chunk))
    return sorted(map(sorted, shares.rows))
