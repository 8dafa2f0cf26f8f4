"""Hugging Face transformers: batches of similar length, log_softmax of all logits, and the tokens' values of it."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from threading import Barrier

import torch
import transformers

from benchmarks.peers.scoring import LogProbs, ScoreJob, Scorer, Texts, batches, serve

_loaded: list[transformers.PreTrainedModel] = []  # the model of a process of the pool
_all_here: list[Barrier] = []


def load_model(path: str, threads: int, barrier: Barrier) -> None:
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    _loaded[:], _all_here[:] = [model.eval()], [barrier]


def meet(_: int) -> None:
    """Wait until every process of the pool has loaded the model."""
    _all_here[0].wait()


def score_batch(texts: Texts) -> LogProbs:
    """Padding is on the right, which no earlier token sees."""
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    logits = _loaded[0](ids[:, :-1], use_cache=False).logits  # [n_text, longest - 1, n_vocab]
    log_probs = torch.log_softmax(logits, dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    return [row[: len(text) - 1].tolist() for row, text in zip(log_probs, texts, strict=True)]


def score(pool: ProcessPoolExecutor, size: int, texts: Texts) -> LogProbs:
    found: LogProbs = [[] for _ in texts]
    order = batches(texts, size)
    for batch, rows in zip(order, pool.map(score_batch, [[texts[i] for i in b] for b in order]), strict=True):
        for i, row in zip(batch, rows, strict=True):
            found[i] = row
    return found


def load(job: ScoreJob) -> Scorer:
    processes, size = job.options["processes"], job.options["batch_size"]
    threads = job.jobs // processes
    context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
    pool = ProcessPoolExecutor(processes, context, load_model, (job.model, threads, context.Barrier(processes)))
    list(pool.map(meet, range(processes)))
    settings = f"{processes} x {threads} threads, batch {size}"
    return Scorer(partial(score, pool, size), f"{transformers.__version__}, torch {torch.__version__}", settings)


if __name__ == "__main__":
    serve(load)
