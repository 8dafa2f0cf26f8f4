"""OpenAI's requests in, OpenAI's answers out, by the types of OpenAI's own package."""

import json
import tempfile
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming
from openai.types.shared import ErrorObject
from pydantic import TypeAdapter

from batchgen import run
from batchgen.errors import InputError, UsageError
from batchgen.input.openai import MAX_CHOICES, read_batch_line
from batchgen.job import Job
from batchgen.output.openai import make_answer
from batchgen.run import run_job
from batchgen.text.special_tokens import SpecialTokens
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import Rejected, Request, SamplingParams
from tests.support.inputs import open_prompts
from tests.support.jobs import change, make_job
from tests.support.models import write_byte_model, write_byte_vocabulary
from tests.support.plans import plan_of

BASE = SamplingParams(max_tokens=5)
CASES = Path(__file__).parent / "cases"


def line(custom_id: Any = "a", body: Any = None, **changes: Any) -> dict[str, Any]:
    whole = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body or {"prompt": "ab"}}
    return whole | changes


def write(folder: Path, *lines: dict[str, Any] | bytes) -> Path:
    path = folder / "batch.jsonl"
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def outcomes(folder: Path, *lines: dict[str, Any] | bytes) -> list[Request | Rejected]:
    return list(open_prompts(write(folder, *lines)).requests(BASE))


def only_error(folder: Path, one: dict[str, Any] | bytes) -> str:
    _, item = outcomes(folder, line("first"), one)
    assert isinstance(item, Rejected), item
    assert item.error.startswith("batch.jsonl:2: ")
    assert "\n" not in item.error
    item.error.encode()
    return item.error.removeprefix("batch.jsonl:2: ")


