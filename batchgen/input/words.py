"""Names of columns: what they lead to, and the words that error messages about inputs share."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice

from batchgen.errors import UsageError
from batchgen.options import say, shown

ABSENT = object()  # in place of a value that is not there


def find_value(fields: Mapping[str, object], name: str, default: object = None) -> object:
    """The value of a key, else that at a path of keys: "a.b" is the b of the object a, or null with a. "a.b" wins."""
    if name in fields:
        return fields[name]
    first, dot, rest = name.partition(".")
    inner = fields.get(first)
    if dot and first in fields and inner is None:
        return None
    return find_value(inner, rest, default) if dot and isinstance(inner, Mapping) else default


def list_names(names: Sequence[str]) -> str:
    """The first eight names, quoted, and how many follow."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(shown(name) for name in names[:8]) + more


def find_nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar name, in any case; the limits of number and length keep hostile names cheap."""
    short = {known.casefold(): known for known in islice(names, 100) if len(known) <= 100}
    near = get_close_matches(name.casefold(), short, n=1)
    return short[near[0]] if near else None


def describe_missing(column: str, option: str, names: Sequence[str], kind: str) -> str:
    """`no key 'prompt'; the keys are 'Prompt', 'id'; did you mean 'Prompt'? pass it as --prompt-column`"""
    if not names:
        return f"no {kind} {shown(column)}; there are no {kind}s at all"
    near, named = find_nearest(column, names), say(option)
    remedy = f"did you mean {shown(near)}? pass it as {named}" if near else f"name the right one with {named}"
    if option == "template":
        remedy = f"did you mean {{{near}}}? correct the template" if near else f"write {{{names[0]}}} in the template"
    if option == "text_column":
        remedy += f"; score also takes a prompt with {say('completion_column')} or {say('choices_column')}"
    return f"no {kind} {shown(column)}; the {kind}s are {list_names(names)}; {remedy}"


def find_surrogate(text: str) -> str | None:
    r"""The first half of a surrogate pair, as `\ud800`: JSON allows it, but it is not a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None


def check_characters(name: str, text: str) -> None:
    if code := find_surrogate(text):
        raise UsageError(f"{name} has a lone surrogate ({code}), which is not a character; remove it")
