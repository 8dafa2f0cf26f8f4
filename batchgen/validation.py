"""Which rows fit the model: every request is counted in tokens before any is generated."""

from typing import Literal, Protocol

from batchgen.types import Rejected, Request, TokenizedRequest

OnTooLong = Literal["reject", "truncate-left", "shorten"]
EmptyPrompt = Literal["reject", "unconditional"]


class Tokenizer(Protocol):
    """What validation asks of a tokenizer; encode loses no byte, and no token stands for more than the longest."""

    @property
    def eos_id(self) -> int | None: ...

    @property
    def longest_token_bytes(self) -> int: ...

    def encode(self, text: str, /) -> list[int]: ...


def _reject(request: Request, reason: str, prompt_tokens: int | None) -> Rejected:
    error = f"{request.place}: {reason}"
    return Rejected(request.row, request.place, request.id, request.prompt, error, prompt_tokens)


def _empty(request: Request, tokenizer: Tokenizer) -> Rejected:
    remedy = "write one or pass --empty-prompt unconditional"
    if tokenizer.eos_id is None:
        remedy = "write one (this vocabulary has no <|endoftext|> to start from)"
    return _reject(request, f"the prompt is empty, and a completion starts from 1 token or more; {remedy}", 0)


def _remedy(room: int, max_tokens: int, n_ctx: int, on_too_long: OnTooLong) -> str:
    """Name only what works for this row: max_tokens that leave no token of prompt cannot be met by truncating."""
    truncate = "pass --on-too-long truncate-left"
    if max_tokens < n_ctx:
        return f"lower max_tokens to {room} or {truncate}" if room else truncate
    if room:
        return f"lower max_tokens to {room} or pass --on-too-long shorten"
    lower = f"lower max_tokens below {n_ctx}"
    return lower if on_too_long == "truncate-left" else f"{lower} and {truncate}"


def _too_long(request: Request, prompt_tokens: int | None, n_ctx: int, on_too_long: OnTooLong) -> Rejected:
    """prompt_tokens None is "more than n_ctx", uncounted."""
    max_tokens = request.params.max_tokens
    counted = f"more than {n_ctx}" if prompt_tokens is None else str(prompt_tokens)
    room = 0 if prompt_tokens is None else max(n_ctx - prompt_tokens, 0)
    remedy = _remedy(room, max_tokens, n_ctx, on_too_long)
    reason = f"{counted} prompt tokens + {max_tokens} max_tokens exceed n_ctx {n_ctx}; {remedy}"
    return _reject(request, reason, prompt_tokens)


def validate(
    request: Request | Rejected,
    tokenizer: Tokenizer,
    n_ctx: int,
    on_too_long: OnTooLong = "reject",
    empty_prompt: EmptyPrompt = "reject",
) -> TokenizedRequest | Rejected:
    """Tokenize one request and hold it to prompt_tokens + max_tokens <= n_ctx; an exact fit is accepted.

    truncate-left keeps the prompt's last tokens, shorten lowers max_tokens; what neither can save is rejected,
    as is an empty prompt unless it may start from the end-of-text token. A Rejected passes through.

    n_ctx=1024, 1009 prompt tokens, max_tokens=40 -> 1009 + 15 (shorten), 984 + 40 (truncate-left)
    """
    if isinstance(request, Rejected):
        return request
    # no token is longer than longest_token_bytes, so the length alone can say that a prompt of megabytes is too long
    if on_too_long != "truncate-left" and len(request.prompt) > n_ctx * tokenizer.longest_token_bytes:
        return _too_long(request, None, n_ctx, on_too_long)
    ids = tuple(tokenizer.encode(request.prompt))
    if not ids:
        if empty_prompt == "reject" or tokenizer.eos_id is None:
            return _empty(request, tokenizer)
        ids = (tokenizer.eos_id,)
    excess = len(ids) + request.params.max_tokens - n_ctx
    if excess > 0 and on_too_long == "truncate-left" and excess < len(ids):
        ids, excess = ids[excess:], 0
    fitting = TokenizedRequest(request.row, request.place, request.id, request.prompt, ids, request.params)
    if excess <= 0:
        return fitting
    if on_too_long == "shorten" and len(ids) < n_ctx:
        return fitting.with_max_tokens(n_ctx - len(ids))
    return _too_long(request, len(ids), n_ctx, on_too_long)
