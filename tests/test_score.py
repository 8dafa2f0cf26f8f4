"""score.py: what was read of a row's passages is its scores, and their totals depend on no order; as a job, too."""

import contextlib
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.engine.sequence import Completion, Prompt
from batchgen.errors import BatchgenError, UsageError
from batchgen.input.targets import with_targets
from batchgen.input.validation import make_check
from batchgen.job import FirstToken, Job, Policy, ScoreInput, ScoreOptions, WorkOptions
from batchgen.jobs.report import sample_lines
from batchgen.models.model import Model
from batchgen.output.ledger import COUNTS, Ledger
from batchgen.output.reading import read_stored
from batchgen.planning import fit_task
from batchgen.progress import Progress, Scores, read_status, status_path
from batchgen.run import run_job
from batchgen.text.special_tokens import AddedToken
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import (
    READING,
    Chunk,
    Passage,
    Receipt,
    Rejected,
    Request,
    ScoreRow,
    TokenizedRequest,
)
from batchgen.workers import score as score_module
from batchgen.workers import workers as workers_module
from batchgen.workers.complete import map_engine
from batchgen.workers.marker import Marker
from batchgen.workers.score import score_chunk
from batchgen.workers.tasks import rows_of_chunk
from batchgen.workers.worker import WorkerSetup, make_receipt, run_chunk
from tests.support.command import batchgen
from tests.support.models import write_byte_model

