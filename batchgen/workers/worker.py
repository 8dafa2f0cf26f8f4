"""What a worker process does: one chunk in, one part on disk, a receipt back.

A worker is sent paths and small records and keeps the model that it mapped for the next chunk. Which process
runs a chunk makes no difference to what it writes.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from joblib.externals.loky import process_executor
from threadpoolctl import threadpool_limits

from batchgen.engine.engine import LARGEST_BATCH, MAX_BATCH, Engine
from batchgen.engine.sequence import Completion, Prompt, sample_seeds
from batchgen.errors import BatchgenError
from batchgen.input.kept import kept_columns
from batchgen.models.shards import Manifest, load_manifest, load_params
from batchgen.output.ledger import with_receipt
from batchgen.output.schema import output_schema
from batchgen.output.writer import write_part
from batchgen.planning import default_kv_bytes
from batchgen.text.stopping import StopStrings, bad_word_ids, completed_text
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import Chunk, OutputRow, Receipt, Rejected, SamplingParams, TokenizedRequest

OUT_OF_MEMORY = 12  # exit code: errno's ENOMEM
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """All that a worker needs besides its chunk."""

    model: str
    model_hash: str  # a worker that has another model under this path maps it anew
    kv_bytes: int
    max_batch: int
    share_prefixes: bool
    token_ids: bool
    logprobs: bool
    params: SamplingParams  # the run's, which a row may have changed for itself
    parent: int  # process id: a worker does not outlive it
    prompt_index: bool = False
    markers: str | None = None  # where they lie, if not in the attempt's directory


@dataclass(frozen=True, slots=True)
class Sighting:
    """What a worker's marker says: the chunk that it is working on, or was, what of it is done, the rows in flight.

    pulse changes with everything that the worker does. suspects are the rows that it has just begun to read, or is
    about to write down: what they do to a worker, they do now. running are the others of this step.
    """

    pid: int
    pulse: int
    working: bool
    chunk: int
    rows: int
    prompt_tokens: int
    completion_tokens: int
    suspects: tuple[int, ...]
    running: tuple[int, ...]

    @property
    def in_flight(self) -> tuple[int, ...]:
        return self.suspects + self.running


class Marker:
    """A worker's account of itself, in a small mapped file that outlives it.

    int64: pulse, working, chunk, rows done, tokens in and out, number of suspects, of running rows, and all these rows.
    """

    HEADER = 8
    MAX_ROWS = 2 * LARGEST_BATCH
    BYTES = 8 * (HEADER + MAX_ROWS)

    def __init__(self, directory: Path, chunk: int) -> None:
        path = directory / f"worker-{os.getpid()}"
        if not path.exists():
            path.write_bytes(bytes(self.BYTES))  # a hole could not be filled on a full disk
        self._values: npt.NDArray[np.int64] = np.memmap(path, np.int64, "r+")
        self._values[1 : self.HEADER] = True, chunk, 0, 0, 0, 0, 0
        self._values[0] += 1

    def add(self, rows: int, prompt_tokens: int, completion_tokens: int) -> None:
        self._values[3:6] += (rows, prompt_tokens, completion_tokens)

    def on(self, suspects: Sequence[int], running: Sequence[int] = ()) -> None:
        """Say which rows are next, before anything is done with them."""
        rows = [*suspects, *running][: self.MAX_ROWS]
        self._values[self.HEADER : self.HEADER + len(rows)] = rows
        self._values[6:8] = min(len(suspects), len(rows)), max(len(rows) - len(suspects), 0)
        self._values[0] += 1

    def step(self, starting: Sequence[int], running: Sequence[int]) -> None:
        """The same of a step of the engine, in which each of them gets a token."""
        self.on(starting, running)
        self._values[5] += len(starting) + len(running)

    def settle(self, completion_tokens: int) -> None:
        """How many they really were: without what ended a sequence, and with what was generated once for several."""
        self._values[5] = completion_tokens

    def done(self) -> None:
        self.on(())
        self._values[1] = False

    def lost(self) -> Sighting:
        """What it says now, and will say no more: nothing of the chunk will come."""
        sighting = _sighting(os.getpid(), self._values.tolist())
        self._values[3:6] = 0
        self.done()
        return sighting


class NoMarker(Marker):
    """Nobody looks."""

    def __init__(self) -> None:
        self._values = np.zeros(self.HEADER + self.MAX_ROWS, np.int64)


def _sighting(pid: int, values: list[int]) -> Sighting:
    pulse, working, chunk, rows, prompt_tokens, completion_tokens, n_suspect, n_running = values[: Marker.HEADER]
    in_flight = tuple(values[Marker.HEADER :][: n_suspect + n_running])
    return Sighting(
        pid=pid,
        pulse=pulse,
        working=bool(working),
        chunk=chunk,
        rows=rows,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        suspects=in_flight[:n_suspect],
        running=in_flight[n_suspect:],
    )


def read_sightings(directory: Path) -> list[Sighting]:
    """What the workers of an attempt are doing, or were when they died."""
    sightings = []
    for path in directory.glob("worker-*"):
        with suppress(FileNotFoundError, IsADirectoryError):
            data = path.read_bytes()
            if len(data) == Marker.BYTES:  # else it is just being made
                sightings.append(_sighting(int(path.name.partition("-")[2]), np.frombuffer(data, np.int64).tolist()))
    return sightings


def map_engine(
    directory: Path,
    manifest: Manifest,
    tokenizer: Tokenizer,
    *,
    kv_bytes: int | None = None,
    max_batch: int = MAX_BATCH,
    share_prefixes: bool = True,
) -> Engine:
    """An engine over the model's shards, mapped and not read yet; kv_bytes None is automatic."""
    return Engine(
        load_params(directory, manifest),
        manifest.config,
        eos_id=tokenizer.eos_id,
        kv_bytes=default_kv_bytes(manifest.config) if kv_bytes is None else kv_bytes,
        max_batch=max_batch,
        share_prefixes=share_prefixes,
    )


