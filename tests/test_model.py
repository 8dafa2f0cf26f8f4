"""model.py: what is mapped and read is what was opened and verified, whatever takes its place meanwhile."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from batchgen.errors import ModelError
from batchgen.generator import Generator
from batchgen.input.prompts import Prompts
from batchgen.models.model import Model
from batchgen.models.shards import Description, write_model
from batchgen.output.schema import Columns
from batchgen.run import run_job
from batchgen.text.special_tokens import SPECIAL_TOKENS, SpecialTokens
from batchgen.types import SamplingParams
from batchgen.workers.worker import WorkerSetup, load_engine
from tests.support.models import BYTES, sharp_tensors, write_byte_model, write_byte_vocabulary

Swap = Callable[[Path, Path], object]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_byte_model(tmp_path / "bytes")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A model of the same name, config and file sizes with other weights."""
    (tmp_path / "other").mkdir()
    return write_byte_model(tmp_path / "other" / "bytes", seed=1)


def move(model: Path, other: Path) -> None:
    """As convert --replace, fetch --again and mv do."""
    model.rename(model.with_name("aside"))
    other.rename(model)


def move_shards(model: Path, other: Path) -> None:
    for path in other.glob("*.npy"):
        path.replace(model / path.name)


def copy_over(model: Path, other: Path) -> None:
    """As cp does: into the files that are there."""
    for path in other.iterdir():
        shutil.copyfile(path, model / path.name)


SWAPS = [move, move_shards, copy_over]


def setup_of(model: Model) -> WorkerSetup:
    return WorkerSetup(
        model=str(model.directory),
        model_hash=model.hash,
        model_files=model.files_hash,
        precision="float32",
        kv_bytes=2**24,
        max_batch=4,
        share_prefixes=True,
        columns=Columns(),
        params=SamplingParams(),
        parent=os.getpid(),
    )


# ---- replaced after it was opened


@pytest.mark.parametrize("swap", SWAPS)
def test_another_model_in_its_place_is_neither_verified_nor_mapped(model, other, swap: Swap):
    opened = Model.load(model)
    swap(model, other)
    for use in (opened.verify, opened.load_params):
        with pytest.raises(ModelError, match=r"bytes/.*\.npy: was replaced or changed while the model is in use"):
            use()


def test_a_tokenizer_that_takes_its_place_is_not_read(model):
    """It decides texts as weights do, and its files may be younger than what was verified."""
    opened = Model.load(model)
    (model / SPECIAL_TOKENS).write_text(SpecialTokens(begin=(65,)).to_json())  # not one of the model's files
    assert opened.load_tokenizer().special.begin == ()
    path = model / "encoder.json"
    path.write_text(path.read_text().replace('"A": 65', '"A": 66').replace('"B": 66', '"B": 65'))
    with pytest.raises(ModelError, match=r"encoder\.json: is not the model's \(expected sha256 .*, found"):
        opened.load_tokenizer()


@pytest.mark.parametrize("swap", SWAPS)
def test_a_worker_that_starts_late_maps_no_other_model(model, other, swap: Swap):
    setup = setup_of(Model.load(model))
    swap(model, other)
    with pytest.raises(ModelError, match=r"bytes: has model|wte\.npy: is damaged"):
        load_engine(setup)


def test_a_worker_maps_the_same_model_that_was_put_there_anew(model):
    """The files are others; so it reads all of them before it maps them."""
    setup = setup_of(Model.load(model))
    shutil.copytree(model, model.with_name("copy"))
    move(model, model.with_name("copy"))
    assert load_engine(setup)[2].files_hash != setup.model_files


def test_weights_that_change_under_a_worker_are_noticed_and_moved_ones_stay_as_they_are(model, other):
    mapped = load_engine(setup_of(Model.load(model)))[2]
    aside = model.rename(model.with_name("aside"))
    mapped.check_unchanged()
    aside.rename(model)
    mapped.check_unchanged()
    copy_over(model, other)
    with pytest.raises(ModelError, match="bytes/.*: was replaced or changed while the model is in use"):
        mapped.check_unchanged()


def test_a_generator_ends_a_call_whose_weights_have_changed(model, other):
    generator = Generator(model)
    assert generator.generate(["abc"], max_tokens=2)
    copy_over(model, other)
    with pytest.raises(ModelError, match="was replaced or changed while the model is in use"):
        generator.generate(["abc"], max_tokens=2)


def test_a_model_replaced_while_the_input_is_scanned_ends_the_run(model, other, tmp_path, monkeypatch):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "abc"}\n')
    scan = Prompts.scan
    monkeypatch.setattr(Prompts, "scan", lambda self: (move(model, other), scan(self))[1])
    with pytest.raises(ModelError, match="was replaced or changed while the model is in use; run the same command"):
        run_job(prompts, tmp_path / "out.parquet", model=str(model))
    assert not (tmp_path / "out.parquet").exists()
    monkeypatch.setattr(Prompts, "scan", scan)
    assert run_job(prompts, tmp_path / "out.parquet", model=str(model), jobs=1).ok == 1  # the other one, as asked


# ---- ids beyond the weights


def with_vocabulary(model: Path, name: str, text: str) -> Model:
    """The model with another vocabulary file, under a manifest that has its hash."""
    vocabulary = write_byte_vocabulary(model.with_name("vocabulary"))
    (vocabulary / name).write_text(text)
    tensors = sharp_tensors(BYTES)
    shutil.rmtree(model)
    write_model(model, Description("bytes", BYTES, {}), tensors.items(), tokenizer_dir=vocabulary)
    return Model.load(model)


def test_a_vocabulary_larger_than_the_embedding_is_refused_when_it_is_read(model):
    encoder = json.loads((model / "encoder.json").read_text())
    opened = with_vocabulary(model, "encoder.json", json.dumps(encoder | {"ab": 257}))
    with pytest.raises(ModelError, match="bytes: the vocabulary has ids up to 257, the model 257 rows of wte"):
        opened.load_tokenizer()


@pytest.mark.parametrize("field", ["begin", "end", "start", "unknown"])
def test_a_special_token_without_weights_is_refused_when_it_is_read(model, field):
    special = replace(SpecialTokens(), **{field: (257,) if field in ("begin", "end") else 257})
    opened = with_vocabulary(model, SPECIAL_TOKENS, special.to_json())
    with pytest.raises(ModelError, match="bytes: token id 257 .* is not in the vocabulary"):
        opened.load_tokenizer()