PARAMS = READING
LN2 = math.log(2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.load(write_byte_model(tmp_path_factory.mktemp("score") / "bytes"))


@pytest.fixture(scope="module")
def tokenizer(model: Model) -> Tokenizer:
    return model.load_tokenizer()


class FakeEngine:
    """Yields passages in any order; the log-probability of a token is -its id / 8, its rank 1 for even ids."""

    class config:  # noqa: N801  # an attribute of an engine
        n_ctx, n_vocab = 1024, 10_000

    work = None

    def __init__(self, seed: int = 0, odd: float | None = None) -> None:
        self.seed, self.odd = seed, odd

    def generate(self, prompts: list[Prompt], on_step: Any) -> Iterator[Completion]:
        for one in random.Random(self.seed).sample(prompts, len(prompts)):
            ids = one.token_ids[one.scored :]
            logprobs = tuple(self.odd if self.odd is not None and token == 7 else -token / 8 for token in ids)
            ranks = tuple(1 + token % 2 for token in ids)
            yield Completion(one.row, one.first_sample, (), "length", None, None, logprobs, ranks)


class Steps(Marker):
    """Notes how many rows are done as tokens are counted."""

    def __init__(self) -> None:
        self.rows, self.prompt_tokens, self.scored, self.seen = 0, 0, 0, []  # type: ignore[var-annotated]

    def begin(self, rows: int, work: object) -> None: ...

    def set_in_flight(self, suspects: Any, running: Any = ()) -> None: ...

    def finish(self, phase: Any = 0) -> None: ...

    def add(self, rows: int, prompt_tokens: int) -> None:
        self.rows, self.prompt_tokens = self.rows + rows, self.prompt_tokens + prompt_tokens

    def add_scored(self, tokens: int) -> None:
        self.scored += tokens
        self.seen.append((self.rows, self.scored))


def request(row: int, prompt: tuple[int, ...], *ids: tuple[int, ...], **fields: Any) -> TokenizedRequest:
    """A row whose passages are the prompt and each of these tokens."""
    passages = tuple(Passage((*prompt, *one), len(prompt)) for one in ids)
    text = bytes(prompt).decode("latin-1")
    return TokenizedRequest(row, f"p:{row}", f"id-{row}", text, prompt, PARAMS, passages=passages, **fields)


def scored(kind: str, *items: Any, engine: FakeEngine | None = None, tokenizer: Tokenizer) -> list[ScoreRow]:
    task = ScoreOptions(kind=kind)  # type: ignore[arg-type]
    return score_chunk(Chunk(0, items), task, engine or FakeEngine(), tokenizer, Steps())  # type: ignore[arg-type]


# ---- rows


@pytest.mark.parametrize("seed", range(3))
def test_the_windows_of_a_text_are_one_row_in_their_order(tokenizer: Tokenizer, seed: int) -> None:
    windows = tuple(Passage((1, *range(start, start + 8)), 5) for start in (8, 12, 16))
    item = replace(request(4, (1,)), prompt="é" * 6, passages=windows)
    (row,) = scored("text", item, engine=FakeEngine(seed), tokenizer=tokenizer)
    ids = (*range(12, 16), *range(16, 20), *range(20, 24))
    assert (row.token_ids, row.token_logprobs) == (ids, tuple(-token / 8 for token in ids))
    assert row.token_ranks == tuple(1 + token % 2 for token in ids)
    nats = sum(ids) / 8
    assert (row.tokens, row.bytes, row.nats) == (12, 12, nats)
    assert row.bits_per_byte == nats / LN2 / 12
    assert row.perplexity == math.exp(nats / 12)


def test_a_completion_is_greedy_if_each_of_its_tokens_is_the_likeliest(tokenizer: Tokenizer) -> None:
    given = {"targets": ("xy",)}
    rows = scored(
        "completion", request(0, (3,), (2, 8), **given), request(1, (3,), (2, 9), **given), tokenizer=tokenizer
    )
    assert [(row.tokens, row.logprob, row.greedy) for row in rows] == [(2, -1.25, True), (2, -1.375, False)]
    assert [(row.prompt_tokens, row.completion) for row in rows] == [(1, "xy")] * 2


def test_choices_are_compared_raw_by_token_and_by_byte(tokenizer: Tokenizer) -> None:
    choices = ("é" * 8, "b", "cc")
    item = request(0, (3, 4), (8, 8), (9,), (16, 2, 2), targets=choices, answer=2)
    (row,) = scored("choices", item, tokenizer=tokenizer)
    assert (row.choices, row.choice_tokens, row.logprobs) == (choices, (2, 1, 3), (-2.0, -1.125, -2.5))
    assert row.logprobs_by_token == (-1.0, -1.125, -2.5 / 3)
    assert row.logprobs_by_byte == (-2.0 / 16, -1.125, -1.25)
    assert (row.best, row.best_by_token, row.best_by_byte, row.answer) == (1, 2, 0, 2)
    assert row.token_ids == ((8, 8), (9,), (16, 2, 2))
    (equal,) = scored("choices", request(0, (3,), (8,), (8,), targets=("a", "b")), tokenizer=tokenizer)
    assert equal.best == equal.best_by_token == equal.best_by_byte == 0  # the first of equal ones
    (single,) = scored("choices", request(0, (3,), (8,), targets=("a",)), tokenizer=tokenizer)
    assert (single.logprobs, single.logprob) == ((-1.0,), None)


@pytest.mark.parametrize("odd", [math.nan, -math.inf, math.inf])
def test_what_is_no_number_fails_its_row_and_no_other(tokenizer: Tokenizer, odd: float, tmp_path: Path) -> None:
    items = (request(0, (1,), (5, 6)), request(1, (1,), (5, 7, 6)), request(2, (1,), (6,)))
    rows = scored("text", *items, engine=FakeEngine(odd=odd), tokenizer=tokenizer)
    assert [row.status for row in rows] == ["ok", "failed", "ok"]
    assert str(rows[1].error).startswith(f"p:1: the model gives a token the log-probability {odd}, so its weights")
    assert (rows[1].nats, rows[1].perplexity, rows[1].tokens) == (None, None, None)
    receipt = make_receipt(Chunk(0, items), rows, tmp_path)
    assert (receipt.ok, receipt.failed, receipt.completion_tokens) == (2, 1, 3)
    assert [(reason.rows, reason.place) for reason in receipt.reasons] == [(1, "p:1")]


def test_a_text_may_be_less_likely_than_a_number_can_say(tokenizer: Tokenizer) -> None:
    (row,) = scored("text", request(0, (1,), (6_000,)), tokenizer=tokenizer)
    assert (row.status, row.nats, row.perplexity) == ("ok", 750.0, math.inf)


@pytest.mark.parametrize("first_token", ["endoftext", "given"])
def test_the_bytes_are_the_texts_whatever_its_tokens_have(tokenizer: Tokenizer, first_token: FirstToken) -> None:
    """A tokenizer may put a space before a text, or take spaces into a special token."""
    mark = AddedToken(256, "<|endoftext|>", lstrip=True, rstrip=True)
    special = replace(tokenizer.special, added=(mark,), prefix_space=True, parse=True)
    odd = Tokenizer(tokenizer.encoder, tokenizer._merged, tokenizer.token_bytes, special)
    task = ScoreOptions(first_token=first_token)
    check = make_check(odd, 128, Policy(), task)
    for text, first in (("aéb", 0), (" aéb", 1), ("a <|endoftext|> b", 0)):
        item = check(Request(0, "p:0", None, text, PARAMS))
        [row] = score_chunk(Chunk(0, (item,)), task, FakeEngine(), odd, Steps())  # type: ignore[arg-type]
        assert row.bytes == len(text.encode()) - (first if first_token == "given" else 0)


def test_rejected_rows_stay_in_their_places(tokenizer: Tokenizer) -> None:
    bad = Rejected(1, "p:1", "id", "abc", "p:1: \ud800 is no text", 3)
    rows = scored("text", request(0, (1,), (2,)), bad, request(2, (1,), (2,)), tokenizer=tokenizer)
    assert [(row.row, row.status) for row in rows] == [(0, "ok"), (1, "rejected"), (2, "ok")]
    assert (rows[1].prompt, rows[1].error) == ("abc", "p:1: \\ud800 is no text")


def test_rows_that_are_not_scored_keep_what_was_to_be_scored(tokenizer: Tokenizer) -> None:
    """Whether they are rejected for their length, for their answer, or failed."""
    check = make_check(tokenizer, 128, Policy(), ScoreOptions(kind="completion"))
    long = check(with_targets(Request(0, "p:0", None, "x" * 200, PARAMS), {"completion_column": "c"}))
    failed = request(1, (1,), (2,), targets=("d",)).failed("broken")
    rows = scored("completion", long, failed, tokenizer=tokenizer)
    assert [(row.status, row.completion, row.choices) for row in rows] == [
        ("rejected", "c", None),
        ("failed", "d", None),
    ]
    unknown = with_targets(Request(0, "p:0", None, "x", PARAMS), {"choices_column": ["a", "b"], "answer_column": 2})
    [row] = scored("choices", unknown, tokenizer=tokenizer)
    assert (row.status, row.choices, row.completion, row.answer) == ("rejected", ("a", "b"), None, None)
    bad = with_targets(Request(0, "p:0", None, "x", PARAMS), {"choices_column": ["a", 2]})
    assert scored("choices", bad, tokenizer=tokenizer)[0].choices is None  # they cannot be read


def test_a_row_is_done_with_its_last_passage(tokenizer: Tokenizer) -> None:
    marker, items = (
        Steps(),
        (request(0, (1, 2), (2,), (3, 4), targets=("a", "b")), Rejected(1, "p", None, None, "p: x")),
    )
    score_chunk(Chunk(0, items), ScoreOptions(kind="choices"), FakeEngine(), tokenizer, marker)  # type: ignore[arg-type]
    assert (marker.rows, marker.prompt_tokens, marker.scored) == (2, 2, 3)
    assert [rows for rows, _ in marker.seen] == [1, 1]


# ---- totals


def test_totals_are_the_same_however_the_rows_are_cut(tokenizer: Tokenizer) -> None:
    rng = random.Random(5)
    items = [
        request(row, (1,), *(tuple(rng.choices(range(2, 200), k=3)) for _ in "ab"), targets=("a", "bb"), answer=row % 2)
        for row in range(40)
    ]
    rows = scored("choices", *items, tokenizer=tokenizer)
    totals = set()
    for size in (1, 7, 40):
        parts = [(items[at : at + size], rows[at : at + size]) for at in range(0, 40, size)]
        rng.shuffle(parts)
        receipts = [make_receipt(Chunk(0, tuple(some)), made, Path("x")) for some, made in parts]
        totals.add(tuple(sum(getattr(receipt, name) for receipt in receipts) for name in COUNTS))
    (total,) = totals
    counts = dict(zip(COUNTS, total, strict=True))
    assert (counts["answered"], counts["completion_tokens"], counts["prompt_tokens"]) == (40, 240, 40)
    assert counts["right"] == sum(row.best == row.answer for row in rows) > 0


def test_measures_are_those_of_the_kind() -> None:
    counts = dict(ok=4, completion_tokens=10, nanonats=25_000_000_000, scored_bytes=50, greedy=1)
    text = Scores.of("text", Counter(counts)).measures()
    assert text == {"nats": 25.0, "perplexity": math.exp(2.5), "bits_per_byte": 25 / LN2 / 50}
    assert Scores.of("completion", Counter(counts)).measures() == {
        "logprob": -25.0,
        "mean_logprob": -6.25,
        "greedy": 0.25,
    }
    assert Scores.of("choices", Counter(counts)).measures() == {}  # nobody says which are right
    right = Scores.of("choices", Counter(answered=8, right=2, right_by_token=4, right_by_byte=6)).measures()
    assert right == {"accuracy": 0.25, "accuracy_by_token": 0.5, "accuracy_by_byte": 0.75}
    assert Scores.of("text", Counter()).measures() == {}  # of no ok row


# ---- with an engine


def test_equal_texts_have_equal_scores_whatever_is_read_with_them(model: Model, tokenizer: Tokenizer) -> None:
    task = fit_task(ScoreOptions(stride=50), model.config)
    check = make_check(tokenizer, model.config.n_ctx, Policy(), task)  # type: ignore[arg-type]
    texts = ["abc" * 100, "a", "abcd " * 9, "abc" * 100]
    items = tuple(check(Request(row, f"p:{row}", None, text, PARAMS)) for row, text in enumerate(texts))
    alone = [
        rows_of_chunk(Chunk(0, (item,)), task, PARAMS, map_engine(model, tokenizer), tokenizer)[0] for item in items
    ]
    together = rows_of_chunk(Chunk(0, items), task, PARAMS, map_engine(model, tokenizer, max_batch=3), tokenizer)
    assert together == alone
    assert len(items[0].passages) == 5  # type: ignore[union-attr]  # 128 tokens, then 4 of up to 50
    assert [row.tokens for row in together] == [len(text) for text in texts]  # type: ignore[union-attr]
    assert replace(together[3], row=0) == together[0]  # type: ignore[type-var]


# ---- a job


class InProcess:
    """A Pool in this process."""

    longest = 0.0

    def __init__(self, setup: WorkerSetup, attempt: Path, *_: object) -> None:
        self.setup, self.attempt = setup, str(attempt)

    def receipts(self, chunks: Iterator[Chunk]) -> Iterator[Receipt]:
        for chunk in chunks:
            yield run_chunk(self.setup, chunk, self.attempt)


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "Pool", InProcess)