# ---- requests


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", ("ab",)),
        ("", ("",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_a_prompt_is_a_string_strings_token_ids_or_lists_of_them(tmp_path, prompt, prompts):
    (item,) = outcomes(tmp_path, line(body={"prompt": prompt}))
    assert isinstance(item, Request)
    assert (item.row, item.place, item.id) == (0, "batch.jsonl:1", "a")
    assert (item.prompt, *item.others) == prompts
    assert item.params == BASE


def test_a_body_that_openai_accepts_is_accepted(tmp_path):
    body: CompletionCreateParamsNonStreaming = {
        "model": "gpt-3.5-turbo-instruct",
        "prompt": "ab",
        "best_of": 1,
        "echo": True,
        "frequency_penalty": 0.5,
        "logit_bias": {"50": -100},
        "logprobs": None,
        "max_tokens": 16,
        "n": 2,
        "presence_penalty": -0.5,
        "seed": 11,
        "stop": ["\n", "x"],
        "stream": False,
        "stream_options": None,
        "suffix": None,
        "temperature": 0.7,
        "top_p": 0.9,
        "user": "me",
    }
    TypeAdapter(CompletionCreateParamsNonStreaming).validate_python(body)
    (item,) = outcomes(tmp_path, line(body=body))
    assert item.params == SamplingParams(
        max_tokens=16,
        temperature=0.7,
        top_p=0.9,
        presence_penalty=-0.5,
        frequency_penalty=0.5,
        logit_bias=((50, -100),),
        n=2,
        seed=11,
        stop=("\n", "x"),
        echo=True,
    )


def test_values_that_ask_for_nothing():
    *taken, seed = open_prompts(CASES / "neutral_values.openai.jsonl").requests(BASE)
    for item in taken:
        assert isinstance(item, Request), item
        assert item.params == replace(BASE, n=2, temperature=1) if item.id == "best_of_n" else BASE
    assert len(taken) == 7
    assert isinstance(seed, Rejected)
    assert seed.error.endswith("openai.jsonl:8: seed -1 is out of range (0 to 9223372036854775807)")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (line(5), "custom_id must be a string"),
        (line(""), "custom_id must be a string"),
        (line(None), "custom_id must be a string"),
        (line("\ud800"), "custom_id has a lone surrogate (\\ud800)"),
        (line(method="GET"), "method 'GET' is not supported; write POST"),
        (line(url="/v1/chat/completions"), "url '/v1/chat/completions' is not supported; write /v1/completions"),
        (line(url=None), "url None is not supported"),
        (line(extra=1), "the key 'extra' is none of custom_id, method, url, body"),
        (line(body=[1]), "body is not an object"),
        ({"custom_id": "b", "url": "/v1/completions"}, "no body"),
        (line(body={"model": "x"}), "prompt must be a string"),
        (line(body={"prompt": None}), "prompt must be"),
        (line(body={"prompt": []}), "prompt must be"),
        (line(body={"prompt": [[]]}), "prompt must be"),
        (line(body={"prompt": ["a", 1]}), "prompt must be"),
        (line(body={"prompt": [1, [1]]}), "prompt must be"),
        (line(body={"prompt": [True]}), "prompt must be"),
        (line(body={"prompt": [1.5]}), "prompt must be"),
        (line(body={"prompt": "\udc00"}), "prompt has a lone surrogate (\\udc00)"),
        (line(body={"prompt": "a", "best_of": 3}), "best_of 3 is not supported; leave it out"),
        (line(body={"prompt": "a", "stream": True}), "stream True is not supported"),
        (line(body={"prompt": "a", "suffix": "b"}), "suffix 'b' is not supported"),
        (line(body={"prompt": "a", "suffix": "\ud83d"}), "suffix '\\ud83d' is not supported"),
        (line(body={"prompt": "a", "stream": "\ud83d"}), "stream '\\ud83d' is not supported"),
        (line(body={"prompt": "a", "messages": []}), "'messages' is not supported; leave it out"),
        (line(body={"prompt": "a", "max_token": 5}), "'max_token' is not supported; did you mean 'max_tokens'?"),
        (line(body={"prompt": "a", "max_tokens": 0}), "max_tokens 0 is out of range (1 or more)"),
        (line(body={"prompt": "a", "temperature": "hot"}), "temperature 'hot' is out of range"),
        (line(body={"prompt": "a", "stop": ["a"] * 65}), "stop has 65 strings"),
        (line(body={"prompt": "a", "logit_bias": {"x": 1}}), "logit_bias is out of range"),
        (
            line(body={"prompt": "a", "echo": True, "logprobs": 1, "prompt_logprobs": 2}),
            "prompt_logprobs 2 and logprobs 1 differ, and with echo the answer has one list for both; leave prompt",
        ),
        (line(body={"prompt": ["a"] * 3, "n": 700}), f"3 prompts x n 700 exceed {MAX_CHOICES} choices"),
        (line("first"), "custom_id 'first' is that of batch.jsonl:1 too; rename one"),
        ({"prompt": "a row of the other kind"}, "the key 'prompt' is none of"),
        (b"{", "not JSON"),
        (b"[]", "the line is an array, not an object"),
        (b'{"custom_id": "a", "custom_id": "b"}', "the key 'custom_id' appears twice"),
    ],
)
def test_a_bad_line_is_rejected_by_name(tmp_path, bad, words):
    assert only_error(tmp_path, bad).startswith(words)


def test_an_escape_in_a_stop_string_is_noted(tmp_path):
    stops = [r"\n", "\n", [".", r"\t"], [r"\n"]]
    prompts = open_prompts(write(tmp_path, *(line(str(i), {"prompt": "a", "stop": s}) for i, s in enumerate(stops))))
    assert all(isinstance(item, Request) for item in prompts.requests(BASE))
    assert prompts.row_parameters.escaped == {r"\n": 2, r"\t": 1}


def test_a_custom_id_of_a_bad_line_cannot_be_used_again(tmp_path):
    items = outcomes(tmp_path, line("x", body={"prompt": 5}), line("x"), line("y"))
    assert [isinstance(item, Rejected) for item in items] == [True, True, False]


def test_a_rejected_line_keeps_its_custom_id_if_that_is_text(tmp_path):
    items = outcomes(tmp_path, line("x", body={"prompt": 5}), line(7), line("\ud800"), b"?")
    assert [item.id for item in items] == ["x", None, None, None]


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from(["custom_id", "method", "url", "body", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=4),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["prompt", "n", "stop", "logit_bias", "best_of"]), inner, max_size=3)
            ),
        ),
    )
)
def test_any_json_object_is_a_request_or_a_usage_error(fields):
    fields = {"url": "/v1/completions"} | fields
    try:
        prompts, params = read_batch_line(fields, BASE)
    except UsageError as error:
        text = str(error)
    else:
        text = ""
        assert prompts
        assert isinstance(params, SamplingParams)
    assert "\n" not in text


