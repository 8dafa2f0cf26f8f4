"""Makes some rows of an output again, from its metadata alone, and compares them with the file."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchgen import __version__
from batchgen.engine.limits import kv_bytes_per_token
from batchgen.errors import BatchgenError, InputError, ModelError, UsageError
from batchgen.files import Stamp, stamp_of
from batchgen.gpt2.machine_code import prepare_kernels
from batchgen.input.validation import make_check
from batchgen.models.model import Model
from batchgen.models.registry import list_models
from batchgen.options import say
from batchgen.output.parts import in_order
from batchgen.output.reading import output_files, read_batches, read_input_rows, read_left_out, read_plan
from batchgen.output.schema import columns_of, own_names
from batchgen.plan import Plan
from batchgen.planning import check_memory, default_kv_bytes
from batchgen.text.guided import installed_version
from batchgen.types import (
    Chunk,
    EmbeddingRow,
    OutputRow,
    Precision,
    Request,
    Row,
    SamplingParams,
    ScoreRow,
    Task,
    TokenizedRequest,
)
from batchgen.workers.complete import map_engine
from batchgen.workers.tasks import rows_of_chunk

CLOSE = 1e-3  # of log-probabilities and the like, if rows may be rounded differently; of those above 1, of their size
_AROUND = 30  # characters or tokens to show from the first difference
_GIVEN = {"row", "sample", "id", "prompt", "text", "status", "error"}  # not generated
_COUNTED = ("row", "sample", "status", "completion_tokens")
_RECORDS = {"generate": OutputRow, "score": ScoreRow, "embed": EmbeddingRow}
_TARGETS = {"completion", "choices", "answer"}  # nor are these of scores
StoredRow: TypeAlias = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Replay:
    """What was generated again, how it was compared, and the differences (a line each)."""

    path: Path
    model: Path
    rows: int  # of the input
    ok: int  # of these
    compared: int  # input rows
    samples: int  # output rows of these
    columns: tuple[str, ...]
    exact: bool  # bit for bit; else by text and ids, with log-probabilities within CLOSE
    seed: int
    task: Task
    notes: tuple[str, ...]
    differences: tuple[str, ...]


def replay(
    path: Path, n_rows: int, seed: int | None = None, model: str | None = None, precision: Precision | None = None
) -> Replay:
    """Generate n_rows random input rows of an output again, and compare all their samples with the file's.

    precision: instead of the file's own, to see what it changes.
    """
    stamps = list_stamps(path)
    plan = read_plan(path)
    precision = precision or plan.precision
    found = find_same_model(path, plan, model)
    rows, ok = count_rows(path, plan)
    if seed is None:
        seed = int.from_bytes(os.urandom(4))
    chosen = np.sort(np.random.default_rng(seed).choice(ok, min(n_rows, len(ok)), replace=False)).tolist()
    own = own_names(columns_of(plan)) - {*plan.keep}  # an older version could keep a column that has such a name now
    kept = read_input_rows(path, chosen, own)
    if list_stamps(path) != stamps:
        raise InputError(f"{path}: the file was changed while it was being read; verify it when nothing writes it")
    found = found.with_precision(precision)
    check_memory(found)
    found.verify()
    notes = list_notes(plan, precision)
    made = _make_again(path, plan, kept.to_pylist(), found)
    columns = made_columns(plan, kept.column_names)
    return Replay(
        path=path,
        model=found.directory,
        rows=rows,
        ok=len(ok),
        compared=len(chosen),
        samples=kept.num_rows,
        columns=columns,
        exact=not notes,
        seed=seed,
        task=plan.task,
        notes=tuple(notes),
        differences=tuple(list_differences(kept, made, columns, exact=not notes)),
    )


def made_columns(plan: Plan, names: Iterable[str]) -> tuple[str, ...]:
    """The columns that were generated or scored, and not copied from the input, in the order of their record."""
    made = {*names} - (_GIVEN if plan.task == "generate" else _GIVEN | _TARGETS)
    return tuple(field.name for field in fields(_RECORDS[plan.task]) if field.name in made)


def list_stamps(path: Path) -> list[Stamp]:
    """The stamp of each file of an output; nothing for one that is missing."""
    try:
        return [stamp_of(file) for file in output_files(path)]
    except FileNotFoundError:
        return []


def find_same_model(path: Path, plan: Plan, model: str | None) -> Model:
    """The model with the weights that made the file: under its name, or any other with its hash."""
    try:
        found = Model.open(model or plan.model)
    except ModelError:
        if model is not None:
            raise
        found = None
    if found is not None and found.hash == plan.model_hash:
        return found
    same = next((info.path for info in list_models() if info.hash == plan.model_hash), None) if model is None else None
    if same is not None:
        return Model.open(str(same))
    has = "is not here" if found is None else f"is here with hash {found.hash[:16]}"
    remedy = f"name the folder of the right one with {say('model')}"
    raise ModelError(
        f"{path}: made by model {plan.model} with hash {plan.model_hash[:16]}; {model or plan.model} {has}; {remedy}"
    )


def count_rows(path: Path, plan: Plan) -> tuple[int, npt.NDArray[np.int64]]:
    """How many input rows the output has, and the numbers of the ok ones; all must be there, in order."""
    ok, selection = [np.zeros(0, np.int64)], plan.selection
    batches = read_batches(path, _COUNTED)
    for batch in in_order(batches, selection, path, "it was changed", read_left_out(path), InputError):
        ok.append(batch["row"].to_numpy()[_is_made(batch)])
    numbers = np.unique(np.concatenate(ok))
    if not len(numbers):
        raise BatchgenError(f"{path}: none of its {len(selection)} rows is ok, so there is nothing to generate again")
    return len(selection), numbers


def _is_made(batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
    """Which output rows were generated or scored: those that are ok, or dropped for what was generated."""
    is_made = pc.equal(batch["status"], "ok")
    if "completion_tokens" in batch.schema.names:
        is_dropped = pc.equal(batch["status"], "dropped")
        is_made = pc.or_(is_made, pc.and_(is_dropped, pc.is_valid(batch["completion_tokens"])))
    found: npt.NDArray[np.bool_] = is_made.to_numpy(zero_copy_only=False)
    return found


def list_notes(plan: Plan, precision: Precision) -> list[str]:
    """Why the rows cannot be compared bit for bit; empty if they can."""
    if not plan.portable:
        what = "then the bits of a row depended on the processor, and this version cannot make them again"
        return [f"the file was made by batchgen {plan.batchgen}: {what}; that version can"]
    here = {"batchgen": __version__, "regex": version("regex"), "precision": precision}
    here["llguidance"] = installed_version() if plan.llguidance else ""
    return [
        f"the file was made with {name} {getattr(plan, name)}, this is {value}"
        for name, value in here.items()
        if getattr(plan, name) not in ("", value)
    ]


# ---- the rows' requests, from the file


def read_requests(path: Path, plan: Plan, rows: Iterable[StoredRow]) -> list[Request]:
    """The requests of the rows; a row of an OpenAI batch file may have several prompts, each with its n samples."""
    requests: list[Request] = []
    for row in rows:
        number, sample = _int(row["row"]), _int(row["sample"])
        if row[_text_column(plan)] is None:
            continue
        is_new = not requests or number != requests[-1].row
        if sample == 0 or (is_new and not plan.rejects):  # sample 0 may be left out
            prompt, params = read_request(path, plan, row)
            id_ = None if row["id"] is None else str(row["id"])
            requests.append(Request(number, f"row {number}", id_, prompt, params, targets=read_targets(row, plan)))
        elif row.get("prompt_index") and requests and sample % requests[-1].params.n == 0:
            prompt, _ = read_request(path, plan, row)
            requests[-1] = replace(requests[-1], others=(*requests[-1].others, prompt))
    return requests


def read_targets(row: StoredRow, plan: Plan) -> tuple[str, ...]:
    """What was scored after the row's prompt: its completion or its choices; nothing of a text alone."""
    if plan.completion_column:
        return (str(row["completion"]),)
    choices = row["choices"] if plan.choices_column else ()
    return tuple(map(str, choices)) if isinstance(choices, list) else ()


