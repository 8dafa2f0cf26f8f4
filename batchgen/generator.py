"""batchgen as a library: a model in this process, for prompts in memory; for what should survive it, see run_job."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import numpy as np

from batchgen.engine.limits import MAX_BATCH, kv_bytes_per_token
from batchgen.errors import ModelError, UsageError
from batchgen.gpt2.machine_code import prepare_kernels
from batchgen.gpt2.params import Array
from batchgen.input.grouping import TOGETHER
from batchgen.input.targets import read_choices, read_completion
from batchgen.input.validation import make_check
from batchgen.job import DEFAULT_MODEL, EmbedOptions, Policy, Pool, ScoreOptions, TaskOptions, WorkOptions, with_kind
from batchgen.models.model import Model
from batchgen.options import known_keywords, shown, split_keywords
from batchgen.planning import fit_task, plan_chunks, within_memory
from batchgen.text.stopping import StopStrings, completed_text
from batchgen.text.tokenizer import StreamDecoder
from batchgen.types import (
    READING,
    Kind,
    OutputRow,
    Precision,
    Rejected,
    Request,
    SamplingParams,
    ScoreRow,
    TokenizedRequest,
)
from batchgen.workers.complete import map_engine, to_prompts
from batchgen.workers.marker import RECORD, Marker
from batchgen.workers.tasks import rows_of_chunk

if TYPE_CHECKING:
    from batchgen.engine.engine import Engine, Step

CHUNK_PROMPTS = 512  # memory for keys and values is taken as it is needed; this bounds the prompts that wait for it

OnPrompts = Callable[[int, int], object]  # prompts done, prompts in all
T = TypeVar("T")


@known_keywords
class Generator:
    """A GPT-2 with its buffers, mapped once, one core for each call; its rows are those of a job with equal parameters.

    Threads may share it, streams may be open at the same time, and a forked process may go on with it: calls at the
    same time have their own buffers (up to kv_bytes each). Pickled, it is the model's name, for joblib and the like.

    >>> from batchgen import Generator
    >>> generator = Generator("tales")
    >>> [row.completion for row in generator.generate(["Once upon a time"], max_tokens=8)]
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        precision: Precision | None = None,
        kv_bytes: int | None = None,
        batch_size: int = MAX_BATCH,
    ) -> None:
        """model is a name (see `batchgen models`) or a directory; kv_bytes bounds the keys and values in flight."""
        precision = WorkOptions(precision=precision).precision  # checked
        opened = Model.open(str(model), precision)
        self.config, self._model = opened.config, opened
        self.tokenizer = opened.load_tokenizer()
        prepare_kernels()
        self._engine = map_engine(opened, self.tokenizer, kv_bytes=kv_bytes or None, max_batch=batch_size)
        self._idle = [self._engine]  # engines that no call uses
        is_folder = opened.directory == Path(model).expanduser()
        name = str(opened.directory.absolute()) if is_folder else str(model)
        self._pickled = name, opened.precision, kv_bytes, batch_size, opened.hash

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, self._pickled

    def generate(
        self,
        prompts: Iterable[str],
        params: SamplingParams | None = None,
        policy: Policy | None = None,
        *,
        progress: OnPrompts | None = None,
        **options: object,
    ) -> list[OutputRow]:
        """Complete the prompts: a row for every sample of every prompt, in order.

        options are fields of SamplingParams (max_tokens=40, temperature=0.8, ...) and of Policy (on_too_long, ...),
        instead of params and policy. Raises UsageError, naming the prompt, for one that a job would reject.
        """
        asked, policy = _read_options(params, policy, options)
        items = [self._check(request, policy) for request in _requests(prompts, asked)]
        return sorted(self._rows(items, asked, None, progress), key=lambda row: (row.row, row.sample))

    def score(
        self,
        prompts: Iterable[str],
        completions: Iterable[str | Iterable[str]] | None = None,
        *,
        progress: OnPrompts | None = None,
        **options: object,
    ) -> list[ScoreRow]:
        """How likely the model finds texts, or each prompt's completion, or its choices (a list): a row for each.

        options are fields of ScoreOptions (per_token, stride, first_token) and of Policy. Raises UsageError, naming
        the text, for one that a job would reject.

        >>> [row] = generator.score(["The king said to his"], [[" daughter", " spoon"]])
        >>> row.best, row.logprobs
        """
        own, rules = split_keywords(options, ScoreOptions, Policy)
        asked, policy = ScoreOptions(**own), Policy(**rules)  # type: ignore[arg-type]
        requests = list(_requests(prompts, READING))
        if completions is not None:
            requests, kind = _add_targets(requests, completions)
            asked = with_kind(asked, kind)
        task = fit_task(asked, self.config)
        items = [self._check(request, policy, task) for request in requests]
        return sorted(self._rows(items, READING, task, progress), key=lambda row: row.row)

    def embed(
        self,
        texts: Iterable[str],
        *,
        layer: int = -1,
        pool: Pool = "mean",
        progress: OnPrompts | None = None,
        **options: object,
    ) -> Array:
        """A vector for each text, [n, n_embd] float32; layer and pool are those of EmbedOptions, options of Policy.

        Raises UsageError, naming the text, for one that a job would reject.
        """
        own, rules = split_keywords({"layer": layer, "pool": pool, **options}, EmbedOptions, Policy)
        task, policy = fit_task(EmbedOptions(**own), self.config), Policy(**rules)  # type: ignore[arg-type]
        items = [self._check(request, policy, task) for request in _requests(texts, READING, "texts")]
        vectors = np.empty((len(items), self.config.n_embd), np.float32)
        for row in self._rows(items, READING, task, progress):
            if row.error is not None:  # the weights overflow
                raise ModelError(row.error)
            vectors[row.row] = row.embedding
        return vectors

    def _rows(
        self,
        items: list[TokenizedRequest],
        params: SamplingParams,
        task: TaskOptions | None,
        progress: OnPrompts | None,
    ) -> Iterator[Any]:
        """The rows of the task, chunk by chunk."""
        marker = _Progress(len(items), progress) if progress else None
        with self._free_engine() as engine:
            for chunk in plan_chunks(items, CHUNK_PROMPTS, TOGETHER):
                yield from rows_of_chunk(chunk, task, params, engine, self.tokenizer, marker)

    def stream(
        self, prompt: str, params: SamplingParams | None = None, policy: Policy | None = None, **options: object
    ) -> Iterator[str]:
        """Yield what a job writes for row 0, sample 0, in pieces: each as soon as its characters are certain."""
        asked, policy = _read_options(params, policy, options)
        _check_text("PROMPT", prompt)
        request = self._check(Request(0, "PROMPT", None, prompt, replace(asked, n=1, logprobs=None)), policy)
        return self._stream(request)

    def _stream(self, request: TokenizedRequest) -> Iterator[str]:
        params = request.params
        n_given = len(self.tokenizer.decode_bytes(request.all_again[0]))
        decoder = StreamDecoder(self.tokenizer, skip_special=params.skip_special_tokens, n_skipped=n_given)
        unsure = max(map(len, params.stop), default=1) - 1  # last characters that may yet begin a stop string
        text, done, shown = "", 0, 0
        yield request.prompt if params.echo else ""
        for finished, sampled in self._steps(request):
            for sequence, _ in sampled:
                text += decoder.push(sequence.token_ids[done:])
                done = len(sequence.token_ids)
            for completion in finished:
                text, unsure = completed_text(completion.token_ids, params, self.tokenizer, n_given)[0], 0
            certain = max(len(text) - unsure, shown)
            yield text[shown:certain]
            shown = certain

    def _steps(self, request: TokenizedRequest) -> Iterator["Step"]:
        """The engine's steps."""
        prompts = to_prompts(request, self.tokenizer)
        with self._free_engine() as engine:
            yield from engine.steps(prompts, should_stop=StopStrings(self.tokenizer))

    @contextmanager
    def _free_engine(self) -> Iterator["Engine"]:
        """An engine that no other call uses; after an error or an abandoned stream it is not used again."""
        try:
            engine = self._idle.pop()
        except IndexError:
            engine = self._engine.twin()
        yield engine
        self._model.check_unchanged()
        self._idle.append(engine)

    def _check(self, request: Request, policy: Policy, task: TaskOptions | None = None) -> TokenizedRequest:
        precision, room = self._model.precision, self._engine.arena.n_tokens
        kv_bytes = room * kv_bytes_per_token(self.config, precision)
        check = make_check(self.tokenizer, self.config.n_ctx, policy, task)
        item = within_memory(check, self.config, precision, kv_bytes)(request)
        if isinstance(item, Rejected):
            raise UsageError(item.error)
        return item


