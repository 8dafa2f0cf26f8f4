"""An input as the rest of the program sees it: files of prompts, opened once, scanned once, and read as chunks.

Each file is opened three times in a run: to check it, to scan it, and to read it. Its bytes are the same each time, or
the run ends (files.SteadyFile): no chunk has a row of other bytes than those whose hash is in the plan.
"""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Protocol, TypeAlias

import pyarrow as pa

from batchgen.errors import InputError, UsageError
from batchgen.input import csv_files, jsonl, parquet, text_lines
from batchgen.input.duplicates import Repeats
from batchgen.input.formats import Format, Found, Reading, Rows, Scanned, folder_parameters
from batchgen.input.grouping import TOGETHER, Item, share_out
from batchgen.input.kept import Column, kept_schema, pack_kept
from batchgen.input.parameters import ASKING, PARAMETERS, WITH_COLUMNS, find_results, is_asked, override_params
from batchgen.input.sources import Source, check_local_unchanged, check_unchanged, find_sources, local_paths
from batchgen.input.templates import Shots, template_of, with_template
from batchgen.input.validation import Check
from batchgen.input.words import describe_missing, find_surrogate
from batchgen.job import InputOptions, ScoreInput
from batchgen.options import say, shown
from batchgen.selection import Selection
from batchgen.types import MAX_INT, Chunk, Rejected, Request, Reused, RowParameters, SamplingParams, TokenizedRequest

