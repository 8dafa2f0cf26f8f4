"""An input as the rest of the program sees it: files of prompts, opened once, scanned once, and read as chunks.

A format is a module with three functions, check, scan and read, of the kind that formats.Format declares. To add one,
write its module, and add it to FORMATS below, to the suffixes in sources.py, and to InputFormat in job.py.

Each file is opened three times in a run: to check it, to scan it, and to read it.
"""

import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa

from batchgen.errors import InputError
from batchgen.input import csv_files, jsonl, parquet
from batchgen.input.formats import Format, Found, Reading, Rows
from batchgen.input.kept import kept_schema, pack_kept
from batchgen.input.sources import Source, check_unchanged, find_sources, local_paths
from batchgen.input.validation import Check
from batchgen.input.words import describe_missing
from batchgen.job import InputOptions
from batchgen.types import Chunk, Rejected, Request, SamplingParams

FORMATS: dict[str, Format] = {"jsonl": jsonl, "csv": csv_files, "tsv": csv_files, "parquet": parquet}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the scan of an input finds.

    sha256 is that of the stored bytes of the file. For several files, or one below key=value folders, it is that of a
    text with a line for each file: its SHA-256 in hex, and what its folders say. Names of files do not count.
    """

    formats: tuple[str, ...]  # of the files, sorted
    rows: int
    sha256: str
    bytes: int
    logprobs: bool  # a row may ask for them
    kept: pa.Schema  # of the kept columns


@dataclass(frozen=True, slots=True)
class Cut:
    """How an input is cut into chunks, and which of them are wanted."""

    chunk_rows: int
    rows: Container[int] | None = None  # only these input rows; None: all
    skip: Container[int] = ()  # chunks that are done: their rows are read but not tokenized


@dataclass(frozen=True, slots=True)
class Prompts:
    """An input whose files exist and can be prompts."""

    options: InputOptions
    sources: tuple[Source, ...]
    openai: bool  # made of OpenAI's batch files

    @classmethod
    def open(cls, options: InputOptions, spool: Path | None = None) -> "Prompts":
        """Find the files and read the start of each; standard input is copied to a nameless file in `spool`.

        Raises InputError, with a remedy, for a missing file, column or format. Single bad rows pass, to be rejected one
        by one, and so does an empty file. A kept column may be absent from some files, but not from all.
        """
        sources = find_sources(options.files, options.format, spool)
        found = [FORMATS[source.format].check(source, options) for source in sources]
        openai = _agree_on_openai(sources, found)
        _check_kept(options, sources, found)
        return cls(options, sources, openai)

    @property
    def local_paths(self) -> list[Path]:
        """The local files, and the directories that the user named for them."""
        return local_paths(self.sources)

    def scan(self) -> Facts:
        """Read every file once; InputError if packed data is damaged or a file has changed."""
        scanned = []
        for source in self.sources:
            scanned.append(FORMATS[source.format].scan(source, self.options.keep))
            check_unchanged(source)
        return Facts(
            formats=tuple(sorted({source.format for source in self.sources})),
            rows=sum(one.rows for one in scanned),
            sha256=_combine(self.sources, [one.sha256 for one in scanned]),
            bytes=sum(one.bytes for one in scanned),
            logprobs=any(one.logprobs for one in scanned),
            kept=kept_schema(self.options.keep, self.sources, [one.columns for one in scanned]),
        )

    def requests(self, params: SamplingParams) -> Iterator[Request | Rejected]:
        """Yield every row in order, from row 0; its own parameters win over `params`.

        Places are `a.jsonl:LINE` and `a.parquet:row N`. Memory is flat in the number of rows, except for the custom_ids
        of OpenAI's batch files. Raises InputError if a file is damaged or has changed.
        """
        for rows in self._read(params, pa.schema([])):
            yield from rows.items

    def chunks(self, facts: Facts, params: SamplingParams, check: Check, cut: Cut) -> Iterator[Chunk]:
        """Yield the wanted chunks in order, each with the kept columns of its rows; see `requests` for the rest."""
        for index, pieces in enumerate(_regroup(self._read(params, facts.kept), cut)):
            if index in cut.skip:
                continue
            items = [item for piece in pieces for item in piece.items]
            tables = [piece.kept for piece in pieces if piece.kept is not None]
            kept = pack_kept(tables, [item.row for item in items]) if tables else None
            yield Chunk(index, tuple(map(check, items)), kept)

    def _read(self, params: SamplingParams, kept: pa.Schema) -> Iterator[Rows]:
        """Yield all rows, in batches of bounded size."""
        reading = Reading(self.options, params, kept, self.openai)
        first_row = 0
        for source in self.sources:
            for rows in FORMATS[source.format].read(source, reading, first_row):
                yield rows
                first_row += len(rows.items)
            check_unchanged(source)


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
    for column in options.keep:
        if names and column not in names:
            more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
            raise InputError(f"{sources[0].where}{more}: {describe_missing(column, 'keep', list(names), 'column')}")


def _combine(sources: Sequence[Source], hashes: Sequence[str]) -> str:
    """The SHA-256 of an input from those of its files; see Facts."""
    if len(sources) == 1 and not sources[0].partition:
        return hashes[0]
    digest = hashlib.sha256()
    for source, sha256 in zip(sources, hashes, strict=True):
        folders = f" {json.dumps(source.partition)}" if source.partition else ""
        digest.update(f"{sha256}{folders}\n".encode())
    return digest.hexdigest()


def _regroup(batches: Iterable[Rows], cut: Cut) -> Iterator[list[Rows]]:
    """Yield the wanted rows chunk by chunk, as the pieces of batches that make up each; the last may be shorter."""
    pieces: list[Rows] = []
    room = cut.chunk_rows
    for batch in batches:
        wanted = iter([i for i, item in enumerate(batch.items) if cut.rows is None or item.row in cut.rows])
        while indices := tuple(islice(wanted, room)):
            pieces.append(batch.take(indices))
            room -= len(indices)
            if room == 0:
                yield pieces
                pieces, room = [], cut.chunk_rows
    if pieces:
        yield pieces
