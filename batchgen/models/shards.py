"""A model on disk: a directory with one `.npy` file for each tensor, the vocabulary, and a manifest with every hash.

    124M/manifest.json  encoder.json  vocab.bpe  wte.npy  wpe.npy  lm_head.panels.npy  h0.ln_1.g.npy ...

The matrices of products (h0.attn.c_attn.w, ..., lm_head) are stored in panels, as the kernels read them; all other
tensors as they are. Every hash is that of the plain tensor's file: a model keeps its hash however it is stored.
In format 1 all tensors were plain; once.py packs such a model.

Weights are memory-mapped, so the processes of one machine share one copy. A mapped file that shrinks kills its
readers (SIGBUS): a model is written beside its place, renamed, and never changed afterwards.
"""

import errno
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from batchgen.errors import ModelError
from batchgen.files import JsonObject, Stamp, parse_json, replace_file, stamp_of, sync_path
from batchgen.gpt2.config import OPTIONS, GPT2Config
from batchgen.gpt2.params import Array, Params, nest
from batchgen.gpt2.weights import PANEL, Float32Linear, Weights, arrange, from_panels, to_panels
from batchgen.limits import reason_of
from batchgen.text.special_tokens import SPECIAL_TOKENS
from batchgen.types import Precision

PLAIN_FORMAT, FORMAT = 1, 2  # the older format, which once.py packs, and the one that is written
MANIFEST = "manifest.json"
TOKENIZER_FILES = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}  # OpenAI's name: Hugging Face's

REMEDY = "fetch or convert the model again"
REPLACED = "was replaced or changed while the model is in use; run the same command again once nothing writes there"
_OTHER_MODEL = "holds another model; remove it first, or ask to replace it"
_MAX_MANIFEST = 16 * 2**20
_MAX_TOKENIZER = 64 * 2**20
_BLOCK = 4 * 2**20  # numbers converted and written at a time
_ALIGN = 64  # NumPy starts the data of a .npy at a multiple of this
INT8, UNFINISHED_INT8 = "int8", ".int8.tmp"  # the folder of the weights in int8, and the same while it is written
_FOLDERS = (INT8, UNFINISHED_INT8)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
_MODEL_FILE = re.compile(  # the names of the files that a model consists of
    r"manifest\.json|encoder\.json|vocab\.bpe|special_tokens\.json|(wte|wpe|lm_head|ln_f\.[gb]"
    r"|h[0-9]+\.(ln_[12]\.[gb]|(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.[wb]))(\.panels)?\.npy"
)
_PANELS = "panels"  # the layout of a matrix's file
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TYPES: dict[type, str] = {dict: "an object", list: "a list", str: "a string", int: "a whole number"}

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
            raise ModelError(f"{path}: is not a file; {REMEDY}")
        with path.open("rb") as file:
            if stamp not in (None, stamp_of(file.fileno())):
                raise ModelError(f"{path}: {REPLACED}")
            yield file
    except FileNotFoundError as error:
        raise ModelError(f"{path}: is missing; {REMEDY}") from error
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
        raise ModelError(f"{path}: is larger than {limit} bytes; {REMEDY}")
    try:
        values = parse_json(data.decode())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ModelError(f"{path}: is not JSON ({show(error)}); {REMEDY}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected an object, found {show(values)}; {REMEDY}")
    return values


@contextmanager
def other_remedy(remedy: str) -> Iterator[None]:
    """Files that batchgen made of a model need not be fetched or converted again, but made again."""
    try:
        yield
    except ModelError as error:
        raise ModelError(str(error).replace(REMEDY, remedy)) from error


