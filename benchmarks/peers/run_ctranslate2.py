"""CTranslate2: `generate_batch` of token strings, which sorts them by length itself."""

import json
from pathlib import Path
from typing import Any

import ctranslate2

from benchmarks.peers.protocol import Completions, Job, Ready, Task, serve
from benchmarks.peers.scoring import ScoreJob


def open_generator(job: Job | ScoreJob) -> tuple[ctranslate2.Generator, list[str], str]:
    """The model, its token strings by id, and its threads in words."""
    o = job.options
    intra_threads = job.jobs // o["inter_threads"]
    generator = ctranslate2.Generator(
        job.model,
        device="cpu",
        compute_type=o["compute_type"],
        inter_threads=o["inter_threads"],
        intra_threads=intra_threads,
    )
    tokens = json.loads(Path(job.model, "vocabulary.json").read_text(encoding="utf-8"))
    return generator, tokens, f"{o['inter_threads']} x {intra_threads} threads"


def load(job: Job) -> Ready:
    o = job.options
    generator, tokens, threads = open_generator(job)

    def complete(task: Task) -> Completions:
        options = sampling(task) | {"max_batch_size": o["max_batch_size"]}
        static = task.shared_prefix if o.get("static_prompt") else 0
        if static:
            options["static_prompt"] = [tokens[i] for i in task.prompts[0][:static]]
        results = generator.generate_batch(
            [[tokens[i] for i in prompt[static:]] for prompt in task.prompts],
            max_length=task.max_tokens,
            min_length=task.max_tokens,
            include_prompt_in_result=False,
            **options,
        )
        return [ids for result in results for ids in result.sequences_ids]

    settings = f"{threads}, max_batch_size {o['max_batch_size']}"
    return Ready(complete, ctranslate2.__version__, settings + (", static_prompt" if o.get("static_prompt") else ""))


def sampling(task: Task) -> dict[str, Any]:
    if not task.temperature:
        return {"beam_size": 1, "sampling_topk": 1}
    return {
        "beam_size": 1,
        "num_hypotheses": task.n,
        "sampling_temperature": task.temperature,
        "sampling_topk": task.top_k,
        "sampling_topp": task.top_p,
    }


if __name__ == "__main__":
    serve(load)