# ---- which files are OpenAI's


def test_a_batch_file_is_known_by_its_first_object(tmp_path):
    path = write(tmp_path, b"not JSON", b"", line())
    prompts = open_prompts(path)
    assert prompts.openai
    assert (prompts.scan().rows, prompts.scan().asks) == (2, set())
    path = write(tmp_path, {"prompt": "a", "custom_id": "b"}, line())
    assert not open_prompts(path).openai
    for body in ({"logprobs": 1}, {"echo": True, "logprobs": 0}, {"return_full_text": False, "prompt_logprobs": 1}):
        asks = {"echo" if name == "return_full_text" else name for name in body}
        assert open_prompts(write(tmp_path, line(body={"prompt": "a"} | body))).scan().asks == asks


# ---- answers


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("openai") / "bytes")


LINES = [
    line("plain", body={"prompt": "abc", "model": "any"}),
    line("several", body={"prompt": ["ab", "cd", "efg"], "n": 2, "temperature": 0.9, "logprobs": 2}),
    line("ids", body={"prompt": [[97, 98], [99]], "stop": "a", "max_tokens": 30, "logprobs": 0}),
    line("wrong", body={"prompt": "a", "best_of": 9}),
    line("long", body={"prompt": "x" * 200}),
    line("vocabulary", body={"prompt": [[999]]}),
    line("echo", body={"prompt": "é", "echo": True}),
    line("plain", body={"prompt": "again"}),
    b"not JSON",
    line("scored", body={"prompt": ["ab", "é"], "echo": True, "logprobs": 2, "max_tokens": 0, "n": 2}),
    line("ids and echo", body={"prompt": [97, 195], "echo": True, "logprobs": 0}),
    line("loop", body={"prompt": "z", "logit_bias": {"120": 100}, "stop_loops": True, "max_tokens": 60}),
]


@pytest.fixture
def job(model, tmp_path) -> Job:
    return make_job(write(tmp_path, *LINES), tmp_path / "out.jsonl", str(model), BASE, jobs=1, chunk_rows=4)


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def check_types(body: Any) -> Completion:
    """By the types of OpenAI's package, whose client takes null where they do not say so: of a first token."""
    known = json.loads(json.dumps(body))
    for choice in known["choices"]:
        for name in ("token_logprobs", "top_logprobs"):
            if choice["logprobs"] and None in (choice["logprobs"][name] or ()):
                assert choice["logprobs"][name].pop(0) is None
    assert not Completion.model_validate(known, strict=True).model_extra
    return Completion.construct(**body)


def test_every_line_is_answered_in_openais_shape(job):
    summary = run_job(job)
    found = answers(job.output.path)
    assert [answer["custom_id"] for answer in found] == [
        *("plain", "several", "ids", "wrong", "long", "vocabulary", "echo", "plain", None),
        *("scored", "ids and echo", "loop"),
    ]
    assert (summary.input_rows, summary.rejected) == (len(LINES), 5)
    assert len({answer["id"] for answer in found}) == len(found)
    for answer in found:
        assert list(answer) == ["id", "custom_id", "response", "error"]
        assert answer["error"] is None
        response = answer["response"]
        assert list(response) == ["status_code", "request_id", "body"]
        if response["status_code"] == 200:
            completion = check_types(response["body"])
            assert completion.model == "bytes"
            assert [choice.index for choice in completion.choices] == list(range(len(completion.choices)))
            assert completion.usage
            assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
        else:
            assert response["status_code"] == 400
            error = ErrorObject.model_validate(response["body"]["error"], strict=True)
            assert error.message.startswith("batch.jsonl:")


