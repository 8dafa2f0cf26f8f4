"""Where models are: a name is looked up in the user's folders, then among the models that come with batchgen."""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import batchgen
from batchgen.errors import ModelError
from batchgen.files import cache_dir
from batchgen.gpt2.config import GPT2Config
from batchgen.models.openai import SIZES
from batchgen.models.shards import INT8, MANIFEST, load_manifest, map_shards, model_hash
from batchgen.models.string_map import read_string_map

VERIFIED = "verified.json"  # in models_dir(): {model_hash: day of its last verification}
MODELS_VARIABLE = "BATCHGEN_MODELS"

_BARE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")  # without a separator or a leading dot it stays in its folder


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One line of `batchgen models`; a broken model has only a name, a path and an error."""

    name: str
    path: Path
    config: GPT2Config | None = None
    hash: str | None = None
    parameters: int | None = None  # as published: wte counts once, its transposed copy does not
    bytes: int | None = None  # on disk, with that copy, the vocabulary, and weights in int8
    source: dict[str, str] | None = None
    verified: str | None = None  # the day of the last verification: 2026-11-21
    error: str | None = None


def _embedded() -> Path:
    return (Path(batchgen.__file__).parent / "data").resolve() / "models"


def user_roots() -> list[Path]:
    """The user's folders of models, first to last: $BATCHGEN_MODELS, the cache."""
    named, cache = os.environ.get(MODELS_VARIABLE), cache_dir()
    roots = [Path(os.path.expanduser(named)).absolute()] if named else []
    return [*roots, cache / "models"] if cache else roots


def models_dir() -> Path:
    """The first of them; it may not exist yet."""
    if not (roots := user_roots()):
        raise ModelError(f"there is no home directory to keep models in; set {MODELS_VARIABLE} to a folder")
    return roots[0]


def model_roots() -> list[Path]:
    """The folders in which a bare name is looked up, first to last."""
    return [*user_roots(), _embedded()]


def check_bare_name(name: str) -> str:
    """Return a name that stays inside its folder; anything else raises ModelError."""
    if not _BARE_NAME.fullmatch(name) or len(name) > 100:
        raise ModelError(
            f"model name {ascii(name[:100])}: use up to 100 letters, digits, '.', '_' and '-', the first one not '.'; "
            "write a directory with a separator, as ./mine"
        )
    return name


def _has_separator(name: str) -> bool:
    return os.sep in name or bool(os.altsep and os.altsep in name)


def model_destination(name_or_dir: str) -> Path:
    """The directory of a model that is to be made: a path as given, a bare name inside models_dir()."""
    if _has_separator(name_or_dir):
        return Path(os.path.expanduser(name_or_dir))
    return models_dir() / check_bare_name(name_or_dir)


def _is_model(path: Path) -> bool:
    return os.path.isfile(path / MANIFEST)


def _locate(name: str) -> Path | None:
    return next((root / name for root in model_roots() if _is_model(root / name)), None)


def _subdirectories(root: Path) -> Iterator[Path]:
    try:
        entries = sorted(root.iterdir())
    except OSError:  # a folder that does not exist or cannot be read holds no models
        return
    yield from (path for path in entries if _BARE_NAME.fullmatch(path.name) and os.path.isdir(path))


def _describe(name: str, days: dict[str, str]) -> ModelInfo:
    path = _locate(name) or next(root / name for root in model_roots() if os.path.isdir(root / name))
    try:
        manifest = load_manifest(path)
        for _ in map_shards(path, manifest, {}):  # a shard that is missing or too short
            pass
        files = [*manifest.tokenizer, *(shard.file for shard in manifest.tensors.values())]
        size = sum(entry.stat().st_size for entry in [*(path / file for file in files), *path.glob(f"{INT8}/*")])
    except (ModelError, OSError) as error:
        return ModelInfo(name, path, error=str(error))
    parameters = sum(math.prod(shape) for shape in manifest.config.tensor_shapes().values())
    if not manifest.config.tie_word_embeddings:
        parameters += manifest.config.n_vocab * manifest.config.n_embd
    digest = model_hash(manifest)
    return ModelInfo(name, path, manifest.config, digest, parameters, size, manifest.source, days.get(digest))


def list_models() -> list[ModelInfo]:
    """Describe every model that a bare name can reach, in the order of names; a broken one has its error."""
    try:
        days = read_string_map(models_dir() / VERIFIED)
    except ModelError:  # without a home or with a damaged file, no verification is known
        days = {}
    names = {path.name for root in model_roots() for path in _subdirectories(root)}
    return [_describe(name, days) for name in sorted(names)]


def _unknown_model(name: str) -> ModelError:
    """The error for a name that is not found, with the known names and what to do."""
    known = sorted(info.name for info in list_models() if info.error is None)
    listed = f"(known: {', '.join(known) or 'none'})"
    if name in SIZES:
        return ModelError(
            f"model {name} is not here; fetch it with: batchgen fetch {name}, or convert a downloaded checkpoint with: "
            f"batchgen convert SRC {name} {listed}"
        )
    names = {other.lower(): other for other in (*SIZES, *known)}
    near = get_close_matches(name.lower(), names, n=1)
    suggestion = f"; did you mean {names[near[0]]!r}?" if near else ""
    return ModelError(f"unknown model {name!r}{suggestion} {listed}")


def find_model(name_or_dir: str) -> Path:
    """Return a model's directory: `tales` -> `.../data/models/tales`, `./mine` -> `./mine`.

    A text with a separator is a path, and so is the name of a model directory in the current directory.
    """
    path = Path(os.path.expanduser(name_or_dir))
    if name_or_dir and _is_model(path):
        return path
    if _has_separator(name_or_dir) or name_or_dir in (".", ".."):
        raise ModelError(f"{path}: is not a model (it has no {MANIFEST}); give a name or a converted directory")
    found = _locate(check_bare_name(name_or_dir))
    if found is None:
        raise _unknown_model(name_or_dir)
    return found
