"""The order of execution: shared prefixes, the order of waiting sequences, and memory for the admitted ones."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from batchgen.engine.beams import Blocks, Search
from batchgen.engine.limits import beam_tokens_needed, stem_of
from batchgen.engine.sequence import Sequence
from batchgen.gpt2.attention import copy_segment
from batchgen.gpt2.forward import Prefill
from batchgen.gpt2.kv_cache import BLOCK, LANES, KVArena, Segment

Tokens = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Prefix:
    """Tokens that several sequences start with, after those of `parent`; whole blocks are shared, fewer are copied."""

    token_ids: Tokens
    start: int
    parent: "Prefix | None"
    unfinished: int = 0  # sequences under it that still need its keys and values
    segment: Segment | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def path(self) -> list["Prefix"]:
        return [*(self.parent.path if self.parent else []), self]

    @property
    def is_copied(self) -> bool:
        return len(self.token_ids) < BLOCK


@dataclass(slots=True, eq=False)
class PromptGroup:
    """The sequences that read the same tokens; those admitted together share the prefill. A search is alone in one."""

    token_ids: Tokens
    sequences: list[Sequence]
    prefix: Prefix | None = None
    pending: "_PendingPrefill | None" = None  # the last one
    first_wanted: int = field(init=False)  # of any sequence: each group reads this position, and what follows, itself

    def __post_init__(self) -> None:
        self.first_wanted = min(sequence.first_wanted for sequence in self.sequences)

    @property
    def copied(self) -> Prefix | None:
        """The partial block that it copies, if any."""
        return self.prefix if self.prefix and self.prefix.is_copied else None

    @property
    def shared(self) -> Prefix | None:
        """The last prefix of whole blocks."""
        return self.prefix.parent if self.prefix and self.prefix.is_copied else self.prefix

    @property
    def longest(self) -> int:
        """Positions of its longest sequence."""
        return len(self.token_ids) + max(sequence.n_left for sequence in self.sequences)


def _block_at(group: PromptGroup, start: int) -> Tokens | None:
    """The block from `start` on; None if it includes a position whose state is wanted."""
    return group.token_ids[start : start + BLOCK] if start + BLOCK <= group.first_wanted else None


def _common(groups: list[PromptGroup], start: int) -> Tokens:
    """The tokens from `start` on that all groups share, before those whose state is wanted."""
    rests = [group.token_ids[start : group.first_wanted] for group in groups]
    first, last = min(rests), max(rests)  # a beginning that these two share is shared by all
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _set_partial_prefixes(groups: list[PromptGroup], start: int, parent: Prefix | None, known: int = 0) -> None:
    """Set the prefix of groups that share less than a block, but at least LANES tokens: fewer are not worth a copy.

    The first `known` of these tokens are already shared by all groups. A family that shares LANES more has a prefix of
    its own if that saves tokens: the choices of one question, after a beginning that many questions share.
    """
    families: dict[Tokens, list[PromptGroup]] = {}
    for group in groups:
        families.setdefault(group.token_ids[start + known : group.first_wanted][:LANES], []).append(group)
    for beginning, family in families.items():
        tokens = _common(family, start)
        if len(beginning) < LANES or len(family) < 2 or (len(family) - 1) * (len(tokens) - known) <= known:
            continue
        prefix, before = Prefix(tokens, start, parent), family[0].prefix
        for group in family:
            group.prefix = prefix
        _set_partial_prefixes(family, start, parent, len(tokens))
        users = [group for group in family if group.prefix is prefix]
        if len(users) > 1:
            prefix.token_ids = _common(users, start)
            prefix.unfinished = sum(len(group.sequences) for group in users)
        elif users:
            users[0].prefix = before


def find_prefixes(
    groups: Iterable[PromptGroup], start: int = 0, parent: Prefix | None = None
) -> list[list[PromptGroup]]:
    """Set each group's longest shared prefix; return families of groups that share a first block.

    A prefix extends as far as all its sequences agree: AAB, AAC and D (one letter for one block) have the prefix AA.
    """
    by_block: dict[Tokens | None, list[PromptGroup]] = {}
    for group in groups:
        by_block.setdefault(_block_at(group, start), []).append(group)
    families: list[list[PromptGroup]] = []
    alone: list[PromptGroup] = []
    for block, family in by_block.items():
        n_sequence = sum(len(group.sequences) for group in family)
        if block is None or n_sequence < 2:
            alone += family
            continue
        end = start + BLOCK
        while (following := _block_at(family[0], end)) and all(_block_at(g, end) == following for g in family):
            end += BLOCK
        prefix = Prefix(family[0].token_ids[start:end], start, parent, n_sequence)
        for group in family:
            group.prefix = prefix
        subfamilies = find_prefixes(family, end, prefix)
        subfamilies.sort(key=lambda members: -max(group.longest for group in members))
        families.append([group for members in subfamilies for group in members])
    _set_partial_prefixes(alone, start, parent)
    return [*families, *([group] for group in alone)]


def _group_of(sequence: Sequence) -> tuple[Tokens, int, int]:
    """Equal for sequences of one group."""
    return sequence.read, *((sequence.prompt.row, sequence.sample) if sequence.params.searches else (-1, -1))


def group_sequences(sequences: Iterable[Sequence], share_prefixes: bool) -> tuple[list[list[PromptGroup]], int]:
    """Families of groups that share a first block, and the tokens that they read, those of each prefix once."""
    # of a group, those that generate come first: they need the keys and values that one of them reads
    in_order = sorted(sequences, key=lambda s: (*_group_of(s), not s.params.max_tokens))
    groups = [PromptGroup(key[0], list(same)) for key, same in groupby(in_order, key=_group_of)]
    families = find_prefixes(groups) if share_prefixes else [[group] for group in groups]
    prefixes = {prefix for group in groups if group.prefix for prefix in group.prefix.path}
    own = sum(len(group.token_ids) - (group.prefix.end if group.prefix else 0) for group in groups)
    return families, own + sum(len(prefix.token_ids) for prefix in prefixes)


@dataclass(slots=True, eq=False)
class _PendingPrefill:
    """Tokens of a segment that no pass has read yet."""

    segment: Segment
    token_ids: Tokens
    position: int  # of the first of them
    copied: Segment | None = None  # the keys and values before the tokens, to be copied into the segment
    sequences: list[Sequence] = field(default_factory=list)  # none for a prefix; the segment is the first's
    after: Segment | None = None  # of the tokens that are not in the segment, if it is a stem

    def take(self, n: int) -> "Piece":
        """The first n tokens, or fewer, for the next pass."""
        if self.after is not None and self.position == self.after.start:
            self.segment, self.after = self.after, None
        n = n if self.after is None else min(n, self.after.start - self.position)
        taken, self.token_ids = self.token_ids[:n], self.token_ids[n:]
        self.position += len(taken)
        first_wanted = min((sequence.first_wanted for sequence in self.sequences), default=self.position)
        n_wanted = min(max(self.position - first_wanted, 0), len(taken))
        prefill = Prefill(self.segment, taken, n_wanted, self.copied)
        self.copied = None
        return Piece(prefill, self.position, self.sequences, not self.token_ids)


class Piece(NamedTuple):
    """What one pass reads of a prompt or a prefix; the states of its last prefill.n_logits positions are wanted."""

    prefill: Prefill
    end: int  # the position after it
    sequences: list[Sequence]  # none of a prefix
    is_last: bool


class Scheduler:
    """Admits sequences, longest first, when slots and memory are free, and cuts their prefill into passes."""

    def __init__(self, sequences: list[Sequence], arena: KVArena, max_batch: int, share_prefixes: bool) -> None:
        self.arena, self.max_batch = arena, max_batch
        self.running: list[Sequence] = []
        self.pending: deque[_PendingPrefill] = deque()
        self.in_flight = 0  # admitted sequences that are not finished; a search counts all of its beams from the start
        self.prefix_of: dict[Sequence, Prefix | None] = {}
        self.prefixes: dict[Prefix, None] = {}  # those with a segment, in order of allocation
        self.waiting: deque[tuple[Sequence, PromptGroup]] = deque()
        families, self.prompt_tokens = group_sequences(sequences, share_prefixes)
        families.sort(key=lambda family: -max(group.longest for group in family))
        for group in (group for family in families for group in family):
            for sequence in group.sequences:
                sequence.order = len(self.waiting)
                self.prefix_of[sequence] = group.prefix
                self.waiting.append((sequence, group))

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self.pending or self.running)

    def _drop(self, prefix: Prefix) -> None:
        if prefix.segment is not None:
            self.arena.release(prefix.segment)
            prefix.segment = None
            del self.prefixes[prefix]

    def _admit(self, sequence: Sequence, group: PromptGroup) -> bool:
        """Allocate memory for a sequence and its prefixes and queue their prefill; False, with no change, if full."""
        joined = group.pending  # unless it is past what the sequence wants, or past its end
        if joined and (not joined.token_ids or joined.position > sequence.first_wanted):
            joined = None
        if joined and not sequence.params.max_tokens:
            joined.sequences.append(sequence)  # it needs no keys and values after that
            return True
        new: dict[Prefix, _PendingPrefill] = {}
        for prefix in group.prefix.path if group.prefix else []:
            if prefix.segment is not None:
                continue
            parent = prefix.parent.segment if prefix.parent else None
            prefix.segment = self.arena.allocate(len(prefix.token_ids), prefix.start, parent)
            if prefix.segment is None:
                break
            self.prefixes[prefix] = None
            new[prefix] = _PendingPrefill(prefix.segment, prefix.token_ids, prefix.start)
        else:
            sequence.segment = self._allocate(sequence, group)
        if sequence.segment is None:
            for prefix in new:
                self._drop(prefix)
            return False
        self.pending += new.values()
        if not joined:
            start = group.prefix.end if group.prefix else 0
            copied = group.copied.segment if group.copied else None
            stem = sequence.search.stem if sequence.search else None
            after = sequence.segment if stem else None
            joined = _PendingPrefill(stem or sequence.segment, group.token_ids[start:], start, copied, after=after)
            group.pending = joined
            self.pending.append(joined)
        joined.sequences.append(sequence)
        return True

    def _allocate(self, sequence: Sequence, group: PromptGroup) -> Segment | None:
        """Memory for what follows the prefixes of whole blocks: the segment that the first token is written after."""
        shared, start = (group.shared.segment, group.shared.end) if group.shared else (None, 0)
        n_prompt = len(group.token_ids)
        if not sequence.params.searches:
            return self.arena.allocate(n_prompt - start + sequence.n_left, start, shared)
        whole, stem = stem_of(n_prompt), None
        if whole > start and (stem := self.arena.allocate(whole - start, start, shared)) is None:
            return None
        room = self.arena.allocate(beam_tokens_needed(n_prompt, sequence.n_left, sequence.width), whole)
        if room is None:
            if stem is not None:
                self.arena.release(stem)
            return None
        sequence.search = Search(sequence, Blocks(self.arena, room), stem)
        return sequence.search.blocks.take(whole, stem or shared)

    def _has_slot(self, sequence: Sequence) -> bool:
        """A search that is wider than a batch runs alone."""
        return self.in_flight + min(sequence.width, self.max_batch) <= self.max_batch

    def admit(self, max_rows: int) -> None:
        """Admit waiting sequences in order until slots or memory run out.

        Those that generate nothing, only until the next pass has max_rows rows: what it read gives its memory back.
        """
        while self.waiting and self._has_slot(self.waiting[0][0]):
            sequence, group = self.waiting[0]
            can_wait = not sequence.params.max_tokens and not (group.pending and group.pending.token_ids)
            if can_wait and sum(len(pending.token_ids) for pending in self.pending) >= max_rows:
                return
            if not self._admit(sequence, group):
                if self.running or self.pending:
                    return
                for prefix in list(self.prefixes):  # nothing runs, so no sequence uses them
                    self._drop(prefix)
                if not self._admit(sequence, group):
                    raise MemoryError("the arena is smaller than one sequence, which check_limits rules out")
            self.waiting.popleft()
            self.in_flight += sequence.width

    def next_pieces(self, max_rows: int) -> list[Piece]:
        """Up to max_rows rows of prefill."""
        pieces: list[Piece] = []
        while self.pending and max_rows > 0:
            pieces.append(self.pending[0].take(max_rows))
            max_rows -= pieces[-1].prefill.n_row
            if pieces[-1].is_last:
                self.pending.popleft()
        return pieces

    def start(self, sequences: list[Sequence]) -> None:
        """After a prefill, which is the first sequence's: run those that generate, which copy keys and values."""
        source, *copies = sequences
        for sequence in copies:
            if sequence.segment is not None:
                assert source.segment is not None
                copy_segment(self.arena.config, source.segment, sequence.segment)
        self.running += [sequence for sequence in sequences if sequence.params.max_tokens]

    def replace(self, beams: list[Sequence], children: list[Sequence]) -> None:
        """Run other beams of a search; those that share most are adjacent, so that attention reads it once."""

        def path(one: Sequence) -> list[int]:
            return [part.offset for part in one.segment.path] if one.segment else []

        gone = {*beams}
        self.running = [sequence for sequence in self.running if sequence not in gone]
        self.running += sorted(children, key=path)

    def finish(self, sequence: Sequence) -> None:
        """Release the sequence's memory, and that of prefixes that no other sequence needs."""
        self.in_flight -= sequence.width
        if sequence.search is not None:
            sequence.search.release()
        elif sequence.segment is not None:
            self.arena.release(sequence.segment)
        sequence.segment = None
        if sequence.params.max_tokens and sequence.search is None:
            self.running.remove(sequence)
        prefix = self.prefix_of[sequence]
        for part in prefix.path if prefix else []:
            part.unfinished -= 1
            if not part.unfinished:
                self._drop(part)
