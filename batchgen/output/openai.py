"""Answers to an OpenAI batch file: for each request, a line in the shape of OpenAI's.

https://platform.openai.com/docs/guides/batch and its /v1/completions. Nothing here depends on the clock or on how the
work is cut: equal inputs, models and parameters give equal bytes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, BinaryIO, TypeAlias

import pyarrow as pa

from batchgen.output.file import WriteRows
from batchgen.plan import Plan
from batchgen.text.tokenizer import StreamDecoder, Tokenizer
from batchgen.types import SamplingParams

CREATED = 0  # a time would make each run's bytes its own

Row: TypeAlias = dict[str, Any]  # of the output, by column
Json: TypeAlias = dict[str, object]


def _error(message: str) -> Json:
    return {"message": message, "type": "invalid_request_error", "param": None, "code": None}


def _offsets(ids: Sequence[int], tokenizer: Tokenizer, skip_special: bool) -> Iterator[int]:
    """The character of the text at which each token begins; for a part of a character, that character."""
    decoder, characters = StreamDecoder(tokenizer, skip_special=skip_special), 0
    for token in ids:
        yield characters
        characters += len(decoder.push([token]))


def _logprobs(sample: Row, tokenizer: Tokenizer, params: SamplingParams) -> Json:
    own = json.loads(sample.get("parameters") or "{}")
    skip_special = own.get("skip_special_tokens", params.skip_special_tokens)
    ids, length = sample["completion_token_ids"], len(sample["completion"])
    tokens = [tokenizer.token_text(token) for token in ids]
    tops = [{top["token"]: top["logprob"] for top in tops} for tops in sample["top_logprobs"] or ()]
    for top, token, logprob in zip(tops, tokens, sample["logprobs"], strict=False):  # there are none for logprobs 0
        top.setdefault(token, logprob)  # OpenAI's always have the chosen token among them
    return {
        "tokens": tokens,
        "token_logprobs": sample["logprobs"],
        "top_logprobs": tops or None,
        "text_offset": [min(offset, length) for offset in _offsets(ids, tokenizer, skip_special)],
    }


def _choice(sample: Row, tokenizer: Tokenizer, params: SamplingParams) -> Json:
    return {
        "text": sample["completion"],
        "index": sample["sample"],
        "logprobs": None if sample.get("logprobs") is None else _logprobs(sample, tokenizer, params),
        "finish_reason": "length" if sample["finish_reason"] == "length" else "stop",  # OpenAI has no word for a loop
    }


def _usage(samples: Sequence[Row]) -> Json:
    """Counts of tokens; a prompt's count once, however many samples it has."""
    by_prompt: dict[int, int] = {sample["prompt_index"]: sample["prompt_tokens"] for sample in samples}
    prompt = sum(by_prompt.values())
    completion = sum(int(sample["completion_tokens"]) for sample in samples)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _completion(samples: Sequence[Row], digest: str, plan: Plan, tokenizer: Tokenizer) -> Json:
    return {
        "id": f"cmpl-{digest}",
        "object": "text_completion",
        "created": CREATED,
        "model": plan.model,
        "choices": [_choice(sample, tokenizer, plan.parameters) for sample in samples],
        "usage": _usage(samples),
    }


def make_answer(samples: Sequence[Row], digest: str, plan: Plan, tokenizer: Tokenizer) -> Json:
    """The answer to one request, from its rows of the output: with status code 400 to a rejected one, as the API's."""
    first = samples[0]
    answer = {"id": f"batch_req_{digest}", "custom_id": first["id"], "response": None, "error": None}
    if first["status"] == "failed":
        return answer | {"error": {"code": "failed", "message": first["error"]}}
    if first["status"] == "ok":
        code, body = 200, _completion(samples, digest, plan, tokenizer)
    else:
        code, body = 400, {"error": _error(first["error"])}
    return answer | {"response": {"status_code": code, "request_id": digest, "body": body}}


def answers_writer(load_tokenizer: Callable[[], Tokenizer]) -> WriteRows:
    """A function that writes output rows, which have token ids if they have log-probabilities, as OpenAI's lines."""

    def write_answers(batches: Iterable[pa.RecordBatch], file: BinaryIO, _: pa.Schema, plan: Plan) -> None:
        tokenizer = load_tokenizer()
        encode = json.JSONEncoder(ensure_ascii=False).encode
        values = plan.to_json()
        identity = json.dumps([values[key] for key in ("input", "model_hash", "parameters")])
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, samples in groupby(rows, key=itemgetter("row")):
            digest = hashlib.sha256(f"{identity}:{number}".encode()).hexdigest()[:32]
            file.write((encode(make_answer(list(samples), digest, plan, tokenizer)) + "\n").encode())

    return write_answers
