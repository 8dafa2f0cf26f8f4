"""workers/embed.py and `batchgen embed`: a vector for each text, the same whatever is read with it."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen import Generator
from batchgen.errors import UsageError
from batchgen.job import EmbedOptions, ScoreInput
from batchgen.output import parts
from batchgen.output.file import write_json_lines
from batchgen.output.reading import read_plan
from batchgen.output.schema import Columns
from batchgen.run import run_job
from batchgen.types import EmbeddingRow, SamplingParams, TokenizedRequest
from batchgen.workers.embed import embedded_row
from tests.support.jobs import change_job, make_job
from tests.support.models import BYTES, sharp_tensors, write_byte_model
from tests.support.reference import hidden_states

TEXTS = ["a", "abc", "abcdefghij" * 9, "abd", "abc", "Once upon a time é", "x" * 128, "abcdefghij" * 9 + "k"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("embed") / "bytes")


@pytest.fixture(scope="module")
def generator(model: Path) -> Generator:
    return Generator(model)


# ---- Generator.embed


@pytest.mark.parametrize("layer", range(BYTES.n_layer + 1))
def test_a_vector_is_the_mean_of_the_layers_states_or_the_last_one(generator: Generator, layer: int) -> None:
    texts = TEXTS[:4]
    states = [hidden_states(list(text.encode()), sharp_tensors(BYTES), BYTES.n_head)[layer] for text in texts]
    for pool, expected in (
        ("mean", [state.mean(axis=0) for state in states]),
        ("last", [state[-1] for state in states]),
    ):
        vectors = generator.embed(texts, layer=layer, pool=pool)  # type: ignore[arg-type]
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("options", [{}, {"layer": 1, "pool": "last"}], ids=str)
def test_a_vector_does_not_depend_on_the_other_texts(model: Path, precision: Any, options: dict[str, Any]) -> None:
    generator = Generator(model, precision=precision)
    together = generator.embed(TEXTS, **options)
    alone = [generator.embed([text], **options)[0] for text in TEXTS]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(Generator(model, precision=precision, batch_size=2).embed(TEXTS, **options), alone)


def test_layers_count_from_the_end_too(generator: Generator) -> None:
    np.testing.assert_array_equal(generator.embed(["abc"]), generator.embed(["abc"], layer=BYTES.n_layer))
    np.testing.assert_array_equal(generator.embed(["abc"], layer=-3), generator.embed(["abc"], layer=0))


@pytest.mark.parametrize("layer", [-4, 3])
def test_a_layer_that_the_model_lacks_is_refused(python_names: None, generator: Generator, layer: int) -> None:
    with pytest.raises(UsageError, match=rf"layer={layer} is out of range \(-3 to 2"):
        generator.embed(["a"], layer=layer)


def test_a_text_that_is_too_long_is_read_from_the_right_if_asked(python_names: None, generator: Generator) -> None:
    with pytest.raises(UsageError, match=r"texts\[0\]: .*128"):
        generator.embed(["ab" * 100])
    truncated = generator.embed(["ab" * 100], on_too_long="truncate-left")
    np.testing.assert_array_equal(truncated, generator.embed(["ab" * 64]))


def test_an_empty_text_is_refused_or_the_start_token(python_names: None, generator: Generator) -> None:
    with pytest.raises(UsageError, match=r"texts\[1\]: .*empty_prompt='unconditional'"):
        generator.embed(["a", ""])
    start = generator.embed(["<|endoftext|>"], special_tokens="parse")
    np.testing.assert_array_equal(generator.embed([""], empty_prompt="unconditional"), start)


def test_no_texts_are_no_vectors(generator: Generator) -> None:
    assert generator.embed([]).shape == (0, BYTES.n_embd)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("abc", {}, r"texts is one string \('abc'\); give a list of them: \[text\]"),
        ({"text": ["a"]}, {}, r"texts is a dict; give one column of it: texts\['text'\]"),
        (7, {}, "texts is 7; give a list of strings"),
        (["a", None], {}, r"texts\[1\]: None \(NoneType\) is not a string"),
        (["a"], {"pool": "max"}, "pool 'max' is none of mean, last"),
        (["a"], {"layer": 1.5}, r"layer 1.5 is out of range \(-\(n_layer \+ 1\) to n_layer\)"),
        (["a"], {"max_tokens": 3}, "'max_tokens' is not an option of EmbedOptions or Policy"),
    ],
)
def test_what_cannot_be_embedded_is_named(
    python_names: None, generator: Generator, texts: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        generator.embed(texts, **options)


def test_texts_that_are_done_are_counted(generator: Generator) -> None:
    counts: list[tuple[int, int]] = []
    generator.embed(TEXTS, progress=lambda done, n: counts.append((done, n)))
    assert counts == [(done, len(TEXTS)) for done in range(1, len(TEXTS) + 1)]


# ---- a job


@pytest.fixture(scope="module")
def job(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("job")
    lines = [json.dumps({"id": f"n{row}", "text": text, "tag": row}) for row, text in enumerate(TEXTS)]
    lines[3:3] = ['{"text": ""}', '{"text": null}', "nonsense", json.dumps({"text": "y" * 129})]
    (folder / "t.jsonl").write_text("\n".join(lines))
    given = ScoreInput(folder / "t.jsonl", keep=("tag",), task=EmbedOptions())
    return make_job(given, folder / "o.parquet", str(model), jobs=2, chunk_rows=3)


@pytest.fixture(scope="module")
def table(job: Any) -> pa.Table:
    summary = run_job(job)
    assert (summary.ok, summary.rejected) == (len(TEXTS), 4)
    return pq.read_table(job.output.path)


def test_a_job_writes_a_vector_for_each_row_and_null_for_a_rejected_one(table: pa.Table, generator: Generator) -> None:
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), BYTES.n_embd)
    rows = table.to_pylist()
    assert [row["row"] for row in rows] == list(range(len(TEXTS) + 4))
    rejected = [row for row in rows if row["status"] == "rejected"]
    assert [row["row"] for row in rejected] == [3, 4, 5, 6]
    assert all(row["embedding"] is None and row["error"].startswith("t.jsonl:") for row in rejected)
    vectors = [row["embedding"] for row in rows if row["status"] == "ok"]
    np.testing.assert_array_equal(np.array(vectors, np.float32), generator.embed(TEXTS))
    assert [row["prompt_tokens"] for row in rows if row["status"] == "ok"] == [len(text.encode()) for text in TEXTS]


def test_json_lines_hold_the_same_numbers(table: pa.Table) -> None:
    file = io.BytesIO()
    write_json_lines(table.to_batches(), file)
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    assert pa.array([line["embedding"] for line in lines], table.schema.field("embedding").type).equals(
        table["embedding"].combine_chunks()
    )


def test_negative_layers_are_the_same_job(job: Any, table: pa.Table) -> None:
    """Its plan has the layer's index, and it is found complete: no worker starts."""
    assert read_plan(job.output.path).options() == EmbedOptions(layer=BYTES.n_layer)
    again = change_job(job, overwrite=False)
    before = job.output.path.stat().st_mtime_ns
    for layer in (-1, BYTES.n_layer):
        assert run_job(replace(again, input=replace(job.input, task=EmbedOptions(layer=layer)))).ok == len(TEXTS)
    assert job.output.path.stat().st_mtime_ns == before