LINES = {
    "text": [{"text": "Once " * (1 + row % 40), "n": row} for row in range(30)] + [{"text": ""}, {"text": None}],
    "completion": [{"prompt": "ab " * row, "completion": "cd" * (1 + row % 3), "n": row} for row in range(30)]
    + [{"prompt": "a", "completion": ""}, {"prompt": "a"}],
    "choices": [
        {"prompt": "ab", "choices": [f" {row}", " b"][: 1 + row % 2], "answer": row % 2, "n": row} for row in range(30)
    ]
    + [{"prompt": "a", "choices": []}, {"prompt": "a", "choices": ["b", 3]}],
}
COLUMNS: dict[str, dict[str, str]] = {
    "text": {},
    "completion": {"completion_column": "completion"},
    "choices": {"choices_column": "choices", "answer_column": "answer"},
}


def write(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES[kind]))
    return path


def job_of(folder: Path, kind: str, model: Model, output: str = "out.parquet", **work: Any) -> Job:
    return Job(
        ScoreInput(write(folder, kind), keep=("n",), task=ScoreOptions(per_token=True), **COLUMNS[kind]),  # type: ignore[arg-type]
        f"{folder}/{output}",
        model.directory,
        work=WorkOptions(jobs=1, chunk_rows=8, **work),
    )


