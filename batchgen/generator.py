"""batchgen as a library: a model in this process, for prompts that are already in memory.

For a file of prompts, and for anything that should survive the process, there is run_job.
"""

from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path

from threadpoolctl import threadpool_limits

from batchgen.engine.engine import MAX_BATCH
from batchgen.errors import UsageError
from batchgen.input.validation import make_check
from batchgen.job import DEFAULT_MODEL, Policy
from batchgen.models.model import Model
from batchgen.planning import plan_chunks
from batchgen.text.stopping import StopStrings, completed_text
from batchgen.text.tokenizer import StreamDecoder
from batchgen.types import OutputRow, Rejected, Request, SamplingParams, TokenizedRequest
from batchgen.workers.complete import complete_chunk, map_engine, to_prompts

CHUNK_PROMPTS = 512  # memory for keys and values is taken as it is needed; this bounds the prompts that wait for it


class Generator:
    """A GPT-2 with its buffers, mapped once, on one core; its rows are those of a job with the same parameters.

    >>> from batchgen import Generator
    >>> generator = Generator("tales")
    >>> [row.completion for row in generator.generate(["Once upon a time"], max_tokens=8)]
    """

    def __init__(
        self, model: str | Path = DEFAULT_MODEL, *, kv_bytes: int | None = None, batch_size: int = MAX_BATCH
    ) -> None:
        """model is a name (see `batchgen models`) or a directory; kv_bytes bounds the keys and values in flight.

        Raises ModelError if the model is missing or damaged, UsageError if kv_bytes is too small.
        """
        opened = Model.open(str(model))
        self.config = opened.config
        self.tokenizer = opened.load_tokenizer()
        self._engine = map_engine(opened, self.tokenizer, kv_bytes=kv_bytes or None, max_batch=batch_size)

    def generate(
        self,
        prompts: Iterable[str],
        params: SamplingParams | None = None,
        policy: Policy | None = None,
        **options: object,
    ) -> list[OutputRow]:
        """Complete the prompts: a row for every sample of every prompt, in order.

        options are fields of SamplingParams (max_tokens=40, temperature=0.8, ...) and of Policy (on_too_long, ...),
        instead of params and policy. Raises UsageError, naming the prompt, for one that a job would reject, before
        anything is generated.
        """
        if isinstance(prompts, str):
            raise UsageError(f"prompts is one string ({prompts[:20]!r}); give a list of them: [prompt]")
        asked, policy = _read_options(params, policy, options)
        requests = (Request(row, f"prompts[{row}]", None, prompt, asked) for row, prompt in enumerate(prompts))
        items = [self._check(request, policy) for request in requests]
        with threadpool_limits(1, user_api="blas"):  # as in a worker: with two threads bits differ
            chunks = plan_chunks(items, CHUNK_PROMPTS)
            return [row for chunk in chunks for row in complete_chunk(chunk, asked, self._engine, self.tokenizer)]

    def stream(
        self, prompt: str, params: SamplingParams | None = None, policy: Policy | None = None, **options: object
    ) -> Iterator[str]:
        """Yield the completion of one prompt as text, each piece as soon as its characters are certain.

        Joined, the pieces are what a job writes for row 0, sample 0. Raises UsageError as `generate` does.
        """
        asked, policy = _read_options(params, policy, options)
        request = self._check(Request(0, "PROMPT", None, prompt, replace(asked, n=1, logprobs=None)), policy)
        with threadpool_limits(1, user_api="blas"):
            yield from self._stream(request)

    def _stream(self, request: TokenizedRequest) -> Iterator[str]:
        decoder, params = StreamDecoder(self.tokenizer), request.params
        unsure = max(map(len, params.stop), default=1) - 1  # last characters that may yet begin a stop string
        text, done, shown = "", 0, 0
        yield request.prompt if params.echo else ""
        steps = self._engine.steps(to_prompts(request, self.tokenizer), should_stop=StopStrings(self.tokenizer))
        for finished, sampled in steps:
            for sequence, _ in sampled:
                text += decoder.push(sequence.token_ids[done:])
                done = len(sequence.token_ids)
            for completion in finished:
                text, unsure = completed_text(completion.token_ids, params, self.tokenizer)[0], 0
            certain = max(len(text) - unsure, shown)
            yield text[shown:certain]
            shown = certain

    def _check(self, request: Request, policy: Policy) -> TokenizedRequest:
        item = make_check(self.tokenizer, self.config.n_ctx, policy)(request)
        if isinstance(item, Rejected):
            raise UsageError(item.error)
        return item


def _read_options(
    params: SamplingParams | None, policy: Policy | None, options: dict[str, object]
) -> tuple[SamplingParams, Policy]:
    """The two records, or what keywords make of them; UsageError for both and for a keyword that is neither's."""
    sampling = {field.name for field in fields(SamplingParams)}
    policies = {field.name for field in fields(Policy)}
    for name in options:
        if name not in sampling | policies:
            near = get_close_matches(name, sampling | policies, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else "see SamplingParams and Policy"
            raise UsageError(f"{name!r} is not an option; {remedy}")
    for record, names, given in (("params", sampling, params), ("policy", policies, policy)):
        if given is not None and (both := [name for name in options if name in names]):
            raise UsageError(f"{record} and {', '.join(both)} were given; give the one or the others")
    own = {name: value for name, value in options.items() if name in sampling}
    rules = {name: value for name, value in options.items() if name in policies}
    return params or SamplingParams(**own), policy or Policy(**rules)  # type: ignore[arg-type]
