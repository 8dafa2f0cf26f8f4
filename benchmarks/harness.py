"""lm-evaluation-harness with its model hf and with batchgen: python -m benchmarks.harness [--large] [--keep FOLDER].

Three tasks on texts that the embedded model tales samples: 200 rows of which of four continuations is the true one
(loglikelihood), the perplexity of 12 texts of about 1,900 tokens (loglikelihood_rolling), and 60 greedy continuations
(generate_until). The same weights are read by hf (transformers, float32) and by batchgen in float32 and in int8;
--large adds random weights of 124M's shape, with 40 rows of each task. Exit code 1 if batchgen's float32 has another
accuracy than hf, or a log-likelihood that differs by more than 1e-3 (of a text: for every 100 tokens).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchgen.generator import Generator
from batchgen.models.convert import convert_checkpoint
from batchgen.models.model import Model
from batchgen.models.shards import load_tensors
from benchmarks.models import SIZE_124M, write_huggingface
from tests.support.tensors import random_tensors
from tests.support.vocabulary import gpt2_vocabulary_dir

ROOT = Path(__file__).resolve().parents[1]
TALES, SAMPLE = ROOT / "data" / "models" / "tales", ROOT / "data" / "prompts" / "sample.jsonl"
N_CHOICES, CONTEXT_WORDS, CHOICE_WORDS = 4, 60, 12
TOLERANCE = 1e-3
HF_BATCH = "8"  # the fastest of 1, 8 and 32

CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
}
UNTIL = {
    "output_type": "generate_until",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{target}}",
    "generation_kwargs": {"until": ["\n", "?"], "max_gen_toks": 40},
    "metric_list": [{"metric": "chrf"}],
}
TASKS = {"tales_choice": CHOICE, "tales_rolling": ROLLING, "tales_until": UNTIL}


# ---- tasks


def sample_texts(n: int = 17) -> list[str]:
    """Texts of tales, n from each of the sample prompts; those of a prompt are neighbours."""
    prompts = [json.loads(line)["prompt"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    options: dict[str, Any] = {"max_tokens": 220, "temperature": 0.8, "ignore_eos": True, "skip_special_tokens": True}
    rows = Generator(TALES, precision="float32").generate(prompts, n=n, seed=17, echo=True, **options)
    return [str(row.completion) for row in rows]


def choice_rows(texts: list[str]) -> Iterator[dict[str, Any]]:
    """The true continuation among those of the next texts, which are mostly of the same prompt."""
    draw = random.Random(17)
    cut = [text.split(" ") for text in texts]
    ends = [" ".join(words[CONTEXT_WORDS : CONTEXT_WORDS + CHOICE_WORDS]) for words in cut]
    for i, words in enumerate(cut):
        order = draw.sample(range(N_CHOICES), N_CHOICES)
        choices = [ends[(i + step) % len(ends)] for step in order]
        yield {"context": " ".join(words[:CONTEXT_WORDS]), "choices": choices, "answer": order.index(0)}


def write_tasks(folder: Path) -> None:
    """The tasks as lm_eval reads them: JSON is YAML."""
    texts = sample_texts()
    choices = list(choice_rows(texts))[:200]
    rows = {
        "tales_choice": choices,
        "tales_rolling": [{"text": "\n\n".join(texts[i : i + 8])} for i in range(0, 96, 8)],
        "tales_until": [row | {"target": row["choices"][row["answer"]]} for row in choices[:60]],
    }
    folder.mkdir(parents=True)
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(f"{json.dumps(row)}\n" for row in rows[name]), encoding="utf-8")
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **task}, indent=2), encoding="utf-8")


# ---- runs


@dataclass(frozen=True, slots=True)
class Run:
    """What one command of lm_eval found, by task: metrics, and for each row its answers."""

    seconds: float
    metrics: dict[str, dict[str, float]]
    answers: dict[str, list[list[Any]]]


def run_harness(words: list[str], folder: Path, output: Path) -> Run:
    """One command of lm_eval; it must not look for anything in a network."""
    common = ["--include_path", str(folder / "tasks"), "--tasks", ",".join(TASKS), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    paths = {"PYTHONPATH": str(ROOT)}
    begin = time.perf_counter()
    command = [sys.executable, "-W", "ignore", *words, *common, "--output_path", str(output)]
    done = subprocess.run(command, env=os.environ | offline | paths, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return read_run(output, seconds)


def read_run(output: Path, seconds: float) -> Run:
    (results,) = output.rglob("results_*.json")
    metrics = json.loads(results.read_text(encoding="utf-8"))["results"]
    answers = {}
    for name in TASKS:
        (samples,) = output.rglob(f"samples_{name}_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
        answers[name] = [[answer for (answer,) in row["resps"]] for row in sorted(rows, key=lambda row: row["doc_id"])]
    return Run(seconds, metrics, answers)


# ---- comparison


def largest_difference(one: Run, other: Run, task: str) -> float:
    """Of two log-likelihoods of the same request."""
    pairs = zip(one.answers[task], other.answers[task], strict=True)
    return max(abs(_log(a) - _log(b)) for row, also in pairs for a, b in zip(row, also, strict=True))


def _log(answer: Any) -> float:
    return float(answer[0] if isinstance(answer, list) else answer)


def same_texts(one: Run, other: Run) -> int:
    return sum(a == b for a, b in zip(one.answers["tales_until"], other.answers["tales_until"], strict=True))


def print_runs(title: str, runs: dict[str, Run]) -> bool:
    """A table of one model's runs beside hf's, and whether batchgen's float32 agrees."""
    exact = runs["hf"]
    print(f"\n| {title} | acc | bits_per_byte | log-likelihood, largest difference | texts of hf's | wall time |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, run in runs.items():
        choice, rolling = run.metrics["tales_choice"], run.metrics["tales_rolling"]
        differences = [largest_difference(exact, run, task) for task in ("tales_choice", "tales_rolling")]
        print(
            f"| {name} | {choice['acc,none']:.3f} | {rolling['bits_per_byte,none']:.5f} "
            f"| {differences[0]:.5f} (a choice), {differences[1]:.5f} (a text) "
            f"| {same_texts(exact, run)} of {len(run.answers['tales_until'])} | {run.seconds:.1f} s |",
            flush=True,
        )
    ours = runs["batchgen float32"]
    same_accuracy = exact.metrics["tales_choice"]["acc,none"] == ours.metrics["tales_choice"]["acc,none"]
    near = largest_difference(exact, ours, "tales_choice") < TOLERANCE
    near_texts = largest_difference(exact, ours, "tales_rolling") < 20 * TOLERANCE
    return same_accuracy and near and near_texts


def compare(title: str, models: tuple[Path, Path], folder: Path, options: list[str]) -> bool:
    """Run all with one model, as Hugging Face's and as ours."""
    huggingface, ours = models
    runs = {"hf": ["-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={huggingface},dtype=float32"]}
    runs["hf"] += ["--device", "cpu", "--batch_size", HF_BATCH]
    for precision in ("float32", "int8"):
        Model.load(ours, precision=precision)  # made once, and not timed
        words = ["-m", "batchgen", "lm-eval", "--model", "batchgen"]
        runs[f"batchgen {precision}"] = [*words, "--model_args", f"model={ours},precision={precision}"]
    name = title.replace(" ", "-")
    outputs = {key: folder / name / key.replace(" ", "-") for key in runs}
    found = {key: run_harness([*words, *options], folder, outputs[key]) for key, words in runs.items()}
    return print_runs(title, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="random weights of 124M's shape too")
    parser.add_argument(
        "--keep", type=Path, help="a folder for tasks, models and samples; without it, they are removed"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="harness-") as scratch:
        folder = (options.keep or Path(scratch)).resolve()
        write_tasks(folder / "tasks")
        tales = Model.load(TALES)
        write_huggingface(folder / "hf-tales", load_tensors(TALES), tales.config, TALES)
        agrees = compare("tales", (folder / "hf-tales", TALES), folder, [])
        if options.large:
            write_huggingface(folder / "hf-124M", random_tensors(SIZE_124M), SIZE_124M, gpt2_vocabulary_dir())
            convert_checkpoint(folder / "hf-124M", folder / "124M", name="random")
            agrees &= compare("random 124M", (folder / "hf-124M", folder / "124M"), folder, ["--limit", "40"])
    sys.exit(0 if agrees else 1)


if __name__ == "__main__":
    main()