@lru_cache(maxsize=1)  # a pool's process is sent the same one with every task
def _open_again(model: str, precision: Precision, kv_bytes: int | None, batch_size: int, model_hash: str) -> Generator:
    """A Generator that was pickled; ModelError if the model's name means another one now, or on this machine."""
    generator = Generator(model, precision=precision, kv_bytes=kv_bytes, batch_size=batch_size)
    if (found := generator._model.hash) != model_hash:
        raise ModelError(f"model {model} is {found[:12]} here, and {model_hash[:12]} was pickled; copy it here")
    return generator


class _Progress(Marker):
    """Reports each prompt that is done."""

    def __init__(self, prompts: int, report: OnPrompts) -> None:
        super().__init__(np.zeros(1, RECORD))
        self._prompts, self._done, self._report = prompts, 0, report

    def add(self, rows: int, prompt_tokens: int) -> None:
        if rows:
            self._done += rows
            self._report(self._done, self._prompts)


def _requests(prompts: Iterable[str], params: SamplingParams, name: str = "prompts") -> Iterator[Request]:
    for row, prompt in enumerate(_elements(name, prompts)):
        _check_text(f"{name}[{row}]", prompt)
        yield Request(row, f"{name}[{row}]", None, str(prompt), params)  # not a subclass, such as NumPy's


