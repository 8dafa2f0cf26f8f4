"""Validation: every request is tokenized and compared with the model's context before any is generated."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import numpy as np

from batchgen.errors import InputError, UsageError
from batchgen.input.passages import Passages, Unfit, encode_text, find_passages
from batchgen.job import OnTooLong, Policy, ScoreOptions, SeedBy, TaskOptions
from batchgen.options import say
from batchgen.text.guided import check_pattern
from batchgen.text.healing import beginnings_of
from batchgen.text.stopping import banned_ids
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import READING, Ids, Rejected, Request, SamplingParams, TokenizedRequest

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
    """Raise Unfit for an id that no token has, and if no token may come first."""
    _check_token_ids("stop_token_ids", params.stop_token_ids, tokenizer)
    _check_token_ids("logit_bias", (token for token, _ in params.logit_bias), tokenizer)
    _check_token_ids("allowed_token_ids", params.allowed_token_ids, tokenizer)
    banned = {"bad_words": banned_ids(params.bad_words, tokenizer)}
    if params.min_tokens:
        banned["min_tokens"] = {*params.stop_token_ids, *(() if params.ignore_eos else tokenizer.special.end)}
    if not params.allowed_token_ids:
        if len(set().union(*banned.values())) >= tokenizer.n_tokens:
            reason = f"bad_words and min_tokens may ban every token of this vocabulary of {tokenizer.n_tokens}"
            raise Unfit(f"{reason}; leave one that may be drawn", None)
        return
    left = {*params.allowed_token_ids}.difference(*banned.values())
    causes = " and ".join(name for name, ids in banned.items() if not ids.isdisjoint(params.allowed_token_ids))
    if not left:
        raise Unfit(f"allowed_token_ids are all banned by {causes}; allow another token, or leave out {causes}", None)
    if params.choices and not any(_can_spell(text.encode(), left, tokenizer) for text in params.choices):
        reason = f"allowed_token_ids{causes and f' that are not banned by {causes}'} can spell none of the choices"
        raise Unfit(f"{reason}; allow the tokens of one, or leave out allowed_token_ids", None)


def _can_spell(text: bytes, ids: set[int], tokenizer: Tokenizer) -> bool:
    """Whether these tokens, one after another, can be this text."""
    words = {tokenizer.decode_bytes([token]) for token in ids - tokenizer.special_ids}
    lengths = sorted({len(word) for word in words if word})
    reached = {0}
    for start in range(len(text)):
        if start in reached:
            reached.update(start + n for n in lengths if text[start : start + n] in words)
    return len(text) in reached


class Fitted(NamedTuple):
    """One prompt that fits the model."""

    text: str
    ids: Ids  # the tokens that are read
    again: Ids  # the tokens after them, which are drawn again


def _back_up(prompt: str | Ids, ids: Ids, params: SamplingParams, tokenizer: Tokenizer) -> tuple[Ids, Ids]:
    """Beginnings.back_up, if the row asks for it."""
    if not (params.heal and params.max_tokens):
        return ids, ()
    if not isinstance(prompt, str):
        what = f"the prompt is token ids, which are read as they are, and {say('heal', True)} is for texts"
        raise Unfit(f"{what}; give its text, or heal false", len(ids))
    return beginnings_of(tokenizer).back_up(ids)


def _check_pattern(params: SamplingParams, tokenizer: Tokenizer, prompts: Iterable[Fitted], n_ctx: int) -> None:
    """Raise Unfit if the pattern cannot be met after each prompt; the context may shorten max_tokens."""
    for one in prompts:
        try:
            max_tokens = min(params.max_tokens, n_ctx - len(one.ids))
            check_pattern(params, tokenizer, max_tokens, tokenizer.decode_bytes(one.again))
        except UsageError as error:
            raise Unfit(str(error), len(one.ids)) from error


def _fit(prompt: str | Ids, params: SamplingParams, tokenizer: Tokenizer, n_ctx: int, policy: Policy) -> Fitted:
    """One prompt, truncated if that is the policy; shorten may leave less than max_tokens."""
    on_too_long, begin = policy.on_too_long, tokenizer.special.begin if isinstance(prompt, str) else ()
    max_tokens = params.max_tokens
    room = n_ctx - max_tokens
    truncate = on_too_long == "truncate-left" and room > len(begin)  # begin stays in front
    # no token is longer than longest_token_bytes, so a prompt of megabytes need not be tokenized to be too long
    if not truncate and isinstance(prompt, str) and len(prompt) > n_ctx * tokenizer.longest_token_bytes:
        raise _too_long(None, max_tokens, n_ctx, on_too_long)
    n_again = beginnings_of(tokenizer).longest if params.heal else 0  # at most
    ids = _encode(prompt, tokenizer, policy, n_ctx + n_again if truncate else None)
    ids, again = _back_up(prompt, ids, params, tokenizer)
    if len(ids) > room and truncate:
        ids = begin + ids[len(ids) - room + len(begin) :]
    elif len(ids) > room and not (on_too_long == "shorten" and len(ids) < n_ctx):
        raise _too_long(len(ids), max_tokens, n_ctx, on_too_long)
    return Fitted(prompt if isinstance(prompt, str) else tokenizer.decode(ids), ids, again)


def _seed_key(request: Request, prompts: Iterable[Ids], seed_by: SeedBy) -> Ids:
    """What the row's random numbers depend on instead of its number, in 4 words of 32 bits; () if it is the number.

    prompts: the tokens of each, as the model reads them or draws them again; their lengths are hashed too, so that
    [1, 2] [3] is not [1] [2, 3].
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


