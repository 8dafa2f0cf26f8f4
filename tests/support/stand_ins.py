"""Stand-ins for an input that was opened and scanned."""

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from batchgen.input.sources import Source
from batchgen.job import InputOptions


@dataclass(frozen=True)
class Facts:
    rows: int = 0
    asks: frozenset[str] = frozenset()
    kept: pa.Schema = field(default_factory=lambda: pa.schema([]))


@dataclass(frozen=True)
class Prompts:
    options: InputOptions = InputOptions(())
    sources: tuple[Source, ...] = ()
    openai: bool = False
    local_paths: list[Path] = field(default_factory=list)
