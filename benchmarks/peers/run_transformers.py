"""Hugging Face transformers: static batches of similar length, padded on the left; a shared prefix is read once."""

import copy

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
        prefix = read_prefix(model, task.prompts[0][: task.shared_prefix])
        for batch in batches(task, size):
            outputs = generate(model, [task.prompts[i] for i in batch], task, prefix)
            for place, ids in enumerate(outputs):
                completions[batch[place // task.n] * task.n + place % task.n] = ids
        return completions

    version = f"{transformers.__version__}, torch {torch.__version__}"
    return Ready(complete, version, f"{job.jobs} threads, batch {size}")


def read_prefix(model: transformers.PreTrainedModel, ids: list[int]) -> transformers.DynamicCache | None:
    """The keys and values of a prefix, for one sequence."""
    return model(torch.tensor([ids]), use_cache=True, logits_to_keep=1).past_key_values if ids else None


def generate(
    model: transformers.PreTrainedModel,
    prompts: list[list[int]],
    task: Task,
    prefix: transformers.DynamicCache | None,
) -> Completions:
    """Generate one batch: padding is between the prefix and the rest of a prompt; the mask decides positions."""
    shared, longest = task.shared_prefix, max(map(len, prompts))
    gaps = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([p[:shared] + [PAD] * gap + p[shared:] for p, gap in zip(prompts, gaps, strict=True)])
    mask = torch.tensor([[1] * shared + [0] * gap + [1] * (longest - shared - gap) for gap in gaps])
    cache = copy.deepcopy(prefix)
    if cache:
        cache.batch_repeat_interleave(len(prompts) * task.n)
    sampling = {"do_sample": False}
    if task.temperature:
        sampling = {"do_sample": True, "temperature": task.temperature, "top_k": task.top_k, "top_p": task.top_p}
    output = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=task.max_tokens,
        num_return_sequences=task.n,
        pad_token_id=PAD,
        **sampling,
    )
    return output[:, longest:].tolist()


if __name__ == "__main__":
    serve(load)
