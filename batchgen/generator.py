"""batchgen as a library: a model in this process, for prompts that are already in memory.

For a file of prompts, and for anything that should survive the process, there is run_job.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from threadpoolctl import threadpool_limits

from batchgen.engine.engine import MAX_BATCH
from batchgen.errors import UsageError
from batchgen.input.validation import EmptyPrompt, OnTooLong, validate
from batchgen.models.registry import DEFAULT_MODEL, find_model
from batchgen.models.shards import load_manifest
from batchgen.planning import plan_chunks
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import OutputRow, Rejected, Request, SamplingParams
from batchgen.workers.worker import complete_chunk, map_engine

CHUNK_PROMPTS = 512  # keys and values are taken as they are needed; this bounds what waits for them


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

        Raises ModelError where the model is not there or damaged, UsageError where kv_bytes is too small.
        """
        directory = find_model(str(model))
        manifest = load_manifest(directory)
        self.config = manifest.config
        self.tokenizer = Tokenizer.load(directory)
        self._engine = map_engine(directory, manifest, self.tokenizer, kv_bytes=kv_bytes or None, max_batch=batch_size)

    def generate(
        self,
        prompts: Iterable[str],
        params: SamplingParams | None = None,
        *,
        on_too_long: OnTooLong = "reject",
        empty_prompt: EmptyPrompt = "reject",
        **options: object,
    ) -> list[OutputRow]:
        """Complete the prompts: a row for every sample of every prompt, in order.

        options are the fields of SamplingParams (max_tokens=40, temperature=0.8, ...), if params is not given.
        Raises UsageError, naming the prompt, for one that a job would reject, before anything is generated.
        """
        if isinstance(prompts, str):
            raise UsageError(f"prompts is one string ({prompts[:20]!r}); give a list of them: [prompt]")
        if params is not None and options:
            raise UsageError(f"params and {', '.join(options)} were given; give the one or the others")
        asked = params or SamplingParams(**options)  # type: ignore[arg-type]
        items = []
        for row, prompt in enumerate(prompts):
            request = Request(row, f"prompts[{row}]", None, prompt, asked)
            item = validate(request, self.tokenizer, self.config.n_ctx, on_too_long, empty_prompt)
            if isinstance(item, Rejected):
                raise UsageError(_as_argument(item.error))
            items.append(item)
        with threadpool_limits(1, user_api="blas"):  # as in a worker: two threads give other bits
            chunks = plan_chunks(items, CHUNK_PROMPTS)
            return [row for chunk in chunks for row in complete_chunk(chunk, asked, self._engine, self.tokenizer)]


def _as_argument(error: str) -> str:
    """The remedy as Python has it: `--on-too-long truncate-left` is on_too_long="truncate-left"."""
    return re.sub(r"--([a-z-]+) ([a-z-]+)", lambda option: f'{option[1].replace("-", "_")}="{option[2]}"', error)
