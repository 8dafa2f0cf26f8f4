"""The dataset card of an output: README.md with Hugging Face's YAML head, which datasets.load_dataset reads."""

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.errors import InputError, OutputError, UsageError
from batchgen.files import CARD, is_sealed_card, parse_json, replace_file, seal_card
from batchgen.output.beside import read_beside
from batchgen.output.place import is_json_lines, output_errors
from batchgen.output.reading import check_rows, open_output_file, output_files, read_batches, read_plan, read_rows_at
from batchgen.output.schema import Columns, columns_of, own_names
from batchgen.plan import Plan
from batchgen.review.report.counts import Row
from batchgen.types import STATUSES, Kind, SamplingParams, Task

SHOWN_ROWS = 3
MOST_TEXT, MOST_ITEMS, MOST_VALUE = 1_000, 8, 500  # characters and items of a list in the sample; of a value
_TASKS: dict[Task, str] = {"generate": "text-generation", "score": "text-generation", "embed": "feature-extraction"}
_DONE: dict[Task, str] = {"generate": "completed", "score": "scored", "embed": "embedded"}
_MEANINGS = {
    "row": "number of the input row, from 0",
    "sample": "number of the sample of this row, from 0",
    "id": "the input's id",
    "prompt": "the text before it",
    "text": "the text that was read",
    "completion": "the text that follows the prompt",
    "prompt_tokens": "tokens that were read",
    "completion_tokens": "tokens that were generated",
    "finish_reason": "why it ended: length, stop ...",
    "stop_reason": "the stop string or token that ended it",
    "status": "ok; rejected, failed or dropped: see error",
    "error": "why there is nothing",
    "seed": "of the random numbers",
    "parameters": "the row's own parameters, as JSON",
    "completion_token_ids": "the completion in GPT-2's tokens",
    "logprobs": "log-probability of each token of the completion, or of each choice",
    "top_logprobs": "the likeliest tokens at each place",
    "prompt_token_ids": "the prompt in GPT-2's tokens",
    "prompt_logprobs": "log-probability of each token of the prompt",
    "prompt_top_logprobs": "the likeliest tokens at each place of the prompt",
    "beam_score": "of beam search: the completion's log-probability, divided by its length to the power length_penalty",
    "prompt_index": "number of the prompt in its input row",
    "mean_logprob": "mean log-probability of the completion's tokens",
    "repetition": "share of 4-grams of tokens that occurred before",
    "tokens": "tokens that were scored",
    "bytes": "length of the text in UTF-8",
    "nats": "minus the log-probability of the text",
    "bits_per_byte": "nats / ln 2 / bytes",
    "perplexity": "exp(nats / tokens)",
    "logprob": "log-probability of the completion",
    "greedy": "whether each of its tokens is the likeliest",
    "choices": "texts of which one is to follow the prompt",
    "choice_tokens": "tokens of each choice",
    "logprobs_by_token": "the same divided by tokens",
    "logprobs_by_byte": "the same divided by bytes",
    "best": "index of the likeliest choice",
    "best_by_token": "the same by token",
    "best_by_byte": "the same by byte",
    "answer": "index of the right choice",
    "token_ids": "what was scored, in GPT-2's tokens",
    "token_logprobs": "log-probability of each token",
    "token_ranks": "rank of each token, 0 for the likeliest",
    "embedding": "vector of the text",
}


@dataclass(frozen=True, slots=True)
class Wishes:
    """What only people know of a dataset; None is left out."""

    license: str | None = None
    title: str | None = None
    languages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        licenses = () if self.license is None else (self.license,)
        _check_names("--license", licenses, r"[A-Za-z0-9][A-Za-z0-9.+-]*", "cc-by-4.0")
        _check_names("--language", self.languages, r"[A-Za-z]{2,3}(-[A-Za-z0-9]+)*", "en")


def _check_names(option: str, names: Iterable[str], pattern: str, example: str) -> None:
    for name in names:
        if not re.fullmatch(pattern, name):
            raise UsageError(f"{option} {name!r} is no name that the Hub takes; write it as {example}")


# ---- text that cannot break out


