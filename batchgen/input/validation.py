"""Validation: every request is tokenized and compared with the model's context before any is generated."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from batchgen.errors import InputError, UsageError
from batchgen.input.passages import Passages, Unfit, encode_text, find_passages
from batchgen.job import OnTooLong, Policy, ScoreOptions, SeedBy, TaskOptions
from batchgen.options import say
from batchgen.text.stopping import bad_word_ids
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import Ids, Rejected, Request, SamplingParams, TokenizedRequest

Check: TypeAlias = Callable[[Request | Rejected], TokenizedRequest | Rejected]


def _remedy(room: int, max_tokens: int, n_ctx: int, on_too_long: OnTooLong) -> str:
    """Suggest only what works for this row: truncation does not help if max_tokens leaves no room for a prompt."""
    truncate = f"pass {say('on_too_long', 'truncate-left')}"
    if max_tokens < n_ctx:
        return f"lower max_tokens to {room} or {truncate}" if room else truncate
    if room:
        return f"lower max_tokens to {room} or pass {say('on_too_long', 'shorten')}"
    lower = f"lower max_tokens below {n_ctx}"
    return lower if on_too_long == "truncate-left" else f"{lower} and {truncate}"


def _too_long(prompt_tokens: int | None, max_tokens: int, n_ctx: int, on_too_long: OnTooLong) -> Unfit:
    """prompt_tokens None: more than n_ctx, not counted."""
    counted = f"more than {n_ctx}" if prompt_tokens is None else str(prompt_tokens)
    room = 0 if prompt_tokens is None else max(n_ctx - prompt_tokens, 0)
    more = f" + {max_tokens} max_tokens" if max_tokens else ""
    remedy = _remedy(room, max_tokens, n_ctx, on_too_long)
    return Unfit(f"{counted} prompt tokens{more} exceed n_ctx {n_ctx}; {remedy}", prompt_tokens)


def _encode(prompt: str | Ids, tokenizer: Tokenizer, policy: Policy, last: int | None) -> Ids:
    """The prompt's token ids, at least one; of a text, the last so many after those that stand before every prompt."""
    if isinstance(prompt, str):
        ids = encode_text(prompt, tokenizer, policy, last)
    else:
        ids = prompt
        _check_token_ids("the prompt", ids, tokenizer)
    if not prompt:
        if policy.empty_prompt == "reject" or tokenizer.special.start is None:
            remedy = f"write one or pass {say('empty_prompt', 'unconditional')}"
            if tokenizer.special.start is None:
                remedy = "write one (this vocabulary has no <|endoftext|> to start from)"
            raise Unfit(f"the prompt is empty, and a completion starts from 1 token or more; {remedy}", 0)
        ids = ids or (tokenizer.special.start,)
    return ids


def _check_token_ids(name: str, ids: Iterable[int], tokenizer: Tokenizer) -> None:
    for token in ids:
        if not tokenizer.has_id(token):
            where = f"outside the vocabulary (0 to {tokenizer.n_vocab - 1})"
            where = "which no token has" if 0 <= token < tokenizer.n_vocab else where
            raise Unfit(f"{name} has token id {token}, {where}; correct it", None)


def _check_parameters(params: SamplingParams, tokenizer: Tokenizer) -> None:
    """Each id is a token's, and some token may always be drawn: a small vocabulary can be banned as a whole."""
    _check_token_ids("stop_token_ids", params.stop_token_ids, tokenizer)
    _check_token_ids("logit_bias", (token for token, _ in params.logit_bias), tokenizer)
    banned = {word[-1] for word in bad_word_ids(params.bad_words, tokenizer)}
    if params.min_tokens:
        banned |= {*params.stop_token_ids, *(() if params.ignore_eos else tokenizer.special.end)}
    if len(banned) >= tokenizer.n_tokens:
        reason = f"bad_words and min_tokens may ban every token of this vocabulary of {tokenizer.n_tokens}"
        raise Unfit(f"{reason}; leave one that may be drawn", None)