FORMATS: dict[str, Format] = {"jsonl": jsonl, "csv": csv_files, "tsv": csv_files, "parquet": parquet, "txt": text_lines}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the scan of an input finds.

    sha256 is that of the stored bytes of the file. For several files, or one below key=value folders, it is that of a
    text with a line for each file: its SHA-256 in hex, and what its folders say. Names of files do not count.
    """

    formats: tuple[str, ...]  # of each file; one for all if they agree
    rows: int
    sha256: str
    bytes: int
    asks: frozenset[str]  # of parameters.ASKING, those that a row may have
    kept: pa.Schema  # of the kept columns
    files: tuple[str, ...] = ()  # of several files, 16 digits of the SHA-256 of each, folders included
    names: tuple[str, ...] = field(default=(), compare=False)  # of the files, for people
    template: str | None = None  # that prompts are made of
    before: str = ""  # stands before every prompt


WINDOW_BYTES = 32 * 2**20  # a chunk is in memory several times: here, on its way, in its worker
COPIED = 32  # rows that are copied from an older output, for one that is generated
MOST_COPIED = 16_384  # of a chunk
COPYING = 4  # chunks of such rows in a window


@dataclass(frozen=True, slots=True)
class Cut:
    """How an input is cut into chunks, and which are wanted. A window ends with the row that fills it; see grouping.py.

    A resumed run cuts at the same rows, and into the same chunks.
    """

    chunk_rows: int
    rows: Container[int] | None = None  # only these input rows; None: all
    end: int | None = None  # none of these rows is at this number or after it; None: not known
    skip: Container[int] = ()  # chunks that are done: their rows are read but not tokenized
    as_json: bool = False  # kept values are written as JSON lines; a row with one that JSON cannot hold is rejected
    together: int = 1  # chunks of a window; 1: each chunk is consecutive rows
    window_bytes: int = WINDOW_BYTES  # of the input
    before: Container[int] = ()  # rows that earlier shards do: a row here may repeat one of them
    drop_prompts: bool = False  # a row with the prompt of an earlier one is dropped

    @classmethod
    def for_output(
        cls,
        kind: str,
        chunk_rows: int,
        rows: Container[int] | None,
        skip: Container[int] = (),
        drop_prompts: bool = False,
    ) -> "Cut":
        """The cut for a kind of output. The parts of a dataset are its files, so each has consecutive rows."""
        selection = rows if isinstance(rows, Selection) else None
        return cls(
            chunk_rows,
            rows,
            None if selection is None else selection.end,
            skip,
            as_json=kind == "jsonl",
            together=1 if kind == "dataset" else TOGETHER,
            window_bytes=WINDOW_BYTES,
            before=() if selection is None else Selection(selection.before),
            drop_prompts=drop_prompts,
        )

    def concerns(self, row: int) -> bool:
        """Whether a row is wanted, or one of the wanted may repeat it."""
        return self.rows is None or row in self.rows or row in self.before


CheckItem: TypeAlias = Callable[[Item], TokenizedRequest | Rejected]


class Older(Protocol):
    """Older outputs, whose rows are copied; see output/reused.py."""

    def find(self, items: Sequence[Item]) -> Sequence[int]:
        """For each row, the one there that is as it would be made, or -1: without a look at its tokens."""

    def divide(
        self, items: Sequence[Item], older: Sequence[int], check: CheckItem
    ) -> tuple[list[TokenizedRequest | Rejected], Reused | None]:
        """The rows that are to be generated, checked, and what is copied of the others; older: as `find` says."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """An input whose files exist and can be prompts."""

    options: InputOptions
    sources: tuple[Source, ...]
    openai: bool  # made of OpenAI's batch files
    row_parameters: RowParameters = field(default_factory=RowParameters)  # of the rows that were read last
    shots: Shots | None = None

    @classmethod
    def open(cls, options: InputOptions, spool: Path | None = None, shots: Shots | None = None) -> "Prompts":
        """Find the files and read the start of each; standard input is copied to a nameless file in `spool`.

        shots: the examples that the options name (see open_prompts in shots.py).
        """
        options = with_template(options)
        sources = find_sources(options.files, options.format, spool)
        found = [FORMATS[source.format].check(source, options) for source in sources]
        for source in sources:
            _with_folders(source, options, SamplingParams(max_tokens=MAX_INT, prompt_logprobs=0))
        openai = _agree_on_openai(sources, found)
        if openai:
            _check_openai(sources[0], options)
        _check_kept(options, sources, found)
        results = dict.fromkeys(name for one in found if options.row_params for name in find_results(one.names))
        folders = dict.fromkeys(folder for one in sources if options.row_params for folder in _folders_above(one))
        return cls(options, sources, openai, RowParameters(results=tuple(results), folders=tuple(folders)), shots)

    @property
    def local_paths(self) -> list[Path]:
        """The local files, and the directories that the user named for them."""
        return [*local_paths(self.sources), *(self.shots.paths if self.shots else ())]

    @property
    def before(self) -> str:
        """What stands before every prompt."""
        return self.shots.text if self.shots else ""

    def scan(self) -> Facts:
        """Read every file once; InputError if packed data is damaged or a file has changed."""
        scanned = []
        for source in self.sources:
            scanned.append(FORMATS[source.format].scan(source, self.options))
            check_unchanged(source)
        lines = [_line(source, one.sha256) for source, one in zip(self.sources, scanned, strict=True)]
        formats = tuple(source.format for source in self.sources)
        named = [folder_parameters(source, self.options) for source in self.sources]
        return Facts(
            formats=formats if len(set(formats)) > 1 else formats[:1],
            rows=sum(one.rows for one in scanned),
            sha256=scanned[0].sha256 if lines == [scanned[0].sha256] else _hash("".join(f"{line}\n" for line in lines)),
            bytes=sum(one.bytes + one.rows * len(self.before) for one in scanned),
            asks=ASKING & {name for found in (*named, *(one.asks for one in scanned)) for name in found},
            kept=kept_schema(self.options.keep, *_with_rows(self.sources, scanned)),
            files=tuple(_hash(line)[:16] if " " in line else line[:16] for line in lines) if len(lines) > 1 else (),
            names=tuple(source.name for source in self.sources),
            template=self.options.template,
            before=self.before,
        )

    def requests(self, params: SamplingParams) -> Iterator[Item]:
        """Yield every row in order, from row 0; its own parameters win over `params`."""
        for rows in self._read(params, pa.schema([])):
            yield from rows.items

    def chunks(
        self, facts: Facts, params: SamplingParams, check: Check, cut: Cut, older: Older | None = None
    ) -> Iterator[Chunk]:
        """Yield the wanted chunks, each with the kept columns of its rows; see `requests` for the rest."""
        unseen = {*WITH_COLUMNS} - asked_columns(self, facts, params)  # the output has no columns of them

        def checked(item: Item) -> TokenizedRequest | Rejected:
            return item if isinstance(item, TokenizedRequest) else check(item)

        found = self._read(params, facts.kept, cut.as_json)
        batches: Iterator[Rows] = (_reject_unseen(rows, unseen, params) for rows in found)
        repeats = Repeats(cut.drop_prompts, ids=self.options.seed_by == "id")
        if repeats.prompts or repeats.ids:  # rows are checked in their order, before they are dealt out
            batches = repeats.decide_all(batches, checked, cut.concerns)
        if older:
            batches = (replace(rows, older=older.find(rows.items)) for rows in batches)
        for index, pieces in _pieces(batches, cut):
            items = [item for piece in pieces for item in piece.items]
            tables = [piece.kept for piece in pieces if piece.kept is not None]
            kept = pack_kept(tables, [item.row for item in items]) if tables else None
            if older:
                left, reused = older.divide(items, [row for piece in pieces for row in piece.older], checked)
                yield Chunk(index, tuple(left), kept, reused)
            else:
                yield Chunk(index, tuple(map(checked, items)), kept)

    def _read(self, params: SamplingParams, kept: pa.Schema, as_json: bool = False) -> Iterator[Rows]:
        """Yield all rows, in batches of bounded size."""
        found = self.row_parameters
        found.taken.clear()
        found.escaped.clear()
        template = template_of(self.options)
        reading = Reading(self.options, params, kept, self.openai, as_json, found, template, self.before)
        first_row = 0
        for source in self.sources:
            own = replace(reading, params=_with_folders(source, self.options, params))
            names = folder_parameters(source, self.options)
            for rows in FORMATS[source.format].read(source, own, first_row):
                found.taken.update(dict.fromkeys(names, len(rows.items)))
                check_local_unchanged(source)  # at once, not when a run of hours comes to the bytes
                yield _with_sizes(rows) if template or self.before else rows
                first_row += len(rows.items)


def _with_sizes(rows: Rows) -> Rows:
    """The rows with the prompts that were made of them in their sizes: the same value may be in one twice."""
    made = (len(item.prompt or "") for item in rows.items)
    return replace(rows, sizes=[size + more for size, more in zip(rows.sizes, made, strict=True)])


def asked_columns(prompts: Prompts, facts: Facts, params: SamplingParams) -> set[str]:
    """Which of WITH_COLUMNS the run or a row may ask for; in OpenAI's lines, echo with logprobs asks for both."""
    asks = {name for name in ASKING if is_asked(name, params)}
    if prompts.openai or prompts.options.row_params:
        asks |= facts.asks
    if prompts.openai and asks >= {"logprobs", "echo"}:
        asks.add("prompt_logprobs")
    return asks & {*WITH_COLUMNS}


