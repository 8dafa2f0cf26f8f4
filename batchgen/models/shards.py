"""A model on disk: a directory with one `.npy` file for each tensor, the vocabulary, and a manifest with every hash.

    124M/manifest.json  encoder.json  vocab.bpe  wte.npy  lm_head.npy  wpe.npy  h0.ln_1.g.npy ...

Weights are memory-mapped, so the processes of one machine share one copy. A mapped file that shrinks kills its
readers (SIGBUS): a model is written beside its place, renamed, and never changed afterwards.
"""

import hashlib
import json
import math
import mmap
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from batchgen.errors import ModelError
from batchgen.files import Stamp, parse_json, stamp_of, sync_path
from batchgen.gpt2.config import OPTIONS, GPT2Config
from batchgen.gpt2.params import Array, Params, nest
from batchgen.limits import reason_of
from batchgen.text.special_tokens import SPECIAL_TOKENS

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER_FILES = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}  # OpenAI's name: Hugging Face's

_REMEDY = "fetch or convert the model again"
REPLACED = "was replaced or changed while the model is in use; run the same command again once nothing writes there"
_OTHER_MODEL = "holds another model; remove it first, or ask to replace it"
_MAX_MANIFEST = 16 * 2**20
_MAX_TOKENIZER = 64 * 2**20
_BLOCK = 4 * 2**20  # numbers converted and written at a time
_ALIGN = 64  # NumPy starts the data of a .npy at a multiple of this
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
_MODEL_FILE = re.compile(  # the names of the files that a model consists of
    r"manifest\.json|encoder\.json|vocab\.bpe|special_tokens\.json|(wte|wpe|lm_head|ln_f\.[gb]"
    r"|h[0-9]+\.(ln_[12]\.[gb]|(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.[wb]))\.npy"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TYPES: dict[type, str] = {dict: "an object", list: "a list", str: "a string", int: "a whole number"}

JsonObject: TypeAlias = dict[str, Any]
Tensor = npt.NDArray[np.generic]
OnProgress = Callable[[int, int], None]  # (shards written, in total)
Stamps: TypeAlias = Mapping[str, Stamp]  # by file name


# ---- untrusted values


def show(value: object) -> str:
    """An untrusted value on one line of at most 300 characters: an object's type and length, an error's first line."""
    if isinstance(value, (dict, list)):  # deep nesting makes repr raise RecursionError
        return f"{_TYPES[type(value)]} of {len(value)}"
    is_error = isinstance(value, Exception)
    text = (str(value).splitlines() or [type(value).__name__])[0] if is_error else ascii(value)
    return text if len(text) <= 300 else text[:297] + "..."


def listed(names: Iterable[str], most: int = 6) -> str:
    """Untrusted names in order, the first few of many: 'a', 'b' and 200 more."""
    names = sorted(names)
    first, rest = names[:most], len(names[most:])
    return ", ".join(map(show, first)) + (f" and {rest} more" if rest else "")


def check_text(text: object, place: str) -> str:
    """Return `text` if a terminal can show it: 1 to 500 printable characters. Otherwise raise ModelError."""
    if not isinstance(text, str) or not text.isprintable() or not 1 <= len(text) <= 500:
        raise ModelError(f"{place}: expected 1 to 500 printable characters, found {show(text)}")
    return text


@contextmanager
def open_file(path: Path, stamp: Stamp | None = None) -> Iterator[BufferedReader]:
    """Open a file of a model; ModelError if it has another stamp than this one, or is a pipe, which may never end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelError(f"{path}: is not a file; {_REMEDY}")
        with path.open("rb") as file:
            if stamp not in (None, stamp_of(file.fileno())):
                raise ModelError(f"{path}: {REPLACED}")
            yield file
    except FileNotFoundError as error:
        raise ModelError(f"{path}: is missing; {_REMEDY}") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({reason_of(error)})") from error


def file_sha256(path: Path, stamp: Stamp | None = None) -> str:
    """The SHA-256 of a file of a model, in hex; raises ModelError as open_file does."""
    with open_file(path, stamp) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, limit: int) -> JsonObject:
    """Read a JSON object from a file of at most `limit` bytes; ModelError for anything that RFC 8259 does not allow."""
    with open_file(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ModelError(f"{path}: is larger than {limit} bytes; {_REMEDY}")
    try:
        values = parse_json(data.decode())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ModelError(f"{path}: is not JSON ({show(error)}); {_REMEDY}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected an object, found {show(values)}; {_REMEDY}")
    return values


@contextmanager
def library_errors(place: object, remedy: str) -> Iterator[None]:
    """Turn any exception of a library that reads a checkpoint into ModelError."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{place} cannot be read ({show(error)}); {remedy}") from error