def _tokenized(request: Request, text: str, ids: Ids, tokenizer: Tokenizer, policy: Policy) -> TokenizedRequest:
    """The request with the text and the tokens of its first prompt."""
    texts = [text for text in (request.prompt, *request.others, *request.targets) if isinstance(text, str)]
    has_special_text = policy.special_tokens == "auto" and any(map(tokenizer.reads_special_as_text, texts))
    given_as_ids, params = not isinstance(request.prompt, str), request.params
    row, place = request.row, request.place
    return TokenizedRequest(row, place, request.id, text, ids, params, (), given_as_ids, has_special_text)


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
    if isinstance(request := _trim(request) if policy.trim else request, Rejected):
        return request
    params, prompts = request.params, (request.prompt, *request.others)
    try:
        _check_parameters(params, tokenizer)
        fitted = [_fit(prompt, params, tokenizer, n_ctx, policy) for prompt in prompts]
        _check_pattern(params, tokenizer, fitted, n_ctx)
        key = _seed_key(request, (one.ids + one.again for one in fitted), seed_by)
    except Unfit as unfit:
        return request.rejected(unfit.reason, unfit.prompt_tokens)
    first, *others = (one[:2] for one in fitted)
    again = tuple(one.again for one in fitted if params.heal)
    fitting = _tokenized(request, *first, tokenizer, policy)
    fitting = replace(fitting, others=tuple(others), seed_key=key, measured=measured, again=again)
    room = n_ctx - max(len(one.ids) for one in fitted)
    return fitting if room >= params.max_tokens else fitting.with_max_tokens(room)


def _fit_text(request: Request, tokenizer: Tokenizer, n_ctx: int, policy: Policy) -> tuple[str, Ids]:
    """The text to embed, and its token ids."""
    if not request.prompt and (policy.empty_prompt == "reject" or tokenizer.special.start is None):
        remedy = f"leave the row out or pass {say('empty_prompt', 'unconditional')}"
        if tokenizer.special.start is None:
            remedy = "leave the row out (this vocabulary has no <|endoftext|> to stand for it)"
        raise Unfit(f"the text is empty, and has no token to embed; {remedy}", 0)
    fitted = _fit(request.prompt, READING, tokenizer, n_ctx, policy)
    return fitted.text, fitted.ids


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
    tokenized = _tokenized(request, text, ids, tokenizer, policy)
    return replace(tokenized, targets=request.targets, answer=request.answer, passages=passages)


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