def _reject_unseen(rows: Rows, unseen: Container[str], params: SamplingParams) -> Rows:
    """Reject rows that ask for a column in letters that the scan, which looks for the name, did not see."""
    items = list(rows.items)
    for index, item in enumerate(items):
        if not isinstance(item, Request) or item.params is params:
            continue
        name = next((name for name in WITH_COLUMNS if name in unseen and is_asked(name, item.params)), None)
        if name is not None:
            reason = f"{name} is written in a way that is found too late; write it in plain letters"
            items[index] = item.rejected(reason)
    return replace(rows, items=items)


def _folders_above(source: Source) -> Iterator[str]:
    """The folders like seed=3 that a file is in and that are none of its columns."""
    for folder in PurePath(source.where).parts[:-1]:
        name, _, value = folder.partition("=")
        if value and name in PARAMETERS and name not in dict(source.partition):
            yield folder


def _with_folders(source: Source, options: InputOptions, params: SamplingParams) -> SamplingParams:
    """The parameters of a file's rows that have none of their own."""
    try:
        return override_params(folder_parameters(source, options), params)
    except UsageError as error:
        remedy = f"rename the folder or pass {say('row_params', False)}"
        raise InputError(f"{source.where}: {error}; {remedy}") from error


def _check_openai(source: Source, options: InputOptions) -> None:
    """Raise InputError for options that OpenAI's batch files have no use for."""
    what = f"{source.where}: this is one of OpenAI's batch files, which"
    if isinstance(options, ScoreInput):
        remedy = "a body with echo, logprobs and max_tokens 0 has its prompt scored there"
        raise InputError(f"{what} ask for completions; pass it to generate ({remedy})")
    for name in ("template", "shots"):
        if getattr(options, name) is not None:
            raise InputError(f"{what} have their prompts in bodies; leave {say(name)} out")


def _agree_on_openai(sources: Sequence[Source], found: Sequence[Found]) -> bool:
    """Whether the files are OpenAI's batch files: all or none of them."""
    openai = next((one.openai for one in found if one.openai is not None), False)
    for source, one in zip(sources, found, strict=True):
        if one.openai not in (None, openai):
            which = "the first is one of OpenAI's batch files and this is not"
            which = which if openai else "this is one of OpenAI's batch files and the first is not"
            raise InputError(f"{source.where}: {which}; run them apart")
    return openai


