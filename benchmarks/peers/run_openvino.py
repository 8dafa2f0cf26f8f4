"""OpenVINO GenAI: its continuous batching with a prefix cache, one engine on all cores."""

from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai

from benchmarks.peers.protocol import Completions, Job, Ready, Task, serve

CACHE_GIB = 3


def load(job: Job) -> Ready:
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GIB
    scheduler.max_num_seqs = 256
    scheduler.max_num_batched_tokens = 1024
    scheduler.enable_prefix_caching = bool(job.task.shared_prefix)
    precision = "f32" if job.options["kind"] == "float32" else "bf16"
    properties = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": job.jobs}
    if precision == "f32":
        properties["KV_CACHE_PRECISION"] = "f32"
    pipeline = genai.ContinuousBatchingPipeline(Path(job.model), scheduler, "CPU", properties)

    def complete(task: Task) -> Completions:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = task.max_tokens
        config.ignore_eos = True
        config.num_return_sequences = task.n
        if task.temperature:
            config.do_sample = True
            config.temperature, config.top_k, config.top_p = task.temperature, task.top_k, task.top_p
        inputs = [ov.Tensor(np.array([prompt], np.int64)) for prompt in task.prompts]
        results = pipeline.generate(inputs, [config] * len(inputs))
        return [list(ids) for result in results for ids in result.m_generation_ids]

    settings = f"{job.jobs} threads, {precision}, {CACHE_GIB} GiB of keys and values"
    return Ready(complete, ov.__version__.split("-")[0], settings)


if __name__ == "__main__":
    serve(load)
