"""Answers to an OpenAI batch file: for each request, a line in the shape of OpenAI's.

https://platform.openai.com/docs/guides/batch and its /v1/completions. Nothing here depends on the clock or on how the
work is cut: equal inputs, models and parameters give equal bytes.
"""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import BinaryIO, TypeAlias

import pyarrow as pa

from batchgen.files import JsonObject as Row
from batchgen.output.file import WriteRows
from batchgen.plan import Plan
from batchgen.text.healing import beginnings_of
from batchgen.text.tokenizer import Tokenizer

CREATED = 0  # a time would make each run's bytes its own

Json: TypeAlias = dict[str, object]


def _error(message: str) -> Json:
    return {"message": message, "type": "invalid_request_error", "param": None, "code": None}


def _offsets(ids: Sequence[int], tokenizer: Tokenizer, skip_special: bool, n_given: int = 0) -> Iterator[int]:
    """The character of the text at which each token begins; for a part of a character, that character.

    The first n_given bytes of the tokens are not in the text.
    """
    decoder, characters = codecs.getincrementaldecoder("utf-8")(errors="replace"), 0
    for token in ids:
        data = tokenizer.decode_bytes([token], skip_special=skip_special)
        data, n_given = data[n_given:], max(n_given - len(data), 0)
        characters += len(decoder.decode(data[:1]))  # of bytes before it that are no character, U+FFFD comes only now
        is_whole = data and not decoder.getstate()[0]  # its first byte ends a character, else it is in the next one
        yield characters - 1 if is_whole else characters
        characters += len(decoder.decode(data[1:]))


def _prompt_offsets(ids: Sequence[int], text: str, tokenizer: Tokenizer, n_given: int = 0) -> Iterator[int]:
    """The same of a prompt that was given as a text: its tokens are the end of the text, of which they may be a part.

    After them come n_given bytes that the completion's tokens begin with.

    text="a\u2603b" (bytes 61 e2 98 83 62), ids of 98, 83 and 62 -> 1, 1, 2
    """
    data = text.encode()
    characters = [number for number, character in enumerate(text) for _ in character.encode()]
    characters.append(len(text))  # [bytes + 1]
    n_begin = len(tokenizer.special.begin)  # tokens that stand before every text
    places, end = [], len(data) - n_given
    for token in reversed(ids[n_begin:]):
        word = tokenizer.decode_bytes([token])
        place = data.rfind(word, 0, end)
        if place < 0 or data[place + len(word) : end].decode(errors="replace").strip():  # a token may take spaces too
            place = end - len(word)  # below 0 if the tokenizer puts a space before the text
        end = max(place, 0)
        places.append(characters[end])
    yield from [characters[end]] * len(ids[:n_begin])
    yield from reversed(places)


def _n_given(sample: Row, tokenizer: Tokenizer, plan: Plan, own: Json) -> int:
    """How many bytes of the prompt the completion's tokens begin with."""
    if not own["heal"] or not own["max_tokens"]:
        return 0
    ids = tuple(tokenizer.encode(sample["prompt"], plan.policy().special_tokens))
    return len(tokenizer.decode_bytes(beginnings_of(tokenizer).back_up(ids)[1]))


def _logprobs(sample: Row, tokenizer: Tokenizer, own: Json, n_given: int) -> Json:
    """Of the completion's tokens; with echo, of the prompt's before them, of which the first has none."""
    ids, logprobs, tops = (sample[name] or [] for name in ("completion_token_ids", "logprobs", "top_logprobs"))
    offsets = [*_offsets(ids, tokenizer, bool(own["skip_special_tokens"]), n_given)]
    if own["echo"]:
        prompt, prompt_ids = sample["prompt"], sample["prompt_token_ids"]
        is_text = "prompt_token_ids" not in own
        offsets_of = _prompt_offsets(prompt_ids, prompt, tokenizer, n_given)
        begins = offsets_of if is_text else _offsets(prompt_ids, tokenizer, False)
        offsets = [*begins, *(len(prompt) + offset for offset in offsets)]
        ids, logprobs = [*prompt_ids, *ids], [*sample["prompt_logprobs"], *logprobs]
        tops = [*(sample["prompt_top_logprobs"] or []), *tops]
    tokens = [tokenizer.token_text(token) for token in ids]
    tops = [top and {one["token"]: one["logprob"] for one in top} for top in tops]
    for top, token, logprob in zip(tops, tokens, logprobs, strict=False):  # there are none for logprobs 0
        if top is not None:
            top.setdefault(token, logprob)  # OpenAI's always have the token itself among them
    return {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": tops or None,
        "text_offset": [min(offset, len(sample["completion"])) for offset in offsets],
    }


