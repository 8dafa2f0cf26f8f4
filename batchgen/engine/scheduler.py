"""Who runs next: the tree of shared prefixes, the order of the waiting, and memory for those that are let in."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby

from batchgen.engine.sequence import Sequence
from batchgen.gpt2.forward import Prefill
from batchgen.gpt2.kv_cache import BLOCK, LANES, KVArena, Segment, round_up

Tokens = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Prefix:
    """Tokens that several sequences start with, after those of `parent`.

    Of whole blocks, all attend to the same keys and values; of less than a block, each takes a copy of them.
    """

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
class Waiting:
    """The sequences of one prompt text, which share its prefill."""

    token_ids: Tokens
    sequences: list[Sequence]
    prefix: Prefix | None = None
    followers: list[Sequence] = field(default_factory=list)  # let in after the first, before its prefill was done
    pending: bool = False

    @property
    def copied(self) -> Prefix | None:
        """What it begins with after the last block that it shares."""
        return self.prefix if self.prefix and self.prefix.is_copied else None

    @property
    def shared(self) -> Prefix | None:
        """The last of the blocks that it shares."""
        return self.prefix.parent if self.prefix and self.prefix.is_copied else self.prefix

    @property
    def longest(self) -> int:
        return len(self.token_ids) + max(sequence.params.max_tokens for sequence in self.sequences)


def _shareable(prompt: Waiting, start: int) -> Tokens | None:
    """The block from `start` on, unless it holds the last token, whose logits each prompt needs for itself."""
    return prompt.token_ids[start : start + BLOCK] if start + BLOCK < len(prompt.token_ids) else None


def find_prefixes(prompts: Iterable[Waiting], start: int = 0, parent: Prefix | None = None) -> list[list[Waiting]]:
    """Set each prompt's longest shared prefix; return the prompts in families that share a first block.

    A prefix is as long as all its sequences agree: of AAB, AAC and D (a letter a block), AA is one prefix.
    """
    families: dict[Tokens | None, list[Waiting]] = {}
    alone: list[Waiting] = []
    for prompt in prompts:
        families.setdefault(_shareable(prompt, start), []).append(prompt)
    result: list[list[Waiting]] = []
    for block, family in families.items():
        n_sequence = sum(len(prompt.sequences) for prompt in family)
        if block is None or n_sequence < 2:
            alone += family
            continue
        end = start + BLOCK
        while (following := _shareable(family[0], end)) and all(_shareable(p, end) == following for p in family):
            end += BLOCK
        prefix = Prefix(family[0].token_ids[start:end], start, parent, n_sequence)
        for prompt in family:
            prompt.prefix = prefix
        subfamilies = find_prefixes(family, end, prefix)
        subfamilies.sort(key=lambda members: -max(p.longest for p in members))
        result.append([prompt for members in subfamilies for prompt in members])
    _find_beginnings(alone, start, parent)
    return [*result, *([prompt] for prompt in alone)]


def _find_beginnings(prompts: list[Waiting], start: int, parent: Prefix | None) -> None:
    """Set a prefix of less than a block where prompts share no more: at least LANES tokens, to be worth a copy."""
    families: dict[Tokens, list[Waiting]] = {}
    for prompt in prompts:
        families.setdefault(prompt.token_ids[start:-1][:LANES], []).append(prompt)
    for beginning, family in families.items():
        if len(beginning) < LANES or len(family) < 2:
            continue
        rests = [prompt.token_ids[start:-1] for prompt in family]
        first, last = min(rests), max(rests)  # what these two agree on, all do
        n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        prefix = Prefix(first[:n], start, parent, sum(len(prompt.sequences) for prompt in family))
        for prompt in family:
            prompt.prefix = prefix


@dataclass(slots=True, eq=False)
class _Pending:
    """Tokens of a segment that no pass has read yet; the last gives logits where a prompt waits for them."""

    segment: Segment
    token_ids: Tokens
    prompt: Waiting | None
    leader: Sequence | None
    copied: Segment | None = None  # holds the keys and values of what comes before


class Scheduler:
    """Lets sequences in, longest first, as slots and memory come free, and hands out prefill in pieces."""

    def __init__(self, sequences: list[Sequence], arena: KVArena, max_batch: int, share_prefixes: bool) -> None:
        self.arena, self.max_batch = arena, max_batch
        self.running: list[Sequence] = []
        self.pending: deque[_Pending] = deque()
        self.n_pending = 0  # sequences let in whose prompt has not been read to its end
        self.prefix_of: dict[Sequence, Prefix | None] = {}
        self.prefixes: dict[Prefix, None] = {}  # with a segment, in order of allocation
        self.waiting: deque[tuple[Sequence, Waiting]] = deque()
        by_text = groupby(sorted(sequences, key=lambda s: s.prompt.token_ids), key=lambda s: s.prompt.token_ids)
        prompts = [Waiting(token_ids, list(same)) for token_ids, same in by_text]
        families = find_prefixes(prompts) if share_prefixes else [[prompt] for prompt in prompts]
        families.sort(key=lambda family: -max(prompt.longest for prompt in family))
        for prompt in (prompt for family in families for prompt in family):
            for sequence in prompt.sequences:
                sequence.order = len(self.waiting)
                self.prefix_of[sequence] = prompt.prefix
                self.waiting.append((sequence, prompt))

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.pending or self.running)

    def admit(self) -> None:
        """Let in as many of the waiting as there are slots and memory for, in order."""
        while self.waiting and len(self.running) + self.n_pending < self.max_batch:
            sequence, prompt = self.waiting[0]
            if not self._reserve(sequence, prompt):
                if self.running or self.pending:
                    return
                self._drop_idle_prefixes()
                if not self._reserve(sequence, prompt):
                    raise MemoryError("the arena is smaller than one sequence, which Engine has ruled out")
            self.waiting.popleft()
            self.n_pending += 1

    def next_prefills(self, max_rows: int) -> tuple[list[Prefill], list[tuple[Sequence, list[Sequence]]]]:
        """Up to max_rows of prompt, and the sequences whose prompts end in it, each with those that follow it."""
        prefills: list[Prefill] = []
        ready: list[tuple[Sequence, list[Sequence]]] = []
        while self.pending and max_rows > 0:
            piece = self.pending[0]
            taken = piece.token_ids[:max_rows]
            max_rows -= len(taken)
            piece.token_ids = piece.token_ids[len(taken) :]
            done = not piece.token_ids
            prefills.append(Prefill(piece.segment, taken, int(done and piece.leader is not None), piece.copied))
            piece.copied = None
            if done:
                self.pending.popleft()
            if done and piece.leader is not None and piece.prompt is not None:
                ready.append((piece.leader, piece.prompt.followers))
                piece.prompt.followers, piece.prompt.pending = [], False
        return prefills, ready

    def start(self, leader: Sequence, followers: list[Sequence]) -> None:
        """The prompt has been read: the leader runs, and so do its followers, with copies of what it read."""
        source = leader.segment
        assert source is not None
        for follower in followers:
            segment = follower.segment
            assert segment is not None
            n = segment.length = source.length
            segment.k[..., :n] = source.k[..., :n]
            segment.v[:, :, :n] = source.v[:, :, :n]
        self.running += [leader, *followers]
        self.n_pending -= 1 + len(followers)

    def finish(self, sequence: Sequence) -> None:
        """Give back the sequence's memory, and that of prefixes which nobody needs any more."""
        self.running.remove(sequence)
        assert sequence.segment is not None
        self.arena.release(sequence.segment)
        sequence.segment = None
        prefix = self.prefix_of[sequence]
        for part in prefix.path if prefix else []:
            part.unfinished -= 1
            if not part.unfinished:
                self._drop(part)

    def _reserve(self, sequence: Sequence, prompt: Waiting) -> bool:
        """Memory for one sequence and for the prefixes that it needs and nobody has read; all or nothing."""
        missing = [prefix for prefix in (prompt.prefix.path if prompt.prefix else []) if prefix.segment is None]
        for prefix in missing:
            parent = prefix.parent.segment if prefix.parent else None
            prefix.segment = self.arena.allocate(len(prefix.token_ids), prefix.start, parent)
            if prefix.segment is None:
                break
        else:
            shared, start = (prompt.shared.segment, prompt.shared.end) if prompt.shared else (None, 0)
            n_own = len(prompt.token_ids) - start + sequence.params.max_tokens
            sequence.segment = self.arena.allocate(n_own, start, shared)
        if sequence.segment is None:
            for prefix in missing:
                if prefix.segment is not None:
                    self.arena.release(prefix.segment)
                    prefix.segment = None
            return False
        for prefix in missing:
            assert prefix.segment is not None
            self.prefixes[prefix] = None
            self.pending.append(_Pending(prefix.segment, prefix.token_ids, None, None))
        if prompt.pending:
            prompt.followers.append(sequence)
        else:
            prompt.pending = True
            rest = prompt.token_ids[prompt.prefix.end if prompt.prefix else 0 :]
            copied = prompt.copied.segment if prompt.copied else None
            self.pending.append(_Pending(sequence.segment, rest, prompt, sequence, copied))
        return True

    def _drop(self, prefix: Prefix) -> None:
        if prefix.segment is not None:
            self.arena.release(prefix.segment)
            prefix.segment = None
            del self.prefixes[prefix]

    def _drop_idle_prefixes(self) -> None:
        """Forget what was read of prefixes; called only while nothing runs, so nobody is using them."""
        for prefix in list(self.prefixes):
            self._drop(prefix)


def tokens_needed(n_prompt: int, max_tokens: int) -> int:
    """Room in the arena that always suffices for one sequence alone, whatever it shares."""
    return round_up(n_prompt + max_tokens, LANES) + BLOCK
