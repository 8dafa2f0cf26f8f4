"""OpenAI's batch files, the requests: a line of JSON each, with the body of a POST to /v1/completions.

https://platform.openai.com/docs/guides/batch; output/openai.py writes the answers.
"""

from typing import Any

from batchgen.errors import UsageError
from batchgen.input.parameters import PARAMETERS, misspelt, row_params
from batchgen.types import SamplingParams, shown

URL = "/v1/completions"
MAX_CHOICES = 2048  # of one line, OpenAI's limit for its prompts

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
