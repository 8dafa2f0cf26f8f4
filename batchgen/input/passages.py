"""Which tokens of a row are scored, and after which: the border of prompt and completion, and the windows of a text.

Both are those of lm-evaluation-harness (`_encode_pair`, `get_rolling_token_windows`), so that scores can be compared.
"""

from collections.abc import Callable, Iterator
from functools import partial

from batchgen.errors import InputError
from batchgen.job import Policy, ScoreOptions
from batchgen.options import say, shown
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import Ids, Kind, Passage, Request

MAX_READ = 2**25  # tokens of a text's windows, which are in memory at once; as many as the longest row has bytes

Passages = tuple[Passage, ...]


class Unfit(Exception):
    """The reason why a row does not fit the model, and the length of its prompt in tokens if it was counted."""

    def __init__(self, reason: str, prompt_tokens: int | None) -> None:
        super().__init__(reason, prompt_tokens)
        self.reason, self.prompt_tokens = reason, prompt_tokens


def encode_text(text: str, tokenizer: Tokenizer, policy: Policy, last: int | None = None) -> Ids:
    """The ids of a text, or the last so many, after those that stand before every prompt."""
    try:
        return tuple(tokenizer.encode(text, policy.special_tokens, last))
    except InputError as error:
        raise Unfit(str(error), None) from error


def _find_start(tokenizer: Tokenizer, remedy: str) -> Ids:
    """What the first token of a text is scored after."""
    special = tokenizer.special
    if special.begin or special.start is not None:
        return special.begin or (special.start,)  # type: ignore[return-value]
    raise Unfit(f"this vocabulary has no <|endoftext|> to read before the first token; {remedy}", None)


# ---- a text


def windows_of(ids: Ids, scored: int, n_ctx: int, stride: int) -> Iterator[Passage]:
    """Cut a text into passages of up to n_ctx + 1 tokens, in which each token from index `scored` on is scored once.

    The first scores all that it has, each later one `stride` tokens, or those that are left, after as many as fit.

    ids=(0, 1, 2, 3, 4, 5, 6), scored=1, n_ctx=3, stride=2
    -> (0, 1, 2, 3) from 1, (2, 3, 4, 5) from 2, (3, 4, 5, 6) from 3
    """
    yield Passage(ids[: n_ctx + 1], scored)
    for done in range(n_ctx + 1, len(ids), stride):
        end = min(done + stride, len(ids))
        yield Passage(ids[end - n_ctx - 1 : end], n_ctx + 1 - (end - done))


def _text_passages(
    text: str, tokenizer: Tokenizer, n_ctx: int, policy: Policy, options: ScoreOptions
) -> tuple[Ids, Passages]:
    stride, begin = options.stride or n_ctx, tokenizer.special.begin
    ids = encode_text(text, tokenizer, policy)[len(begin) :]
    if not ids:
        raise Unfit("the text is empty, and has no token to score; leave the row out", 0)
    if options.first_token == "endoftext":
        before = _find_start(tokenizer, f"pass {say('first_token', 'given')}")
    else:
        before, ids = (*begin, ids[0]), ids[1:]
    if not ids:
        other = f"pass {say('first_token', 'endoftext')} or leave the row out"
        raise Unfit(f"the text is 1 token, and {say('first_token', 'given')} scores from the second on; {other}", 1)
    if (len(before) + len(ids) - n_ctx - 1) * (n_ctx + 1) > MAX_READ * stride:
        remedy = f"raise {say('stride')} or cut the text" if stride < n_ctx else "cut the text"
        raise Unfit(f"the windows of these {len(ids)} tokens exceed {MAX_READ} tokens; {remedy}", len(before))
    return before, tuple(windows_of(before + ids, len(before), n_ctx, stride))


# ---- a prompt and its targets


def _encode_targets(request: Request, tokenizer: Tokenizer, policy: Policy) -> tuple[Ids, list[Ids]]:
    """The ids of the prompt, and those that each target adds; whitespace at the prompt's end belongs to the targets.

    Prompt and target are encoded together and cut after as many tokens as the prompt alone has: "The " and "fox" are
    "The" and " fox". A prompt of nothing, or of whitespace, is <|endoftext|>.
    """
    assert isinstance(request.prompt, str)
    text = request.prompt.rstrip()
    pairs = [request.prompt + target for target in request.targets]
    if text:
        before = encode_text(text, tokenizer, policy)
        return before, [encode_text(pair, tokenizer, policy)[len(before) :] for pair in pairs]
    before, n_begin = _find_start(tokenizer, "write a prompt"), len(tokenizer.special.begin)
    added = [encode_text(pair, tokenizer, policy)[n_begin:] for pair in pairs]
    return before, [ids[1:] if ids[:1] == before[-1:] else ids for ids in added]  # a target may begin with the mark


def _name(request: Request, kind: Kind, index: int) -> str:
    what = "the completion" if kind == "completion" else f"choice {index} (from 0)"
    return f"{what}, {shown(request.targets[index])},"


def _cut_prompt(
    name: Callable[[int], str], before: Ids, added: list[Ids], n_ctx: int, policy: Policy, begin: Ids
) -> Ids:
    """The prompt's last tokens, if that is the policy, so that the longest target fits; what begins it stays."""
    longest = max(range(len(added)), key=lambda index: len(added[index]))
    room = n_ctx + 1 - len(added[longest])  # the last token is not read
    if len(before) <= room:
        return before
    count = f"{name(longest)} has {len(added[longest])} tokens"
    if room < max(len(begin), 1):
        raise Unfit(f"{count}, and n_ctx {n_ctx} leaves none to the prompt; shorten it", len(before))
    if policy.on_too_long != "truncate-left":
        remedy = f"shorten the prompt to {room} or pass {say('on_too_long', 'truncate-left')}"
        raise Unfit(f"{count}, and with {len(before)} prompt tokens they exceed n_ctx {n_ctx}; {remedy}", len(before))
    return begin + before[len(before) - room + len(begin) :]


def _target_passages(
    request: Request, tokenizer: Tokenizer, n_ctx: int, policy: Policy, kind: Kind
) -> tuple[Ids, Passages]:
    name = partial(_name, request, kind)
    if policy.on_too_long != "truncate-left" and len(request.prompt) > (n_ctx + 1) * tokenizer.longest_token_bytes:
        remedy = f"shorten it or pass {say('on_too_long', 'truncate-left')}"  # not tokenized for each of its choices
        raise Unfit(f"the prompt has more tokens than n_ctx {n_ctx}; {remedy}", None)
    before, added = _encode_targets(request, tokenizer, policy)
    for index, ids in enumerate(added):
        if not request.targets[index]:
            raise Unfit(f"{name(index)} is empty, and has no token to score; write it", len(before))
        if not ids:
            remedy = "begin it with a space, or cut prompt and completion at one"
            raise Unfit(f"{name(index)} adds no token to the prompt: they merge; {remedy}", len(before))
    before = _cut_prompt(name, before, added, n_ctx, policy, tokenizer.special.begin)
    return before, tuple(Passage(before + ids, len(before)) for ids in added)


def find_passages(
    request: Request, tokenizer: Tokenizer, n_ctx: int, policy: Policy, options: ScoreOptions
) -> tuple[str, Ids, Passages]:
    """The prompt, its ids that are read and not scored, and a passage for each target, or the windows of a text."""
    text = request.prompt
    assert isinstance(text, str)  # OpenAI's batch files, which may have ids, are not scored
    if request.targets:
        return text, *_target_passages(request, tokenizer, n_ctx, policy, options.kind)
    return text, *_text_passages(text, tokenizer, n_ctx, policy, options)
