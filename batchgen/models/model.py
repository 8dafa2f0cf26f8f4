"""A model that was found: its manifest is read, its weights are not."""

from dataclasses import dataclass
from pathlib import Path

from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.params import Params
from batchgen.models.registry import find_model
from batchgen.models.shards import Manifest, load_manifest, load_params, model_hash, verify_shards
from batchgen.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Model:
    """A model directory and its manifest."""

    directory: Path
    manifest: Manifest

    @classmethod
    def open(cls, name_or_dir: str) -> "Model":
        """Find a model by name or directory; ModelError if it does not exist or its manifest is damaged."""
        return cls.load(find_model(name_or_dir))

    @classmethod
    def load(cls, directory: Path) -> "Model":
        """The model in a directory; ModelError if its manifest is missing or damaged."""
        return cls(directory, load_manifest(directory))

    def verify(self) -> None:
        """Read every shard and compare its SHA-256 with the manifest; ModelError names one that differs."""
        verify_shards(self.directory)

    def load_params(self) -> Params:
        """The weights, memory-mapped."""
        return load_params(self.directory, self.manifest)

    def load_tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.directory)

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
    def bytes(self) -> int:
        """The size of the weights on disk, and in memory once they are read."""
        return sum(path.stat().st_size for path in self.directory.glob("*.npy"))