def _fit(prompt: str | Ids, max_tokens: int, tokenizer: Tokenizer, n_ctx: int, policy: Policy) -> tuple[str, Ids]:
    """Text and token ids of one prompt, truncated if that is the policy; shorten may leave less than max_tokens."""
    on_too_long, begin = policy.on_too_long, tokenizer.special.begin if isinstance(prompt, str) else ()
    room = n_ctx - max_tokens
    truncate = on_too_long == "truncate-left" and room > len(begin)  # begin stays in front
    # no token is longer than longest_token_bytes, so a prompt of megabytes need not be tokenized to be too long
    if not truncate and isinstance(prompt, str) and len(prompt) > n_ctx * tokenizer.longest_token_bytes:
        raise _too_long(None, max_tokens, n_ctx, on_too_long)
    ids = _encode(prompt, tokenizer, policy, n_ctx if truncate else None)
    if len(ids) > room and truncate:
        ids = begin + ids[len(ids) - room + len(begin) :]
    elif len(ids) > room and not (on_too_long == "shorten" and len(ids) < n_ctx):
        raise _too_long(len(ids), max_tokens, n_ctx, on_too_long)
    return prompt if isinstance(prompt, str) else tokenizer.decode(ids), ids


def _seed_key(request: Request, prompts: Iterable[Ids], seed_by: SeedBy) -> Ids:
    """What the row's random numbers hang on instead of its number, in 4 words of 32 bits; () if it is the number.

    prompts: the tokens of each, as the model reads them; their lengths are hashed too, so that [1, 2] [3] is not
    [1] [2, 3].
    """
    if seed_by == "row":
        return ()
    if seed_by == "id":
        if request.id is None:
            remedy = f"give it one ({say('id_column')} names the column), or pass {say('seed_by', 'prompt')}"
            raise Unfit(f"the row has no id, which {say('seed_by', 'id')} needs; {remedy}", None)
        data = request.id.encode("utf-8", "surrogatepass")
    else:
        data = b"".join(np.array([len(ids), *ids], "<u4").tobytes() for ids in prompts)
    digest = hashlib.blake2b(data, digest_size=16, person=f"batchgen {seed_by}".encode()).digest()
    return tuple(np.frombuffer(digest, "<u4").tolist())


def check_shots(text: str, tokenizer: Tokenizer, n_ctx: int, policy: Policy) -> None:
    """Raise InputError if the examples before every prompt fill the context: every row would be rejected."""
    if policy.on_too_long == "truncate-left":
        return
    try:
        is_long = len(text) > n_ctx * tokenizer.longest_token_bytes
        tokens = n_ctx if is_long else len(encode_text(text, tokenizer, policy))
    except Unfit as unfit:
        raise InputError(f"{say('shots')}: {unfit.reason}") from unfit
    if tokens >= n_ctx:
        count = f"more than {n_ctx:,}" if is_long else f"{tokens:,}"
        what = f"the examples have {count} tokens, and no prompt fits after them (n_ctx {n_ctx:,})"
        raise InputError(f"{say('shots')}: {what}; draw fewer with {say('n_shots')}, or shorten them")


def _trim(request: Request | Rejected) -> Request | Rejected:
    """The row without the spaces at the end of its prompts, whatever becomes of it."""
    if isinstance(request, Rejected):
        return replace(request, prompt=request.prompt and request.prompt.rstrip(" "))
    prompts = (request.prompt, *request.others)
    first, *others = (prompt.rstrip(" ") if isinstance(prompt, str) else prompt for prompt in prompts)
    return replace(request, prompt=first, others=tuple(others))


def _has_special_text(request: Request, tokenizer: Tokenizer, policy: Policy) -> bool:
    texts = (request.prompt, *request.others, *request.targets)
    return policy.special_tokens == "auto" and any(
        tokenizer.reads_special_as_text(text) for text in texts if isinstance(text, str)
    )