@pytest.mark.parametrize("kind", LINES)
def test_a_job_has_a_row_for_every_row_whatever_it_is_written_to(tmp_path: Path, model: Model, kind: str) -> None:
    summary = run_job(job_of(tmp_path, kind, model))
    assert (summary.input_rows, summary.rejected, summary.failed, summary.exit_code) == (32, 2, 0, 3)
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["row"], row["sample"]) for row in rows] == [(row, 0) for row in range(32)]
    assert [row["n"] for row in rows] == [line.get("n") for line in LINES[kind]]
    assert {row["status"] for row in rows[30:]} == {"rejected"}
    assert read_stored(tmp_path / "out.parquet").statuses == Counter(ok=30, rejected=2)
    run_job(job_of(tmp_path, kind, model, "out.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines == json.loads(json.dumps(rows))
    run_job(job_of(tmp_path, kind, model, "folder/"))
    parts = [row for part in sorted((tmp_path / "folder").glob("*.parquet")) for row in pq.read_table(part).to_pylist()]
    assert sorted(parts, key=lambda row: row["row"]) == rows
    assert run_job(job_of(tmp_path, kind, model, "folder/")).complete


def test_the_totals_are_those_of_the_rows(tmp_path: Path, model: Model) -> None:
    for kind in LINES:
        folder = tmp_path / kind
        folder.mkdir()
        scores = run_job(job_of(folder, kind, model)).scores
        assert scores is not None
        rows = [row for row in pq.read_table(folder / "out.parquet").to_pylist() if row["status"] == "ok"]
        assert scores.rows == len(rows) == 30
        measures = scores.measures()
        assert read_status(status_path(folder / "out.parquet"))["scores"] == measures
        if kind == "text":
            nats, tokens = math.fsum(row["nats"] for row in rows), sum(row["tokens"] for row in rows)
            expected = {"nats": nats, "perplexity": math.exp(nats / tokens), "bits_per_byte": nats / LN2 / tokens}
        elif kind == "completion":
            total = math.fsum(row["logprob"] for row in rows)
            greedy = sum(row["greedy"] for row in rows) / 30
            expected = {"logprob": total, "mean_logprob": total / 30, "greedy": greedy}
        else:
            right = [
                sum(row[best] == row["answer"] for row in rows) for best in ("best", "best_by_token", "best_by_byte")
            ]
            names = ("accuracy", "accuracy_by_token", "accuracy_by_byte")
            answered = sum(row["answer"] is not None for row in rows)
            expected = {name: n / answered for name, n in zip(names, right, strict=True)}
        assert measures == pytest.approx(expected, abs=1e-6, rel=1e-9)


class Interrupted(BaseException):
    """Like KeyboardInterrupt, which would end pytest itself."""


def test_an_interrupted_job_resumes_to_the_same_bytes_and_totals(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_job(job_of(tmp_path, "text", model, "whole.parquet"))
    commit, left, job = Ledger.commit, iter(range(2)), job_of(tmp_path, "text", model)

    def interrupted(self: Ledger, receipt: Receipt) -> None:
        if next(left, None) is None:
            raise Interrupted
        commit(self, receipt)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "commit", interrupted)
        with pytest.raises(Interrupted):
            run_job(job)
    with pytest.raises(UsageError, match="it had --stride 128, and this has --stride 64; run it as before"):
        run_job(replace(job, input=replace(job.input, task=ScoreOptions(per_token=True, stride=64))))
    again = run_job(job)
    assert again.resumed == 16
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert again.scores == whole.scores


def test_failed_rows_are_scored_again(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    run_job(job_of(tmp_path, "choices", model, "whole.parquet"))
    job, make = job_of(tmp_path, "choices", model), score_module.scored_row

    def broken(request: TokenizedRequest, *rest: Any) -> ScoreRow:
        row = make(request, *rest)
        return score_module.unscored_row(request.failed("broken"), "choices") if request.row in (3, 17) else row

    with monkeypatch.context() as patch:
        patch.setattr(score_module, "scored_row", broken)
        assert run_job(job).failed == 2
    summary = run_job(replace(job, output=replace(job.output, retry_failed=True)))
    assert (summary.failed, summary.ok, summary.resumed, summary.scores) == (0, 30, 30, None)
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_progress_counts_what_is_read(tmp_path: Path, model: Model) -> None:
    seen: list[Progress] = []
    summary = run_job(job_of(tmp_path, "completion", model), on_progress=seen.append)
    tokens = sum(len(f"{line['prompt']}{line['completion']}") for line in LINES["completion"][1:30]) + 1 + 2
    assert summary.tokens == tokens
    assert seen[-1].tokens == tokens
    assert summary.completion_tokens == sum(len(line["completion"]) for line in LINES["completion"][:30]) + 29


def test_a_job_of_keywords_reads_the_columns_of_scores(tmp_path: Path, model: Model) -> None:
    options = {"model": model.directory, "jobs": 1, "status": False}
    path = write(tmp_path, "choices")
    run_job(path, tmp_path / "o.parquet", task=ScoreOptions(), choices_column="choices", keep=("answer",), **options)
    assert pq.read_table(tmp_path / "o.parquet").column_names[-2:] == ["error", "answer"]  # kept: nobody else has it
    with pytest.raises(UsageError, match="'max_tokens' is not an option of ScoreInput"):
        run_job(path, tmp_path / "p.parquet", task=ScoreOptions(), max_tokens=5)
    with pytest.raises(UsageError, match="'choices_column' is not an option of InputOptions"):
        run_job(path, tmp_path / "p.parquet", choices_column="choices")


def with_task(kind: str, task: Any) -> dict[str, Any]:
    return {"input": ScoreInput(f"{kind}.jsonl", task=task, **COLUMNS[kind])}  # type: ignore[arg-type]


REFUSED: list[tuple[str, Callable[[], dict[str, Any]], str]] = [
    (
        "text",
        lambda: with_task("text", ScoreOptions(stride=129)),
        "--stride 129 is out of range (1 to 128, the model's n_ctx)",
    ),
    (
        "choices",
        lambda: with_task("choices", ScoreOptions(stride=8)),
        "--stride 8 is about a text that is scored alone; leave it",
    ),
    (
        "choices",
        lambda: with_task("choices", ScoreOptions("given")),
        "--first-token given is about a text that is scored alone",
    ),
    ("text", lambda: {"policy": Policy("shorten")}, "--on-too-long shorten is about completions that are generated"),
    ("text", lambda: {"policy": Policy(trim=True)}, "--trim is about completions that are generated"),
    ("text", lambda: with_task("text", 5), "task 5 is none; write ScoreOptions(...) or EmbedOptions(...)"),
    (
        "text",
        lambda: {"input": ScoreInput("x", prompt_column="p")},
        "--prompt-column names what is before a completion",
    ),
    ("text", lambda: {"input": ScoreInput("x", completion_column="")}, "--completion-column is empty; name a column"),
    ("text", lambda: {"input": ScoreInput("text.jsonl", keep=("text",))}, "--keep 'text': the output has a column of"),
]


@pytest.mark.parametrize(("kind", "changes", "reason"), REFUSED)
def test_options_that_mean_nothing_are_refused(
    tmp_path: Path, model: Model, kind: str, changes: Callable[[], dict[str, Any]], reason: str
) -> None:
    job = job_of(tmp_path, kind, model)
    with contextlib.chdir(tmp_path), pytest.raises(BatchgenError) as error:
        run_job(replace(job, **changes()))
    assert reason in str(error.value)
    assert not (tmp_path / "out.parquet").exists()


# ---- the command


def test_the_command_says_what_was_scored(tmp_path: Path, model: Model) -> None:
    lines = {
        "text": ["perplexity ", " bits per byte (", "] perplexity "],
        "completion": ["log-probability -", " a row; ", " of 30 greedy", "] ab "],
        "choices": ["accuracy ", "by token ", "by byte ", "30 rows with an answer", "] ab -> "],
    }
    for kind, expected in lines.items():
        words = [word for name, column in COLUMNS[kind].items() for word in (f"--{name.replace('_', '-')}", column)]
        path = write(tmp_path, kind)
        done = batchgen("score", path, "-o", tmp_path / f"{kind}.parquet", "-m", model.directory, "-j", 1, *words)
        assert done.returncode == 3
        text = done.stdout.decode()
        assert [part for part in expected if part not in text] == []
        assert " tokens read, " in text
        again = batchgen("score", path, "-o", tmp_path / f"{kind}.parquet", "-m", model.directory, *words)
        assert b"complete: there was nothing to do" in again.stdout


def test_of_many_choices_the_best_and_some_others_are_shown(tmp_path: Path) -> None:
    many = {"choices": [f" c{i}" for i in range(1000)], "logprobs": [-1.5 + (i == 500) for i in range(1000)]}
    row = {"row": 0, "id": None, "status": "ok", "error": None, "prompt": "x", "best": 500, **many}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "o.parquet")
    [line] = sample_lines(tmp_path / "o.parquet", 1, "choices")
    assert line.startswith("[row 0] x -> c500 (-0.50); c0 (-1.50); c1 (-1.50); ")
    assert line.endswith("; c6 (-1.50); ... and 992 more")
