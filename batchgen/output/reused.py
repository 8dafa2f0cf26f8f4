"""Rows that are copied from older outputs (--reuse), and samples that continue what is there.

A row is copied if a run would make the same bits again: model, precision, version, tokens of the prompt, parameters and
random numbers are equal. Of a row that wants more samples, those that are there are copied; of a sample that ended by
its max_tokens, what is there is continued.
"""

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchgen.files import parse_json
from batchgen.input.grouping import Item
from batchgen.input.parameters import own_parameters
from batchgen.input.prompts import CheckItem
from batchgen.options import say
from batchgen.output.older import OlderOutput, find_older
from batchgen.output.older_rows import (
    FILLS,
    Asked,
    Integers,
    MappedRows,
    ask,
    list_keys,
    list_values,
    make_key,
    read_rows,
)
from batchgen.plan import Plan, differs
from batchgen.types import Begun, Rejected, Request, Reused, SamplingParams, TokenizedRequest

logger = logging.getLogger(__name__)

Checked: TypeAlias = TokenizedRequest | Rejected

TRIES = 4  # older rows with one hash that are compared with a row
_NEW = ("row", "sample", "id", "status", "error", "parameters")  # of a copied row, what is not the older row's


# ---- may any row be copied?


def why_not(opened: OlderOutput, plan: Plan, names: Iterable[str]) -> str | None:
    """Why no row of an older output is what this plan makes, if that is so; names: the columns of the new output."""
    old = opened.plan
    if old is None:
        return f"it was made by batchgen {opened.writer}, and this is {plan.batchgen}"
    if old.task != "generate":
        return f"it was made by the command {old.task}"
    for name in ("model_hash", "precision", "batchgen", "regex", "llguidance", "special_tokens"):
        had, has = getattr(old, name), getattr(plan, name)
        if had != has and name == "model_hash":
            return f"it was made with the model {old.model} ({had[:8]}), and this is {plan.model} ({has[:8]})"
        if differs(name, had, has):
            return f"it was made with {name} {had}, and this is {has}"
    if not old.portable:
        return "its bits depended on the processor"
    missing = [name for name in names if name not in opened.names and name not in FILLS]
    return f"it has no column {missing[0]!r}" if missing and opened.names else None


# ---- what is copied of a chunk


@dataclass(slots=True)
class Copies:
    """Output rows to make of older ones."""

    rows: list[int] = field(default_factory=list)  # these four of each input row
    ids: list[str | None] = field(default_factory=list)
    parameters: list[str | None] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    olds: list[int] = field(default_factory=list)  # these two of each output row
    samples: list[int] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)  # input rows of which nothing is left to generate


