"""CTranslate2: `score_batch` of token strings, which sorts them by length itself."""

import ctranslate2

from benchmarks.peers.run_ctranslate2 import open_generator
from benchmarks.peers.scoring import LogProbs, ScoreJob, Scorer, Texts, serve


def load(job: ScoreJob) -> Scorer:
    most = job.options["max_batch_size"]
    generator, tokens, threads = open_generator(job)

    def score(texts: Texts) -> LogProbs:
        strings = [[tokens[i] for i in text] for text in texts]
        return [result.log_probs for result in generator.score_batch(strings, max_batch_size=most)]

    return Scorer(score, ctranslate2.__version__, f"{threads}, max_batch_size {most}")


if __name__ == "__main__":
    serve(load)