# ---- the manifest


@dataclass(frozen=True, slots=True)
class Shard:
    """One tensor's file: little-endian float32 in C order behind a version 1.0 `.npy` header."""

    file: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, slots=True)
class Description:
    """What a manifest says besides its hashes. Raises ModelError for a text that a terminal cannot show."""

    name: str
    config: GPT2Config
    source: dict[str, str]  # where the model comes from: {"format": "TensorFlow checkpoint", ...}

    def __post_init__(self) -> None:
        check_text(self.name, "name")
        for key, value in self.source.items():
            check_text(key, "source")
            check_text(value, f"source {key!r}")


@dataclass(frozen=True, slots=True)
class Manifest(Description):
    """The contents of manifest.json; load_manifest checks the tensors against the config."""

    tensors: dict[str, Shard]
    tokenizer: dict[str, str]  # file: sha256


def shard_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """The shape of every shard: the checkpoint's tensors, and lm_head, which is wte transposed if the two are tied."""
    return config.tensor_shapes() | {"lm_head": (config.n_embd, config.n_vocab)}


def model_hash(manifest: Manifest) -> str:
    """16 hex digits of a hash over config, weights and vocabulary; the model's name does not count."""
    content = {
        "config": manifest.config.as_dict(),
        "tensors": {name: shard.sha256 for name, shard in manifest.tensors.items()},
        "tokenizer": manifest.tokenizer,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _check_object(values: object, types: Mapping[str, type], place: str, optional: Container[str] = ()) -> JsonObject:
    """Return a JSON object with these keys and types of values; ModelError names a key that differs."""
    if not isinstance(values, dict):
        raise ModelError(f"{place}expected an object, found {show(values)}")
    for key in values.keys() - types.keys():
        near = get_close_matches(key[:100], types, n=1)
        raise ModelError(f"{place}unknown key {show(key)}" + (f" (nearest: {near[0]!r})" if near else ""))
    for key, expected in types.items():
        if key not in values and key not in optional:
            raise ModelError(f"{place}{key!r} is missing")
        if key in values and not isinstance(values[key], expected):
            raise ModelError(f"{place}{key}: expected {_TYPES[expected]}, found {show(values[key])}")
    return values


def _check_sha256(text: str, place: str) -> str:
    if not _SHA256.fullmatch(text):
        raise ModelError(f"{place}expected 64 hex digits of a sha256, found {show(text)}")
    return text


def parse_config(values: object) -> GPT2Config:
    """Make a GPT2Config of a JSON object; ModelError names what is unknown, missing or out of range."""
    types = {field.name: object if field.name in OPTIONS else int for field in fields(GPT2Config)}
    return GPT2Config(**_check_object(values, types, "config: ", optional=OPTIONS))


def _parse_shard(values: object, shape: tuple[int, ...], place: str) -> Shard:
    entry = _check_object(values, {"file": str, "dtype": str, "shape": list, "sha256": str}, place)
    file, found = entry["file"], entry["shape"]
    if not _PLAIN_NAME.fullmatch(file) or not file.endswith(".npy"):
        raise ModelError(f"{place}file {show(file)} is not a plain .npy name inside the directory")
    if entry["dtype"] != "<f4":
        raise ModelError(f"{place}dtype: expected '<f4', found {show(entry['dtype'])}")
    if any(type(size) is not int for size in found) or tuple(found) != shape:
        sizes = ", ".join(map(show, found[:8]))
        raise ModelError(f"{place}shape: expected {list(shape)} from the config, found [{sizes}]")
    return Shard(file, shape, _check_sha256(entry["sha256"], place))


def _parse_tensors(values: object, config: GPT2Config) -> dict[str, Shard]:
    shapes = shard_shapes(config)
    tensors = _check_object(values, dict.fromkeys(shapes, dict), "tensors: ")
    shards = {name: _parse_shard(tensors[name], shape, f"tensors: {name}: ") for name, shape in shapes.items()}
    owners: dict[str, str] = {}
    for name, shard in shards.items():
        if owners.setdefault(shard.file, name) != name:
            raise ModelError(f"tensors: {name}: file {shard.file!r} is also that of {owners[shard.file]}")
    return shards


def _parse_manifest(values: JsonObject) -> Manifest:
    version = values.get("format")
    if type(version) is not int or version != FORMAT:
        raise ModelError(f"format is {show(version)}, and this batchgen reads format {FORMAT}; upgrade batchgen")
    objects = dict.fromkeys(("config", "source", "tensors", "tokenizer"), dict)
    _check_object(values, {"format": int, "name": str} | objects, "")
    config = parse_config(values["config"])
    names = dict.fromkeys((*TOKENIZER_FILES, SPECIAL_TOKENS), str)
    tokenizer = _check_object(values["tokenizer"], names, "tokenizer: ", optional=[SPECIAL_TOKENS])
    for name, digest in tokenizer.items():
        _check_sha256(digest, f"tokenizer: {name}: ")
    return Manifest(values["name"], config, values["source"], _parse_tensors(values["tensors"], config), tokenizer)


def load_manifest(directory: Path) -> Manifest:
    """Read and check `manifest.json`; ModelError for any bytes that are not a valid manifest."""
    path = directory / MANIFEST
    if not os.path.lexists(path):
        raise ModelError(f"{directory}: is not a model (it has no {MANIFEST}); {_REMEDY}")
    values = read_json(path, _MAX_MANIFEST)
    try:
        return _parse_manifest(values)
    except ModelError as error:
        raise ModelError(f"{path}: {show(error)}; {_REMEDY}") from error


def _format_manifest(manifest: Manifest) -> bytes:
    values = {
        "format": FORMAT,
        "name": manifest.name,
        "config": manifest.config.as_dict(),
        "source": manifest.source,
        "tensors": {
            name: {"file": shard.file, "dtype": "<f4", "shape": shard.shape, "sha256": shard.sha256}
            for name, shard in manifest.tensors.items()
        },
        "tokenizer": manifest.tokenizer,
    }
    return json.dumps(values, indent=1).encode() + b"\n"


# ---- reading


def _npy_header(shape: tuple[int, ...]) -> bytes:
    return f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode("ascii")


def _check_npy_header(file: BufferedReader, path: Path, shape: tuple[int, ...]) -> int:
    """Read a `.npy` header and return the offset of the data.

    It must be exactly the expected text. NumPy evaluates it, and accepts big-endian, structured and Fortran arrays.
    """
    start = file.read(10)
    if start[:8] != b"\x93NUMPY\x01\x00" or len(start) < 10:
        raise ModelError(f"{path}: expected a version 1.0 .npy file, found one that starts with {start!r}; {_REMEDY}")
    length = int.from_bytes(start[8:], "little")
    expected, found = _npy_header(shape), file.read(length)
    if found.rstrip(b" \n") != expected or (10 + length) % _ALIGN:
        raise ModelError(f"{path}: expected header {show(expected)}, found {show(found)}; {_REMEDY}")
    return 10 + length


def _map(file: BufferedReader, length: int) -> mmap.mmap:
    if sys.version_info >= (3, 13):  # keeps no file descriptor open for each of 1558M's 581 shards
        return mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, trackfd=False)
    return mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ)