def _check_kept(options: InputOptions, sources: Sequence[Source], found: Sequence[Found]) -> None:
    names: dict[str, None] = {}
    for source, one in zip(sources, found, strict=True):
        names |= dict.fromkeys((*one.names, *dict(source.partition)))
        for name, value in source.partition:
            if name in options.keep and find_surrogate(value or ""):
                raise InputError(f"{source.where}: the folder of {shown(name)} is not UTF-8; rename it")
    for column in options.keep:
        if names and column not in names:
            more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
            raise InputError(f"{sources[0].where}{more}: {describe_missing(column, 'keep', list(names), 'column')}")


def _with_rows(
    sources: Sequence[Source], scanned: Sequence[Scanned]
) -> tuple[list[Source], list[Mapping[str, Column]]]:
    """The files that have rows, and their kept columns; all files if none has rows. Without rows there are no types."""
    pairs = [(source, one.columns) for source, one in zip(sources, scanned, strict=True) if one.rows]
    pairs = pairs or [(source, one.columns) for source, one in zip(sources, scanned, strict=True)]
    return [source for source, _ in pairs], [columns for _, columns in pairs]


def _line(source: Source, sha256: str) -> str:
    """What a file counts for in an input of several files; see Facts."""
    return f"{sha256} {json.dumps(source.partition)}" if source.partition else sha256


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _windows(batches: Iterable[Rows], cut: Cut) -> Iterator[list[Rows]]:
    """Yield the wanted rows window by window, as the pieces of batches that make up each."""
    pieces: list[Rows] = []
    most = MOST_COPIED * (COPYING if cut.together > 1 else 1)
    work = copied = size = 0  # a row to generate counts as COPIED
    for batch in batches:
        if cut.end is not None and batch.items and batch.items[0].row >= cut.end:
            break
        indices: list[int] = []
        wanted = None if _has_all(cut.rows, batch) else cut.rows
        for index, item in enumerate(batch.items):
            if wanted is not None and item.row not in wanted:
                continue
            indices.append(index)
            is_copied = bool(batch.older) and batch.older[index] >= 0
            copied += is_copied
            work, size = work + (1 if is_copied else COPIED), size + batch.sizes[index]
            if work > cut.chunk_rows * cut.together * COPIED - COPIED or copied == most or size >= cut.window_bytes:
                yield [*pieces, batch.take(indices)]
                pieces, indices, work, copied, size = [], [], 0, 0, 0
        if indices:
            pieces.append(batch.take(indices))
    if pieces:
        yield pieces


def _has_all(rows: Container[int] | None, batch: Rows) -> bool:
    """Whether all rows of a batch are wanted, if that is seen without a look at each."""
    if rows is None or not isinstance(rows, Selection):
        return rows is None
    numbers, items = rows.numbers, batch.items
    return isinstance(numbers, range) and all(item.row in numbers for item in (*items[:1], *items[-1:]))


def _pieces(batches: Iterable[Rows], cut: Cut) -> Iterator[tuple[int, list[Rows]]]:
    """Yield the index of each wanted chunk, and the pieces of batches that make it up."""
    first = 0
    for window in _windows(batches, cut):
        copied = [place for place, row in enumerate(row for piece in window for row in piece.older) if row >= 0]
        n_new = sum(len(piece.items) for piece in window) - len(copied)
        n_chunk = -(-n_new // cut.chunk_rows) + -(-len(copied) // MOST_COPIED) if cut.together > 1 else 1
        indices = range(first, first + n_chunk)
        first = indices.stop
        if all(index in cut.skip for index in indices):
            continue
        if n_chunk == 1:
            yield indices[0], window
            continue
        for index, members in zip(indices, _shares(window, copied, cut.chunk_rows), strict=True):
            if index not in cut.skip:
                yield index, _take(window, members)


def _shares(window: Sequence[Rows], copied: list[int], chunk_rows: int) -> list[list[int]]:
    """The places of each chunk's rows in the window; those that are copied make chunks of their own."""
    shares = [copied[begin : begin + MOST_COPIED] for begin in range(0, len(copied), MOST_COPIED)]
    items = [item for piece in window for item in piece.items]
    places = sorted({*range(len(items))}.difference(copied))
    if places:
        new = [items[place] for place in places]
        n_chunk = -(-len(new) // chunk_rows)
        shares += [[places[member] for member in members] for members in share_out(new, n_chunk, chunk_rows)]
    return sorted(shares)


def _take(pieces: Sequence[Rows], members: Sequence[int]) -> list[Rows]:
    """The rows at these ascending indices, which count through the pieces."""
    found: list[Rows] = []
    start = at = 0
    for piece in pieces:
        end = bisect_left(members, start + len(piece.items), at)
        if at < end:
            found.append(piece.take([member - start for member in members[at:end]]))
        start, at = start + len(piece.items), end
    return found