class OlderRows:
    """The rows of older outputs that a run may copy; see prompts.Older."""

    def __init__(self, stored: MappedRows, plan: Plan, schema: pa.Schema, *, is_fast: bool) -> None:
        """schema: of the new output. is_fast: whether a prompt's text decides its tokens, and that it is not rejected,
        as it did in all older outputs."""
        self.table, self.index, self.numbers = stored.table, stored.index, stored.numbers
        self.plan, self.schema, self.is_fast = plan, schema, is_fast
        self._names = [name for name in schema.names if name not in _NEW]
        self._last: tuple[SamplingParams, tuple[Asked, str | None]] | None = None
        self._has_noted = False  # that samples cannot be continued

    def _ask(self, params: SamplingParams) -> tuple[Asked, str | None]:
        """What parameters ask for, and what the column `parameters` has of them; most rows have the same object."""
        if self._last is None or self._last[0] is not params:
            self._last = params, (ask(self.numbers, params), own_parameters(params, self.plan.parameters))
        return self._last[1]

    # ---- rows that are as they would be made

    def find(self, items: Sequence[Item]) -> list[int]:
        """See prompts.Older; a number is that of an entry of the index."""
        found = np.full(len(items), -1, np.int64)
        if not self.is_fast or not len(self.index.hashes):
            return found.tolist()
        chosen = [
            (place, item, item.prompt)
            for place, item in enumerate(items)
            if isinstance(item, Request) and isinstance(item.prompt, str) and not item.others
        ]
        if chosen:
            texts = [text for _, _, text in chosen]
            if self.plan.trim:
                texts = [text.rstrip(" ") for text in texts]
            asked = [self._ask(item.params)[0] for _, item, _ in chosen]
            matched = self._match(texts, asked, np.array([item.row for _, item, _ in chosen]))
            found[[place for place, _, _ in chosen]] = matched
        return found.tolist()

    def _match(self, texts: list[str], asked: list[Asked], rows: Integers) -> Integers:
        """Of each, the entry with all of its samples that was asked for the same, or -1."""
        index, seed_by = self.index, self.plan.seed_by
        hashes = np.array(list_keys(texts, asked, seed_by, ((row, None) for row in rows.tolist())), np.int64)
        names = "number", "n", "max_tokens", "seed", "greedy", "alike"
        number, n, max_tokens, seed, greedy, alike = list_values(asked, *names)
        at, last = np.searchsorted(index.hashes, hashes), len(index.hashes) - 1
        found = np.full(len(texts), -1, np.int64)
        for entry in (np.minimum(at + skip, last) for skip in range(TRIES)):
            good = index.hashes[entry] == hashes
            if not good.any():
                break
            good &= (index.numbers[entry] == number) & (index.seeds[entry] == seed)
            good &= (index.max_tokens[entry] == max_tokens) & ((alike == 1) | (index.samples[entry] >= n))
            found = np.where((found < 0) & good, entry, found)
        some = np.flatnonzero(found >= 0)
        if len(some):
            old = self.table.take(index.firsts[found[some]], ["prompt", "row"])
            new = pa.array([texts[place] for place in some], pa.string())
            same = pc.equal(old["prompt"].combine_chunks(), new).to_numpy(zero_copy_only=False)
            if self.plan.seed_by == "row":
                same = same & ((greedy[some] == 1) | (old["row"].to_numpy() == rows[some]))
            found[some[~same]] = -1
        return found

    # ---- a chunk

    def divide(
        self, items: Sequence[Item], older: Sequence[int], check: CheckItem
    ) -> tuple[list[Checked], Reused | None]:
        """See prompts.Older."""
        copies, left = Copies(), []
        whole = [(item, entry) for item, entry in zip(items, older, strict=True) if entry >= 0]
        if whole:
            self._copy_whole([item for item, _ in whole], np.array([entry for _, entry in whole]), copies)  # type: ignore[misc]
        if len(whole) < len(items):
            for item, entry in zip(items, older, strict=True):
                if entry < 0 and (rest := self._extend(check(item), copies)) is not None:
                    left.append(rest)
        return left, self._pack(copies) if copies.rows else None

    def _copy_whole(self, items: list[Request], entries: Integers, copies: Copies) -> None:
        """All samples of rows that these entries of the index have."""
        asked = [self._ask(item.params) for item in items]
        firsts, counts = self.index.firsts[entries], [one.n for one, _ in asked]
        samples = firsts * 0
        if max(counts) > 1:
            samples = np.concatenate([np.arange(n) for n in counts])
            differ = np.repeat([not one.alike for one, _ in asked], counts)
            firsts = np.repeat(firsts, counts) + samples * differ
        copies.rows = [item.row for item in items]
        copies.ids = [item.id for item in items]
        copies.parameters, copies.counts = [own for _, own in asked], counts
        copies.olds, copies.samples = firsts.tolist(), samples.tolist()
        copies.whole = copies.rows.copy()

    def _pack(self, copies: Copies) -> Reused:
        """The output rows, by the columns of the new output."""
        olds, counts = np.array(copies.olds, np.int64), np.array(copies.counts)
        table = self.table.take(olds, self._names)
        places = np.repeat(np.arange(len(counts)), counts)
        new: dict[str, pa.Array] = {
            "row": pa.array(np.repeat(np.array(copies.rows, np.int64), counts)),
            "sample": pa.array(copies.samples, pa.int32()),
            "id": pa.array(copies.ids, pa.string()).take(pa.array(places)),
            "status": pa.repeat("ok", len(olds)),
            "error": pa.nulls(len(olds), pa.string()),
            "parameters": pa.array(copies.parameters, pa.string()).take(pa.array(places)),
        }
        columns = [new[name] if name in new else table[name] for name in self.schema.names]
        made = pa.Table.from_arrays(columns, schema=self.schema)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.schema) as stream:
            stream.write_table(made)
        whole = copies.whole
        stream = bytes(sink.getvalue())
        return Reused(stream, len(olds), len(whole), min(whole, default=0), max(whole, default=0))

    # ---- rows of which something is there

    def _extend(self, item: Checked, copies: Copies) -> Checked | None:
        """What is left to generate of a row, after the samples that are copied or continued."""
        if isinstance(item, Rejected) or item.others or (entry := self._best(item)) is None:
            return item
        first, n = int(self.index.firsts[entry]), item.params.n
        had, alike = int(self.index.max_tokens[entry]), item.params.greedy and not item.params.searches
        if item.params.searches and (had != item.params.max_tokens or self.index.samples[entry] < n):
            return item  # a search cannot go on from what it has found
        olds, samples, begun = [], [], []
        for sample in range(n):
            old = first if alike else first + sample
            if not alike and sample >= self.index.samples[entry]:
                begun.append(Begun(sample))
            elif (start := self._begin(old, sample, had, item.params)) is None:
                olds.append(old)
                samples.append(sample)
            else:
                begun.append(start)
        if olds:
            ids = item.prompt_token_ids if item.given_as_ids else None
            copies.rows.append(item.row)
            copies.ids.append(item.id)
            copies.parameters.append(own_parameters(item.params, self.plan.parameters, ids))
            copies.counts.append(len(olds))
            copies.olds += olds
            copies.samples += samples
        if not begun:
            copies.whole.append(item.row)
            return None
        is_new = not olds and not any(one.token_ids for one in begun)
        return item if is_new else replace(item, begun=tuple(begun))

    def _best(self, item: TokenizedRequest) -> int | None:
        """The entry of the same tokens, parameters and random numbers that has most of what is wanted."""
        asked = ask(self.numbers, item.params, item.given_as_ids)
        text = item.prompt_token_ids if item.given_as_ids else item.prompt
        key = make_key(text, asked, self.plan.seed_by, item.row, item.id)
        index = self.index
        begin = int(np.searchsorted(index.hashes, key))
        entries = [
            entry
            for entry in range(begin, min(begin + TRIES, len(index.hashes)))
            if index.hashes[entry] == key
            and (index.numbers[entry], index.seeds[entry]) == (asked.number, asked.seed)
            and self._is_same(int(index.firsts[entry]), item, asked)
        ]

        def worth(entry: int) -> tuple[bool, int, int]:
            max_tokens = int(index.max_tokens[entry])
            return max_tokens == asked.max_tokens, min(int(index.samples[entry]), asked.n), max_tokens

        return max(entries, key=worth, default=None)

    def _is_same(self, old: int, item: TokenizedRequest, asked: Asked) -> bool:
        """Whether the older row has these tokens and random numbers: of equal texts and counts, tokens are equal."""
        value = self.table.value
        if not asked.greedy and self.plan.seed_by == "row" and value(old, "row") != item.row:
            return False
        if not asked.greedy and self.plan.seed_by == "id" and (item.id is None or value(old, "id") != item.id):
            return False
        if item.given_as_ids:
            ids = parse_json(value(old, "parameters") or "{}").get("prompt_token_ids")
            return bool(ids == list(item.prompt_token_ids))
        return (value(old, "prompt"), value(old, "prompt_tokens")) == (item.prompt, len(item.prompt_token_ids))

    def _begin(self, old: int, sample: int, had: int, params: SamplingParams) -> Begun | None:
        """What a sample is continued from, that was made with `had` as its max_tokens; None: it is copied."""
        value, most = self.table.value, params.max_tokens
        count = value(old, "completion_tokens")
        if had == most or (value(old, "finish_reason") != "length" and count < most):
            return None
        n = max(min(count, most) - 1, 0)
        ids = value(old, "completion_token_ids")
        if ids is None and not self._has_noted:
            self._has_noted = True
            what = "older samples that ended by their max_tokens have no completion_token_ids to continue from"
            logger.warning("%s: they are generated anew; with %s they could be", what, say("token_ids", True))
        return Begun(sample, tuple(ids or ())[:n])


# ---- opening


def read_older(
    names: Sequence[str], plan: Plan, schema: pa.Schema, spool: Path
) -> tuple[tuple[str, ...], OlderRows | None]:
    """16 digits of each of the older outputs, and their rows that may be copied; None if there are none.

    schema: of the new output, without kept columns. Logs why an output is of no use; InputError for one that is damaged
    or unfinished.
    """
    with ExitStack() as stack:
        found = find_older(names, spool, stack)
        digests, usable = tuple(one.sha256() for one in found), []
        for one in found:
            if reason := why_not(one, plan, schema.names):
                logger.warning("%s: no row is copied from it: %s; its rows are generated anew", one.where, reason)
            else:
                usable.append(one)
        if not usable:
            return digests, None
        policies = {(one.on_too_long, one.empty_prompt) for one in (plan, *(older.plan for older in usable)) if one}
        is_fast = len(policies) == 1 and plan.seed_by != "id" and not plan.drop_duplicates
        return digests, OlderRows(read_rows(usable, schema, spool), plan, schema, is_fast=is_fast)
