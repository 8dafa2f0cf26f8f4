"""A model that was found: its manifest is read, its weights are not.

The directory may be replaced at any time (`convert --replace`, `mv`). So a Model knows which files it has: what it
verifies, maps and reads later are these files, or it raises a ModelError.
"""

import hashlib
import os
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from batchgen.errors import ModelError
from batchgen.files import stamp_of
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.params import Params, nest
from batchgen.gpt2.weights import Weights
from batchgen.models.int8 import Int8Files, map_int8, open_int8, verify_int8
from batchgen.models.once import packed_directory
from batchgen.models.registry import find_model
from batchgen.models.shards import (
    REPLACED,
    Manifest,
    Stamps,
    is_matrix,
    load_manifest,
    load_tensors,
    map_weights,
    model_hash,
    other_remedy,
    set_precision,
    stamps_of,
    verify_shards,
)
from batchgen.models.tokenizer_files import check_ids
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import Precision


def _remedy_for(packed: Path, directory: Path) -> AbstractContextManager[None]:
    """Errors about a copy that batchgen made of an older model say to remove the copy."""
    if packed == directory or packed == Path(os.path.realpath(directory)):
        return nullcontext()
    return other_remedy(f"remove {packed}: it is made again")


@dataclass(frozen=True, slots=True)
class Model:
    """A model directory, its manifest, and its files."""

    directory: Path
    manifest: Manifest
    files: Stamps
    packed: Path  # the directory of the files: another one if an older model could not be packed in its own
    int8: Int8Files | None = None  # the products' weights, in precision int8

    @classmethod
    def open(cls, name_or_dir: str, precision: Precision | None = None) -> "Model":
        """Find a model by name or directory; ModelError if it does not exist or its manifest is damaged."""
        return cls.load(find_model(name_or_dir), precision=precision)

    @classmethod
    def load(cls, directory: Path, wanted: str | None = None, precision: Precision | None = None) -> "Model":
        """The model in a directory; ModelError if its manifest or a file is missing, or its hash is not `wanted`.

        precision: None means the model's default. What it needs is made if it does not exist.
        """
        manifest = load_manifest(directory)
        if wanted not in (None, found := model_hash(manifest)):
            remedy = "put that model there, and run the same command to resume"
            raise ModelError(f"{directory}: has model {found}, and the run needs {wanted}; {remedy}")
        packed = packed_directory(directory, manifest)
        if not manifest.is_packed:
            manifest = load_manifest(packed)
        names = (*manifest.tokenizer, *(shard.file for shard in manifest.tensors.values()))
        with _remedy_for(packed, directory):
            files = stamps_of(packed, names)
        return cls(directory, manifest, files, packed).with_precision(precision)

    def with_precision(self, precision: Precision | None) -> "Model":
        """The same model in a precision, None for its default; weights in int8 are made if they do not exist."""
        precision = precision or self.manifest.precision
        if precision == self.precision:
            return self
        int8 = open_int8(self.packed, self.manifest, self.files) if precision == "int8" else None
        return replace(self, int8=int8)

    def verify(self) -> None:
        """Read every file that is used and compare its SHA-256 with the manifest; ModelError names one that differs."""
        with _remedy_for(self.packed, self.directory):
            verify_shards(self.packed, self.manifest, self.files, matrices=self.int8 is None)
        if self.int8 is not None:
            verify_int8(self.int8)

    def check_unchanged(self) -> None:
        """ModelError if a file was written to since then, which changes what is mapped; moving a file does not."""
        used = {self.packed / name: stamp for name, stamp in self.files.items()}
        if self.int8:
            used |= {self.int8.folder / name: stamp for name, stamp in self.int8.files.items()}
        for path, before in used.items():
            with suppress(OSError):
                now = stamp_of(path)
                if now != before and now[:2] == before[:2]:
                    raise ModelError(f"{path}: {REPLACED}")

    def load_weights(self) -> Weights:
        """The weights as the kernels read them, memory-mapped."""
        with _remedy_for(self.packed, self.directory):
            if self.int8 is None:
                return map_weights(self.packed, self.manifest, self.files)
            return map_int8(self.packed, self.manifest, self.int8, self.files)

    def load_params(self) -> Params:
        """The weights in float32 as plain arrays, for picoGPT's functions; matrices are copies in memory."""
        return nest(load_tensors(self.packed, self.manifest, self.files), self.config.n_layer)

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer; ModelError if its files are not those of the manifest, or if an id is beyond the weights."""
        tokenizer = Tokenizer.load(self.packed, self.manifest.tokenizer)
        check_ids(tokenizer, self.config.n_vocab, self.packed)
        return tokenizer

    @property
    def config(self) -> GPT2Config:
        return self.manifest.config

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def precision(self) -> Precision:
        return "float32" if self.int8 is None else "int8"

    @property
    def hash(self) -> str:
        return model_hash(self.manifest)

    @property
    def files_hash(self) -> str:
        """16 hex digits: equal if model and files are the same on this machine."""
        files = [sorted(one.files.items()) for one in (self, self.int8) if one]
        return hashlib.sha256(repr((self.hash, files)).encode()).hexdigest()[:16]

    @property
    def bytes(self) -> int:
        """The size of the weights that are mapped, on disk, and in memory once they are read."""
        tensors, int8 = self.manifest.tensors.items(), self.int8.files.values() if self.int8 else ()
        plain = [self.files[shard.file] for name, shard in tensors if not int8 or not is_matrix(name)]
        return sum(stamp[2] for stamp in (*plain, *int8))


def make_default(directory: Path, precision: Precision) -> None:
    """Make a precision the default of a model, and what it needs."""
    model = Model.load(directory, precision=precision)
    set_precision(model.packed, precision)