def escape(text: str) -> str:
    r"""Text without invisible characters, or ones that turn a line around: a line feed -> \n, U+202E -> \u202e."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def quote(text: str) -> str:
    """A YAML string in double quotes, on one line; YAML has no surrogates (bytes of a path that are not UTF-8)."""
    text = re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08X}" for c in text) + '"'


def code(text: str) -> str:
    """A span of code, also in a table: a`b -> ``a`b``"""
    text = escape(text[:MOST_VALUE]) + ("…" if len(text) > MOST_VALUE else "")
    ticks = "`" * (_longest_run(text) + 1)
    space = " " if not text or "`" in (text[0], text[-1]) or text[0] == text[-1] == " " else ""
    return f"{ticks}{space}{text}{space}{ticks}".replace("|", "\\|")


def fence(text: str, language: str) -> list[str]:
    """A block of code that no line of the text ends."""
    ticks = "`" * max(3, _longest_run(text) + 1)
    return [f"{ticks}{language}", *map(escape, text.split("\n")), ticks]


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def heading(text: str) -> str:
    """A line of text in which nothing is Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$:@-])", r"\\\1", escape(" ".join(text.split()))) or "Dataset"


# ---- what is in an output


@dataclass(slots=True)
class Contents:
    """What one pass over an output finds; memory does not grow with its rows."""

    plan: Plan
    schema: pa.Schema | None = None  # of its columns; None: lines with values of any kind
    input_rows: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)  # by column
    sample: list[Row] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return self.statuses.total()


# prompts once for all samples
_COUNTED = {"prompt_tokens": "tokens read", "completion_tokens": "tokens generated", "tokens": "tokens scored"}


def read_contents(path: Path) -> Contents:
    """Read an output; InputError if it is none, not finished, or damaged."""
    if is_json_lines(path) and not path.is_dir():
        return _read_lines(path)
    found = Contents(read_plan(path))
    found.schema = columns_of(found.plan).schema()
    for file_path in output_files(path)[:1]:
        with open_output_file(file_path) as file:
            found.schema = file.schema_arrow
    positions: list[int] = []
    for batch in read_batches(path, [name for name in ("sample", "status", *_COUNTED) if name in found.schema.names]):
        ok = pc.equal(batch["status"], "ok")
        if len(positions) < SHOWN_ROWS:
            first = pc.indices_nonzero(ok)[: SHOWN_ROWS - len(positions)]
            positions += [found.rows + place for place in first.to_pylist()]
        first_sample = pc.equal(batch["sample"], 0)
        found.input_rows += pc.sum(first_sample).as_py() or 0
        found.statuses.update(batch["status"].to_pylist())
        for name in _COUNTED:
            if name in batch.schema.names:
                counted = batch[name].filter(pc.and_(ok, first_sample) if name == "prompt_tokens" else ok)
                found.tokens[name] += pc.sum(counted).as_py() or 0
    if found.plan.rejects:
        check_rows(path, found.plan, found.input_rows)
    found.sample = read_rows_at(path, positions, found.schema.names)
    return found


def _read_lines(path: Path) -> Contents:
    """JSON lines, whose plan is beside them; answers to OpenAI's requests have no rows of ours to count."""
    if not path.exists():
        raise InputError(f"{path}: no such file; check the name")
    try:
        stored = read_beside(path)
    except InputError as error:
        raise InputError(f"{error}; a card is made of lines as batchgen wrote them, with their plan beside") from error
    found = Contents(stored.plan, statuses=stored.statuses)
    kinds: dict[str, set[type]] = {}
    with output_errors(path, "check it"), open(path, "rb") as file:
        for line in file:
            row = parse_json(line)
            if "status" not in row:
                found.sample += [row] * (len(found.sample) < SHOWN_ROWS)
                continue
            for name, value in row.items():
                kinds.setdefault(name, set()).add(type(value))
            found.input_rows += row["sample"] == 0
            if row["status"] != "ok":
                continue
            found.sample += [row] * (len(found.sample) < SHOWN_ROWS)
            for name in _COUNTED:
                if isinstance(row.get(name), int) and (name != "prompt_tokens" or row["sample"] == 0):
                    found.tokens[name] += row[name]
    found.schema = _schema_of(kinds, found.plan.kind)
    return found


_JSON_TYPES = {
    frozenset[type](): pa.string(),
    frozenset((str,)): pa.string(),
    frozenset((bool,)): pa.bool_(),
    frozenset((int,)): pa.int64(),
    frozenset((float,)): pa.float64(),
    frozenset((int, float)): pa.float64(),
}