def test_choices_are_prompts_times_samples_and_usage_counts_a_prompt_once(job):
    run_job(job)
    plain, several, ids, *_, loop = answers(job.output.path)
    body = several["response"]["body"]
    assert len(body["choices"]) == 6
    assert body["usage"]["prompt_tokens"] == 2 + 2 + 3
    assert ids["response"]["body"]["usage"]["prompt_tokens"] == 3
    assert plain["response"]["body"]["usage"]["completion_tokens"] == 5
    assert loop["response"]["body"]["choices"][0]["finish_reason"] == "stop"
    (echo,) = [answer for answer in answers(job.output.path) if answer["custom_id"] == "echo"]
    assert echo["response"]["body"]["choices"][0]["text"].startswith("é")


def test_logprobs_are_of_every_token(job):
    run_job(job)
    _, several, ids, *_ = answers(job.output.path)
    for choice in several["response"]["body"]["choices"]:
        logprobs = choice["logprobs"]
        lengths = {name: len(values) for name, values in logprobs.items()}
        assert set(lengths) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
        assert len(set(lengths.values())) == 1
        for token, logprob, top in zip(
            logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        ):
            assert 2 <= len(top) <= 3
            assert top[token] == logprob
    for choice in ids["response"]["body"]["choices"]:
        assert choice["logprobs"]["top_logprobs"] is None
        assert choice["finish_reason"] in ("stop", "length")
        assert "a" not in choice["text"]


def test_echo_with_logprobs_is_answered_for_every_token_of_prompt_and_completion(job):
    run_job(job)
    found = {answer["custom_id"]: answer["response"]["body"] for answer in answers(job.output.path)}
    scored, ids = found["scored"], found["ids and echo"]
    assert scored["usage"] == {"prompt_tokens": 4, "completion_tokens": 0, "total_tokens": 4}
    assert [(choice["text"], choice["finish_reason"]) for choice in scored["choices"]] == [
        *[("ab", "length"), ("ab", "length"), ("é", "length"), ("é", "length")]
    ]
    for choice in scored["choices"]:
        logprobs = choice["logprobs"]
        assert logprobs["text_offset"] == [0, int(choice["text"] == "ab")]
        assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
        assert logprobs["top_logprobs"][1][logprobs["tokens"][1]] == logprobs["token_logprobs"][1] < 0
    (choice,) = ids["choices"]
    assert choice["text"].startswith("a\ufffd")
    assert len(choice["logprobs"]["token_logprobs"]) == len(choice["logprobs"]["text_offset"]) == 7
    assert choice["logprobs"]["text_offset"][:3] == [0, 1, 2]
    assert choice["logprobs"]["top_logprobs"] is None


def test_the_parquet_output_has_a_row_for_every_choice(job):
    job = change(job, out=job.output.path.with_suffix(".parquet"))
    run_job(job)
    rows = pq.read_table(job.output.path).to_pylist()
    several = [row for row in rows if row["id"] == "several"]
    assert [(row["sample"], row["prompt_index"], row["prompt"]) for row in several] == [
        *[(0, 0, "ab"), (1, 0, "ab"), (2, 1, "cd"), (3, 1, "cd"), (4, 2, "efg"), (5, 2, "efg")]
    ]
    assert [row["prompt"] for row in rows if row["id"] == "ids"] == ["ab", "c"]
    assert {row["finish_reason"] for row in rows if row["id"] == "loop"} == {"repetition"}
    stopped = [row for row in rows if row["id"] == "ids" and row["finish_reason"] == "stop"]
    assert all(row["stop_reason"] == "a" for row in stopped)


def test_an_interrupted_run_ends_in_the_bytes_of_an_undisturbed_one(job, monkeypatch, tmp_path):
    run_job(job)
    other = change(job, out=tmp_path / "other.jsonl")
    with monkeypatch.context() as patch:
        commit, done = run.Ledger.commit, []

        def once(ledger, receipt):
            if done:
                raise KeyboardInterrupt
            done.append(commit(ledger, receipt))

        patch.setattr(run.Ledger, "commit", once)
        with pytest.raises(KeyboardInterrupt):
            run_job(other)
    summary = run_job(other)
    assert summary.resumed
    assert other.output.path.read_bytes() == job.output.path.read_bytes()
    run_job(change(job, out=tmp_path / "cut.jsonl", chunk_rows=3))
    found, expected = answers(tmp_path / "cut.jsonl"), answers(job.output.path)
    assert [answer["id"] for answer in found] == [answer["id"] for answer in expected]