def _int(value: object) -> int:
    assert isinstance(value, int)
    return value


def read_request(path: Path, plan: Plan, row: StoredRow) -> tuple[str | tuple[int, ...], SamplingParams]:
    """A row's prompt, as text or as the token ids that it was given as, and its parameters: the run's and its own."""
    try:
        params, ids = plan.read_own(str(row["parameters"]) if row.get("parameters") is not None else None)
    except (ValueError, TypeError, RecursionError, UsageError) as error:
        remedy = f"they were changed, or batchgen {plan.batchgen} wrote them: install that one (this is {__version__})"
        raise InputError(f"{path}: parameters of row {row['row']} cannot be read ({error}); {remedy}") from error
    return ids or str(row[_text_column(plan)]), params


def _text_column(plan: Plan) -> str:
    """The output's column of what was read first."""
    return "text" if plan.text_column else "prompt"


def generate_again(requests: Iterable[Request], plan: Plan, model: Model) -> dict[tuple[int, int], Row]:
    """Every sample of the requests, made as one chunk: (row, sample) -> what a run would write."""
    tokenizer = model.load_tokenizer()
    check = make_check(tokenizer, model.config.n_ctx, *plan.rules())
    prepare_kernels()
    chunk = Chunk(0, tuple(map(check, requests)))
    searches = any(isinstance(item, TokenizedRequest) and item.params.searches for item in chunk.items)
    engine = map_engine(model, tokenizer, kv_bytes=bytes_for_searches(plan, model) if searches else None)
    rows = rows_of_chunk(chunk, plan.options(), plan.parameters, engine, tokenizer)
    model.check_unchanged()
    return {(row.row, row.sample): row for row in rows}