def _map_shard(path: Path, shape: tuple[int, ...], stamp: Stamp | None = None) -> Array:
    with open_file(path, stamp) as file:
        offset = _check_npy_header(file, path, shape)
        expected, found = offset + 4 * math.prod(shape), os.fstat(file.fileno()).st_size
        if found != expected:
            raise ModelError(
                f"{path}: expected {expected} bytes for float32 {list(shape)}, found {found}; "
                f"the file is {'truncated' if found < expected else 'too long'}, {_REMEDY}"
            )
        return np.frombuffer(_map(file, expected), "<f4", offset=offset).reshape(shape)


def map_tensors(directory: Path, manifest: Manifest, files: Stamps) -> Iterator[tuple[str, Array]]:
    """Map each tensor, read-only; ModelError if its header or length is wrong, or if it is not one of `files`."""
    for name, shard in manifest.tensors.items():
        yield name, _map_shard(directory / shard.file, shard.shape, files.get(shard.file))


def load_params(directory: Path, manifest: Manifest | None = None, files: Stamps | None = None) -> Params:
    """Map a model's weights: read-only float32 arrays, nested as in picoGPT; headers and lengths alone are checked."""
    manifest = manifest or load_manifest(directory)
    return nest(dict(map_tensors(directory, manifest, files or {})), manifest.config.n_layer)