def _add_targets(requests: list[Request], completions: Iterable[object]) -> tuple[list[Request], Kind]:
    """The requests with a completion each, or all with choices."""
    given = [list(one) if _is_list(one) else one for one in _elements("completions", completions)]
    if len(given) != len(requests):
        counts = f"{len(requests)} prompts and {len(given)} completions were given"
        raise UsageError(f"{counts}; give one for each prompt, or a list of choices for each")
    kind: Kind = "choices" if any(isinstance(one, list) for one in given) else "completion"
    read = read_choices if kind == "choices" else read_completion
    return [replace(one, targets=_read(read, row, given[row])) for row, one in enumerate(requests)], kind


def _is_list(value: object) -> TypeGuard[Iterable[object]]:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def _read(read: Callable[[object], tuple[str, ...]], row: int, value: object) -> tuple[str, ...]:
    try:
        return tuple(map(str, read(value)))
    except UsageError as error:
        raise UsageError(f"completions[{row}]: {error}") from error


def _elements(name: str, texts: Iterable[T]) -> Iterable[T]:
    """Raises UsageError for what is no list: its elements would be characters, keys or columns."""
    noun = name.removesuffix("s")
    if isinstance(texts, str):
        raise UsageError(f"{name} is one string ({texts[:20]!r}); give a list of them: [{noun}]")
    if isinstance(texts, Mapping) or hasattr(texts, "columns"):
        raise UsageError(f"{name} is a {type(texts).__name__}; give one column of it: {name}['{noun}']")
    if not isinstance(texts, Iterable):
        raise UsageError(f"{name} is {shown(texts)}; give a list of strings")
    return texts


def _check_text(place: str, prompt: object) -> None:
    if not isinstance(prompt, str):
        kind = type(prompt).__name__
        raise UsageError(f"{place}: {shown(prompt)} ({kind}) is not a string; leave it out, or give a text")


def _read_options(
    params: SamplingParams | None, policy: Policy | None, options: dict[str, object]
) -> tuple[SamplingParams, Policy]:
    """The two records, or what keywords make of them; UsageError for both and for a keyword that is neither's."""
    own, rules = split_keywords(options, SamplingParams, Policy)
    for name, kind, given, keywords in (("params", SamplingParams, params, own), ("policy", Policy, policy, rules)):
        if not isinstance(given, kind | None):
            raise UsageError(f"{name} is {shown(given)}; give a {kind.__name__}, or its fields as keywords")
        if given is not None and keywords:
            raise UsageError(f"{name} and {', '.join(keywords)} were given; give the one or the others")
    return params or SamplingParams(**own), policy or Policy(**rules)  # type: ignore[arg-type]
