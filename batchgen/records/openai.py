"""OpenAI's batch files: requests for completions in, a line of the same shape as OpenAI's for each of them out.

https://platform.openai.com/docs/guides/batch and its /v1/completions. Nothing in the output depends on the clock or
on how the work was cut: equal inputs, models and parameters give equal bytes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any, BinaryIO

from batchgen.errors import UsageError
from batchgen.records.parameters import PARAMETERS, misspelt, row_params
from batchgen.tokenizer import StreamDecoder, Tokenizer
from batchgen.types import SamplingParams, shown

URL = "/v1/completions"
MAX_CHOICES = 2048  # of one line, OpenAI's limit for its prompts
CREATED = 0  # a time would make each run's bytes its own

_LINE_KEYS = {"custom_id", "method", "url", "body"}
_HEEDED_NOWHERE = {"model", "user"}  # the model is the run's
# OpenAI's fields that are not supported, with the values that ask for nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "stream": (False,),
    "stream_options": (),
    "suffix": ("",),
}

_Prompt = str | tuple[int, ...]

# ---- requests


def is_batch_line(fields: dict[str, Any]) -> bool:
    return "custom_id" in fields and ("body" in fields or "url" in fields)


def read_batch_line(fields: dict[str, Any], params: SamplingParams) -> tuple[tuple[_Prompt, ...], SamplingParams]:
    """The prompts and parameters of one line; what its body leaves out is as in params. Raises UsageError by name."""
    _check_line(fields)
    body = fields["body"]
    if not isinstance(body, dict):
        raise UsageError('body is no object; write {"prompt": ..., "max_tokens": ...}')
    for name, value in body.items():
        _check_field(name, value)
    own = row_params({name: value for name, value in body.items() if name in PARAMETERS}, params)
    if own.echo and own.logprobs is not None:
        raise UsageError("echo with logprobs is not supported (those of a prompt are not computed); leave one out")
    prompts = _prompts(body.get("prompt"))
    if len(prompts) * own.n > MAX_CHOICES:
        raise UsageError(f"{len(prompts)} prompts x n {own.n} exceed {MAX_CHOICES} choices; make it several lines")
    return prompts, own


def _check_line(fields: dict[str, Any]) -> None:
    for name in fields.keys() - _LINE_KEYS:
        raise UsageError(f"the key {name[:40]!r} is none of custom_id, method, url, body; leave it out")
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise UsageError("custom_id must be a string of one character or more; write one")
    _check_text("custom_id", custom_id)
    if fields.get("method", "POST") != "POST":
        raise UsageError(f"method {shown(fields['method'])} is not supported; write POST")
    if fields.get("url") != URL:
        raise UsageError(f"url {shown(fields.get('url'))} is not supported; write {URL}")
    if "body" not in fields:
        raise UsageError('no body; write {"prompt": ...}')


def _check_field(name: str, value: Any) -> None:
    if name in PARAMETERS or name in _HEEDED_NOWHERE or name == "prompt":
        return
    if name in _NEUTRAL:
        if value is not None and not any(value is neutral or value == neutral for neutral in _NEUTRAL[name]):
            raise UsageError(f"{name} {shown(value)} is not supported; leave it out")
        return
    near = misspelt(name)
    raise UsageError(f"{name[:40]!r} is not supported; " + (f"did you mean {near!r}?" if near else "leave it out"))


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        raise UsageError(f"{name} has a lone surrogate ({code}), which is no character; remove it") from error


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _prompts(value: Any) -> tuple[_Prompt, ...]:
    """ "a" -> ("a",); ["a", "b"] -> ("a", "b"); [1, 2] -> ((1, 2),); [[1], [2, 3]] -> ((1,), (2, 3))"""
    prompts: tuple[_Prompt, ...]
    if isinstance(value, str):
        prompts = (value,)
    elif _is_token_ids(value):
        prompts = (tuple(value),)
    elif isinstance(value, list) and value and all(isinstance(prompt, str) for prompt in value):
        prompts = tuple(value)
    elif isinstance(value, list) and value and all(map(_is_token_ids, value)):
        prompts = tuple(map(tuple, value))
    else:
        raise UsageError(
            "prompt must be a string, a list of strings, a list of token ids or a list of lists of them, none empty"
        )
    for prompt in prompts:
        if isinstance(prompt, str):
            _check_text("prompt", prompt)
    return prompts


# ---- responses


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
