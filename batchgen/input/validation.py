"""Which rows fit the model: every request is counted in tokens before any is generated."""

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from batchgen.errors import InputError
from batchgen.types import Rejected, Request, TokenizedRequest

OnTooLong = Literal["reject", "truncate-left", "shorten"]
EmptyPrompt = Literal["reject", "unconditional"]


class Tokenizer(Protocol):
    """What validation asks of a tokenizer; encode loses no byte, and no token stands for more than the longest."""

    @property
    def n_vocab(self) -> int: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def longest_token_bytes(self) -> int: ...

    def encode(self, text: str, /) -> list[int]: ...

    def decode(self, ids: Sequence[int], /) -> str: ...


Ids = tuple[int, ...]


class _Unfit(Exception):
    """Why one prompt does not fit, and its length in tokens where it was counted."""

    def __init__(self, reason: str, prompt_tokens: int | None) -> None:
        super().__init__(reason, prompt_tokens)
        self.reason, self.prompt_tokens = reason, prompt_tokens


def _empty(tokenizer: Tokenizer) -> _Unfit:
    remedy = "write one or pass --empty-prompt unconditional"
    if tokenizer.eos_id is None:
        remedy = "write one (this vocabulary has no <|endoftext|> to start from)"
    return _Unfit(f"the prompt is empty, and a completion starts from 1 token or more; {remedy}", 0)


def _remedy(room: int, max_tokens: int, n_ctx: int, on_too_long: OnTooLong) -> str:
    """Name only what works for this row: max_tokens that leave no token of prompt cannot be met by truncating."""
    truncate = "pass --on-too-long truncate-left"
    if max_tokens < n_ctx:
        return f"lower max_tokens to {room} or {truncate}" if room else truncate
    if room:
        return f"lower max_tokens to {room} or pass --on-too-long shorten"
    lower = f"lower max_tokens below {n_ctx}"
    return lower if on_too_long == "truncate-left" else f"{lower} and {truncate}"


def _too_long(prompt_tokens: int | None, max_tokens: int, n_ctx: int, on_too_long: OnTooLong) -> _Unfit:
    """prompt_tokens None is "more than n_ctx", uncounted."""
    counted = f"more than {n_ctx}" if prompt_tokens is None else str(prompt_tokens)
    room = 0 if prompt_tokens is None else max(n_ctx - prompt_tokens, 0)
    remedy = _remedy(room, max_tokens, n_ctx, on_too_long)
    return _Unfit(f"{counted} prompt tokens + {max_tokens} max_tokens exceed n_ctx {n_ctx}; {remedy}", prompt_tokens)


def _ids(prompt: str | Ids, tokenizer: Tokenizer, empty_prompt: EmptyPrompt) -> Ids:
    """The prompt's token ids, at least one."""
    if isinstance(prompt, str):
        try:
            ids = tuple(tokenizer.encode(prompt))
        except InputError as error:
            raise _Unfit(str(error), None) from error
    else:
        ids = prompt
        _check_token_ids("the prompt", ids, tokenizer.n_vocab)
    if not ids:
        if empty_prompt == "reject" or tokenizer.eos_id is None:
            raise _empty(tokenizer)
        ids = (tokenizer.eos_id,)
    return ids


def _check_token_ids(name: str, ids: Iterable[int], n_vocab: int) -> None:
    for token in ids:
        if not 0 <= token < n_vocab:
            raise _Unfit(f"{name} has token id {token}, outside the vocabulary (0 to {n_vocab - 1}); correct it", None)


def _fit(
    prompt: str | Ids,
    max_tokens: int,
    tokenizer: Tokenizer,
    n_ctx: int,
    on_too_long: OnTooLong,
    empty_prompt: EmptyPrompt,
) -> tuple[str, Ids]:
    """Text and token ids of one prompt, cut if that is the policy; with shorten it may leave less than max_tokens."""
    cut = on_too_long == "truncate-left"
    # no token is longer than longest_token_bytes, so the length alone can say that a prompt of megabytes is too long
    if not cut and isinstance(prompt, str) and len(prompt) > n_ctx * tokenizer.longest_token_bytes:
        raise _too_long(None, max_tokens, n_ctx, on_too_long)
    ids = _ids(prompt, tokenizer, empty_prompt)
    text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    excess = len(ids) + max_tokens - n_ctx
    if excess > 0 and cut and excess < len(ids):
        return text, ids[excess:]
    if excess > 0 and not (on_too_long == "shorten" and len(ids) < n_ctx):
        raise _too_long(len(ids), max_tokens, n_ctx, on_too_long)
    return text, ids


def validate(
    request: Request | Rejected,
    tokenizer: Tokenizer,
    n_ctx: int,
    on_too_long: OnTooLong = "reject",
    empty_prompt: EmptyPrompt = "reject",
    trim: bool = False,
) -> TokenizedRequest | Rejected:
    """Tokenize one request and hold it to prompt_tokens + max_tokens <= n_ctx; an exact fit is accepted.

    truncate-left keeps the prompt's last tokens, shorten lowers max_tokens; what neither can save is rejected,
    as is an empty prompt unless it may start from the end-of-text token. trim takes spaces off a prompt's end. Of a
    row with several prompts each is held to it, and one that cannot be generated rejects the row. A Rejected passes
    through.

    n_ctx=1024, 1009 prompt tokens, max_tokens=40 -> 1009 + 15 (shorten), 984 + 40 (truncate-left)
    """
    if isinstance(request, Rejected):
        return request
    params = request.params
    prompts = [request.prompt, *request.others]
    if trim:
        prompts = [prompt.rstrip(" ") if isinstance(prompt, str) else prompt for prompt in prompts]
    try:
        _check_token_ids("stop_token_ids", params.stop_token_ids, tokenizer.n_vocab)
        _check_token_ids("logit_bias", (token for token, _ in params.logit_bias), tokenizer.n_vocab)
        fitted = [_fit(prompt, params.max_tokens, tokenizer, n_ctx, on_too_long, empty_prompt) for prompt in prompts]
    except _Unfit as unfit:
        text = request.prompt if isinstance(request.prompt, str) else None
        error = f"{request.place}: {unfit.reason}"
        return Rejected(request.row, request.place, request.id, text, error, unfit.prompt_tokens)
    (text, ids), *others = fitted
    given_as_ids = not isinstance(request.prompt, str)
    fitting = TokenizedRequest(request.row, request.place, request.id, text, ids, params, tuple(others), given_as_ids)
    room = n_ctx - max(len(ids) for _, ids in fitted)
    return fitting if room >= params.max_tokens else fitting.with_max_tokens(room)
