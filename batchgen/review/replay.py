"""Do the rows of an output come out again? Some are generated from its metadata alone, and compared."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from threadpoolctl import threadpool_limits

from batchgen import __version__
from batchgen.engine.probe import blas_info, is_batch_invariant
from batchgen.errors import BatchgenError, InputError, ModelError, UsageError
from batchgen.input.validation import validate
from batchgen.models.registry import find_model, list_models
from batchgen.models.shards import Manifest, load_manifest, load_params, model_hash, verify_shards
from batchgen.output.reading import read_batches, read_input_rows, read_run
from batchgen.planning import check_memory
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import Chunk, OutputRow, Request, SamplingParams
from batchgen.workers.worker import complete_chunk, map_engine

CLOSE = 1e-3  # of log-probabilities, where another BLAS may round in another way
_AROUND = 30  # characters or tokens that are shown from the first difference on
_GIVEN = {"row", "sample", "id", "prompt", "status", "error"}  # what a row is made from, or says who it is


@dataclass(frozen=True, slots=True)
class Replay:
    """What was generated again, how it was compared, and what differs (a line each)."""

    path: Path
    model: Path
    rows: int  # of the input
    ok: int  # of these
    compared: int  # input rows
    samples: int  # output rows of these
    columns: tuple[str, ...]
    exact: bool  # bit for bit; else by text and ids, with log-probabilities within CLOSE
    seed: int
    notes: tuple[str, ...]
    differences: tuple[str, ...]


def replay(path: Path, n_rows: int, seed: int | None = None, model: str | None = None) -> Replay:
    """Generate n_rows random input rows of an output again, and compare every sample of theirs with the file's.

    `model` is where to find the model, if not under the name that the file gives; its hash must be the file's.
    A seed chooses the same rows again. Raises a BatchgenError where nothing can be compared.
    """
    run = read_run(path)
    params = run_params(path, run)
    directory = find_same_model(path, run, model)
    manifest = load_manifest(directory)
    rows, ok = count_rows(path, run)
    if seed is None:
        seed = int.from_bytes(os.urandom(4))
    chosen = np.sort(np.random.default_rng(seed).choice(ok, min(n_rows, len(ok)), replace=False)).tolist()
    kept = read_input_rows(path, chosen)
    check_memory(manifest.name, manifest.config, sum(file.stat().st_size for file in directory.glob("*.npy")))
    verify_shards(directory)
    exact, notes = how_to_compare(run, directory, manifest)
    requests = requests_again(path, run, kept.to_pylist())
    made = generate_again(requests, run, params, directory, manifest)
    columns = [
        field.name for field in fields(OutputRow) if field.name in kept.column_names and field.name not in _GIVEN
    ]
    return Replay(
        path=path,
        model=directory,
        rows=rows,
        ok=len(ok),
        compared=len(chosen),
        samples=kept.num_rows,
        columns=tuple(columns),
        exact=exact,
        seed=seed,
        notes=tuple(notes),
        differences=tuple(differences(kept, made, columns, exact=exact)),
    )


def run_params(path: Path, run: dict[str, Any]) -> SamplingParams:
    """The sampling parameters that the metadata gives, whatever they are called."""
    values = run.get("parameters")
    if not isinstance(values, dict):
        raise InputError(
            f"{path}: the metadata names no parameters; it was changed: take the file as batchgen wrote it"
        )
    return read_params(path, run, values)


def asked_for(path: Path, run: dict[str, Any], row: dict[str, Any]) -> tuple[str | tuple[int, ...], SamplingParams]:
    """The row's prompt, as text or as the token ids that it was given as, and its parameters: the run's and its own."""
    own = own_parameters(path, row)
    ids = own.pop("prompt_token_ids", None)
    if ids is not None and not (isinstance(ids, list) and ids and all(type(token) is int for token in ids)):
        raise InputError(
            f"{path}: prompt_token_ids in parameters of row {row['row']} are no token ids; they were changed"
        )
    params = read_params(path, run, run["parameters"] | own) if own else run_params(path, run)
    return tuple(ids) if ids else row["prompt"], params


def own_parameters(path: Path, row: dict[str, Any]) -> dict[str, Any]:
    """What the row's column holds."""
    if row.get("parameters") is None:
        return {}
    try:
        own = json.loads(row["parameters"])
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: parameters of row {row['row']} are not JSON; they were changed") from error
    if not isinstance(own, dict):
        raise InputError(f"{path}: parameters of row {row['row']} are not an object; they were changed")
    return own