def validate(
    request: Request | Rejected,
    tokenizer: Tokenizer,
    n_ctx: int,
    policy: Policy,
    seed_by: SeedBy = "row",
    measured: tuple[str, ...] = (),
) -> TokenizedRequest | Rejected:
    """Tokenize one request; a TokenizedRequest has prompt_tokens + max_tokens <= n_ctx, and an exact fit is accepted.

    truncate-left keeps the prompt's last tokens, shorten lowers max_tokens. Of several prompts, each must fit.

    n_ctx=1024, 1009 prompt tokens, max_tokens=40 -> 1009 + 15 (shorten), 984 + 40 (truncate-left)
    """
    request = _trim(request) if policy.trim else request
    if isinstance(request, Rejected):
        return request
    params, prompts = request.params, (request.prompt, *request.others)
    try:
        _check_parameters(params, tokenizer)
        fitted = [_fit(prompt, params.max_tokens, tokenizer, n_ctx, policy) for prompt in prompts]
        key = _seed_key(request, (ids for _, ids in fitted), seed_by)
    except Unfit as unfit:
        return request.rejected(unfit.reason, unfit.prompt_tokens)
    (text, ids), *others = fitted
    fitting = TokenizedRequest(
        request.row,
        request.place,
        request.id,
        text,
        ids,
        params,
        tuple(others),
        given_as_ids=not isinstance(request.prompt, str),
        has_special_text=_has_special_text(request, tokenizer, policy),
        seed_key=key,
        measured=measured,
    )
    room = n_ctx - max(len(ids) for _, ids in fitted)
    return fitting if room >= params.max_tokens else fitting.with_max_tokens(room)


def _fit_text(request: Request, tokenizer: Tokenizer, n_ctx: int, policy: Policy) -> tuple[str, Ids]:
    """The text to embed, and its token ids."""
    if not request.prompt and (policy.empty_prompt == "reject" or tokenizer.special.start is None):
        remedy = f"leave the row out or pass {say('empty_prompt', 'unconditional')}"
        if tokenizer.special.start is None:
            remedy = "leave the row out (this vocabulary has no <|endoftext|> to stand for it)"
        raise Unfit(f"the text is empty, and has no token to embed; {remedy}", 0)
    return _fit(request.prompt, 0, tokenizer, n_ctx, policy)


def validate_reading(
    request: Request | Rejected, tokenizer: Tokenizer, n_ctx: int, policy: Policy, options: TaskOptions
) -> TokenizedRequest | Rejected:
    """Tokenize one request to score or to embed; see TokenizedRequest."""
    if policy.trim:
        request = _trim(request)
    if isinstance(request, Rejected):
        return request
    passages: Passages = ()
    try:
        if isinstance(options, ScoreOptions):
            text, ids, passages = find_passages(request, tokenizer, n_ctx, policy, options)
        else:
            text, ids = _fit_text(request, tokenizer, n_ctx, policy)
    except Unfit as unfit:
        return request.rejected(unfit.reason, unfit.prompt_tokens)
    return TokenizedRequest(
        request.row,
        request.place,
        request.id,
        text,
        ids,
        request.params,
        given_as_ids=not isinstance(request.prompt, str),
        has_special_text=_has_special_text(request, tokenizer, policy),
        targets=request.targets,
        answer=request.answer,
        passages=passages,
    )


def make_check(
    tokenizer: Tokenizer,
    n_ctx: int,
    policy: Policy,
    options: TaskOptions | None = None,
    seed_by: SeedBy = "row",
    measured: tuple[str, ...] = (),
) -> Check:
    """`validate` for one model and policy, or `validate_reading`; the options fit the model (`fit_task`).

    measured: what is wanted of completions besides their text. UsageError for a policy that is about generated tokens
    alone.
    """
    if options is None:
        return lambda request: validate(request, tokenizer, n_ctx, policy, seed_by, measured)
    if policy.on_too_long == "shorten":
        remedy = f"pass {say('on_too_long', 'truncate-left')} or leave it out"
        raise UsageError(f"{say('on_too_long', 'shorten')} lowers max_tokens, and nothing is generated here; {remedy}")
    return lambda request: validate_reading(request, tokenizer, n_ctx, policy, options)
