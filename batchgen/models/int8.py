"""The weights of a model in int8: made once of its float32 panels, and mapped like them.

    124M/int8/int8.json  h0.attn.c_attn.w.panels.npy ... lm_head.panels.npy  scale.npy  column_sum.npy  ...

A matrix has a file of panels; the five small arrays of all matrices (gpt2/weights.py) lie one after another in five
files. int8.json names the model and the recipe, and has the SHA-256 of every file. The folder is renamed when it is
complete, and never changed afterwards.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from batchgen.errors import ModelError
from batchgen.files import sync_path
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.params import Array, nest
from batchgen.gpt2.weights import GROUP, PANEL, Int8Linear, Weights, arrange, from_panels, round_up, to_int8
from batchgen.models.once import make_once, places_beside_models
from batchgen.models.shards import (
    INT8,
    UNFINISHED_INT8,
    Manifest,
    Stamps,
    check_hash,
    check_object,
    check_sha256,
    file_of,
    file_sha256,
    is_matrix,
    map_npy,
    map_shards,
    map_weights,
    model_hash,
    move_into_place,
    other_remedy,
    read_json,
    shard_shapes,
    show,
    stamps_of,
    verify_shards,
    write_file,
    write_npy,
)
from batchgen.text.tokenizer import Tokenizer

INT8_MANIFEST = "int8.json"
# Raise it with the rounding, and with the bits of a float32 kernel, which finds the factors: both change the weights.
RECIPE = 3  # weights of an older recipe are made again
_COLUMNS = {"scale": "<f4", "column_sum": "<i4", "inverse": "<f4", "offset": "<f4", "b": "<f4"}  # of all matrices
_ALIGN = 16  # numbers of four bytes: each array starts at a multiple of 64 bytes
_MAX_MANIFEST = 2**22


@dataclass(frozen=True, slots=True)
class Int8Files:
    """A folder of weights in int8, and its files: what is mapped and verified later are these."""

    folder: Path
    hashes: dict[str, str]  # SHA-256 by name
    files: Stamps

    @property
    def remedy(self) -> str:
        return f"remove {self.folder}: it is made again"


def _matrices(config: GPT2Config) -> dict[str, tuple[int, int]]:
    """{name: (n_in, n_out)} of the matrices of all products."""
    return {name: (shape[0], shape[1]) for name, shape in shard_shapes(config).items() if is_matrix(name)}


def _sizes(shape: tuple[int, int]) -> dict[str, int]:
    """The numbers that a matrix has in each file of small arrays."""
    n_in, n_out = round_up(shape[0], _ALIGN), round_up(shape[1], PANEL)
    return {"scale": n_out, "column_sum": n_out, "inverse": n_in, "offset": n_in, "b": n_out}


def _panel_shape(shape: tuple[int, int]) -> tuple[int, ...]:
    n_in, n_out = shape
    return (-(-n_out // PANEL), -(-n_in // GROUP), PANEL, GROUP)


# ---- reading


def find_int8(folder: Path, manifest: Manifest) -> Int8Files | None:
    """The weights in a folder if they are of this model and of this recipe; else None."""
    path = folder / INT8_MANIFEST
    if not os.path.lexists(path):
        return None
    int8 = Int8Files(folder, {}, {})
    with other_remedy(int8.remedy):
        values = read_json(path, _MAX_MANIFEST)
    try:
        check_object(values, {"model": str, "recipe": int, "files": dict}, "")
        if values["model"] != model_hash(manifest) or values["recipe"] != RECIPE:
            return None
        names = [*map(file_of, _matrices(manifest.config)), *(f"{name}.npy" for name in _COLUMNS)]
        hashes = check_object(values["files"], dict.fromkeys(names, str), "files: ")
        for name, sha256 in hashes.items():
            check_sha256(sha256, f"files: {name}: ")
    except ModelError as error:
        raise ModelError(f"{path}: {show(error)}; {int8.remedy}") from error
    with other_remedy(int8.remedy):
        return replace(int8, hashes={name: hashes[name] for name in names}, files=stamps_of(folder, names))


def _map_linears(int8: Int8Files, config: GPT2Config) -> Iterator[tuple[str, Int8Linear]]:
    """Map every matrix."""
    matrices = _matrices(config)
    columns = []  # of each kind, an array for each matrix
    for kind, dtype in _COLUMNS.items():
        sizes = [_sizes(shape)[kind] for shape in matrices.values()]
        array = map_npy(int8.folder / f"{kind}.npy", (sum(sizes),), dtype, int8.files[f"{kind}.npy"])
        columns.append(np.split(array, np.cumsum(sizes)[:-1]))
    for (name, (n_in, n_out)), scale, column_sum, inverse, offset, b in zip(matrices.items(), *columns, strict=True):
        panels = map_npy(int8.folder / file_of(name), _panel_shape((n_in, n_out)), "|i1", int8.files[file_of(name)])
        yield name, Int8Linear(panels, scale, column_sum, inverse[:n_in], offset[:n_in], b[:n_out])


def map_int8(directory: Path, manifest: Manifest, int8: Int8Files, files: Stamps) -> Weights:
    """Map the weights of a model whose products are in int8."""
    plain = {name: array for name, array in map_shards(directory, manifest, files) if not is_matrix(name)}
    with other_remedy(int8.remedy):
        linears = dict(_map_linears(int8, manifest.config))
    params = nest(plain | linears, manifest.config.n_layer)  # type: ignore[arg-type]
    return arrange(params, "int8", lambda w, b: w)  # w has its own b


def verify_int8(int8: Int8Files) -> None:
    """Compare every file with int8.json; ModelError names the first that differs."""
    with other_remedy(int8.remedy):
        for name, sha256 in int8.hashes.items():
            path = int8.folder / name
            check_hash(path, sha256, file_sha256(path, int8.files[name]))


# ---- making


def _round(stored: Mapping[str, Array], name: str, n_out: int, inverse: Array, offset: Array) -> Int8Linear:
    """Round a matrix of a model in float32; the LM head has no b."""
    b = stored.get(f"{name.removesuffix('/w')}/b", np.zeros(n_out, np.float32))
    return to_int8(from_panels(stored[name], n_out), b, inverse, offset)


def _write_int8(folder: Path, directory: Path, manifest: Manifest, files: Stamps) -> None:
    """Round every matrix to int8 and write the files, one matrix in memory at a time."""
    verify_shards(directory, manifest, files)  # or damaged weights would get hashes of their own
    weights = map_weights(directory, manifest, files)
    from batchgen.models.smoothing import fit_inputs  # with the kernels, which many commands never need

    inputs = fit_inputs(weights, manifest.config, Tokenizer.load(directory, manifest.tokenizer))
    stored = dict(map_shards(directory, manifest, files))
    hashes: dict[str, str] = {}
    columns: dict[str, list[Array]] = {kind: [] for kind in _COLUMNS}
    for name, shape in _matrices(manifest.config).items():
        linear = _round(stored, name, shape[1], *inputs[name])
        hashes[file_of(name)] = write_npy(folder / file_of(name), linear.panels)
        for kind, size in _sizes(shape).items():
            numbers = getattr(linear, kind)
            columns[kind].append(np.pad(numbers, (0, size - len(numbers))))
    for kind in _COLUMNS:
        hashes[f"{kind}.npy"] = write_npy(folder / f"{kind}.npy", np.concatenate(columns[kind]))
    values = {"model": model_hash(manifest), "recipe": RECIPE, "files": hashes}
    write_file(folder / INT8_MANIFEST, [json.dumps(values, indent=1).encode() + b"\n"])
    sync_path(folder)


def _places(directory: Path, manifest: Manifest) -> list[Path]:
    folders = Path(os.path.realpath(directory)), *places_beside_models(model_hash(manifest))
    return [folder / INT8 for folder in folders]


def existing_int8(directory: Path, manifest: Manifest) -> Int8Files | None:
    """The weights in int8 of a packed model, if they were made."""
    found = (find_int8(folder, manifest) for folder in _places(directory, manifest))
    return next((int8 for int8 in found if int8 is not None), None)


def open_int8(directory: Path, manifest: Manifest, files: Stamps) -> Int8Files:
    """The weights in int8 of a packed model; they are made if they do not exist."""

    def make(folder: Path) -> None:
        unfinished = folder.with_name(UNFINISHED_INT8)
        aside = unfinished / "old"
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        (unfinished / "new").mkdir(parents=True)
        try:
            _write_int8(unfinished / "new", directory, manifest, files)
            move_into_place(unfinished / "new", folder, aside)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    what = f"rounding the weights of {manifest.name} to int8"
    return make_once(_places(directory, manifest), lambda folder: find_int8(folder, manifest), make, what)


def check_int8(directory: Path, manifest: Manifest, int8: Int8Files, files: Stamps) -> None:
    """ModelError unless the weights in int8 are those in float32, rounded with the factors that are stored."""
    stored = dict(map_shards(directory, manifest, files))
    for name, found in _map_linears(int8, manifest.config):
        made = _round(stored, name, manifest.tensors[name].shape[1], found.inverse, found.offset)
        pairs = [(getattr(made, field.name), getattr(found, field.name)) for field in fields(made)]
        if not all(np.array_equal(mine, theirs) for mine, theirs in pairs):
            raise ModelError(f"{int8.folder / file_of(name)}: is not {name} rounded to int8; {int8.remedy}")