def _schema_of(kinds: dict[str, set[type]], kind: Kind) -> pa.Schema | None:
    """The types of JSON lines: of our columns as declared, of kept ones by their values; None if they have no one."""
    asked = Columns(True, True, True, True, kind, per_token=True, answer=True, n_embd=1)
    own = {one.name: one.type for one in asked.schema()}
    types = {name: own.get(name) or _JSON_TYPES.get(frozenset(seen - {type(None)})) for name, seen in kinds.items()}
    return pa.schema(list(types.items())) if types and None not in types.values() else None


# ---- the YAML head


def head(path: Path, found: Contents, wishes: Wishes) -> Iterator[str]:
    """What the Hub and `datasets` read."""
    plan = found.plan
    yield "---"
    yield f"pretty_name: {quote(wishes.title or path.stem)}"
    yield f"license: {quote((wishes.license or 'unknown').lower())}"
    if wishes.languages:
        yield f"language: [{', '.join(map(quote, wishes.languages))}]"
    yield f"size_categories: [{size_category(found.rows)}]"
    yield f"task_categories: [{_TASKS[plan.task]}]"
    yield f"tags: [batchgen, gpt2{', synthetic' if plan.task == 'generate' else ''}]"
    data = "*.parquet" if path.is_dir() else re.sub(r"([*?\[])", r"[\1]", path.name)
    yield from ("configs:", "- config_name: default", "  data_files:", "  - split: train", f"    path: {quote(data)}")
    if not path.is_dir() and is_json_lines(path) and found.schema is not None:  # lines do not say what a null is of
        yield from ("dataset_info:", "  features:")
        for one in found.schema:
            yield f"  - name: {quote(one.name)}"
            yield from (f"    {line}" for line in feature(one.type))
    yield "---"


def size_category(rows: int) -> str:
    """The Hub's name: 999 -> n<1K, 1000 -> 1K<n<10K, 12345678 -> 10M<n<100M"""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    place = len(str(rows)) - 3
    if place <= 0:
        return "n<1K"
    return f"{names[place - 1]}<n<{names[place]}" if place < len(names) else "n>1T"


def feature(kind: pa.DataType) -> list[str]:
    """A type as `datasets` writes it in YAML: list<struct<x: int32>> -> ["list:", "- name: x", "  dtype: int32"]"""
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = feature(kind.value_type)
        if len(inner) == 1 and inner[0].startswith("dtype: "):
            return [f"list: {inner[0].removeprefix('dtype: ')}"]
        return ["list:", *(inner[1:] if inner[0] == "struct:" else [f"  {line}" for line in inner])]
    if pa.types.is_struct(kind):
        lines = ["struct:"]
        for one in kind:
            lines += [f"- name: {quote(one.name)}", *(f"  {line}" for line in feature(one.type))]
        return lines
    return [f"dtype: {({'float': 'float32', 'double': 'float64'}).get(str(kind), str(kind))}"]


# ---- the text


def body(path: Path, found: Contents, wishes: Wishes) -> Iterator[str]:
    """What people read."""
    plan = found.plan
    yield from ("", f"# {heading(wishes.title or path.stem)}", "")
    counts = ", ".join(f"{found.statuses[one]:,} {one}" for one in STATUSES if found.statuses[one] or one == "ok")
    samples = "" if found.rows == len(plan.selection) else f" from {len(plan.selection):,} input rows"
    unit = "rows" if found.input_rows or not found.sample else "choices"  # of OpenAI's, in a line for each request
    what = f"{found.rows:,} {unit}{samples}, {_DONE[plan.task]} by the model {code(plan.model)}: {counts}."
    yield f"{what} Made by batchgen {plan.batchgen}, which runs GPT-2 on CPUs."
    if wishes.license is None:
        yield from ("", "The license is not named here: `unknown` stands for it. Ask whoever made this dataset.")
    yield from ("", "```python", "from datasets import load_dataset", "")
    yield from ('rows = load_dataset("THIS_FOLDER", split="train")', "```")
    yield from ("", "## How it was made", "", "| | |", "|---|---|")
    yield from (f"| {name} | {value} |" for name, value in facts(found))
    if found.schema is not None:
        yield from ("", "## Columns", "", "| column | type | |", "|---|---|---|")
        yield from columns(found.schema, plan)
    yield from ("", "## To make it again", "", *fence(plan.command_line(output=path.name), "sh"), "")
    yield f"`INPUT` is the input of {plan.rows:,} rows with the SHA-256 above."
    if plan.portable:
        yield f"With batchgen {plan.batchgen}, the rows are the same bit for bit on any machine."
    if found.rows and not (is_json_lines(path) and not path.is_dir()):
        yield from ("", "## To check it", "", *fence(shlex.join(["batchgen", "verify", path.name]), "sh"), "")
        yield "makes some of its rows again and compares them."
    if found.sample:
        yield from ("", f"## The first {len(found.sample)} of them" if len(found.sample) > 1 else "## One of them", "")
        yield from fence("\n".join(json_text(row) for row in found.sample), "json")
    yield ""