def verify_shards(directory: Path, manifest: Manifest | None = None, files: Stamps | None = None) -> None:
    """Compare every file with the manifest; ModelError names the first that differs, or is not one of `files`."""
    manifest, known = manifest or load_manifest(directory), files or {}
    load_params(directory, manifest, files)  # for a truncated shard, its length says more than its hash
    expected = manifest.tokenizer | {shard.file: shard.sha256 for shard in manifest.tensors.values()}
    if SPECIAL_TOKENS not in expected and os.path.lexists(directory / SPECIAL_TOKENS):
        raise ModelError(f"{directory / SPECIAL_TOKENS}: does not belong to the model; remove it")
    paths = [directory / name for name in expected]
    with ThreadPoolExecutor(2) as threads:  # hashing releases the GIL
        digests = threads.map(file_sha256, paths, map(known.get, expected))
        for path, digest, found in zip(paths, expected.values(), digests, strict=True):
            if found != digest:
                raise ModelError(f"{path}: is damaged (expected sha256 {digest}, found {found}); {_REMEDY}")


# ---- writing


def _write_file(path: Path, blocks: Iterable[bytes | memoryview]) -> str:
    """Write and sync a new file; return its SHA-256."""
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for block in blocks:
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _npy_blocks(name: str, tensor: Tensor) -> Iterator[bytes | memoryview]:
    """Yield a `.npy` file in blocks of rows, so that even wte.T becomes contiguous in little memory.

    The header is made here because NumPy's padding differs between versions, and the hashes must not.
    """
    text = _npy_header(tensor.shape)
    length = -(-(10 + len(text) + 1) // _ALIGN) * _ALIGN - 10
    yield b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1) + b"\n"
    rows = max(1, _BLOCK // math.prod(tensor.shape[1:]))
    for start in range(0, len(tensor), rows):
        with np.errstate(over="ignore"):  # a float64 too large for float32 becomes infinity
            block = np.ascontiguousarray(tensor[start : start + rows], dtype="<f4")
        if not np.isfinite(block).all():
            raise ModelError(f"tensor {name}: holds nan, infinity, or a number too large for float32")
        yield block.data


def _write_shard(directory: Path, name: str, tensor: Tensor) -> Shard:
    file = name.replace("/", ".") + ".npy"
    return Shard(file, tensor.shape, _write_file(directory / file, _npy_blocks(name, tensor)))


def _write_tensors(
    directory: Path, config: GPT2Config, tensors: Iterable[tuple[str, Tensor]], on_progress: OnProgress
) -> dict[str, Shard]:
    shapes, tied = shard_shapes(config), config.tie_word_embeddings
    shards: dict[str, Shard] = {}
    given_head: Tensor | None = None
    for name, tensor in tensors:
        on_progress(len(shards), len(shapes))
        if name not in shapes:
            raise ModelError(f"tensor {show(name)} does not belong to a GPT-2 of {config.n_layer} layers")
        if name in shards and (name != "lm_head" or not tied):
            raise ModelError(f"tensor {name} came twice")
        if tensor.shape != (shape := shapes[name]):
            raise ModelError(f"tensor {name}: expected shape {list(shape)} from the config, found {list(tensor.shape)}")
        if tensor.dtype.kind != "f":
            raise ModelError(f"tensor {name}: expected floating point numbers, found {tensor.dtype}")
        if name == "lm_head" and tied:  # made from wte in any case; a given one, as random_tensors has, must be equal
            given_head = tensor
            continue
        shards[name] = _write_shard(directory, name, tensor)
        if name == "wte" and tied:
            shards["lm_head"] = _write_shard(directory, "lm_head", tensor.T)
    missing = [name for name in shapes if name not in shards]
    if missing:
        raise ModelError(f"tensor {missing[0]} is missing ({len(missing)} of {len(shapes)} are)")
    head = _map_shard(directory / shards["lm_head"].file, shapes["lm_head"])
    if given_head is not None and not np.array_equal(given_head.astype("<f4"), head):
        raise ModelError("tensor lm_head is not wte transposed, but the config ties the two")
    on_progress(len(shapes), len(shapes))
    return {name: shards[name] for name in shapes}


def _copy_tokenizer(source: Path, directory: Path) -> dict[str, str]:
    """Copy the vocabulary under OpenAI's names, and special_tokens.json if there is one; return {file: sha256}."""
    hashes = {}
    for name, other in (*TOKENIZER_FILES.items(), (SPECIAL_TOKENS, SPECIAL_TOKENS)):
        path = next((source / each for each in (name, other) if os.path.exists(source / each)), None)
        if path is None and name == SPECIAL_TOKENS:
            continue
        if path is None:
            raise ModelError(f"{source}: has neither {name} nor {other}; put the vocabulary there")
        with open_file(path) as file:
            data = file.read(_MAX_TOKENIZER + 1)
        if len(data) > _MAX_TOKENIZER:
            raise ModelError(f"{path}: is larger than {_MAX_TOKENIZER} bytes, too large for a vocabulary of GPT-2")
        hashes[name] = _write_file(directory / name, [data])
    return hashes


def _check_target(directory: Path, config: GPT2Config, replace: bool) -> list[Path]:
    """Raise ModelError if `directory` cannot take the model; return the files to keep in it."""
    if not os.path.lexists(directory):
        return []
    if not directory.is_dir():
        raise ModelError(f"{directory}: is in the way, and is not a directory; move it")
    entries = sorted(directory.iterdir())
    if not replace and entries:
        if not os.path.lexists(directory / MANIFEST):
            raise ModelError(f"{directory}: exists, and is not a model; give a new directory")
        if load_manifest(directory).config != config:
            raise ModelError(f"{directory}: {_OTHER_MODEL}")
    for path in entries:
        if path.is_dir() and not path.is_symlink():
            raise ModelError(f"{path}: is a directory, and a model has only files; move it first")
    return [path for path in entries if not _MODEL_FILE.fullmatch(path.name)]


def _has_model(directory: Path, manifest: Manifest) -> bool:
    """Whether `directory` already holds this same model; ModelError if it holds another or a damaged one."""
    if not directory.exists() or not any(directory.iterdir()):
        return False
    if model_hash(load_manifest(directory)) != model_hash(manifest):
        raise ModelError(f"{directory}: {_OTHER_MODEL}")
    verify_shards(directory)
    return True


def _move_into_place(new: Path, directory: Path, aside: Path) -> None:
    """Rename `new` to `directory`; an old directory is moved aside, and back if the rename fails."""
    has_old = directory.exists()
    if has_old:
        directory.rename(aside)
    try:
        new.rename(directory)
    except BaseException:
        if has_old:
            aside.rename(directory)
        raise
    sync_path(directory.parent)


def write_model(
    directory: Path,
    description: Description,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    tokenizer_dir: Path,
    replace: bool = False,
    on_progress: OnProgress | None = None,
) -> None:
    """Write a model directory with one tensor in memory at a time, beside it and renamed: it never holds half a model.

    tensors: those of config.tensor_shapes(), in any order, each once. lm_head is made from wte; if the config does
    not tie the two, lm_head is one of `tensors`.
    replace: replace another model; files that do not belong to a model are kept. Without it, `directory` must be
    absent or empty, or hold this same model.
    """
    directory = Path(os.path.realpath(directory))
    try:
        kept = _check_target(directory, description.config, replace)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", suffix=".tmp", dir=directory.parent) as private:
            new = Path(private, "new")
            new.mkdir()  # the mode of `private` is 0700; the model gets the user's umask
            tokenizer = _copy_tokenizer(tokenizer_dir, new)
            shards = _write_tensors(new, description.config, tensors, on_progress or (lambda done, total: None))
            manifest = Manifest(description.name, description.config, dict(description.source), shards, tokenizer)
            _write_file(new / MANIFEST, [_format_manifest(manifest)])
            for path in kept:
                shutil.copy2(path, new / path.name, follow_symlinks=False)
                if not path.is_symlink():
                    sync_path(new / path.name)
            sync_path(new)
            if replace or not _has_model(directory, manifest):
                _move_into_place(new, directory, aside=Path(private, "old"))
    except OSError as error:
        raise ModelError(f"{directory}: cannot be written ({error.strerror or error})") from error