def read_params(path: Path, run: dict[str, Any], values: dict[str, Any]) -> SamplingParams:
    """SamplingParams of what JSON has made of them; InputError where this version does not know them."""
    unknown = sorted(values.keys() - {field.name for field in fields(SamplingParams)})
    try:
        if unknown:
            raise UsageError(", ".join(unknown))
        return SamplingParams(**values)
    except (TypeError, UsageError) as error:
        by = f"it was written by batchgen {run.get('batchgen')}, and this is {__version__}: install that one"
        raise InputError(f"{path}: has parameters that are not known here ({error}); {by}") from error


def find_same_model(path: Path, run: dict[str, Any], model: str | None) -> Path:
    """The model with the very weights that made the file: under its name, or any that is here with that hash."""
    name, wanted = str(run.get("model")), str(run.get("model_hash"))
    try:
        directory = find_model(model or name)
        found = model_hash(load_manifest(directory))
    except ModelError:
        if model is not None:
            raise
        directory, found = None, None
    if directory is not None and found == wanted:
        return directory
    same = next((info.path for info in list_models() if info.hash == wanted), None) if model is None else None
    if same is not None:
        return same
    has = "is not here" if found is None else f"is here with hash {found[:16]}"
    remedy = "name the folder of the right one with --model"
    raise ModelError(f"{path}: made by model {name} with hash {wanted[:16]}; {model or name} {has}; {remedy}")


def count_rows(path: Path, run: dict[str, Any]) -> tuple[int, Any]:
    """How many input rows the output holds, and the numbers of those that are ok; all must be there, in order."""
    ok, last, rows = [np.zeros(0, np.int64)], -1, 0
    for batch in read_batches(path, ["row", "sample", "status"]):
        if any(column.null_count for column in batch.columns):
            raise InputError(f"{path}: row, sample or status is null near row {last}; it was changed")
        numbers = batch["row"].to_numpy()
        steps = np.diff(numbers, prepend=last)
        if not np.isin(steps, (0, 1)).all():
            near = int(numbers[~np.isin(steps, (0, 1))][0])
            raise InputError(f"{path}: row {near} is out of order, or the rows before it are missing; it was changed")
        last = int(numbers[-1]) if len(numbers) else last
        first = batch["sample"].to_numpy() == 0
        rows += int(first.sum())
        ok.append(numbers[first & pc.equal(batch["status"], "ok").to_numpy(zero_copy_only=False)])
    if rows != run.get("rows"):
        raise InputError(f"{path}: holds {rows} input rows, and its metadata says {run.get('rows')}; it was changed")
    found = np.concatenate(ok)
    if not len(found):
        raise BatchgenError(f"{path}: none of its {rows} rows is ok, so there is nothing to generate again")
    return rows, found


def how_to_compare(run: dict[str, Any], directory: Path, manifest: Manifest) -> tuple[bool, list[str]]:
    """Whether bit for bit, and if not, why."""
    with threadpool_limits(1, user_api="blas"):  # as in a worker
        invariant = is_batch_invariant(load_params(directory, manifest), manifest.config)
    blas = blas_info().kernels
    here = {"batchgen": __version__, "numpy": version("numpy"), "blas": blas}
    notes = [
        f"the file was made with {name} {run.get(name)}, this is {value}"
        for name, value in here.items()
        if run.get(name) != value
    ]
    if not run.get("batch_invariant"):
        notes.append("the file was made where rows depend on their company (batch_invariant is false)")
    if not invariant:
        notes.append(f"{blas} rounds a row differently in other company (batchgen doctor)")
    return not notes, notes


