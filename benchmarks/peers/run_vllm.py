"""vLLM for CPUs: continuous batching, prefix cache, one engine on all cores."""

import os
from typing import Any

import vllm
from vllm import LLM, SamplingParams

from benchmarks.peers.protocol import Completions, Job, Ready, Task, serve


def load(job: Job) -> Ready:
    options: dict[str, Any] = dict(job.options)
    llm = LLM(
        job.model,
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        max_model_len=1024,
        disable_log_stats=True,
        seed=0,
        **options,
    )

    def complete(task: Task) -> Completions:
        llm.reset_prefix_cache()  # which an earlier call has filled
        params = SamplingParams(
            max_tokens=task.max_tokens,
            n=task.n,
            temperature=task.temperature,
            top_k=task.top_k,
            top_p=task.top_p,
            ignore_eos=True,
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in task.prompts]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [list(sample.token_ids) for output in outputs for sample in output.outputs]

    shown = f"{job.jobs} threads, prefix cache, {os.environ['VLLM_CPU_KVCACHE_SPACE']} GiB of keys and values"
    return Ready(complete, vllm.__version__, f"{shown}, blocks of {options.get('block_size', 128)}")


if __name__ == "__main__":  # vLLM starts processes that import this file
    serve(load)
