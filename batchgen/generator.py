"""batchgen as a library: a model in this process, for prompts in memory; for what should survive it, see run_job."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from batchgen.engine.limits import MAX_BATCH
from batchgen.errors import ModelError, UsageError
from batchgen.gpt2.machine_code import prepare_kernels
from batchgen.input.grouping import TOGETHER
from batchgen.input.validation import make_check
from batchgen.job import DEFAULT_MODEL, Policy, WorkOptions
from batchgen.models.model import Model
from batchgen.options import known_keywords, shown, split_keywords
from batchgen.planning import plan_chunks
from batchgen.text.stopping import StopStrings, completed_text
from batchgen.text.tokenizer import StreamDecoder
from batchgen.types import OutputRow, Precision, Rejected, Request, SamplingParams, TokenizedRequest
from batchgen.workers.complete import complete_chunk, map_engine, to_prompts
from batchgen.workers.marker import RECORD, Marker

if TYPE_CHECKING:
    from batchgen.engine.engine import Engine, Step

CHUNK_PROMPTS = 512  # memory for keys and values is taken as it is needed; this bounds the prompts that wait for it

OnPrompts = Callable[[int, int], object]  # prompts done, prompts in all


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
        marker = _Progress(len(items), progress) if progress else None
        rows: list[OutputRow] = []
        with self._free_engine() as engine:
            for chunk in plan_chunks(items, CHUNK_PROMPTS, TOGETHER):
                rows += complete_chunk(chunk, asked, engine, self.tokenizer, marker)
        return sorted(rows, key=lambda row: (row.row, row.sample))

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
        decoder = StreamDecoder(self.tokenizer, skip_special=params.skip_special_tokens)
        unsure = max(map(len, params.stop), default=1) - 1  # last characters that may yet begin a stop string
        text, done, shown = "", 0, 0
        yield request.prompt if params.echo else ""
        for finished, sampled in self._steps(request):
            for sequence, _ in sampled:
                text += decoder.push(sequence.token_ids[done:])
                done = len(sequence.token_ids)
            for completion in finished:
                text, unsure = completed_text(completion.token_ids, params, self.tokenizer)[0], 0
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

    def _check(self, request: Request, policy: Policy) -> TokenizedRequest:
        item = make_check(self.tokenizer, self.config.n_ctx, policy)(request)
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


def _requests(prompts: Iterable[str], params: SamplingParams) -> Iterator[Request]:
    """Raises UsageError for what is no list of strings: its elements would be characters, keys or columns."""
    if isinstance(prompts, str):
        raise UsageError(f"prompts is one string ({prompts[:20]!r}); give a list of them: [prompt]")
    if isinstance(prompts, Mapping) or hasattr(prompts, "columns"):
        raise UsageError(f"prompts is a {type(prompts).__name__}; give one column of it: prompts['prompt']")
    if not isinstance(prompts, Iterable):
        raise UsageError(f"prompts is {shown(prompts)}; give a list of strings")
    for row, prompt in enumerate(prompts):
        _check_text(f"prompts[{row}]", prompt)
        yield Request(row, f"prompts[{row}]", None, prompt, params)


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