def _prompt_logprobs(sample: Row, tokenizer: Tokenizer) -> list[Json | None]:
    """The prompt's alone, which OpenAI's answers do not have, as vLLM writes them: by token id."""
    named: list[Json | None] = []
    tops = sample["prompt_top_logprobs"] or [()] * len(sample["prompt_token_ids"])
    for token, logprob, top in zip(sample["prompt_token_ids"], sample["prompt_logprobs"], tops, strict=True):
        pairs = {token: logprob} | {one["token_id"]: one["logprob"] for one in top or ()}
        texts = {key: {"logprob": value, "decoded_token": tokenizer.token_text(key)} for key, value in pairs.items()}
        named.append(None if logprob is None else {str(key): value for key, value in texts.items()})
    return named


_REASONS = {"length": "length", "blocked": "length"}  # OpenAI has no word for a loop, and one for what is incomplete


def _choice(sample: Row, tokenizer: Tokenizer, plan: Plan) -> Json:
    own: Json = plan.parameters.as_dict() | json.loads(sample.get("parameters") or "{}")
    logprobs = None
    if sample.get("logprobs") is not None:
        logprobs = _logprobs(sample, tokenizer, own, _n_given(sample, tokenizer, plan, own))
    choice: Json = {
        "text": sample["completion"],
        "index": sample["sample"],
        "logprobs": logprobs,
        "finish_reason": _REASONS.get(sample["finish_reason"], "stop"),
    }
    if sample.get("beam_score") is not None:
        choice["beam_score"] = sample["beam_score"]
    if sample.get("prompt_logprobs") is not None and not (logprobs and own["echo"]):
        choice["prompt_logprobs"] = _prompt_logprobs(sample, tokenizer)
    return choice


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
        "choices": [_choice(sample, tokenizer, plan) for sample in samples],
        "usage": _usage(samples),
    }


def make_answer(samples: Sequence[Row], digest: str, plan: Plan, tokenizer: Tokenizer) -> Json:
    """The answer to one request, from its rows of the output: with status code 400 to a rejected one, as the API's."""
    first = samples[0]
    answer = {"id": f"batch_req_{digest}", "custom_id": first["id"], "response": None, "error": None}
    if first["status"] in ("failed", "dropped"):
        return answer | {"error": {"code": first["status"], "message": first["error"]}}
    if first["status"] == "ok":
        code, body = 200, _completion(samples, digest, plan, tokenizer)
    else:
        code, body = 400, {"error": _error(first["error"])}
    return answer | {"response": {"status_code": code, "request_id": digest, "body": body}}


def answers_writer(load_tokenizer: Callable[[], Tokenizer]) -> WriteRows:
    """A function that writes output rows, which have token ids if they have log-probabilities, as OpenAI's lines."""

    def write_answers(batches: Iterable[pa.RecordBatch], file: BinaryIO, _: pa.Schema, plan: Plan, *__: object) -> None:
        tokenizer = load_tokenizer()
        encode = json.JSONEncoder(ensure_ascii=False).encode
        values = plan.to_json()
        identity = json.dumps([values[key] for key in ("input", "model_hash", "parameters")])
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, samples in groupby(rows, key=itemgetter("row")):
            digest = hashlib.sha256(f"{identity}:{number}".encode()).hexdigest()[:32]
            file.write((encode(make_answer(list(samples), digest, plan, tokenizer)) + "\n").encode())

    return write_answers
