"""CTranslate2: `score_batch` of token strings, which sorts them by length itself."""

import json
from pathlib import Path

import ctranslate2

from benchmarks.peers.scoring import LogProbs, ScoreJob, Scorer, Texts, serve


def load(job: ScoreJob) -> Scorer:
    o = job.options
    threads = job.jobs // o["inter_threads"]
    generator = ctranslate2.Generator(
        job.model,
        device="cpu",
        compute_type=o["compute_type"],
        inter_threads=o["inter_threads"],
        intra_threads=threads,
    )
    tokens = json.loads(Path(job.model, "vocabulary.json").read_text(encoding="utf-8"))

    def score(texts: Texts) -> LogProbs:
        strings = [[tokens[i] for i in text] for text in texts]
        return [result.log_probs for result in generator.score_batch(strings, max_batch_size=o["max_batch_size"])]

    settings = f"{o['inter_threads']} x {threads} threads, max_batch_size {o['max_batch_size']}"
    return Scorer(score, ctranslate2.__version__, settings)


if __name__ == "__main__":
    serve(load)