def columns(schema: pa.Schema, plan: Plan) -> Iterator[str]:
    """A table's line for each column, with what it means; one that was kept from the input says so."""
    own = own_names(Columns(kind=plan.kind, answer=True, n_embd=1))
    for one in schema:
        meaning = _MEANINGS[one.name] if one.name in own else "of the input"
        yield f"| {code(one.name)} | {code(str(one.type))} | {meaning} |"


def facts(found: Contents) -> Iterator[tuple[str, str]]:
    """What is known of how it was made: a name, and Markdown."""
    plan = found.plan
    yield "model", f"{code(plan.model)}, hash {code(plan.model_hash)}"
    yield "precision", code(plan.precision)
    if plan.task == "generate":
        given, usual = plan.parameters.as_dict(), SamplingParams().as_dict()
        changed = [f"{code(name)} {code(_plain(value))}" for name, value in given.items() if value != usual[name]]
        yield "parameters", ", ".join([*changed, "all others as by default" if changed else "as by default"])
        key = "number" if plan.seed_by == "row" else plan.seed_by
        yield "random numbers", f"from seed {plan.parameters.seed} and each row's {key}"
    if plan.shots is not None:
        yield "before each prompt", f"examples, SHA-256 {code(plan.shots)}…"
    formats = ", ".join(map(code, sorted(set(plan.input_formats))))
    files = f" in {len(plan.files):,} files" if plan.files else ""
    yield "input", f"{plan.rows:,} rows{files} ({formats}), SHA-256 {code(plan.input)}"
    if plan.reuse:
        yield "copied rows", f"rows may be copied from {len(plan.reuse)} older output(s) that would be made the same"
    for name, n in found.tokens.items():
        yield _COUNTED[name], f"{n:,}"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def json_text(row: Row) -> str:
    """A row as JSON on several lines, long values cut; nulls left out."""
    short = {name: shorten(value) for name, value in row.items() if value is not None}
    return json.dumps(short, indent=1, ensure_ascii=False, default=str)


def shorten(value: object) -> object:
    """A value with the beginning of long texts and lists."""
    if isinstance(value, str):
        return value if len(value) <= MOST_TEXT else f"{value[:MOST_TEXT]}… ({len(value) - MOST_TEXT:,} more)"
    if isinstance(value, list | tuple):
        more = [f"… ({len(value) - MOST_ITEMS:,} more)"] if len(value) > MOST_ITEMS else []
        return [*map(shorten, value[:MOST_ITEMS]), *more]
    if isinstance(value, dict):
        return {name: shorten(one) for name, one in value.items()}
    return value


# ---- the file


def write_card(path: Path, wishes: Wishes = Wishes(), *, overwrite: bool = False) -> Path:
    """Write the card of an output, whole or not at all, and return its path; equal outputs give equal cards.

    A README.md is replaced if it is a card as batchgen wrote it; one by someone else, or that was edited, only with
    overwrite.
    """
    found = read_contents(path)
    out = path / CARD if path.is_dir() else path.with_name(CARD)
    if out.is_symlink() or (out.exists() and not out.is_file()):
        raise OutputError(f"{out}: a symbolic link, or not a file; move it away")
    if out.exists() and not (overwrite or is_sealed_card(out) or not out.stat().st_size):
        what = "a file that batchgen did not write, or that was edited since"
        raise OutputError(f"{out}: {what}; move it away, or pass --overwrite to replace it")
    text = "\n".join([*head(path, found, wishes), *body(path, found, wishes)]) + "\n"
    with output_errors(out, "make room, or correct that"):
        replace_file(out, seal_card(text))
    return out