def test_a_failed_row_has_an_error_and_no_response(tmp_path):
    tokenizer = Tokenizer.load(write_byte_vocabulary(tmp_path / "v"))
    row = {"id": "a", "status": "failed", "error": "b.jsonl:1: killed a worker", "row": 0, "sample": 0}
    assert make_answer([row], "0" * 32, plan_of(), tokenizer) == {
        "id": "batch_req_" + "0" * 32,
        "custom_id": "a",
        "response": None,
        "error": {"code": "failed", "message": "b.jsonl:1: killed a worker"},
    }


def test_text_offsets_are_of_characters_and_parts_of_them_are_named_by_bytes(tmp_path):
    tokenizer = Tokenizer.load(write_byte_vocabulary(tmp_path / "v"))
    ids = list("aé☃b".encode())
    row = {"id": "a", "status": "ok", "row": 0, "sample": 0, "prompt_index": 0, "prompt_tokens": 1}
    row |= {"completion": "aé☃", "completion_tokens": len(ids), "completion_token_ids": ids, "finish_reason": "stop"}
    row |= {"logprobs": [-1.0] * len(ids), "top_logprobs": None}
    answer = make_answer([row], "0" * 32, plan_of(), tokenizer)
    logprobs = answer["response"]["body"]["choices"][0]["logprobs"]
    assert logprobs["tokens"][:3] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs["text_offset"] == [0, 1, 1, 2, 2, 2, 3]


def test_a_token_that_the_text_skips_moves_no_offset(tmp_path):
    tokenizer = Tokenizer.load(write_byte_vocabulary(tmp_path / "v"))
    row = {"id": "a", "status": "ok", "row": 0, "sample": 0, "prompt_index": 0, "prompt_tokens": 1}
    row |= {"completion": "ab", "completion_tokens": 3, "completion_token_ids": [97, 256, 98], "finish_reason": "stop"}
    row |= {"logprobs": [-1.0] * 3, "top_logprobs": None, "parameters": '{"skip_special_tokens": true}'}
    answer = make_answer([row], "0" * 32, plan_of(), tokenizer)
    assert answer["response"]["body"]["choices"][0]["logprobs"]["text_offset"] == [0, 1, 1]


# ---- echo with log-probabilities

TOKENIZER = Tokenizer.load(write_byte_vocabulary(Path(tempfile.mkdtemp()) / "v"))
OWN = {"echo": True, "logprobs": 2, "prompt_logprobs": 2}


def tops(*pairs: tuple[int, float]) -> list[dict[str, Any]]:
    return [{"token_id": token, "token": TOKENIZER.token_text(token), "logprob": logprob} for token, logprob in pairs]


def echoed(prompt: str, new_text: str = "", ids: list[int] | None = None, **changes: Any) -> dict[str, Any]:
    """An output row; of a prompt given as text, ids are those of the last tokens, all unless given."""
    prompt_ids, new = list(prompt.encode()) if ids is None else ids, list(new_text.encode())
    row = {"row": 0, "sample": 0, "id": "a", "status": "ok", "prompt": prompt, "prompt_index": 0, "error": None}
    row |= {"completion": prompt + new_text, "completion_tokens": len(new), "completion_token_ids": new}
    row |= {"finish_reason": "length", "prompt_tokens": len(prompt_ids), "prompt_token_ids": prompt_ids}
    row |= {"logprobs": [-0.5] * len(new), "top_logprobs": [tops((120, -0.25), (121, -4.0))] * len(new)}
    row |= {"prompt_logprobs": [None, *[-1.5] * (len(prompt_ids) - 1)]}
    row |= {"prompt_top_logprobs": [None, *[tops((97, -0.75), (122, -2.0))] * (len(prompt_ids) - 1)]}
    return row | {"parameters": json.dumps(OWN)} | changes


def body_of(*rows: dict[str, Any], params: SamplingParams = BASE, tokenizer: Tokenizer = TOKENIZER) -> Any:
    return make_answer(rows, "0" * 32, plan_of(parameters=params), tokenizer)["response"]["body"]  # type: ignore[index]


