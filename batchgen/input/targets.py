"""What a row gives to score: its completion or its choices, and which of these is right."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from batchgen.errors import UsageError
from batchgen.input.parameters import read_literal
from batchgen.input.words import ABSENT, check_characters
from batchgen.job import InputOptions, ScoreInput
from batchgen.options import shown
from batchgen.types import Rejected, Request

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_INDEX = re.compile(r"\s*([+-]?[0-9]{1,9})(?:\.0*)?\s*")  # pandas writes 2.0 if a column has nulls
_TYPE_NAMES = {str: "a string", bool: "a boolean", dict: "an object", list: "a list", type(None): "null"}


# ---- columns


def prompt_option(options: InputOptions) -> str:
    """The option that names the column of the prompt."""
    return "text_column" if isinstance(options, ScoreInput) and options.text_column else "prompt_column"


def prompt_word(options: InputOptions) -> str:
    """What errors call a row's prompt: `the prompt`, or `the text` if it is scored alone."""
    return f"the {prompt_option(options).removesuffix('_column')}"


def target_columns(options: InputOptions) -> dict[str, str]:
    """The columns that a row to score must have beside its prompt's, by option."""
    if not isinstance(options, ScoreInput):
        return {}
    names = ("completion_column", "choices_column", "answer_column")
    return {name: column for name in names if (column := getattr(options, name))}


def labels_column(options: InputOptions) -> str | None:
    """The `choices.label` beside the `choices.text`, as ARC and others of Hugging Face have it; it may be absent."""
    if not isinstance(options, ScoreInput) or not options.answer_column:
        return None
    struct, dot, name = (options.choices_column or "").rpartition(".")
    return f"{struct}.label" if dot and name == "text" else None


# ---- completions and choices


def describe(value: object) -> str:
    """`a number (1.5)`, `a list`: the type as JSON has it, and the value of a number."""
    if isinstance(value, bytes):
        return "not UTF-8"
    kind = _TYPE_NAMES.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
    return f"{kind} ({shown(value)})" if isinstance(value, int | float) else kind


def _check_text(name: str, value: object) -> str:
    """The text itself; UsageError if it is none, or if nothing of it can be scored."""
    if not isinstance(value, str):
        raise UsageError(f"{name} is {describe(value)}; make it a string")
    if not value:
        raise UsageError(f"{name} is empty, and has no token to score; write it, or leave the row out")
    check_characters(name, value)
    return value


def read_completion(value: object) -> tuple[str, ...]:
    """The completion as the only target; UsageError with the reason if it is none."""
    return (_check_text("the completion", value),)


def read_choices(value: object) -> tuple[str, ...]:
    """The choices: a list of strings, or the text of one in JSON or Python; UsageError with the reason for another.

    ["a", "b"], '["a", "b"]', "['a', 'b']" -> ("a", "b")
    """
    items = read_literal(value, python=True) if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise UsageError(f"the choices are {_describe_choices(value)}")
    if not items:
        raise UsageError("the list of choices is empty; write one or more")
    return tuple(_check_text(f"choice {index} (from 0)", item) for index, item in enumerate(items))


def _describe_choices(value: object) -> str:
    """What they are instead of a list, and the remedy."""
    if not isinstance(value, str):
        return f"{describe(value)}; make them a list of strings"
    if re.match(r"\s*(?:array\()?\[", value):
        return f"{shown(value)}, which is a list neither in JSON nor in Python; write the column with json.dumps"
    return f'{shown(value)}, which is no list; write them as ["a", "b"]'


# ---- answers


def read_answer(value: object, choices: Sequence[str], labels: Sequence[str] = ()) -> int | None:
    """The index of the right choice; None: the row does not say. UsageError if it names none, or more than one.

    An answer is a choice's index from 0, its text, or its label; without labels, these are A, B, ...

    choices=("red", "blue"): 1, 1.0, "1", "blue", "B" -> 1; None, "" -> None
    """
    if value is None or value is ABSENT or value == "" or value != value:  # NaN: so pandas writes what is missing
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"the answer is {describe(value)}; {_say_answers(choices, labels)}")
    found = _find_answers(value, choices, labels)
    if not found:
        raise UsageError(f"the answer {shown(value)} is no choice; {_say_answers(choices, labels)}")
    if len(found) > 1:
        which = " and ".join(f"choice {index}" for index in found)
        raise UsageError(
            f"the answer {shown(value)} may be {which} (from 0); {_say_apart(value, found, choices, labels)}"
        )
    return found[0]


def _find_answers(value: str | float, choices: Sequence[str], labels: Sequence[str]) -> list[int]:
    """The choices that an answer may mean. Where labels are numbers, it is no index."""
    number: float | None = value if not isinstance(value, str) else None
    if isinstance(value, str) and (match := _INDEX.fullmatch(value)):
        number = int(match[1])
    is_whole = isinstance(number, int) or (number is not None and number.is_integer())
    name = str(int(number)) if number is not None and is_whole else str(value)
    named = [index for index, label in enumerate(labels) if label in (value, name)]
    if named:
        return named
    is_index = number in range(len(choices)) and not any(map(_INDEX.fullmatch, labels))
    found = {int(number)} if is_index and number is not None else set()
    found |= {index for index, choice in enumerate(choices) if choice == value}
    if not found and not labels and value in list(LETTERS[: len(choices)]):
        found = {LETTERS.index(name)}
    return sorted(found)


def _say_answers(choices: Sequence[str], labels: Sequence[str]) -> str:
    """What an answer may be."""
    index = "" if any(map(_INDEX.fullmatch, labels)) else f"index (0 to {len(choices) - 1}), "
    label = f"its label ({', '.join(map(shown, labels[:8]))})" if labels else "its letter (A is the first)"
    return f"write the right choice's {index}text or {label}, or null if it is not known"


def _say_apart(value: str | float, found: Sequence[int], choices: Sequence[str], labels: Sequence[str]) -> str:
    """How to write an answer that means one choice."""
    if labels and len({labels[index] for index in found}) < len(found):
        return "give each choice a label of its own"
    letters = [LETTERS[index] for index in found if index < len(LETTERS)]
    if labels:
        return f"write its label: {' or '.join(shown(labels[index]) for index in found)}"
    if len(letters) == len(found) and not set(letters) & set(choices):
        return f"write {' or '.join(letters)}"
    return "write its index as a number"


def _read_labels(value: object, choices: Sequence[str]) -> Sequence[str]:
    if value is None or value is ABSENT:
        return ()
    labels = read_literal(value, python=True) if isinstance(value, str) else value
    if not isinstance(labels, list | tuple) or len(labels) != len(choices):
        what = f"{len(labels)}" if isinstance(labels, list | tuple) else describe(labels)
        raise UsageError(
            f"the labels of the choices are {what}, and there are {len(choices)} choices; write one for each"
        )
    return [label if isinstance(label, str) else str(label) for label in labels]


# ---- rows


def with_targets(request: Request, values: Mapping[str, object]) -> Request | Rejected:
    """The row with what it gives to score: the values of `target_columns`, by option, and `labels` if there are any."""
    try:
        if "completion_column" in values:
            return replace(request, targets=read_completion(values["completion_column"]))
        request = replace(request, targets=read_choices(values["choices_column"]))
        labels = _read_labels(values.get("labels"), request.targets)
        return replace(request, answer=read_answer(values.get("answer_column"), request.targets, labels))
    except UsageError as error:
        return request.rejected(str(error))
