"""A model that was found: its manifest is read, its weights are not.

The directory may be replaced at any time (`convert --replace`, `mv`). So a Model knows which files it has: what it
verifies, maps and reads later are these files, or it raises a ModelError.
"""

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from batchgen.errors import ModelError
from batchgen.files import stamp_of
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.params import Params
from batchgen.models.registry import find_model
from batchgen.models.shards import (
    REPLACED,
    Manifest,
    Stamps,
    load_manifest,
    load_params,
    model_hash,
    open_file,
    verify_shards,
)
from batchgen.models.tokenizer_files import check_ids
from batchgen.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Model:
    """A model directory, its manifest, and its files."""

    directory: Path
    manifest: Manifest
    files: Stamps

    @classmethod
    def open(cls, name_or_dir: str) -> "Model":
        """Find a model by name or directory; ModelError if it does not exist or its manifest is damaged."""
        return cls.load(find_model(name_or_dir))

    @classmethod
    def load(cls, directory: Path, wanted: str | None = None) -> "Model":
        """The model in a directory; ModelError if its manifest or a file is missing, or its hash is not `wanted`."""
        manifest = load_manifest(directory)
        if wanted not in (None, found := model_hash(manifest)):
            remedy = "put that model there, and run the same command to resume"
            raise ModelError(f"{directory}: has model {found}, and the run needs {wanted}; {remedy}")
        names = (*manifest.tokenizer, *(shard.file for shard in manifest.tensors.values()))
        files = {}
        for name in names:
            with open_file(directory / name) as file:
                files[name] = stamp_of(file.fileno())
        return cls(directory, manifest, files)

    def verify(self) -> None:
        """Read every shard and compare its SHA-256 with the manifest; ModelError names one that differs."""
        verify_shards(self.directory, self.manifest, self.files)

    def check_unchanged(self) -> None:
        """ModelError if a file was written to since then, which changes what is mapped; moving a file does not."""
        for name, before in self.files.items():
            with suppress(OSError):
                now = stamp_of(self.directory / name)
                if now != before and now[:2] == before[:2]:
                    raise ModelError(f"{self.directory / name}: {REPLACED}")

    def load_params(self) -> Params:
        """The weights, memory-mapped."""
        return load_params(self.directory, self.manifest, self.files)

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer; ModelError if its files are not those of the manifest, or if an id is beyond the weights."""
        tokenizer = Tokenizer.load(self.directory, self.manifest.tokenizer)
        check_ids(tokenizer, self.config.n_vocab, self.directory)
        return tokenizer

    @property
    def config(self) -> GPT2Config:
        return self.manifest.config

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def hash(self) -> str:
        return model_hash(self.manifest)

    @property
    def files_hash(self) -> str:
        """16 hex digits: equal if model and files are the same on this machine."""
        return hashlib.sha256(repr((self.hash, sorted(self.files.items()))).encode()).hexdigest()[:16]

    @property
    def bytes(self) -> int:
        """The size of the weights on disk, and in memory once they are read."""
        return sum(self.files[shard.file][2] for shard in self.manifest.tensors.values())
