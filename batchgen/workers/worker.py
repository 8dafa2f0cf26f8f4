"""What a worker process does: map the model, complete a chunk, write the part, send back a receipt.

A worker keeps the model mapped for its next chunk. What it writes does not depend on which process runs the chunk.
"""

import ctypes
import errno
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from joblib.externals.loky import process_executor

from batchgen.errors import ModelError, OutputError, SetupError
from batchgen.input.kept import kept_columns
from batchgen.job import TaskOptions
from batchgen.limits import reached_limit
from batchgen.models.model import Model
from batchgen.output.parts import with_receipt, write_part
from batchgen.output.schema import Columns
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import (
    Chunk,
    Precision,
    Reason,
    Receipt,
    Rejected,
    Row,
    SamplingParams,
    TokenizedRequest,
    add_reasons,
)
from batchgen.workers.complete import map_engine
from batchgen.workers.marker import Marker, Sighting
from batchgen.workers.tasks import count_totals, made_tokens, rows_of_chunk

if TYPE_CHECKING:
    from batchgen.engine.engine import Engine

OUT_OF_MEMORY = 12  # exit code: errno's ENOMEM
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSetup:
    """All that a worker needs besides its chunk."""

    model: str  # directory
    model_hash: str
    precision: Precision
    model_files: str = ""  # the files that the run has verified, as Model.files_hash; empty: none yet
    kv_bytes: int
    max_batch: int
    share_prefixes: bool
    columns: Columns
    params: SamplingParams  # the run's; a row may have others
    task: TaskOptions | None = None  # None: generate
    parent: int  # process id: the worker dies with it
    markers: str | None = None  # directory; None: the attempt's
    plan: str = ""  # its digest


class ChunkError(Exception):
    """What a chunk raised if that does not concern the whole job, and what its worker did then."""

    def __init__(self, text: str, sighting: Sighting) -> None:
        super().__init__(text, sighting)
        self.text, self.sighting = text, sighting

    def __str__(self) -> str:
        return self.text


def become_worker(parent: int) -> None:
    """Called first in a new process: leave Ctrl-C to the parent (a process id), and die when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # With psutil (Dask installs it), loky restarts a worker that grows by 300 MB; mapped weights alone are more.
    process_executor._USE_PSUTIL = False
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the call
            os._exit(1)


@lru_cache(maxsize=1)
def load_engine(setup: WorkerSetup) -> tuple["Engine", Tokenizer, Model]:
    """Map the model, once per process; ModelError if it is not the run's: it may have been replaced."""
    model = Model.load(Path(setup.model), setup.model_hash, setup.precision)
    if model.files_hash != setup.model_files:  # the same model was put there anew, if it is the same
        model.verify()
    tokenizer = model.load_tokenizer()
    engine = map_engine(
        model, tokenizer, kv_bytes=setup.kv_bytes, max_batch=setup.max_batch, share_prefixes=setup.share_prefixes
    )
    return engine, tokenizer, model


def make_receipt(chunk: Chunk, rows: Sequence[Row], path: Path, plan: str = "", n_copied: int = 0) -> Receipt:
    """The counts of a chunk's rows, and of so many that are copied; the part at `path` is not written yet."""
    made = [row for row in rows if row.status == "ok"]
    extended = [item for item in chunk.items if isinstance(item, TokenizedRequest) and item.begun is not None]
    made_rows = {row.row for row in made}
    begun = [one for item in extended if item.row in made_rows for one in item.begun or ()]
    places = {item.row: item.place for item in chunk.items}
    unmade = [row for row in rows if row.status in ("rejected", "failed")]  # what is dropped was asked for
    reasons: dict[str, Reason] = {}
    add_reasons(reasons, (Reason.of(row.row, places[row.row], row.error) for row in unmade if row.error is not None))
    return Receipt(
        chunk=chunk.index,
        path=str(path),
        sha256="",
        input_rows=chunk.n_rows,
        rows=len(rows) + n_copied,
        ok=len(made) + n_copied,
        rejected=sum(row.status == "rejected" for row in rows),
        failed=sum(row.status == "failed" for row in rows),
        dropped=sum(row.status == "dropped" for row in rows),
        prompt_tokens=sum(row.prompt_tokens or 0 for row in made),
        completion_tokens=sum(map(made_tokens, made)) - sum(len(one.token_ids) for one in begun),
        **count_totals(made),
        space_ends=sum(map(_has_space_end, chunk.items)),
        special_texts=sum(isinstance(item, TokenizedRequest) and item.has_special_text for item in chunk.items),
        reasons=tuple(reasons.values()),
        plan=plan,
        reused=chunk.reused.rows if chunk.reused else 0,
        extended=len(extended),
    )


def _has_space_end(item: TokenizedRequest | Rejected) -> bool:
    if isinstance(item, Rejected) or not item.params.max_tokens or item.params.heal:
        return False
    return any(text.endswith(" ") for text, _ in item.prompts)


def _read_copied(chunk: Chunk, rows: Sequence[Row]) -> pa.Table | None:
    """The rows of the chunk that are copied; a row that fails now fails as a whole."""
    if chunk.reused is None:
        return None
    table = pa.ipc.open_stream(chunk.reused.stream).read_all()
    failed = [row.row for row in rows if row.status != "ok"]
    return table.filter(pc.invert(pc.is_in(table["row"], pa.array(failed, pa.int64())))) if failed else table


def _write_part(columns: Columns, chunk: Chunk, rows: Sequence[Row], receipt: Receipt, copied: pa.Table | None) -> str:
    """Write the part that the receipt names, and the receipt into it; returns the part's SHA-256."""
    path = Path(receipt.path)
    path.unlink(missing_ok=True)  # of a worker that died
    schema = with_receipt(columns.schema(kept_columns(chunk, np.empty(0, np.int64)).schema), receipt)
    return write_part(rows, path, schema, partial(kept_columns, chunk), copied)


def run_chunk(setup: WorkerSetup, chunk: Chunk, attempt: str) -> Receipt:
    """Complete one chunk and write it as a part into the attempt's directory; ChunkError has the rows in flight."""
    started = time.monotonic()
    marker = Marker.open(Path(setup.markers or attempt), chunk.index)
    try:
        engine, tokenizer, model = load_engine(setup)
        rows = rows_of_chunk(chunk, setup.task, setup.params, engine, tokenizer, marker)
        model.check_unchanged()
        copied = _read_copied(chunk, rows)
        path, n_copied = Path(attempt, f"{chunk.index:08d}.parquet"), 0 if copied is None else len(copied)
        receipt = make_receipt(chunk, rows, path, setup.plan, n_copied)
        marker.set_completion_tokens(receipt.completion_tokens)
        sha256 = _write_part(setup.columns, chunk, rows, receipt, copied)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # the process is not usable; its marker names the rows
    except (ModelError, OutputError, SetupError, OSError):
        raise
    except Exception as error:  # a UsageError or InputError is a row's own here
        if reached_limit(error):  # no row is the cause; the parent says it
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
        raise ChunkError(f"{type(error).__name__}: {error}", marker.abandon()) from error
    marker.finish()
    return receipt.finished(sha256, time.monotonic() - started)
