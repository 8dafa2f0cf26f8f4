"""OpenAI's batch files, the answers: a line of the shape of OpenAI's for each request.

https://platform.openai.com/docs/guides/batch and its /v1/completions. Nothing here depends on the clock or on how the
work was cut: equal inputs, models and parameters give equal bytes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any, BinaryIO

from batchgen.text.tokenizer import StreamDecoder, Tokenizer

CREATED = 0  # a time would make each run's bytes its own


def batch_writer(plan: dict[str, Any], tokenizer: Tokenizer) -> Callable[[Iterable[Any], BinaryIO], None]:
    """Writes record batches of the output's columns (with token ids) as OpenAI's lines; its ids come from the plan."""
    identity = json.dumps([plan[key] for key in ("input", "model_hash", "parameters")])

    def write(batches: Iterable[Any], file: BinaryIO) -> None:
        encode = json.JSONEncoder(ensure_ascii=False).encode
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, samples in groupby(rows, key=itemgetter("row")):
            digest = hashlib.sha256(f"{identity}:{number}".encode()).hexdigest()[:32]
            file.write((encode(batch_line(list(samples), digest, plan["model"], tokenizer)) + "\n").encode())

    return write


def batch_line(samples: list[dict[str, Any]], digest: str, model: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """What became of one request, from its rows of the output.

    A rejected one is answered with status code 400, as the API would; a failed one has no response.
    """
    first = samples[0]
    line = {"id": f"batch_req_{digest}", "custom_id": first["id"], "response": None, "error": None}
    if first["status"] == "failed":
        return line | {"error": {"code": "failed", "message": first["error"]}}
    ok = first["status"] == "ok"
    code, body = (
        (200, _completion(samples, digest, model, tokenizer)) if ok else (400, {"error": _error(first["error"])})
    )
    return line | {"response": {"status_code": code, "request_id": digest, "body": body}}


def _error(message: str) -> dict[str, Any]:
    return {"message": message, "type": "invalid_request_error", "param": None, "code": None}


def _completion(samples: list[dict[str, Any]], digest: str, model: str, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "id": f"cmpl-{digest}",
        "object": "text_completion",
        "created": CREATED,
        "model": model,
        "choices": [_choice(sample, tokenizer) for sample in samples],
        "usage": _usage(samples),
    }


def _choice(sample: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "text": sample["completion"],
        "index": sample["sample"],
        "logprobs": None if sample.get("logprobs") is None else _logprobs(sample, tokenizer),
        "finish_reason": "length" if sample["finish_reason"] == "length" else "stop",  # OpenAI has no word for a loop
    }


def _logprobs(sample: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    ids, length = sample["completion_token_ids"], len(sample["completion"])
    tokens = [tokenizer.token_text(token) for token in ids]
    tops = [{top["token"]: top["logprob"] for top in tops} for tops in sample["top_logprobs"] or ()]
    for top, token, logprob in zip(tops, tokens, sample["logprobs"], strict=False):  # there are none for logprobs 0
        top.setdefault(token, logprob)  # OpenAI's always have the chosen token among them
    return {
        "tokens": tokens,
        "token_logprobs": sample["logprobs"],
        "top_logprobs": tops or None,
        "text_offset": [min(offset, length) for offset in _offsets(ids, tokenizer)],
    }


def _offsets(ids: list[int], tokenizer: Tokenizer) -> Iterator[int]:
    """At which character of the text each token begins; a part of a character, where that character would."""
    decoder, characters = StreamDecoder(tokenizer), 0
    for token in ids:
        yield characters
        characters += len(decoder.push([token]))


def _usage(samples: list[dict[str, Any]]) -> dict[str, int]:
    """A prompt's tokens count once, whatever its samples."""
    by_prompt = {sample["prompt_index"]: sample["prompt_tokens"] for sample in samples}
    prompt, completion = sum(by_prompt.values()), sum(sample["completion_tokens"] for sample in samples)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
