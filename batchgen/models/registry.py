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
from batchgen.gpt2.config import GPT2Config
from batchgen.models.openai import SIZES
from batchgen.models.records import Records
from batchgen.models.shards import MANIFEST, load_manifest, load_params, model_hash

DEFAULT_MODEL = "tales"
OPENAI_MODELS = SIZES
VERIFIED = "verified.json"  # in models_dir(): model_hash of what was verified, and when
MODELS_VARIABLE = "BATCHGEN_MODELS"

_BARE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")  # no separator and no dot in front: it stays in its folder


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One line of `batchgen models`; of a broken model only the name, the path and the error are known."""

    name: str
    path: Path
    config: GPT2Config | None = None
    hash: str | None = None
    parameters: int | None = None  # as published: wte counts once, its transposed copy does not
    bytes: int | None = None  # on disk, that copy and the vocabulary included
    source: dict[str, str] | None = None
    verified: str | None = None  # the day when it was, as 2026-11-21
    error: str | None = None


def find_model(name_or_dir: str) -> Path:
    """Return a model's directory: `tales` -> `.../data/models/tales`, `./mine` -> `./mine`.

    What holds a separator is a path, and so is the name of a model directory that is here; any other name
    is looked up in model_roots(). Raises ModelError with the known names and what to do.
    """
    path = Path(os.path.expanduser(name_or_dir))
    if name_or_dir and _is_model(path):
        return path
    if _has_separator(name_or_dir) or name_or_dir in (".", ".."):
        raise ModelError(f"{path}: is not a model (it has no {MANIFEST}); give a name or a converted directory")
    found = _locate(check_bare_name(name_or_dir))
    if found is None:
        raise ModelError(_unknown(name_or_dir))
    return found


def list_models() -> list[ModelInfo]:
    """Describe every model that a bare name can reach, by name; broken ones with what is wrong with them."""
    names = {path.name for root in model_roots() for path in _subdirectories(root)}
    verified = _verified()
    return [_describe(name, verified) for name in sorted(names)]


def model_destination(name_or_dir: str) -> Path:
    """Return where a model that is to be made goes: a path is itself, a bare name is in models_dir()."""
    if _has_separator(name_or_dir):
        return Path(os.path.expanduser(name_or_dir))
    check_bare_name(name_or_dir)
    return models_dir() / name_or_dir


def models_dir() -> Path:
    """Return the user's folder of models, which need not exist yet: $BATCHGEN_MODELS or the cache."""
    folders = [_from_environment(), _cache()]
    for folder in folders:
        if folder is not None:
            return folder
    raise ModelError(f"there is no home directory to keep models in; set {MODELS_VARIABLE} to a folder")


def model_roots() -> list[Path]:
    """Return the folders a bare name is looked up in, first to last; $BATCHGEN_MODELS goes before the cache."""
    return [root for root in (_from_environment(), _cache(), _embedded()) if root is not None]


def check_bare_name(name: str) -> str:
    """Return a name that stays inside its folder; anything else raises ModelError."""
    if not _BARE_NAME.fullmatch(name) or len(name) > 100:
        raise ModelError(
            f"model name {ascii(name[:100])} may hold letters, digits, '.', '_' and '-', 100 at most and no '.' in "
            "front; a directory is given with a separator, as ./mine"
        )
    return name


def _from_environment() -> Path | None:
    value = os.environ.get(MODELS_VARIABLE)
    return Path(os.path.expanduser(value)).absolute() if value else None


def _cache() -> Path | None:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # which the XDG specification says to ignore
        base = os.path.expanduser("~/.cache")
    return Path(base, "batchgen", "models") if os.path.isabs(base) else None


def _embedded() -> Path:
    return Path(batchgen.__file__).parent / "data" / "models"


def _has_separator(name: str) -> bool:
    return os.sep in name or bool(os.altsep and os.altsep in name)


def _is_model(path: Path) -> bool:
    return os.path.isfile(path / MANIFEST)


def _locate(name: str) -> Path | None:
    return next((root / name for root in model_roots() if _is_model(root / name)), None)


def _subdirectories(root: Path) -> Iterator[Path]:
    try:
        entries = sorted(root.iterdir())
    except OSError:  # a folder that is not there, or not the user's to read, holds no models
        return
    yield from (path for path in entries if _BARE_NAME.fullmatch(path.name) and os.path.isdir(path))


def _verified() -> dict[str, str]:
    try:
        return Records(models_dir() / VERIFIED).read()
    except ModelError:  # there is no home, or the file is damaged: then nothing is known to be verified
        return {}


def _describe(name: str, verified: dict[str, str]) -> ModelInfo:
    path = _locate(name) or next(root / name for root in model_roots() if os.path.isdir(root / name))
    try:
        manifest = load_manifest(path)
        load_params(path, manifest)
        files = [*manifest.tokenizer, *(shard.file for shard in manifest.tensors.values())]
        size = sum((path / file).stat().st_size for file in files)
    except (ModelError, OSError) as error:
        return ModelInfo(name, path, error=str(error))
    parameters = sum(math.prod(shape) for shape in manifest.config.tensor_shapes().values())
    if not manifest.config.tie_word_embeddings:
        parameters += manifest.config.n_vocab * manifest.config.n_embd
    known = model_hash(manifest)
    day = verified.get(known)
    return ModelInfo(name, path, manifest.config, known, parameters, size, manifest.source, verified=day)


def _unknown(name: str) -> str:
    known = sorted(info.name for info in list_models() if info.error is None)
    here = f"known: {', '.join(known)}" if known else "no models are here"
    if name in OPENAI_MODELS:
        return (
            f"model {name} is not here; fetch it with: batchgen fetch {name}, or convert a downloaded checkpoint with: "
            f"batchgen convert SRC {name} ({here})"
        )
    near = get_close_matches(name.lower(), [other.lower() for other in (*known, *OPENAI_MODELS)], n=1)
    meant = next((f"; did you mean {other!r}?" for other in (*known, *OPENAI_MODELS) if [other.lower()] == near), "")
    return f"no model is called {name!r}{meant} ({here})"
