"""batchgen as a model of lm-evaluation-harness: its requests are the rows of a job, scored or completed.

Importing this module registers the model: lm_eval 0.4 looks for no models outside its own package. `batchgen lm-eval`
imports it and runs their command line; in Python: `import batchgen.jobs.harness`, then
`simple_evaluate(model="batchgen")`.
"""

import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pyarrow.parquet as pq
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from batchgen import __version__
from batchgen.errors import InputError, UsageError
from batchgen.job import DEFAULT_MODEL, InputOptions, Job, OutputOptions, Policy, ScoreInput, WorkOptions
from batchgen.models.model import Model
from batchgen.options import check_keywords, options_of, shown, use_flags
from batchgen.progress import Progress
from batchgen.run import run_job
from batchgen.types import OF_DRAWS, SamplingParams

Row: TypeAlias = dict[str, Any]
T = TypeVar("T")

logger = logging.getLogger(__name__)

HARNESS = ("batch_size", "max_batch_size", "device")  # lm_eval gives these to every model: 1, None, "cuda:0" by default
MAX_GEN_TOKS, TOP_K = 256, 50  # of the model hf, for requests that do not say; top_k: if it samples
OURS = {"max_tokens", "stop", "n", "echo", "include_stop", "logprobs", "prompt_logprobs"}  # not for a task to set

# As hf: <|endoftext|> in a text is read as a token, and what is too long is cut off at its left.
SCORED = Policy(on_too_long="truncate-left", special_tokens="parse")
GENERATED = replace(SCORED, empty_prompt="unconditional")


@register_model("batchgen")
class BatchgenLM(LM):  # type: ignore[misc]  # lm_eval is not always installed
    """A model of batchgen. Arguments: model, seed, work_dir, and the options of a job's work (precision, jobs, ...).

    Answers depend on the request, the model and its precision alone; lm_eval's --batch_size and --device do nothing.
    work_dir keeps requests and answers: the same evaluation goes on there after an interruption.
    """

    def __init__(
        self, model: str = DEFAULT_MODEL, *, seed: int = 0, work_dir: str | None = None, **options: Any
    ) -> None:
        super().__init__()
        options = {name: value for name, value in options.items() if name not in HARNESS}
        known = [name for name in options_of(WorkOptions) if name not in HARNESS]
        check_keywords(options, ("model", "seed", "work_dir", *known), "the model batchgen")
        self._work, self._seed, self._work_dir = WorkOptions(**options), SamplingParams(seed=seed).seed, work_dir
        self._model = Model.open(str(model), self._work.precision)

    # ---- what lm_eval asks for

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-probability of each continuation after its context, and whether greedy decoding would write it."""
        rows = [{"prompt": context, "completion": continuation} for context, continuation in _arguments(requests)]
        found = self._answer("loglikelihood", rows, disable_tqdm)
        n_ctx = self._model.config.n_ctx
        ends = [(row["prompt"] + row["completion"], row["prompt_tokens"] + row["tokens"], n_ctx + 1) for row in found]
        self._warn_of_cuts("loglikelihood", ends)
        return self._cached("loglikelihood", requests, [(row["logprob"], row["greedy"]) for row in found])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text from <|endoftext|> on; a text of no token has 0."""
        rows = [{"text": text} for (text,) in _arguments(requests)]
        found = iter(self._answer("loglikelihood_rolling", [row for row in rows if row["text"]], disable_tqdm))
        totals = [-next(found)["nats"] if row["text"] else 0.0 for row in rows]
        return self._cached("loglikelihood_rolling", requests, totals)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context; requests that sample have their own draws, equal ones too."""
        rows = [
            {"prompt": context, **row_parameters(asked), "id": str(number)}
            for number, (context, asked) in enumerate(_arguments(requests))
        ]
        n_ctx = self._model.config.n_ctx
        for row in rows:
            if (tokens := row["max_tokens"]) >= n_ctx:  # as hf: nothing would be left of the context
                raise UsageError(
                    f"max_gen_toks {tokens} is out of range (1 to {n_ctx - 1}: n_ctx is {n_ctx}); lower it"
                )
            if not row["temperature"]:
                del row["id"]  # so that equal rows are done once
        found = self._answer("generate_until", rows, disable_tqdm)
        rooms = [n_ctx - row["max_tokens"] for row in rows]
        ends = [(row["prompt"], row["prompt_tokens"], room) for row, room in zip(found, rooms, strict=True)]
        self._warn_of_cuts("generate_until", ends)
        return self._cached("generate_until", requests, [row["completion"] for row in found])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        raise UsageError("GPT-2 has no chat template; leave --apply_chat_template out")

    @property
    def tokenizer_name(self) -> str:
        """Asked for with a chat template only."""
        return self.apply_chat_template([])

    def get_model_info(self) -> dict[str, str]:
        """For the results' config: what makes the answers again."""
        model = self._model
        return {"model_sha": model.hash, "model_dtype": model.precision, "batchgen_version": __version__}

    # ---- a job

    def _answer(self, kind: str, rows: Sequence[Row], disable_tqdm: bool) -> list[Row]:
        """An output row for each row, in order; equal rows are done once. InputError names one that cannot be done."""
        lines = [json.dumps(row) for row in rows]
        places = {line: place for place, line in enumerate(dict.fromkeys(lines))}
        if not rows:
            return []
        with self._folder() as folder, tqdm(total=len(places), desc=f"Running {kind}", disable=disable_tqdm) as bar:
            text = "".join(f"{line}\n" for line in places)
            asked = json.dumps([self.get_model_info(), self._seed, text])  # in the name: they find their answers again
            source = Path(folder, f"{kind}-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.jsonl")
            source.write_text(text, encoding="utf-8")
            output = source.with_suffix(".parquet")

            def show(progress: Progress) -> None:
                bar.update(progress.rows - bar.n)

            run_job(self._job(kind, source, output), on_progress=show, open_model=lambda _: self._model)
            bar.update(len(places) - bar.n)
            found = pq.read_table(output).to_pylist()
        _check_answers(kind, found)
        return [found[places[line]] for line in lines]

    def _folder(self) -> AbstractContextManager[str]:
        if self._work_dir is None:
            return tempfile.TemporaryDirectory(prefix="batchgen-")
        os.makedirs(self._work_dir, exist_ok=True)
        return nullcontext(self._work_dir)

    def _job(self, kind: str, source: Path, output: Path) -> Job:
        rows, policy = InputOptions(source), GENERATED
        if kind != "generate_until":
            column = "completion" if kind == "loglikelihood" else None
            rows, policy = ScoreInput(source, completion_column=column), SCORED
        sampling = SamplingParams(seed=self._seed)
        return Job(rows, OutputOptions(output), self._model.directory, sampling, policy, self._work)

    def _warn_of_cuts(self, kind: str, read: Iterable[tuple[str, int, int]]) -> None:
        """As hf does; for each request its text, the tokens of it that were read, and how many can be."""
        full = {(text, room) for text, tokens, room in read if tokens == room}
        encode = self._model.load_tokenizer().encode if full else None
        cut = sum(len(encode(text, "parse")) > room for text, room in full) if encode else 0
        if cut:
            words = "%d %s requests are longer than the model's %d tokens: the left of their contexts is cut off"
            logger.warning(words, cut, kind, self._model.config.n_ctx)

    def _cached(self, kind: str, requests: Iterable[Instance], answers: list[T]) -> list[T]:
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers


def row_parameters(asked: Mapping[str, object]) -> Row:
    """A request's generation arguments as those of a row; UsageError for one that batchgen does not know.

    {"until": ["\\n"], "max_gen_toks": 8} -> {"max_tokens": 8, "stop": ["\\n"], "temperature": 0.0, ...}
    """
    said = {name: value for name, value in asked.items() if value is not None}
    given = dict(normalize_gen_kwargs(said, MAX_GEN_TOKS))
    stops = [stop for stop in given.pop("until") if stop]  # an empty one stops nothing
    row: Row = {"max_tokens": given.pop("max_gen_toks"), "stop": stops, "skip_special_tokens": True}
    samples, temperature = given.pop("do_sample"), given.pop("temperature", 0.0)
    known = [field.name for field in fields(SamplingParams) if field.name not in OURS]
    check_keywords(given, (*known, "until", "max_gen_toks", "do_sample"), "generate_until")
    if not samples:
        given = {name: value for name, value in given.items() if name not in OF_DRAWS}  # as hf: they do nothing
        return row | given | {"temperature": 0.0}
    return row | {"top_k": TOP_K} | given | {"temperature": temperature}


def _arguments(requests: Iterable[Instance]) -> list[Any]:
    return [request.args for request in requests]


def _check_answers(kind: str, answers: Sequence[Row]) -> None:
    """InputError names the first request without an answer: its last words are those that were to be scored."""
    wrong = [answer for answer in answers if answer["status"] != "ok"]
    if wrong:
        text = str(wrong[0].get("text", wrong[0].get("prompt")))
        where = f"the context that ends in {shown(text[-40:])}"
        reason = str(wrong[0]["error"]).partition(": ")[2]
        raise InputError(f"{len(wrong)} of {len(answers)} {kind} requests have no answer; after {where}: {reason}")


def main(words: Sequence[str]) -> None:
    """Run lm_eval's command line, with batchgen as a model that it knows."""
    from lm_eval.__main__ import cli_evaluate

    use_flags({})  # errors name arguments of the model, as in Python
    sys.argv = ["lm-eval", *words]
    cli_evaluate()