def test_echo_with_logprobs_answers_for_the_prompt_and_the_completion():
    body = body_of(echoed("aé", "b"))
    (choice,) = check_types(body).choices
    assert (choice.text, choice.finish_reason) == ("aéb", "length")
    assert choice.logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "b"]
    assert choice.logprobs.token_logprobs == [None, -1.5, -1.5, -0.5]
    assert choice.logprobs.text_offset == [0, 1, 1, 2]
    assert choice.logprobs.top_logprobs == [
        None,
        {"a": -0.75, "z": -2.0, "bytes:\\xc3": -1.5},
        {"a": -0.75, "z": -2.0, "bytes:\\xa9": -1.5},
        {"x": -0.25, "y": -4.0, "b": -0.5},
    ]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    assert "prompt_logprobs" not in body["choices"][0]


def test_a_choice_of_beam_search_has_its_score():
    first, second = body_of(echoed("a", "b", beam_score=-0.5), echoed("a", "c", sample=1))["choices"]
    assert first["beam_score"] == -0.5
    assert "beam_score" not in second


def test_max_tokens_0_answers_for_the_prompt_alone():
    body = body_of(echoed("ab", sample=0, prompt_index=0), echoed("c", sample=1, prompt_index=1))
    first, second = check_types(body).choices
    assert (first.text, first.finish_reason, second.text) == ("ab", "length", "c")
    assert (first.logprobs.token_logprobs, second.logprobs.token_logprobs) == ([None, -1.5], [None])
    assert (second.logprobs.top_logprobs, second.logprobs.text_offset) == ([None], [0])
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}


def test_logprobs_0_has_no_top_logprobs_and_without_logprobs_there_is_only_the_text():
    none = {"top_logprobs": None, "prompt_top_logprobs": None}
    logprobs = body_of(echoed("ab", "c", **none))["choices"][0]["logprobs"]
    assert (logprobs["token_logprobs"], logprobs["top_logprobs"]) == ([None, -1.5, -0.5], None)
    row = echoed("ab", logprobs=None, prompt_logprobs=None, parameters=None)
    assert body_of(row, params=replace(BASE, echo=True))["choices"][0] == {
        **{"text": "ab", "index": 0, "logprobs": None, "finish_reason": "length"}
    }


@given(st.text(max_size=6), st.integers(0, 30))
def test_the_tokens_of_a_truncated_prompt_are_the_end_of_its_text(text, cut):
    ids = list(text.encode())[cut:]
    begins = [number for number, character in enumerate(text) for _ in character.encode()][cut:]
    if not ids:
        return
    assert body_of(echoed(text, "b", ids))["choices"][0]["logprobs"]["text_offset"] == [*begins, len(text)]


@given(st.text(min_size=1, max_size=6).map(str.encode) | st.binary(min_size=1, max_size=6), st.integers(0, 3))
@example(b" \xd5i", 0)
def test_offsets_of_a_prompt_of_token_ids_are_those_of_its_text(data, cut):
    ids = list(data)[cut:] or [97]  # it may begin with a part of a character, and have some within
    text = TOKENIZER.decode(ids)
    row = echoed(text, "b", ids, parameters=json.dumps(OWN | {"prompt_token_ids": ids}))
    *offsets, last = body_of(row)["choices"][0]["logprobs"]["text_offset"]
    assert last == len(text)
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert all(
        TOKENIZER.decode([token]) == text[place] for token, place in zip(ids, offsets, strict=True) if token < 128
    )


