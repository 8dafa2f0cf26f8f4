"""The order of execution: shared prefixes, the order of waiting sequences, and memory for the admitted ones."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby

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
    """The sequences of one prompt text; those admitted together share its prefill."""

    token_ids: Tokens
    sequences: list[Sequence]
    prefix: Prefix | None = None
    admitted: list[Sequence] = field(default_factory=list)  # since the last prefill; the next one is for the first

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
        return len(self.token_ids) + max(sequence.params.max_tokens for sequence in self.sequences)


def _block_at(group: PromptGroup, start: int) -> Tokens | None:
    """The block from `start` on; None if it includes the last token, which each prompt reads itself for its logits."""
    return group.token_ids[start : start + BLOCK] if start + BLOCK < len(group.token_ids) else None


def _set_partial_prefixes(groups: list[PromptGroup], start: int, parent: Prefix | None) -> None:
    """Set the prefix of groups that share less than a block, but at least LANES tokens: fewer are not worth a copy."""
    families: dict[Tokens, list[PromptGroup]] = {}
    for group in groups:
        families.setdefault(group.token_ids[start:-1][:LANES], []).append(group)
    for beginning, family in families.items():
        if len(beginning) < LANES or len(family) < 2:
            continue
        rests = [group.token_ids[start:-1] for group in family]
        first, last = min(rests), max(rests)  # a beginning that these two share is shared by all
        n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        prefix = Prefix(first[:n], start, parent, sum(len(group.sequences) for group in family))
        for group in family:
            group.prefix = prefix


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


@dataclass(slots=True, eq=False)
class _PendingPrefill:
    """Tokens of a segment that no pass has read yet."""

    segment: Segment
    token_ids: Tokens
    group: PromptGroup | None = None  # its sequences start with the logits of the last token; None for a prefix
    copied: Segment | None = None  # the keys and values before the tokens, to be copied into the segment


class Scheduler:
    """Admits sequences, longest first, when slots and memory are free, and cuts their prefill into passes."""

    def __init__(self, sequences: list[Sequence], arena: KVArena, max_batch: int, share_prefixes: bool) -> None:
        self.arena, self.max_batch = arena, max_batch
        self.running: list[Sequence] = []
        self.pending: deque[_PendingPrefill] = deque()
        self.n_pending = 0  # admitted sequences whose prefill is not complete
        self.prefix_of: dict[Sequence, Prefix | None] = {}
        self.prefixes: dict[Prefix, None] = {}  # those with a segment, in order of allocation
        self.waiting: deque[tuple[Sequence, PromptGroup]] = deque()
        self.prompt_tokens = 0  # to read; each shared prefix once
        by_text = groupby(sorted(sequences, key=lambda s: s.prompt.token_ids), key=lambda s: s.prompt.token_ids)
        groups = [PromptGroup(token_ids, list(same)) for token_ids, same in by_text]
        families = find_prefixes(groups) if share_prefixes else [[group] for group in groups]
        families.sort(key=lambda family: -max(group.longest for group in family))
        for group in (group for family in families for group in family):
            self.prompt_tokens += len(group.token_ids) - (group.prefix.end if group.prefix else 0)
            for sequence in group.sequences:
                sequence.order = len(self.waiting)
                self.prefix_of[sequence] = group.prefix
                self.waiting.append((sequence, group))
        prefixes = {prefix for group in groups if group.prefix for prefix in group.prefix.path}
        self.prompt_tokens += sum(len(prefix.token_ids) for prefix in prefixes)

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
        new: dict[Prefix, _PendingPrefill] = {}
        for prefix in group.prefix.path if group.prefix else []:
            if prefix.segment is not None:
                continue
            parent = prefix.parent.segment if prefix.parent else None
            prefix.segment = self.arena.allocate(len(prefix.token_ids), prefix.start, parent)
            if prefix.segment is None:
                break
            self.prefixes[prefix] = None
            new[prefix] = _PendingPrefill(prefix.segment, prefix.token_ids)
        else:
            shared, start = (group.shared.segment, group.shared.end) if group.shared else (None, 0)
            n_own = len(group.token_ids) - start + sequence.params.max_tokens
            sequence.segment = self.arena.allocate(n_own, start, shared)
        if sequence.segment is None:
            for prefix in new:
                self._drop(prefix)
            return False
        self.pending += new.values()
        group.admitted.append(sequence)
        if len(group.admitted) == 1:
            rest = group.token_ids[group.prefix.end if group.prefix else 0 :]
            copied = group.copied.segment if group.copied else None
            self.pending.append(_PendingPrefill(sequence.segment, rest, group, copied))
        return True

    def admit(self) -> None:
        """Admit waiting sequences in order until slots or memory run out."""
        while self.waiting and len(self.running) + self.n_pending < self.max_batch:
            sequence, group = self.waiting[0]
            if not self._admit(sequence, group):
                if self.running or self.pending:
                    return
                for prefix in list(self.prefixes):  # nothing runs, so no sequence uses them
                    self._drop(prefix)
                if not self._admit(sequence, group):
                    raise MemoryError("the arena is smaller than one sequence, which check_limits rules out")
            self.waiting.popleft()
            self.n_pending += 1

    def next_prefills(self, max_rows: int) -> tuple[list[Prefill], list[list[Sequence]]]:
        """Up to max_rows rows of prefill, and for each prompt that ends in them its admitted sequences."""
        prefills: list[Prefill] = []
        ready: list[list[Sequence]] = []
        while self.pending and max_rows > 0:
            piece = self.pending[0]
            taken = piece.token_ids[:max_rows]
            max_rows -= len(taken)
            piece.token_ids = piece.token_ids[len(taken) :]
            is_done = not piece.token_ids
            prefills.append(Prefill(piece.segment, taken, int(is_done and piece.group is not None), piece.copied))
            piece.copied = None
            if is_done:
                self.pending.popleft()
                if piece.group is not None:
                    ready.append(piece.group.admitted)
                    piece.group.admitted = []
        return prefills, ready

    def start(self, sequences: list[Sequence]) -> None:
        """Run sequences of one prompt after its prefill, which is the first one's; the others copy keys and values."""
        source, *copies = [sequence.segment for sequence in sequences]
        assert source is not None
        for segment in copies:
            assert segment is not None
            copy_segment(self.arena.config, source, segment)
        self.running += sequences
        self.n_pending -= len(sequences)

    def finish(self, sequence: Sequence) -> None:
        """Release the sequence's memory, and that of prefixes that no other sequence needs."""
        self.running.remove(sequence)
        assert sequence.segment is not None
        self.arena.release(sequence.segment)
        sequence.segment = None
        prefix = self.prefix_of[sequence]
        for part in prefix.path if prefix else []:
            part.unfinished -= 1
            if not part.unfinished:
                self._drop(part)