def bytes_for_searches(plan: Plan, model: Model) -> int:
    """Memory for as many keys and values as the run could hold, in the precision of the model."""
    had, has = (kv_bytes_per_token(model.config, precision) for precision in (plan.precision, model.precision))
    return max(-(-plan.kv_bytes // had) * has, default_kv_bytes(model.config, model.precision))


def _make_again(path: Path, plan: Plan, rows: list[StoredRow], model: Model) -> dict[tuple[int, int], Row]:
    """The same of some rows of an output, all samples of each, but for those that the run has left out."""
    made = generate_again(read_requests(path, plan, rows), plan, model)
    if plan.rejects or not plan.drops("completion"):
        return made
    stored = {(_int(row["row"]), _int(row["sample"])) for row in rows}
    return {key: row for key, row in made.items() if key in stored}


# ---- comparing


def list_differences(
    kept: pa.Table, made: Mapping[tuple[int, int], Row], columns: Sequence[str], *, exact: bool
) -> Iterator[str]:
    """A line for each output row that differs from the one generated again, naming the first column and how."""
    rows = kept.to_pylist()
    for number, sample in sorted(made.keys() - {(row["row"], row["sample"]) for row in rows}):
        yield f"row {number}, sample {sample}: was generated again, and is missing from the file"
    for row in rows:
        again = made.get((row["row"], row["sample"]))
        where = f"row {row['row']}, sample {row['sample']}"
        if again is None:
            yield f"{where}: is in the file, and was not generated again; the row was added, or its prompt removed"
        elif again.status != ("ok" if _is_repeated(row) else row["status"]):
            yield f"{where}: is {row['status']} in the file, and {again.status} here ({again.error})"
        else:
            for name in columns:
                value = pa.array([getattr(again, name)], kept.schema.field(name).type)[0].as_py()
                if not _same(row[name], value, exact=exact):
                    yield f"{where}: {name} {_difference(row[name], value)}"
                    break


def _is_repeated(row: StoredRow) -> bool:
    """Whether a row was generated, and dropped for its completion when all rows were there."""
    return row["status"] == "dropped" and row.get("completion_tokens") is not None


def _same(old: object, new: object, *, exact: bool) -> bool:
    """Equal to the last bit, which == is not: -0.0; if not exact, fractions may differ by CLOSE."""
    if isinstance(old, dict) and isinstance(new, dict):
        old, new = [*old.items()], [*new.items()]
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        return len(old) == len(new) and all(_same(a, b, exact=exact) for a, b in zip(old, new, strict=True))
    if isinstance(old, float) and isinstance(new, float):
        near = old == new or abs(old - new) <= CLOSE * max(abs(new), 1.0)
        return repr(old) == repr(new) if exact else near
    return bool(old == new)


def _difference(old: object, new: object) -> str:
    """Where two values part: `differs from place 3: the file has 'd', generated again it is 'e'`."""
    if not isinstance(old, str | list) or not isinstance(new, str | list) or type(old) is not type(new):
        return f"differs: the file has {old!r}, generated again it is {new!r}"
    pairs = zip(old, new, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(old), len(new)))
    ours, theirs = old[place : place + _AROUND], new[place : place + _AROUND]
    return f"differs from place {place}: the file has {ours!r}, generated again it is {theirs!r}"