@lru_cache(maxsize=1)
def loaded(setup: WorkerSetup) -> tuple[Engine, Tokenizer]:
    """Map the model, once a process; one BLAS thread, as two would change bits and slow two workers manyfold."""
    threadpool_limits(1, user_api="blas")
    directory = Path(setup.model)
    manifest = load_manifest(directory)
    tokenizer = Tokenizer.load(directory)
    engine = map_engine(
        directory,
        manifest,
        tokenizer,
        kv_bytes=setup.kv_bytes,
        max_batch=setup.max_batch,
        share_prefixes=setup.share_prefixes,
    )
    return engine, tokenizer


def become_worker(parent: int) -> None:
    """First of all in a new process: leave Ctrl-C to the parent (a process id), and die when the parent does.

    Where psutil is installed, as Dask does, loky would retire a worker that grows by 300 MB, which mapped weights and
    a cache of keys and values do.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process_executor._USE_PSUTIL = False
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


class ChunkError(Exception):
    """What a chunk raised that is no fault of the job as a whole, and what its worker was doing."""

    def __init__(self, text: str, sighting: Sighting) -> None:
        super().__init__(text, sighting)
        self.text, self.sighting = text, sighting

    def __str__(self) -> str:
        return self.text


def run_chunk(setup: WorkerSetup, chunk: Chunk, attempt: str) -> Receipt:
    """Generate one chunk and write it as a part into the attempt's directory.

    Raises ChunkError with the rows that were in flight, or a BatchgenError or OSError that concerns the whole job.
    """
    marker = Marker(Path(setup.markers or attempt), chunk.index)
    try:
        receipt = _run_chunk(setup, chunk, Path(attempt), marker)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # not to be used again; its marker says what it was on
    except (BatchgenError, OSError):
        raise
    except Exception as error:
        raise ChunkError(f"{type(error).__name__}: {error}", marker.lost()) from error
    marker.done()
    return receipt


def _run_chunk(setup: WorkerSetup, chunk: Chunk, attempt: Path, marker: Marker) -> Receipt:
    started = time.monotonic()
    engine, tokenizer = loaded(setup)
    rows = complete_chunk(chunk, setup.params, engine, tokenizer, marker)
    path = attempt / f"{chunk.index:08d}.parquet"
    path.unlink(missing_ok=True)
    generated = [row for row in rows if row.status == "ok"]
    receipt = Receipt(
        chunk=chunk.index,
        path=str(path),
        sha256="",
        input_rows=len(chunk.items),
        rows=len(rows),
        ok=len(generated),
        rejected=sum(row.status == "rejected" for row in rows),
        failed=sum(row.status == "failed" for row in rows),
        prompt_tokens=sum(row.prompt_tokens or 0 for row in generated),
        completion_tokens=sum(row.completion_tokens or 0 for row in generated),
        space_ends=sum(ends_in_space(item) for item in chunk.items),
    )
    marker.settle(receipt.completion_tokens)
    kept = kept_columns(chunk, rows)
    schema = output_schema(
        token_ids=setup.token_ids, logprobs=setup.logprobs, prompt_index=setup.prompt_index, kept=kept.schema
    )
    sha256 = write_part(rows, path, with_receipt(schema, receipt), kept)
    return receipt.finished(sha256, time.monotonic() - started)


def complete_chunk(
    chunk: Chunk, params: SamplingParams, engine: Engine, tokenizer: Tokenizer, marker: Marker | None = None
) -> list[OutputRow]:
    """The chunk's output rows in order: every sample of every request, and a row for each that is not generated.

    params are the run's; a row says where its own are others. marker is told what is being done.
    """
    requests = {item.row: item for item in chunk.items if isinstance(item, TokenizedRequest)}
    rows = {(item.row, 0): unfinished_row(item) for item in chunk.items if isinstance(item, Rejected)}
    marker = marker or NoMarker()
    marker.add(len(rows), 0, 0)
    prompts = [prompt for request in requests.values() for prompt in to_prompts(request, tokenizer)]
    seeds = {(p.row, sample): seed for p in prompts for sample, seed in enumerate(p.seeds, p.first_sample)}
    stop_strings = StopStrings(tokenizer) if any(prompt.params.stop for prompt in prompts) else None
    for completion in engine.generate(prompts, marker.step, stop_strings):
        marker.on([completion.row])
        key = completion.row, completion.sample
        rows[key] = completed_row(requests[completion.row], completion, tokenizer, seeds[key], params)
        marker.add(int(completion.sample == 0), rows[key].prompt_tokens or 0, 0)
    marker.on((), list(requests))
    return [rows[key] for key in sorted(rows)]


def to_prompts(request: TokenizedRequest, tokenizer: Tokenizer) -> list[Prompt]:
    """A row's prompts, most often one, as the engine takes them."""
    params = request.params
    bad_words = bad_word_ids(params.bad_words, tokenizer)
    firsts = range(0, len(request.prompts) * params.n, params.n)
    return [
        Prompt(request.row, ids, params, sample_seeds(params.seed, request.row, params.n, first), first, bad_words)
        for first, (_, ids) in zip(firsts, request.prompts, strict=True)
    ]


