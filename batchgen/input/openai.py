"""Requests in OpenAI's batch files: each line has the body of a POST to /v1/completions.

https://platform.openai.com/docs/guides/batch; output/openai.py writes the answers.
"""

from dataclasses import replace
from typing import TypeAlias

from batchgen.errors import UsageError
from batchgen.input.formats import BadRow, Reading
from batchgen.input.parameters import apply_values, count_escapes, read_member
from batchgen.input.words import check_characters, find_surrogate
from batchgen.options import shown
from batchgen.types import SamplingParams

URL = "/v1/completions"
MAX_CHOICES = 2048  # of one line, OpenAI's limit for its prompts
LINE_KEYS = ("custom_id", "method", "url", "body")

_NOT_PARAMETERS = {"prompt", "model", "user", "metadata", "service_tier", "request_id"}  # the run has its own model

Fields: TypeAlias = dict[str, object]  # a JSON object
Prompt: TypeAlias = str | tuple[int, ...]


def is_batch_line(fields: Fields) -> bool:
    """Whether an object is a line of a batch file."""
    return "custom_id" in fields and ("body" in fields or "url" in fields)


def read_fields(
    fields: Fields, _line: bytes, place: str, reading: Reading
) -> tuple[str | None, tuple[Prompt, ...], SamplingParams]:
    """The custom_id, the prompts and the parameters of one line; BadRow if it is broken or repeats a custom_id."""
    custom_id = fields.get("custom_id")
    id_ = custom_id if isinstance(custom_id, str) and find_surrogate(custom_id) is None else None
    if id_ and (first := reading.custom_ids.setdefault(id_, place)) != place:
        raise BadRow(f"custom_id {shown(id_)} is that of {first} too; rename one", id_)
    try:
        prompts, params = read_batch_line(fields, reading.params)
    except UsageError as error:
        raise BadRow(str(error), id_) from error
    count_escapes(params, reading.params, reading.found)
    return id_, prompts, params


def read_batch_line(fields: Fields, params: SamplingParams) -> tuple[tuple[Prompt, ...], SamplingParams]:
    """The prompts and parameters of one line; params holds for what the body leaves out. Raises UsageError by name."""
    _check_line(fields)
    body = fields["body"]
    if not isinstance(body, dict):
        raise UsageError('body is not an object; write {"prompt": ..., "max_tokens": ...}')
    members = ((name, value) for name, value in body.items() if name not in _NOT_PARAMETERS)
    own = apply_values((one for name, value in members for one in read_member(name, name, value)), params)
    if own.echo and own.logprobs is not None:
        own = _with_prompt_logprobs(own, params)
    prompts = _read_prompts(body.get("prompt"))
    if len(prompts) * own.n > MAX_CHOICES:
        raise UsageError(f"{len(prompts)} prompts x n {own.n} exceed {MAX_CHOICES} choices; make it several lines")
    return prompts, own


def _with_prompt_logprobs(own: SamplingParams, params: SamplingParams) -> SamplingParams:
    """logprobs of a completion that begins with its prompt are the prompt's too, as many of each token."""
    if own.prompt_logprobs not in (None, own.logprobs, params.prompt_logprobs):
        one = f"prompt_logprobs {own.prompt_logprobs} and logprobs {own.logprobs} differ"
        raise UsageError(f"{one}, and with echo the answer has one list for both; leave prompt_logprobs out")
    return replace(own, prompt_logprobs=own.logprobs)


def _check_line(fields: Fields) -> None:
    for name in fields:
        if name not in LINE_KEYS:
            raise UsageError(f"the key {name[:40]!r} is none of {', '.join(LINE_KEYS)}; leave it out")
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise UsageError("custom_id must be a string of one character or more; write one")
    check_characters("custom_id", custom_id)
    if fields.get("method", "POST") != "POST":
        raise UsageError(f"method {shown(fields['method'])} is not supported; write POST")
    if fields.get("url") != URL:
        raise UsageError(f"url {shown(fields.get('url'))} is not supported; write {URL}")
    if "body" not in fields:
        raise UsageError('no body; write {"prompt": ...}')


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _read_prompts(value: object) -> tuple[Prompt, ...]:
    """ "a" -> ("a",); ["a", "b"] -> ("a", "b"); [1, 2] -> ((1, 2),); [[1], [2, 3]] -> ((1,), (2, 3))"""
    single = isinstance(value, str) or _is_token_ids(value)
    prompts = [value] if single else value
    if isinstance(prompts, list) and prompts:
        if all(isinstance(prompt, str) for prompt in prompts):
            for prompt in prompts:
                check_characters("prompt", prompt)
            return tuple(prompts)
        if all(map(_is_token_ids, prompts)):
            return tuple(map(tuple, prompts))
    raise UsageError(
        "prompt must be a string, a list of strings, a list of token ids or a list of lists of them, none empty"
    )