# ---- rows and parts


def test_a_vector_that_is_no_number_fails_its_row() -> None:
    request = TokenizedRequest(5, "t.jsonl:6", "id", "ab", (97, 98), SamplingParams())
    row = embedded_row(request, np.array([1.0, np.inf], np.float32))
    assert (row.row, row.id, row.status, row.embedding) == (5, "id", "failed", None)
    assert row.error is not None
    assert row.error.startswith("t.jsonl:6: the model gives a state that is no number")


def make_rows(n: int) -> list[EmbeddingRow]:
    """The rows of a part; every third was rejected."""
    vectors = np.random.default_rng(0).standard_normal((n, BYTES.n_embd)).astype(np.float32)
    bad = {"prompt": None, "status": "rejected", "error": "t.jsonl:1: bad"}
    return [
        EmbeddingRow(row=row, id=None, **bad if row % 3 == 1 else {"prompt": "x", "status": "ok", "embedding": vector})
        for row, vector in enumerate(vectors)
    ]


def test_a_part_gives_back_every_bit_in_row_groups_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "GROUP_BYTES", 4 * BYTES.n_embd * 10)
    rows, path = make_rows(60), tmp_path / "part.parquet"
    parts.write_part(rows, path, Columns(kind="embed", n_embd=BYTES.n_embd).schema())
    file = pq.ParquetFile(path)
    assert file.num_row_groups == 4  # 40 vectors
    assert (
        file.metadata.row_group(0).column(file.schema_arrow.names.index("embedding")).encodings[-1]
        == "BYTE_STREAM_SPLIT"
    )
    for row, found in zip(rows, file.read()["embedding"], strict=True):
        assert (row.embedding is None) == (not found.is_valid)
        assert row.embedding is None or row.embedding.tobytes() == found.values.to_numpy().tobytes()