@pytest.mark.parametrize(
    ("special", "prompt", "ids", "offsets"),
    [
        (SpecialTokens(begin=(256,)), "abc", [256, 97, 98, 99], [0, 0, 1, 2]),
        (SpecialTokens(begin=(256,)), "abc", [256, 99], [2, 2]),  # truncated
        (SpecialTokens(prefix_space=True), "ab", [32, 97, 98], [0, 0, 1]),
        (SpecialTokens(start=256), "", [256], [0]),
        (SpecialTokens(), "a<|endoftext|>b", [97, 256, 98], [0, 1, 14]),
        (SpecialTokens(), "a  <|endoftext|>\u3000b c", [97, 256, 98, 32, 99], [0, 3, 17, 18, 19]),  # it takes spaces
    ],
)
def test_what_tokens_and_the_prompt_do_not_have_in_common_moves_no_offset(special, prompt, ids, offsets):
    tokenizer = copy(TOKENIZER)
    tokenizer.special = special
    choice = body_of(echoed(prompt, "d", ids), tokenizer=tokenizer)["choices"][0]
    assert choice["logprobs"]["text_offset"] == [*offsets, len(prompt)]
    assert choice["logprobs"]["tokens"] == [tokenizer.token_text(token) for token in [*ids, 100]]


def test_the_text_ends_before_the_tokens_of_a_stop_string():
    row = echoed("ab", "cd", completion="ab", finish_reason="stop")
    choice = body_of(row)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "stop")
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 2]


@pytest.mark.parametrize("own", [{"prompt_logprobs": 2, "logprobs": 2}, {"prompt_logprobs": 2, "echo": True}])
def test_prompt_logprobs_alone_are_answered_as_vllm_does(own):
    row = echoed("ab", "c", parameters=json.dumps(own), **({} if "logprobs" in own else {"logprobs": None}))
    choice = body_of(row)["choices"][0]
    expected = {"98": ("b", -1.5), "97": ("a", -0.75), "122": ("z", -2.0)}
    named = {token: {"logprob": logprob, "decoded_token": text} for token, (text, logprob) in expected.items()}
    assert choice["prompt_logprobs"] == [None, named]
    assert (choice["logprobs"] or {}).get("token_logprobs", [-0.5]) == [-0.5]


def test_echo_and_logprobs_ask_for_as_many_of_the_prompt(tmp_path):
    bodies = [{"echo": True, "logprobs": 3, "max_tokens": 0}, {"logprobs": 3}, {"echo": True, "max_tokens": 0}]
    bodies += [{"echo": True, "logprobs": 2, "prompt_logprobs": 2}]
    items = outcomes(tmp_path, *(line(str(n), {"prompt": "ab"} | body) for n, body in enumerate(bodies)))
    assert [item.params.prompt_logprobs for item in items] == [3, None, None, 2]
    lines = [line(body={"prompt": "a", "logprobs": 3}), line("b", {"prompt": "a", "echo": False})]
    run_params = replace(BASE, echo=True, prompt_logprobs=0)
    items = open_prompts(write(tmp_path, *lines)).requests(run_params)
    assert [item.params.prompt_logprobs for item in items] == [3, 0]


# ---- several files


def test_a_custom_id_of_another_file_is_a_repeated_one(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line("same")) + "\n")
    first, second = open_prompts([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]).requests(BASE)
    assert isinstance(first, Request)
    assert isinstance(second, Rejected)
    assert second.error == "b.jsonl:1: custom_id 'same' is that of a.jsonl:1 too; rename one"


def test_batch_files_and_others_do_not_mix(tmp_path):
    batch, other, empty = write(tmp_path, line("a")), tmp_path / "o.jsonl", tmp_path / "empty.jsonl"
    other.write_text('{"prompt": "a"}')
    empty.touch()
    open_prompts([empty, batch])
    open_prompts([other, empty])
    with pytest.raises(
        InputError, match=r"o\.jsonl: the first is one of OpenAI's batch files and this is not; run them"
    ):
        open_prompts([empty, batch, other])
    with pytest.raises(InputError, match=r"batch\.jsonl: this is one of OpenAI's batch files and the first is not"):
        open_prompts([other, batch])


def test_openais_lines_carry_no_other_columns(tmp_path):
    job = make_job(
        write(tmp_path, line("a")), tmp_path / "o.jsonl", str(write_byte_model(tmp_path / "m")), keep=("url",)
    )
    with pytest.raises(UsageError, match="--keep: OpenAI's lines have no place for other columns; name the output"):
        run_job(job)
    run_job(change(job, out=tmp_path / "o.parquet"))
    assert pq.read_table(tmp_path / "o.parquet")["url"].to_pylist() == ["/v1/completions"]
