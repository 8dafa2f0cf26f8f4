"""One prompt, completed while you watch: picoGPT's `main`, on the same engine as a job."""

from collections.abc import Iterator
from pathlib import Path

from threadpoolctl import threadpool_limits

from batchgen.errors import UsageError
from batchgen.input.validation import EmptyPrompt, OnTooLong, validate
from batchgen.models.shards import load_manifest
from batchgen.text.stopping import StopStrings, completed_text
from batchgen.text.tokenizer import StreamDecoder, Tokenizer
from batchgen.types import Rejected, Request, SamplingParams
from batchgen.workers.worker import map_engine, to_prompts


def stream_completion(
    model: Path,
    prompt: str,
    params: SamplingParams,
    on_too_long: OnTooLong = "reject",
    empty_prompt: EmptyPrompt = "reject",
) -> Iterator[str]:
    """Yield the completion of one prompt as text, each piece as soon as its characters are certain.

    Joined, they are what a job writes for row 0. Raises UsageError for a prompt that a job would reject.
    """
    manifest, tokenizer = load_manifest(model), Tokenizer.load(model)
    asked = Request(0, "PROMPT", None, prompt, params)
    request = validate(asked, tokenizer, manifest.config.n_ctx, on_too_long, empty_prompt)
    if isinstance(request, Rejected):
        raise UsageError(request.error)
    threadpool_limits(1, user_api="blas")  # as in a worker: two threads give other bits
    engine = map_engine(model, manifest, tokenizer, max_batch=1)
    decoder = StreamDecoder(tokenizer)
    start = request.prompt if params.echo else ""
    may_go = max(map(len, params.stop), default=1) - 1  # characters that may yet turn out to begin a stop string
    text, done, shown = "", 0, 0
    yield start
    for finished, sampled in engine.steps(to_prompts(request, tokenizer), should_stop=StopStrings(tokenizer)):
        for sequence, _ in sampled:
            text += decoder.push(sequence.token_ids[done:])
            done = len(sequence.token_ids)
        for completion in finished:
            text, may_go = completed_text(completion.token_ids, request.params, tokenizer)[0], 0
        certain = max(len(text) - may_go, shown)
        yield text[shown:certain]
        shown = certain
