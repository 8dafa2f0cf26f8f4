"""Hugging Face transformers: static batches of similar length, padded on the left."""

import torch
import transformers

from benchmarks.peers.protocol import Completions, Job, Ready, Task, batches, serve

PAD = 50_256


def load(job: Job) -> Ready:
    torch.set_num_threads(job.jobs)
    torch.set_grad_enabled(False)
    transformers.set_seed(0)
    dtype, size = getattr(torch, job.options["dtype"]), job.options["batch_size"]
    model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None  # so that every completion has max_tokens tokens

    def complete(task: Task) -> Completions:
        completions: Completions = [[] for _ in range(len(task.prompts) * task.n)]
        for batch in batches(task, size):
            outputs = generate(model, [task.prompts[i] for i in batch], task)
            for place, ids in enumerate(outputs):
                completions[batch[place // task.n] * task.n + place % task.n] = ids
        return completions

    version = f"{transformers.__version__}, torch {torch.__version__}"
    return Ready(complete, version, f"{job.jobs} threads, batch {size}")


def generate(model: transformers.PreTrainedModel, prompts: list[list[int]], task: Task) -> Completions:
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    sampling = {"do_sample": False}
    if task.temperature:
        sampling = {"do_sample": True, "temperature": task.temperature, "top_k": task.top_k, "top_p": task.top_p}
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=task.max_tokens,
        num_return_sequences=task.n,
        pad_token_id=PAD,
        **sampling,
    )
    return output[:, longest:].tolist()


if __name__ == "__main__":
    serve(load)
