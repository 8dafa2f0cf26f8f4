"""Words that error messages about inputs share: names shown so that they cannot break a line, and the nearest ones."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import islice


def shown(text: str) -> str:
    """repr, so that no control character or lone surrogate gets into an error text; shortened to 40 characters."""
    return repr(text) if len(text) <= 40 else repr(text[:37] + "...")


def shown_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(shown(name) for name in names[:8]) + more


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name most like another in letters, or in all but their case; the bounds keep hostile keys cheap."""
    short = {known.casefold(): known for known in islice(names, 100) if len(known) <= 100}
    near = get_close_matches(name.casefold(), short, n=1)
    return short[near[0]] if near else None


def missing(column: str, option: str, names: Sequence[str], kind: str) -> str:
    """`no key 'prompt'; the keys are 'Prompt', 'id'; did you mean 'Prompt'? pass --prompt-column`."""
    if not names:
        return f"no {kind} {shown(column)}; there are no {kind}s at all"
    near = nearest(column, names)
    remedy = f"did you mean {shown(near)}? pass it as {option}" if near else f"name the right one with {option}"
    return f"no {kind} {shown(column)}; the {kind}s are {shown_names(names)}; {remedy}"


def first_line(error: BaseException) -> str:
    """What an error of Arrow's or of the system's says, without the lines that follow."""
    reason = getattr(error, "strerror", None) or str(error)
    return reason.strip().split("\n")[0]