def ends_in_space(item: TokenizedRequest | Rejected) -> bool:
    return isinstance(item, TokenizedRequest) and any(text.endswith(" ") for text, _ in item.prompts)


def unfinished_row(item: Rejected) -> OutputRow:
    """Whatever its error quotes, it can be written: half of a surrogate pair as its number."""
    return OutputRow(
        row=item.row,
        sample=0,
        id=item.id,
        prompt=item.prompt,
        completion=None,
        prompt_tokens=item.prompt_tokens,
        completion_tokens=None,
        finish_reason=None,
        status=item.status,
        error=item.error.encode("utf-8", "backslashreplace").decode(),
        seed=None,
    )


def completed_row(
    request: TokenizedRequest, completion: Completion, tokenizer: Tokenizer, seed: int, run_params: SamplingParams
) -> OutputRow:
    params = request.params
    prompt_index = completion.sample // params.n
    prompt, prompt_token_ids = request.prompts[prompt_index]
    text, stop_reason = completed_text(completion.token_ids, params, tokenizer)
    return OutputRow(
        row=request.row,
        sample=completion.sample,
        id=request.id,
        prompt=prompt,
        completion=prompt + text if params.echo else text,
        prompt_tokens=len(prompt_token_ids),
        completion_tokens=len(completion.token_ids),
        finish_reason=completion.finish_reason,
        status="ok",
        error=None,
        seed=None if params.greedy else seed,
        completion_token_ids=completion.token_ids,
        logprobs=completion.logprobs,
        top_logprobs=_named(completion, tokenizer) if params.logprobs else None,
        stop_reason=stop_reason,
        prompt_index=prompt_index,
        parameters=own_parameters(params, run_params, prompt_token_ids if request.given_as_ids else None),
    )


def own_parameters(
    params: SamplingParams, run_params: SamplingParams, prompt_token_ids: Sequence[int] | None = None
) -> str | None:
    """JSON of a row's parameters that are not the run's, and of a prompt that was given as ids; None without any."""
    own: dict[str, Any] = {
        name: value for name, value in params.as_dict().items() if value != getattr(run_params, name)
    }
    if prompt_token_ids is not None:
        own["prompt_token_ids"] = prompt_token_ids
    return json.dumps(own, sort_keys=True) if own else None


def _named(completion: Completion, tokenizer: Tokenizer) -> tuple[tuple[tuple[int, str, float], ...], ...]:
    return tuple(
        tuple((token, tokenizer.token_text(token), logprob) for token, logprob in top)
        for top in completion.top_logprobs or ()
    )
