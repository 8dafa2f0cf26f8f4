"""A model on disk: a directory of one `.npy` a tensor, its vocabulary, and a manifest of all their hashes.

    124M/manifest.json  encoder.json  vocab.bpe  wte.npy  lm_head.npy  wpe.npy  h0.ln_1.g.npy ...

The weights are mapped, not read, so that processes on one machine share one copy of them. A shard that
shrinks while it is mapped kills its reader (SIGBUS): a model is written beside its place and renamed into
it, never rewritten where it stands.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from batchgen.errors import ModelError
from batchgen.files import sync_path
from batchgen.gpt2.config import OPTIONS, GPT2Config
from batchgen.gpt2.params import Array, Params, nest

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER_FILES = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}  # OpenAI's name: Hugging Face's

_REMEDY = "fetch or convert the model again"
_ANOTHER = "holds another model; remove it first, or ask to replace it"
_MAX_MANIFEST = 16 * 2**20
_MAX_TOKENIZER = 64 * 2**20
_BLOCK = 4 * 2**20  # numbers converted and written at a time
_ALIGN = 64  # where NumPy starts the data of a .npy: a multiple of a cache line
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
_SHARD_NAME = re.compile(
    r"(wte|wpe|lm_head|ln_f\.[gb]|h[0-9]+\.(ln_[12]\.[gb]|(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.[wb]))\.npy"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "a string", int: "a whole number"}

T = TypeVar("T")
OnProgress = Callable[[int, int], None]  # (done, of how many)


@dataclass(frozen=True, slots=True)
class Shard:
    """One tensor's file: little-endian float32 in C order behind a version 1.0 `.npy` header."""

    file: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a model directory says it holds; tensors are checked against the config when it is loaded."""

    name: str
    config: GPT2Config
    source: dict[str, str]
    tensors: dict[str, Shard]
    tokenizer: dict[str, str]  # file: sha256


def shard_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Every tensor a model directory holds: the checkpoint's, and lm_head, wte transposed where the two are tied."""
    return config.tensor_shapes() | {"lm_head": (config.n_embd, config.n_vocab)}


