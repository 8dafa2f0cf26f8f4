"""data/models/tales, the embedded model: complete, small, and trained."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from batchgen.job import DEFAULT_MODEL
from batchgen.models.model import Model
from batchgen.models.registry import find_model
from batchgen.models.shards import load_manifest, load_params, verify_shards
from batchgen.text.tokenizer import Tokenizer
from benchmarks.quality import batchgen_log_probs, compare
from tests.support.logits import gpt2

TALES = Path(__file__).parents[1] / "data" / "models" / "tales"

# written for this test, so no training text holds it
STORY = (
    "Once upon a time there was a poor woodcutter who lived with his daughter at the edge of a great forest. "
    '"Father," said the girl one evening, "I will go out into the world and seek my fortune." So she took a loaf '
    "of bread and went away, and when she had walked for three days she came to a castle."
)


def test_the_default_model_is_the_embedded_one():
    assert find_model(DEFAULT_MODEL).samefile(TALES)


def test_the_embedded_model_is_undamaged_and_small():
    verify_shards(TALES)
    assert sum(path.stat().st_size for path in TALES.iterdir()) < 32_000_000


def test_the_vocabulary_fits_the_model():
    tokenizer = Tokenizer.load(TALES)
    assert tokenizer.n_vocab == load_manifest(TALES).config.n_vocab
    assert tokenizer.special.start == tokenizer.n_vocab - 1
    assert tokenizer.decode(tokenizer.encode(STORY)) == STORY


def test_the_embedded_model_predicts_an_unseen_tale():
    """An unseen tale costs far less than the ln(4096) = 8.3 nats per token of a uniform guess."""
    tokenizer, config = Tokenizer.load(TALES), load_manifest(TALES).config
    ids = [tokenizer.special.start, *tokenizer.encode(STORY)]
    logits = gpt2(ids[:-1], **load_params(TALES), n_head=config.n_head).astype(np.float64)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    loss = -logits[np.arange(len(ids) - 1), ids[1:]].mean()
    assert loss < 3.5


def test_int8_changes_what_the_embedded_model_expects_by_little(tmp_path):
    """KL divergence of the next token from float32; docs/precision.md has it for more text."""
    model = Model.load(shutil.copytree(TALES, tmp_path / "tales"), precision="int8")
    tokenizer, config = model.load_tokenizer(), model.config
    window = np.array([[tokenizer.special.start, *tokenizer.encode(STORY)]])
    exact = list(batchgen_log_probs(model.with_precision("float32").load_weights(), config, window))
    assert compare(exact, exact, window).divergence == 0
    int8 = compare(exact, batchgen_log_probs(model.load_weights(), config, window), window)
    assert 0 < int8.divergence < 0.001


def test_the_readme_states_the_measured_loss():
    with open(TALES / "loss.csv", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    stated = re.search(r"held-out text \| ([0-9.]+) nats", (TALES / "README.md").read_text(encoding="utf-8"))
    assert float(stated[1]) == pytest.approx(float(last["val_loss"]), abs=0.001)