@contextmanager
def library_errors(place: object, remedy: str) -> Iterator[None]:
    """Turn any exception of a library that reads a checkpoint into ModelError."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{place} cannot be read ({show(error)}); {remedy}") from error


def stamps_of(directory: Path, names: Iterable[str]) -> dict[str, Stamp]:
    """{name: stamp} of files of a model; ModelError if one is missing."""
    stamps = {}
    for name in names:
        with open_file(directory / name) as file:
            stamps[name] = stamp_of(file.fileno())
    return stamps


# ---- the manifest


@dataclass(frozen=True, slots=True)
class Shard:
    """One tensor's file: little-endian float32 in C order behind a version 1.0 `.npy` header."""

    file: str
    shape: tuple[int, ...]  # of the tensor
    sha256: str  # of the file if it is plain, or was
    in_panels: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """[n_in, n_out] -> [n_panel, n_in, PANEL] if the file holds panels."""
        return (-(-self.shape[1] // PANEL), self.shape[0], PANEL) if self.in_panels else self.shape


@dataclass(frozen=True, slots=True)
class Description:
    """What a manifest says besides its hashes. Raises ModelError for a text that a terminal cannot show."""

    name: str
    config: GPT2Config
    source: dict[str, str]  # where the model comes from: {"format": "TensorFlow checkpoint", ...}
    precision: Precision = field(default="float32", kw_only=True)  # of a job that names none

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

    @property
    def is_packed(self) -> bool:
        """Whether the model is of the format that is written now."""
        return self.tensors["lm_head"].in_panels


def is_matrix(name: str) -> bool:
    """Whether a tensor is the matrix of a product, and so stored in panels."""
    return name == "lm_head" or name.endswith("/w")


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


def check_object(values: object, types: Mapping[str, type], place: str, optional: Container[str] = ()) -> JsonObject:
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


def check_sha256(text: str, place: str) -> str:
    if not _SHA256.fullmatch(text):
        raise ModelError(f"{place}expected 64 hex digits of a sha256, found {show(text)}")
    return text


def parse_config(values: object) -> GPT2Config:
    """Make a GPT2Config of a JSON object; ModelError names what is unknown, missing or out of range."""
    types = {field.name: object if field.name in OPTIONS else int for field in fields(GPT2Config)}
    return GPT2Config(**check_object(values, types, "config: ", optional=OPTIONS))


def _parse_shard(values: object, shape: tuple[int, ...], place: str, in_panels: bool) -> Shard:
    types = {"file": str, "dtype": str, "shape": list, "sha256": str} | ({"layout": str} if in_panels else {})
    entry = check_object(values, types, place)
    file, found = entry["file"], entry["shape"]
    if not _PLAIN_NAME.fullmatch(file) or not file.endswith(".npy"):
        raise ModelError(f"{place}file {show(file)} is not a plain .npy name inside the directory")
    if entry["dtype"] != "<f4":
        raise ModelError(f"{place}dtype: expected '<f4', found {show(entry['dtype'])}")
    if in_panels and entry["layout"] != _PANELS:
        raise ModelError(f"{place}layout: expected {_PANELS!r}, found {show(entry['layout'])}")
    if any(type(size) is not int for size in found) or tuple(found) != shape:
        sizes = ", ".join(map(show, found[:8]))
        raise ModelError(f"{place}shape: expected {list(shape)} from the config, found [{sizes}]")
    return Shard(file, shape, check_sha256(entry["sha256"], place), in_panels)


def _parse_tensors(values: object, config: GPT2Config, version: int) -> dict[str, Shard]:
    shapes = shard_shapes(config)
    tensors = check_object(values, dict.fromkeys(shapes, dict), "tensors: ")
    shards = {
        name: _parse_shard(tensors[name], shape, f"tensors: {name}: ", version == FORMAT and is_matrix(name))
        for name, shape in shapes.items()
    }
    owners: dict[str, str] = {}
    for name, shard in shards.items():
        if owners.setdefault(shard.file, name) != name:
            raise ModelError(f"tensors: {name}: file {shard.file!r} is also that of {owners[shard.file]}")
    return shards


def _parse_manifest(values: JsonObject) -> Manifest:
    version = values.get("format")
    if type(version) is not int or version not in (PLAIN_FORMAT, FORMAT):
        known = f"formats {PLAIN_FORMAT} and {FORMAT}"
        raise ModelError(f"format is {show(version)}, and this batchgen reads {known}; upgrade batchgen")
    objects = dict.fromkeys(("config", "source", "tensors", "tokenizer"), dict)
    check_object(values, {"format": int, "name": str, "precision": str} | objects, "", optional=["precision"])
    precision = values.get("precision", "float32")
    if precision not in get_args(Precision):
        raise ModelError(f"precision: expected one of {', '.join(get_args(Precision))}, found {show(precision)}")
    config = parse_config(values["config"])
    names = dict.fromkeys((*TOKENIZER_FILES, SPECIAL_TOKENS), str)
    tokenizer = check_object(values["tokenizer"], names, "tokenizer: ", optional=[SPECIAL_TOKENS])
    for name, digest in tokenizer.items():
        check_sha256(digest, f"tokenizer: {name}: ")
    tensors = _parse_tensors(values["tensors"], config, version)
    return Manifest(values["name"], config, values["source"], tensors, tokenizer, precision=precision)


def load_manifest(directory: Path) -> Manifest:
    """Read and check `manifest.json`; ModelError for any bytes that are not a valid manifest."""
    path = directory / MANIFEST
    if not os.path.lexists(path):
        raise ModelError(f"{directory}: is not a model (it has no {MANIFEST}); {REMEDY}")
    values = read_json(path, _MAX_MANIFEST)
    try:
        return _parse_manifest(values)
    except ModelError as error:
        raise ModelError(f"{path}: {show(error)}; {REMEDY}") from error


def _format_manifest(manifest: Manifest) -> bytes:
    values = {
        "format": FORMAT,
        "name": manifest.name,
        **({} if manifest.precision == "float32" else {"precision": manifest.precision}),
        "config": manifest.config.as_dict(),
        "source": manifest.source,
        "tensors": {
            name: {"file": shard.file, "dtype": "<f4", "shape": shard.shape, "sha256": shard.sha256}
            | ({"layout": _PANELS} if shard.in_panels else {})
            for name, shard in manifest.tensors.items()
        },
        "tokenizer": manifest.tokenizer,
    }
    return json.dumps(values, indent=1).encode() + b"\n"


# ---- reading


def _npy_start(shape: tuple[int, ...], dtype: str) -> bytes:
    """The bytes of a `.npy` file before its data.

    They are made here because NumPy's padding differs between versions, and the hashes must not.
    """
    text = _npy_header(shape, dtype)
    length = -(-(10 + len(text) + 1) // _ALIGN) * _ALIGN - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1) + b"\n"


def _npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode("ascii")


def _check_npy_header(file: BufferedReader, path: Path, shape: tuple[int, ...], dtype: str) -> int:
    """Read a `.npy` header and return the offset of the data.

    It must be exactly the expected text. NumPy evaluates it, and accepts big-endian, structured and Fortran arrays.
    """
    start = file.read(10)
    if start[:8] != b"\x93NUMPY\x01\x00" or len(start) < 10:
        raise ModelError(f"{path}: expected a version 1.0 .npy file, found one that starts with {start!r}; {REMEDY}")
    length = int.from_bytes(start[8:], "little")
    expected, found = _npy_header(shape, dtype), file.read(length)
    if found[:-1].rstrip(b" ") != expected or found[-1:] != b"\n" or (10 + length) % _ALIGN:
        raise ModelError(f"{path}: expected header {show(expected)}, found {show(found)}; {REMEDY}")
    return 10 + length


def _map(file: BufferedReader, length: int) -> mmap.mmap:
    if sys.version_info >= (3, 13):  # keeps no file descriptor open for each of 1558M's 581 shards
        return mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, trackfd=False)
    return mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ)


def map_npy(path: Path, shape: tuple[int, ...], dtype: str = "<f4", stamp: Stamp | None = None) -> Any:
    """Map a `.npy` file, read-only; its data starts at a multiple of 64 bytes. ModelError if it is of another shape."""
    with open_file(path, stamp) as file:
        offset = _check_npy_header(file, path, shape, dtype)
        expected = offset + np.dtype(dtype).itemsize * math.prod(shape)
        found = os.fstat(file.fileno()).st_size
        if found != expected:
            raise ModelError(
                f"{path}: expected {expected} bytes for {np.dtype(dtype).name} {list(shape)}, found {found}; "
                f"the file is {'truncated' if found < expected else 'too long'}, {REMEDY}"
            )
        return np.frombuffer(_map(file, expected), dtype, offset=offset).reshape(shape)


def map_shards(directory: Path, manifest: Manifest, files: Stamps) -> Iterator[tuple[str, Array]]:
    """Map each tensor as it is stored; ModelError if its header or length is wrong, or if it is not one of `files`."""
    for name, shard in manifest.tensors.items():
        yield name, map_npy(directory / shard.file, shard.stored_shape, stamp=files.get(shard.file))


def map_weights(directory: Path, manifest: Manifest, files: Stamps) -> Weights:
    """Map the weights of a packed model in float32."""
    params = nest(dict(map_shards(directory, manifest, files)), manifest.config.n_layer)
    return arrange(params, "float32", lambda w, b: Float32Linear(w, b))


def load_tensors(directory: Path, manifest: Manifest | None = None, files: Stamps | None = None) -> dict[str, Array]:
    """A model's weights as plain read-only float32 arrays; matrices are copied out of panels."""
    manifest = manifest or load_manifest(directory)
    tensors = {}
    for name, stored in map_shards(directory, manifest, files or {}):
        shard = manifest.tensors[name]
        tensors[name] = from_panels(stored, shard.shape[1]) if shard.in_panels else stored
        tensors[name].flags.writeable = False
    return tensors


def load_params(directory: Path) -> Params:
    """The same, nested as in picoGPT."""
    manifest = load_manifest(directory)
    return nest(load_tensors(directory, manifest), manifest.config.n_layer)


def _plain_sha256(path: Path, shard: Shard, stamp: Stamp | None) -> str:
    """The SHA-256 of a tensor's plain file; ModelError if the padding of its panels is not zeros."""
    if not shard.in_panels:
        return file_sha256(path, stamp)
    panels, n_out = map_npy(path, shard.stored_shape, stamp=stamp), shard.shape[1]
    if panels[-1, :, n_out - len(panels) * PANEL + PANEL :].view(np.uint32).any():
        raise ModelError(f"{path}: is damaged (the columns after column {n_out} are not zeros); {REMEDY}")
    digest = hashlib.sha256()
    for block in _npy_blocks(shard.shape, lambda rows: from_panels(panels[:, rows], n_out)):
        digest.update(block)
    return digest.hexdigest()


def check_hash(path: Path, expected: str, found: str) -> None:
    """ModelError if a file of a model has another SHA-256 than its manifest says."""
    if found != expected:
        raise ModelError(f"{path}: is damaged (expected sha256 {expected}, found {found}); {REMEDY}")


def verify_shards(
    directory: Path, manifest: Manifest | None = None, files: Stamps | None = None, *, matrices: bool = True
) -> None:
    """Compare the files with the manifest; ModelError names the first that differs, or is not one of `files`.

    matrices: those of the products, which are not used if there are others in int8.
    """
    manifest, known = manifest or load_manifest(directory), files or {}
    for _ in map_shards(directory, manifest, known):  # for a truncated shard, its length says more than its hash
        pass
    if SPECIAL_TOKENS not in manifest.tokenizer and os.path.lexists(directory / SPECIAL_TOKENS):
        raise ModelError(f"{directory / SPECIAL_TOKENS}: does not belong to the model; remove it")
    texts = [Shard(name, (), sha256) for name, sha256 in manifest.tokenizer.items()]
    shards = [*texts, *(shard for name, shard in manifest.tensors.items() if matrices or not is_matrix(name))]
    paths = [directory / shard.file for shard in shards]
    with ThreadPoolExecutor(2) as threads:  # hashing and copying release the GIL
        digests = threads.map(_plain_sha256, paths, shards, [known.get(shard.file) for shard in shards])
        for path, shard, found in zip(paths, shards, digests, strict=True):
            check_hash(path, shard.sha256, found)


# ---- writing


def write_file(path: Path, blocks: Iterable[bytes | memoryview]) -> str:
    """Write and sync a new file; return its SHA-256."""
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for block in blocks:
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _npy_blocks(
    shape: tuple[int, ...], block_of: Callable[[slice], npt.NDArray[Any]], dtype: str = "<f4"
) -> Iterator[bytes | memoryview]:
    """Yield a `.npy` file in blocks along the first axis, so that even wte.T becomes contiguous in little memory."""
    yield _npy_start(shape, dtype)
    rows = max(1, _BLOCK // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        yield block_of(slice(start, min(start + rows, shape[0]))).data


def write_npy(path: Path, array: npt.NDArray[Any]) -> str:
    """Write and sync a `.npy` file; return its SHA-256."""
    return write_file(path, _npy_blocks(array.shape, lambda rows: array[rows], array.dtype.str))


def file_of(name: str) -> str:
    """h0/ln_1/g -> h0.ln_1.g.npy, h0/attn/c_attn/w -> h0.attn.c_attn.w.panels.npy"""
    return name.replace("/", ".") + (".panels.npy" if is_matrix(name) else ".npy")


def _write_shard(directory: Path, name: str, tensor: Tensor) -> Shard:
    def plain(rows: slice) -> Array:
        with np.errstate(over="ignore"):  # a float64 too large for float32 becomes infinity
            block = np.ascontiguousarray(tensor[rows], dtype="<f4")
        if not np.isfinite(block).all():
            raise ModelError(f"tensor {name}: holds nan, infinity, or a number too large for float32")
        return block

    file, blocks = file_of(name), _npy_blocks(tensor.shape, plain)
    if not is_matrix(name):
        return Shard(file, tensor.shape, write_file(directory / file, blocks))
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    shard = Shard(file, tensor.shape, digest.hexdigest(), in_panels=True)

    def packed(panels: slice) -> Array:
        return to_panels(tensor[:, panels.start * PANEL : panels.stop * PANEL])  # type: ignore[arg-type]

    write_file(directory / file, _npy_blocks(shard.stored_shape, packed))
    return shard


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
    wte = map_npy(directory / shards["wte"].file, shapes["wte"])
    if given_head is not None and not np.array_equal(given_head.T.astype("<f4"), wte):
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
        hashes[name] = write_file(directory / name, [data])
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
        if path.is_dir() and not path.is_symlink() and path.name not in _FOLDERS:
            raise ModelError(f"{path}: is a directory, and a model has only files; move it first")
    return [path for path in entries if not _MODEL_FILE.fullmatch(path.name) and path.name not in _FOLDERS]


def _has_model(directory: Path, manifest: Manifest) -> bool:
    """Whether `directory` already holds this same model; ModelError if it holds another or a damaged one."""
    if not directory.exists() or not any(directory.iterdir()):
        return False
    if model_hash(load_manifest(directory)) != model_hash(manifest):
        raise ModelError(f"{directory}: {_OTHER_MODEL}")
    verify_shards(directory)
    return True


def move_into_place(new: Path, directory: Path, aside: Path) -> None:
    """Rename `new` to `directory`; an old directory is moved aside, and back if the rename fails."""
    try:
        if directory.exists():
            directory.rename(aside)
        new.rename(directory)
    except BaseException:
        if aside.exists() and not directory.exists():
            aside.rename(directory)
        raise
    sync_path(directory.parent)


def _write_beside(
    directory: Path,
    description: Description,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_dir: Path,
    replace: bool,
    on_progress: OnProgress,
) -> None:
    """See write_model; raises OSError too."""
    kept = _check_target(directory, description.config, replace)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", suffix=".tmp", dir=directory.parent) as private:
        new = Path(private, "new")
        new.mkdir()  # the mode of `private` is 0700; the model gets the user's umask
        tokenizer = _copy_tokenizer(tokenizer_dir, new)
        shards = _write_tensors(new, description.config, tensors, on_progress)
        said = description.name, description.config, dict(description.source)
        manifest = Manifest(*said, shards, tokenizer, precision=description.precision)
        write_file(new / MANIFEST, [_format_manifest(manifest)])
        for path in kept:
            shutil.copy2(path, new / path.name, follow_symlinks=False)
            if not path.is_symlink():
                sync_path(new / path.name)
        sync_path(new)
        if replace or not _has_model(directory, manifest):
            move_into_place(new, directory, aside=Path(private, "old"))


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
    report: OnProgress = on_progress or (lambda done, total: None)
    try:
        _write_beside(directory, description, tensors, tokenizer_dir, replace, report)
    except OSError as error:
        raise ModelError(f"{directory}: cannot be written ({error.strerror or error})") from error


def _pack_in_place(directory: Path, manifest: Manifest, files: Stamps) -> None:
    """Write the panels beside the plain matrices, replace the manifest, and remove the plain matrices."""
    old = {name: shard.file for name, shard in manifest.tensors.items() if is_matrix(name)}
    new = {name: directory / file_of(name) for name in old}
    if not {path.name for path in new.values()}.isdisjoint(shard.file for shard in manifest.tensors.values()):
        raise OSError(errno.EEXIST, "its files have the names of packed ones")
    tensors = dict(manifest.tensors)
    try:
        for name, tensor in map_shards(directory, manifest, files):
            if is_matrix(name):
                new[name].unlink(missing_ok=True)  # of a process that was killed
                tensors[name] = _write_shard(directory, name, tensor)
        replace_file(directory / MANIFEST, _format_manifest(replace(manifest, tensors=tensors)))
    except BaseException:
        if not load_manifest(directory).is_packed:  # else it needs them
            for path in new.values():
                path.unlink(missing_ok=True)
        raise
    for file in old.values():
        with suppress(OSError):
            (directory / file).unlink()


def pack_model(source: Path, manifest: Manifest, directory: Path) -> None:
    """Write the packed form of a plain model into `directory`, which may be the same; OSError if that is impossible.

    At every instant the directory is no model, the plain one or the packed one; other files in it stay.
    """
    files = stamps_of(source, (shard.file for shard in manifest.tensors.values()))
    verify_shards(source, manifest, files)  # or damaged weights would get hashes of their own
    if directory == source:
        _pack_in_place(source, manifest, files)
    else:
        tensors = map_shards(source, manifest, files)
        _write_beside(directory, manifest, tensors, source, replace=True, on_progress=lambda done, total: None)


def set_precision(directory: Path, precision: Precision) -> None:
    """Make a precision the default of a packed model."""
    manifest = load_manifest(directory)
    if manifest.precision == precision:
        return
    try:
        replace_file(directory / MANIFEST, _format_manifest(replace(manifest, precision=precision)))
    except OSError as error:
        raise ModelError(f"{directory / MANIFEST}: cannot be written ({error.strerror or error})") from error