def requests_again(path: Path, run: dict[str, Any], kept: Iterable[dict[str, Any]]) -> list[Request]:
    """What the rows asked for; one of an OpenAI batch file may have several prompts, each with its n samples."""
    requests: list[Request] = []
    for row in kept:
        if row["prompt"] is None:
            continue
        if row["sample"] == 0:
            prompt, params = asked_for(path, run, row)
            requests.append(Request(row["row"], f"row {row['row']}", row["id"], prompt, params))
        elif row.get("prompt_index") and requests and row["sample"] % requests[-1].params.n == 0:
            prompt, _ = asked_for(path, run, row)
            requests[-1] = replace(requests[-1], others=(*requests[-1].others, prompt))
    return requests


def generate_again(
    requests: Iterable[Request], run: dict[str, Any], params: SamplingParams, directory: Path, manifest: Manifest
) -> dict[tuple[int, int], OutputRow]:
    """Every sample of the requests, generated as one chunk: (row, sample) -> what a run would write."""
    tokenizer = Tokenizer.load(directory)
    how = run.get("on_too_long", "reject"), run.get("empty_prompt", "reject"), run.get("trim", False)
    items = tuple(validate(request, tokenizer, manifest.config.n_ctx, *how) for request in requests)
    with threadpool_limits(1, user_api="blas"):
        engine = map_engine(directory, manifest, tokenizer)
        rows = complete_chunk(Chunk(0, items), params, engine, tokenizer)
    return {(row.row, row.sample): row for row in rows}


def differences(
    kept: pa.Table, made: dict[tuple[int, int], OutputRow], columns: Sequence[str], *, exact: bool
) -> Iterator[str]:
    """A line for each output row that did not come out again, naming the first column that differs and how."""
    rows = kept.to_pylist()
    for number, sample in sorted(made.keys() - {(row["row"], row["sample"]) for row in rows}):
        yield f"row {number}, sample {sample}: was generated again, and is missing from the file"
    for row in rows:
        again = made.get((row["row"], row["sample"]))
        where = f"row {row['row']}, sample {row['sample']}"
        if again is None:
            yield f"{where}: is in the file, and was not generated again; the row was added, or its prompt removed"
        elif again.status != row["status"]:
            yield f"{where}: is {row['status']} in the file, and {again.status} here ({again.error})"
        else:
            for name in columns:
                value = pa.array([getattr(again, name)], kept.schema.field(name).type)[0].as_py()
                if not _same(row[name], value, exact=exact):
                    yield f"{where}: {name} {_difference(row[name], value)}"
                    break


def _same(old: Any, new: Any, *, exact: bool) -> bool:
    """Equal; where not exact, numbers that are no whole ones may differ by CLOSE."""
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(_same(a, b, exact=exact) for a, b in zip(old, new, strict=True))
    if isinstance(old, dict) and isinstance(new, dict):
        return _same([*old.items()], [*new.items()], exact=exact)
    if isinstance(old, float) and isinstance(new, float) and not exact:
        return old == new or abs(old - new) <= CLOSE
    return bool(old == new)


def _difference(old: Any, new: Any) -> str:
    """Where two values part: `differs from place 3 on: the file has 'd', generated again it is 'e'`."""
    if not isinstance(old, str | list) or type(old) is not type(new):
        return f"differs: the file has {old!r}, generated again it is {new!r}"
    pairs = zip(old, new, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(old), len(new)))
    ours, theirs = old[place : place + _AROUND], new[place : place + _AROUND]
    return f"differs from place {place} on: the file has {ours!r}, generated again it is {theirs!r}"
