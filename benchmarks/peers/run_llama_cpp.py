"""llama.cpp through llama-cpp-python's low-level API: continuous batching; shared prefixes and prompts are copied."""

import ctypes
from collections import deque
from dataclasses import dataclass
from typing import Any

import llama_cpp as lib
import numpy as np

from benchmarks.peers.protocol import Completions, Job, Ready, Task, serve

N_BATCH, N_UBATCH = 2048, 512
N_VOCAB = 50_257


@dataclass(slots=True)
class Running:
    """A sample in flight, in one of llama.cpp's sequences."""

    sequence: int
    place: int  # among the completions
    position: int  # of its newest token, which is not read yet
    token: int


@dataclass(frozen=True, slots=True)
class Row:
    """One token to read."""

    token: int
    position: int
    sequence: int
    output: bool


class Context:
    """llama.cpp's context, with a sequence for each sample in flight, and one more for a shared prefix."""

    def __init__(self, job: Job) -> None:
        self.n_parallel: int = job.options["n_parallel"]
        lib.llama_backend_init()
        model_params = lib.llama_model_default_params()
        model_params.use_extra_bufts = job.options["repack"]
        self.model = lib.llama_model_load_from_file(job.model.encode(), model_params)
        longest = max(map(len, job.task.prompts)) + job.task.max_tokens
        params = lib.llama_context_default_params()
        params.n_seq_max = self.n_parallel + 1
        params.n_ctx = params.n_seq_max * -(-longest // 256) * 256
        params.n_batch, params.n_ubatch = N_BATCH, N_UBATCH
        params.n_outputs_max = params.n_seq_max
        params.n_threads = params.n_threads_batch = job.jobs
        params.kv_unified = job.options["kv_unified"]
        self.context = lib.llama_init_from_model(self.model, params)
        self.memory = lib.llama_get_memory(self.context)
        self.arrays = Arrays()

    def read(self, rows: list[Row]) -> None:
        """One pass over the rows; llama.cpp then has the logits of output rows, in their order."""
        status = lib.llama_decode(self.context, self.arrays.batch(rows))
        if status:
            raise RuntimeError(f"llama_decode of {len(rows)} tokens returned {status}")

    def copy(self, source: int, target: int) -> None:
        lib.llama_memory_seq_cp(self.memory, source, target, -1, -1)

    def forget(self, sequence: int) -> None:
        lib.llama_memory_seq_rm(self.memory, sequence, -1, -1)

    def greedy(self, n: int) -> list[int]:
        logits = np.ctypeslib.as_array(lib.llama_get_logits(self.context), shape=(n, N_VOCAB))
        return logits.argmax(axis=1).tolist()


class Arrays:
    """A llama_batch over NumPy arrays, which are fast to fill."""

    def __init__(self) -> None:
        self.token, self.position, self.sequence = (np.zeros(N_BATCH, np.int32) for _ in range(3))
        self.count, self.output = np.ones(N_BATCH, np.int32), np.zeros(N_BATCH, np.int8)
        self.pointers = (self.sequence.ctypes.data + 4 * np.arange(N_BATCH)).astype(np.uintp)

    def batch(self, rows: list[Row]) -> Any:
        n = len(rows)
        self.token[:n] = [row.token for row in rows]
        self.position[:n] = [row.position for row in rows]
        self.sequence[:n] = [row.sequence for row in rows]
        self.output[:n] = [row.output for row in rows]
        int32, int8 = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_int8)
        return lib.llama_batch(
            n_tokens=n,
            token=self.token.ctypes.data_as(int32),
            embd=None,
            pos=self.position.ctypes.data_as(int32),
            n_seq_id=self.count.ctypes.data_as(int32),
            seq_id=self.pointers.ctypes.data_as(ctypes.POINTER(int32)),
            logits=self.output.ctypes.data_as(int8),
        )


class Run:
    """One task, from its first prompt to its last token."""

    def __init__(self, context: Context, task: Task) -> None:
        self.context, self.task = context, task
        self.waiting = deque(sorted(range(len(task.prompts)), key=lambda i: -len(task.prompts[i])))
        self.free = list(range(context.n_parallel))
        self.running: list[Running] = []
        self.completions: Completions = [[] for _ in range(len(task.prompts) * task.n)]
        self.samplers = [sampler(task, seed) for seed in range(context.n_parallel)] if task.temperature else []

    def complete(self) -> Completions:
        lib.llama_memory_clear(self.context.memory, True)
        if self.task.shared_prefix:
            prefix = self.task.prompts[0][: self.task.shared_prefix]
            self.context.read([Row(token, i, self.context.n_parallel, False) for i, token in enumerate(prefix)])
        while self.waiting or self.running:
            self.step()
        for chain in self.samplers:
            lib.llama_sampler_free(chain)
        return self.completions

    def step(self) -> None:
        """One more token for every running sample, and the prompts of as many new samples as fit."""
        rows = [Row(r.token, r.position, r.sequence, True) for r in self.running]
        started: list[tuple[int, list[int]]] = []
        while self.waiting and len(self.free) >= self.task.n:
            prompt = self.task.prompts[self.waiting[0]]
            if len(rows) + len(prompt) - self.task.shared_prefix > N_BATCH:
                break
            sequences = [self.free.pop() for _ in range(self.task.n)]
            rows += self.prompt_rows(prompt, sequences[0])
            started.append((self.waiting.popleft(), sequences))
        self.context.read(rows)
        self.append(rows, started)

    def prompt_rows(self, prompt: list[int], sequence: int) -> list[Row]:
        shared = self.task.shared_prefix
        if shared:
            self.context.copy(self.context.n_parallel, sequence)
        return [Row(prompt[i], i, sequence, i == len(prompt) - 1) for i in range(shared, len(prompt))]

    def append(self, rows: list[Row], started: list[tuple[int, list[int]]]) -> None:
        """Append each sample's next token; finished samples free their sequences."""
        outputs = [number for number, row in enumerate(rows) if row.output]
        chosen = self.context.greedy(len(outputs)) if not self.task.temperature else []
        now: list[Running] = []
        for index, running in enumerate(self.running):
            running.token = self.choose(chosen, index, outputs[index], running.sequence)
            running.position += 1
            now.append(running)
        for index, (number, sequences) in enumerate(started, start=len(self.running)):
            for sample, sequence in enumerate(sequences):
                if sample:
                    self.context.copy(sequences[0], sequence)
                token = self.choose(chosen, index, outputs[index], sequence)
                place = number * self.task.n + sample
                now.append(Running(sequence, place, len(self.task.prompts[number]), token))
        self.running = [running for running in now if not self.finished(running)]

    def choose(self, chosen: list[int], index: int, row: int, sequence: int) -> int:
        if not self.task.temperature:
            return chosen[index]
        return int(lib.llama_sampler_sample(self.samplers[sequence], self.context.context, row))

    def finished(self, running: Running) -> bool:
        ids = self.completions[running.place]
        ids.append(running.token)
        if len(ids) < self.task.max_tokens:
            return False
        self.context.forget(running.sequence)
        self.free.append(running.sequence)
        return True


def sampler(task: Task, seed: int) -> Any:
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_k(task.top_k))
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_p(task.top_p, 1))
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(task.temperature))
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(seed))
    return chain


def load(job: Job) -> Ready:
    context = Context(job)
    o = job.options
    settings = f"{job.jobs} threads, {o['n_parallel']} sequences, kv_unified {o['kv_unified']}, repack {o['repack']}"
    return Ready(lambda task: Run(context, task).complete(), lib.__version__, settings)


if __name__ == "__main__":
    serve(load)