def model_hash(manifest: Manifest) -> str:
    """Name the model by what it computes: 16 hex digits over config, weights and vocabulary, not its name."""
    content = {
        "config": manifest.config.as_dict(),
        "tensors": {name: shard.sha256 for name, shard in manifest.tensors.items()},
        "tokenizer": manifest.tokenizer,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


# --- the manifest ---------------------------------------------------------------------------------------


def load_manifest(directory: Path) -> Manifest:
    """Read and check `manifest.json`; whatever its bytes are, this returns or raises ModelError."""
    path = directory / MANIFEST
    if not os.path.lexists(path):
        raise ModelError(f"{directory}: is not a model (it has no {MANIFEST}); {_REMEDY}")
    values = read_json(path, _MAX_MANIFEST)
    try:
        return _parse_manifest(values)
    except ModelError as error:
        raise ModelError(f"{path}: {short(error)}; {_REMEDY}") from error


def read_json(path: Path, limit: int) -> object:
    """Read a JSON file of at most limit bytes; anything that RFC 8259 does not allow raises ModelError."""
    with open_file(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ModelError(f"{path}: is larger than {limit} bytes; {_REMEDY}")
    try:
        return json.loads(data.decode(), object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError and a JSONDecodeError are ValueErrors
        raise ModelError(f"{path}: is not JSON ({short(error)}); {_REMEDY}") from error


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key appears twice")
    return values


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _parse_manifest(values: object) -> Manifest:
    if not isinstance(values, dict):
        raise ModelError("expected an object")
    version = values.get("format")
    if type(version) is not int or version != FORMAT:
        raise ModelError(f"format is {short(version)}, and this batchgen reads format {FORMAT}; upgrade batchgen")
    _check_keys(values, ("format", "name", "config", "source", "tensors", "tokenizer"), "")
    config = parse_config(_take(values, "config", dict, ""))
    return Manifest(
        name=check_text(_take(values, "name", str, ""), "name"),
        config=config,
        source=_parse_source(_take(values, "source", dict, "")),
        tensors=_parse_tensors(_take(values, "tensors", dict, ""), config),
        tokenizer=_parse_tokenizer(_take(values, "tokenizer", dict, "")),
    )


def parse_config(values: Mapping[str, object]) -> GPT2Config:
    """Check what a file says of a config."""
    known = tuple(field.name for field in fields(GPT2Config))
    _check_keys(values, known, "config: ", optional=tuple(OPTIONS))
    numbers = {name: _take(values, name, int, "config: ") for name in known if name not in OPTIONS}
    options = {name: values[name] for name in OPTIONS if name in values}
    given: dict[str, Any] = numbers | options
    return GPT2Config(**given)  # which checks the options


def _parse_source(values: Mapping[str, object]) -> dict[str, str]:
    return {check_text(key, "source"): check_text(value, f"source {key!r}") for key, value in values.items()}


def _parse_tensors(values: Mapping[str, object], config: GPT2Config) -> dict[str, Shard]:
    shapes = shard_shapes(config)
    _check_keys(values, tuple(shapes), "tensors: ")
    parsed = {name: _parse_shard(values, name, shape) for name, shape in shapes.items()}
    owners: dict[str, str] = {}
    for name, shard in parsed.items():
        if owners.setdefault(shard.file, name) != name:
            raise ModelError(f"tensors: {name}: file {shard.file!r} is also that of {owners[shard.file]}")
    return parsed


def _parse_shard(tensors: Mapping[str, object], name: str, shape: tuple[int, ...]) -> Shard:
    where = f"tensors: {name}: "
    entry = _take(tensors, name, dict, "tensors: ")
    _check_keys(entry, ("file", "dtype", "shape", "sha256"), where)
    file = _take(entry, "file", str, where)
    if not _PLAIN_NAME.fullmatch(file) or not file.endswith(".npy"):
        raise ModelError(f"{where}file {short(file)} is not a plain .npy name inside the directory")
    if entry["dtype"] != "<f4":
        raise ModelError(f"{where}dtype: expected '<f4', found {short(entry['dtype'])}")
    found = _take(entry, "shape", list, where)
    if any(type(size) is not int for size in found) or tuple(found) != shape:
        sizes = ", ".join(map(short, found[:8]))
        raise ModelError(f"{where}shape: expected {list(shape)} from the config, found [{sizes}]")
    return Shard(file, shape, _parse_sha256(_take(entry, "sha256", str, where), where))


def _parse_tokenizer(values: Mapping[str, object]) -> dict[str, str]:
    _check_keys(values, tuple(TOKENIZER_FILES), "tokenizer: ")
    return {
        name: _parse_sha256(_take(values, name, str, "tokenizer: "), f"tokenizer: {name}: ") for name in TOKENIZER_FILES
    }


def _parse_sha256(text: str, where: str) -> str:
    if not _SHA256.fullmatch(text):
        raise ModelError(f"{where}expected 64 hex digits of a sha256, found {short(text)}")
    return text


def _check_keys(
    values: Mapping[str, object], known: tuple[str, ...], where: str, optional: tuple[str, ...] = ()
) -> None:
    """Refuse, by name, a key that is missing or that is not known."""
    for key in values.keys() - set(known):
        near = get_close_matches(key[:100], known, n=1)
        raise ModelError(f"{where}unknown key {short(key)}" + (f" (nearest: {near[0]!r})" if near else ""))
    for key in known:
        if key not in values and key not in optional:
            raise ModelError(f"{where}{key!r} is missing")


def _take(values: Mapping[str, object], key: str, kind: type[T], where: str) -> T:
    if key not in values:
        raise ModelError(f"{where}{key!r} is missing")
    value = values[key]
    if not isinstance(value, kind):
        raise ModelError(f"{where}{key}: expected {_KINDS[kind]}, found {short(value)}")
    return value


def check_text(text: object, where: str) -> str:
    """Return a name or a source line that can be shown on a terminal: 1 to 500 printable characters."""
    if not isinstance(text, str) or not text.isprintable() or not 1 <= len(text) <= 500:
        raise ModelError(f"{where}: expected 1 to 500 printable characters, found {short(text)}")
    return text


def short(value: object) -> str:
    """Show an untrusted value on one line; one nested deep cannot even be printed, so its kind has to do."""
    if isinstance(value, (dict, list)):
        return f"{_KINDS[type(value)]} of {len(value)}"
    text = str(value) if isinstance(value, Exception) else ascii(value)
    return text if len(text) <= 300 else text[:297] + "..."


# --- reading --------------------------------------------------------------------------------------------


def load_params(directory: Path, manifest: Manifest | None = None) -> Params:
    """Map a model's weights: read-only float32 arrays, nested as picoGPT nests them, none of them read yet.

    Headers and file lengths are checked, hashes are not (see verify_shards).
    """
    manifest = manifest or load_manifest(directory)
    tensors = {name: _map_shard(directory / shard.file, shard.shape) for name, shard in manifest.tensors.items()}
    return nest(tensors, manifest.config.n_layer)


def verify_shards(directory: Path, *, full: bool = True) -> None:
    """Check every file against the manifest and raise ModelError on the first bad one.

    full=False checks the vocabulary's hashes and the shards' headers and lengths, but not their data.
    """
    manifest = load_manifest(directory)
    load_params(directory, manifest)  # a truncated shard is better called that than a wrong hash
    expected = dict(manifest.tokenizer)
    if full:
        expected |= {shard.file: shard.sha256 for shard in manifest.tensors.values()}
    with ThreadPoolExecutor(2) as threads:  # hashing releases the GIL
        for name, found in zip(expected, threads.map(file_sha256, map(directory.joinpath, expected)), strict=True):
            if found != expected[name]:
                raise ModelError(
                    f"{directory / name}: is damaged (expected sha256 {expected[name]}, found {found}); {_REMEDY}"
                )


def _map_shard(path: Path, shape: tuple[int, ...]) -> Array:
    with open_file(path) as file:
        offset = _check_header(file, path, shape)
        expected, found = offset + 4 * math.prod(shape), os.fstat(file.fileno()).st_size
        if found != expected:
            raise ModelError(
                f"{path}: expected {expected} bytes for float32 {list(shape)}, found {found}; "
                f"the file is {'truncated' if found < expected else 'too long'}, {_REMEDY}"
            )
        return np.frombuffer(_map(file, expected), "<f4", offset=offset).reshape(shape)


def _map(file: BufferedReader, length: int) -> mmap.mmap:
    if sys.version_info >= (3, 13):  # without a file descriptor held open for each of 1558M's 581 shards
        return mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, trackfd=False)
    return mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ)


def _check_header(file: BufferedReader, path: Path, shape: tuple[int, ...]) -> int:
    """Read a `.npy` header and return where the data starts.

    NumPy's own reader evaluates the header and then takes big-endian, structured and Fortran arrays;
    here its text must be the one that is expected, and nothing is evaluated.
    """
    start = file.read(10)
    if start[:8] != b"\x93NUMPY\x01\x00" or len(start) < 10:
        raise ModelError(f"{path}: expected a version 1.0 .npy file, found it to start with {start!r}; {_REMEDY}")
    length = int.from_bytes(start[8:], "little")
    expected, found = _header_text(shape), file.read(length)
    if found.rstrip(b" \n") != expected or (10 + length) % _ALIGN:
        raise ModelError(f"{path}: expected header {short(expected)}, found {short(found)}; {_REMEDY}")
    return 10 + length


def _header_text(shape: tuple[int, ...]) -> bytes:
    return f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode("ascii")


@contextmanager
def open_file(path: Path) -> Iterator[BufferedReader]:
    """Open a file of a model; a pipe or a device under its name would block or never end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelError(f"{path}: is not a file; {_REMEDY}")
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise ModelError(f"{path}: is missing; {_REMEDY}") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error


def file_sha256(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- writing --------------------------------------------------------------------------------------------


def write_model(
    directory: Path,
    config: GPT2Config,
    tensors: Iterable[tuple[str, npt.NDArray[Any]]],
    *,
    name: str,
    source: dict[str, str],
    tokenizer_dir: Path,
    replace: bool = False,
) -> None:
    """Write a model directory, one tensor in memory at a time.

    tensors: the checkpoint's, in any order, each once, of config.tensor_shapes(); lm_head is made from wte, but
    where the config has the two apart (tie_word_embeddings false) it is a tensor like the others.
    tokenizer_dir: holds the vocabulary under OpenAI's or Hugging Face's names.
    replace: put this model in the place of another; files there that are not a model's are kept.

    An existing model is otherwise left alone: ModelError, unless it already is this one. The model is
    written beside `directory` and renamed, so that there is never half of one.
    """
    _parse_source(source)
    check_text(name, "name")
    directory = Path(os.path.realpath(directory))
    try:
        kept = _check_target(directory, config, replace)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", suffix=".tmp", dir=directory.parent) as private:
            new = Path(private, "new")
            new.mkdir()  # not `private` itself, which is 0700: the model is to have the user's own umask
            tokenizer = _copy_tokenizer(tokenizer_dir, new)
            manifest = Manifest(name, config, dict(source), _write_tensors(new, config, tensors), tokenizer)
            _write_file(new / MANIFEST, [_manifest_json(manifest)])
            for path in kept:
                _keep(path, new / path.name)
            sync_path(new)
            if replace or not _holds(directory, manifest):
                _install(new, directory, aside=Path(private, "old"))
    except OSError as error:
        raise ModelError(f"{directory}: cannot be written ({error.strerror or error})") from error


def counted(tensors: Iterable[tuple[str, Array]], total: int, on_progress: OnProgress | None) -> Iterator[Any]:
    """Yield the tensors, telling on_progress how many have been written."""
    for done, tensor in enumerate(tensors):
        if on_progress:
            on_progress(done, total)
        yield tensor
    if on_progress:
        on_progress(total, total)


def _check_target(directory: Path, config: GPT2Config, replace: bool) -> list[Path]:
    """Refuse, before any work, a place that cannot take the model; return the files to keep from it."""
    if not os.path.lexists(directory):
        return []
    if not directory.is_dir():
        raise ModelError(f"{directory}: is in the way, and is not a directory; move it")
    entries = sorted(directory.iterdir())
    if not replace and entries:
        if not os.path.lexists(directory / MANIFEST):
            raise ModelError(f"{directory}: exists, and is not a model; give a new directory")
        if load_manifest(directory).config != config:
            raise ModelError(f"{directory}: {_ANOTHER}")
    for path in entries:
        if path.is_dir() and not path.is_symlink():
            raise ModelError(f"{path}: is a directory, and a model holds none; move it first")
    return [path for path in entries if not _is_model_file(path.name)]


def _is_model_file(name: str) -> bool:
    return name == MANIFEST or name in TOKENIZER_FILES or _SHARD_NAME.fullmatch(name) is not None


def _write_tensors(
    directory: Path, config: GPT2Config, tensors: Iterable[tuple[str, npt.NDArray[Any]]]
) -> dict[str, Shard]:
    shapes, tied = shard_shapes(config), config.tie_word_embeddings
    written: dict[str, Shard] = {}
    given_head = None
    for name, array in tensors:
        if name not in shapes:
            raise ModelError(f"tensor {short(name)} is none of a GPT-2 of {config.n_layer} layers")
        if name in written and (name != "lm_head" or not tied):
            raise ModelError(f"tensor {name} came twice")
        _check_tensor(name, array, shapes[name])
        if name == "lm_head" and tied:  # random_tensors gives one; it is made from wte all the same
            given_head = _digest(_npy(name, array))
            continue
        written[name] = _write_shard(directory, name, array)
        if name == "wte" and tied:
            written["lm_head"] = _write_shard(directory, "lm_head", array.T)
    missing = [name for name in shapes if name not in written]
    if missing:
        raise ModelError(f"tensor {missing[0]} is missing ({len(missing)} of {len(shapes)} are)")
    if given_head not in (None, written["lm_head"].sha256):
        raise ModelError("tensor lm_head is not wte transposed; the config has the two tied")
    return {name: written[name] for name in shapes}


def _check_tensor(name: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ModelError(f"tensor {name}: expected shape {list(shape)} from the config, found {list(array.shape)}")
    if array.dtype.kind != "f":
        raise ModelError(f"tensor {name}: expected floating point numbers, found {array.dtype}")


def _write_shard(directory: Path, name: str, array: npt.NDArray[Any]) -> Shard:
    file = name.replace("/", ".") + ".npy"
    return Shard(file, array.shape, _write_file(directory / file, _npy(name, array)))


def _digest(blocks: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _npy(name: str, array: npt.NDArray[Any]) -> Iterator[bytes | memoryview]:
    """Yield a `.npy` file in blocks of rows, so that even wte.T is made contiguous in little memory.

    The header is written here because NumPy's padding differs between its versions, and the hashes must not.
    """
    text = _header_text(array.shape)
    length = -(-(10 + len(text) + 1) // _ALIGN) * _ALIGN - 10
    yield b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1) + b"\n"
    rows = max(1, _BLOCK // math.prod(array.shape[1:]))
    for start in range(0, len(array), rows):
        with np.errstate(over="ignore"):  # a float64 that float32 cannot hold is found just below
            block = np.ascontiguousarray(array[start : start + rows], dtype="<f4")
        if not np.isfinite(block).all():
            raise ModelError(f"tensor {name}: holds nan, infinity, or a number too large for float32")
        yield block.data


def _write_file(path: Path, blocks: Iterable[bytes | memoryview]) -> str:
    """Write and sync a new file; return its sha256."""
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for block in blocks:
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _copy_tokenizer(source: Path, directory: Path) -> dict[str, str]:
    """Copy the vocabulary under OpenAI's names; return the hashes."""
    hashes = {}
    for name, other in TOKENIZER_FILES.items():
        path = next((source / each for each in (name, other) if os.path.exists(source / each)), None)
        if path is None:
            raise ModelError(f"{source}: has neither {name} nor {other}; put the vocabulary there")
        with open_file(path) as file:
            data = file.read(_MAX_TOKENIZER + 1)
        if len(data) > _MAX_TOKENIZER:
            raise ModelError(f"{path}: is larger than {_MAX_TOKENIZER} bytes, which no vocabulary of GPT-2 is")
        hashes[name] = _write_file(directory / name, [data])
    return hashes


def _manifest_json(manifest: Manifest) -> bytes:
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


def _keep(path: Path, target: Path) -> None:
    shutil.copy2(path, target, follow_symlinks=False)
    if not target.is_symlink():
        sync_path(target)


def _holds(directory: Path, manifest: Manifest) -> bool:
    """Whether this very model, whole, is there already; another one, or a damaged one, raises ModelError."""
    if not directory.exists() or not any(directory.iterdir()):
        return False
    if model_hash(load_manifest(directory)) != model_hash(manifest):
        raise ModelError(f"{directory}: {_ANOTHER}")
    verify_shards(directory)
    return True


def _install(new: Path, directory: Path, aside: Path) -> None:
    """Rename new to directory; what stood there is moved aside, and comes back if that fails."""
    replaced = directory.exists()
    if replaced:
        directory.rename(aside)
    try:
        new.rename(directory)
    except BaseException:
        if replaced:
            aside.rename(directory)
        raise
    sync_path(directory.parent)
