"""Rows that repeat an earlier one of the input: its prompt (--drop-duplicates prompt) or its id (--seed-by id).

They are found by hashes of 128 bits, of which no two are equal by chance: with a million rows, one time in 10**26.
"""

import hashlib
import re
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from batchgen.input.formats import Rows
from batchgen.input.grouping import Item
from batchgen.options import say, shown
from batchgen.types import Rejected, TokenizedRequest

_LAST_NUMBER = re.compile(r"(.*?)([0-9]{0,12})", re.DOTALL)
_NUMBER_BITS = 40  # of a place's number, and one more for none
_SLOTS = 1024  # at first

Key: TypeAlias = tuple[int, int]  # 64 bits each


def hash128(*parts: bytes) -> Key:
    """Equal parts have equal keys, and others, in practice, do not."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return _WORDS.unpack(digest.digest())


_WORDS = struct.Struct("<QQ")


class FirstSeen:
    """For each key, the number that came with it first: a hash table of three words a slot, half of them free or more.

    A dict would take 130 bytes a key, and this takes 48 to 96.
    """

    def __init__(self) -> None:
        self._count, self._mask = 0, _SLOTS - 1
        self._low, self._high, self._numbers = (array("Q", bytes(8 * _SLOTS)) for _ in range(3))

    @property
    def bytes(self) -> int:
        return 3 * 8 * (self._mask + 1)

    def find(self, key: Key, number: int) -> int | None:
        """The first number of the key; None if it is new, and this is it. 0 <= number < 2**64 - 1"""
        slot = self._slot(key)
        if found := self._numbers[slot]:
            return found - 1
        self._low[slot], self._high[slot] = key
        self._numbers[slot] = number + 1  # 0: a free slot
        self._count += 1
        if 2 * self._count > self._mask:
            self._grow()
        return None

    def _slot(self, key: Key) -> int:
        """Where the key is, or the free slot where it would be."""
        low, high = key
        mask, numbers = self._mask, self._numbers
        slot = low & mask
        while numbers[slot] and not (self._low[slot] == low and self._high[slot] == high):
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        """Twice the slots. Old ones are moved in order: slot i of n goes to i or i + n, or after keys there."""
        old = self._low, self._high, self._numbers
        self._mask = 2 * self._mask + 1
        self._low, self._high, self._numbers = (array("Q", bytes(8 * (self._mask + 1))) for _ in range(3))
        for low, high, number in zip(*old, strict=True):
            if number:
                slot = self._slot((low, high))
                self._low[slot], self._high[slot], self._numbers[slot] = low, high, number


@dataclass(slots=True)
class FirstPlaces:
    """The place where each key was first; a place is a whole number here."""

    _seen: FirstSeen = field(default_factory=FirstSeen)
    _prefixes: dict[str, int] = field(default_factory=dict)  # `prompts.jsonl:` -> 0
    _names: list[str] = field(default_factory=list)  # the prefixes in the order of their numbers

    def find(self, key: Key, place: str) -> str | None:
        """The first place of the key; None if it is new, and this is it."""
        first = self._seen.find(key, self._pack(place))
        return None if first is None else self._unpack(first)

    def _pack(self, place: str) -> int:
        """prompts.jsonl:17 -> the number of the prefix `prompts.jsonl:`, and 17"""
        match = _LAST_NUMBER.fullmatch(place)
        assert match is not None
        prefix, digits = match[1], match[2]
        if digits != (plain := str(int(digits or 0))):  # none, or 007, which would come back as 7
            prefix, plain = place, ""
        number = self._prefixes.setdefault(prefix, len(self._names))
        if number == len(self._names):
            self._names.append(prefix)
        return number << _NUMBER_BITS | (int(plain) + 1 if plain else 0)

    def _unpack(self, packed: int) -> str:
        number, digits = packed >> _NUMBER_BITS, packed % (1 << _NUMBER_BITS)
        return f"{self._names[number]}{digits - 1 if digits else ''}"


def _prompt_key(request: TokenizedRequest) -> Key:
    """Of the row's prompts: of their texts, or of their token ids if they were given as such."""
    if request.given_as_ids:
        return hash128(b"ids", *(array("q", ids).tobytes() for _, ids in request.prompts))
    return hash128(b"texts", *(text.encode("utf-8", "surrogatepass") for text, _ in request.prompts))


@dataclass(slots=True)
class Repeats:
    """Decides of one row after the other, in the order of the input, whether it repeats an earlier one.

    Only rows that can be generated count: a rejected one is nobody's first.
    """

    prompts: bool  # a row with the prompt of an earlier one is dropped
    ids: bool  # a row with the id of an earlier one is rejected
    _prompts: FirstPlaces = field(default_factory=FirstPlaces)
    _ids: FirstPlaces = field(default_factory=FirstPlaces)

    def decide(self, item: TokenizedRequest | Rejected) -> TokenizedRequest | Rejected:
        """The row, or what is left of one that repeats another."""
        if isinstance(item, Rejected):
            return item
        if self.ids and item.id is not None:
            first = self._ids.find(hash128(item.id.encode("utf-8", "surrogatepass")), item.place)
            if first is not None:
                remedy = f"give it one of its own, or pass {say('seed_by', 'row')}"
                what = f"the id {shown(item.id)} is that of {first}, and {say('seed_by', 'id')} draws by it"
                return item.set_aside(f"{what}; {remedy}", "rejected")
        if self.prompts:
            first = self._prompts.find(_prompt_key(item), item.place)
            if first is not None:
                return item.set_aside(f"the prompt of {first} again", "dropped")
        return item

    def decide_all(
        self,
        batches: Iterable[Rows],
        check: Callable[[Item], TokenizedRequest | Rejected],
        is_seen: Callable[[int], bool],
    ) -> Iterator[Rows]:
        """Yield the batches with each row that is to be seen, by number, checked and decided."""
        for rows in batches:
            items = [self.decide(check(item)) if is_seen(item.row) else item for item in rows.items]
            yield replace(rows, items=items)
