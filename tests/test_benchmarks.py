"""The benchmarks: seeded workloads of exact sizes, and tables that name what is missing."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from typing import get_args
from xml.etree import ElementTree

import numpy as np
import pytest

from batchgen.engine.engine import Engine
from batchgen.engine.sequence import Prompt
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.params import nest
from batchgen.gpt2.weights import pack
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import Precision, SamplingParams
from benchmarks import bench, datasets, quality, scores
from benchmarks.bench import HEADER, Row, section
from benchmarks.breakdown import measure as measure_steps
from benchmarks.memory import PeakMemory, proportional_bytes, tree
from benchmarks.models import huggingface_tensors, write_safetensors
from benchmarks.peers import run_batchgen, scoring
from benchmarks.peers.protocol import Job, Ready, Task, batches, check, measure
from benchmarks.picture import Line, draw
from benchmarks.systems import SYSTEMS, MissingError, System, run_logged
from benchmarks.workloads import KINDS, N_ORDINARY, make_workload
from tests.support.models import write_byte_model
from tests.support.tensors import random_tensors
from tests.support.vocabulary import gpt2_vocabulary_dir

CONFIG = GPT2Config(n_vocab=20, n_ctx=8, n_embd=4, n_head=2, n_layer=2)


def test_a_score_is_of_the_second_model_against_the_first():
    uniform, sure = np.log(np.full((2, 4), 0.25)), np.log(np.array([[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1]]))
    window = np.array([[3, 0, 1]])  # both expect 0 after 3, and 1 after 0
    assert quality.compare([sure], [sure], window) == quality.Score(pytest.approx(1 / 0.7), 0, 1)
    score = quality.compare([sure], [uniform], window)
    assert score.perplexity == pytest.approx(4)
    assert score.divergence == pytest.approx(0.7 * np.log(2.8) + 0.3 * np.log(0.4))
    assert score.same_best == 0.5


def test_windows_predict_every_token_once():
    windows = quality.cut_windows(list(range(10)), 3)
    assert windows[:, 1:].ravel().tolist() == list(range(1, 10))
    assert (windows[:, 0] == windows[:, 1] - 1).all()


@pytest.mark.parametrize("name", KINDS)
def test_a_workload_depends_on_its_seed_alone(name):
    assert make_workload(name, 0.1) == make_workload(name, 0.1)
    assert make_workload(name, 0.1) != make_workload(name, 0.1, seed=1)


@pytest.mark.parametrize(
    ("name", "rows", "new_tokens"),
    [("W1", 192, 12_288), ("W2", 192, 6_144), ("W3", 24, 12_288), ("W4", 64, 512), ("W5", 192, 12_288)],
)
def test_counts_are_exact(name, rows, new_tokens):
    task = make_workload(name).task
    assert len(task.prompts) == rows
    assert task.new_tokens == new_tokens


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("scale", [0.01, 0.25, 1.0])
def test_prompts_are_ordinary_tokens_and_fit_the_context(name, scale):
    task = make_workload(name, scale).task
    assert all(0 <= token < N_ORDINARY for prompt in task.prompts for token in prompt)
    assert max(map(len, task.prompts)) + task.max_tokens <= 1024


def test_w1_is_a_mixture_of_lengths():
    lengths = sorted(len(prompt) for prompt in make_workload("W1").task.prompts)
    assert lengths[0] == 7
    assert 600 <= lengths[-1] <= 700
    assert 60 <= lengths[96] <= 70
    assert 17_000 <= sum(lengths) <= 18_200


def test_w2_shares_its_prefix_and_nothing_else():
    task = make_workload("W2").task
    assert len({tuple(prompt[:480]) for prompt in task.prompts}) == 1
    own = [tuple(prompt[480:]) for prompt in task.prompts]
    assert len(set(own)) == len(own)
    assert all(10 <= len(ids) <= 60 for ids in own)


def test_w4_is_long_prompts():
    lengths = sorted(len(prompt) for prompt in make_workload("W4").task.prompts)
    assert (lengths[0], lengths[-1]) == (300, 900)


def test_half_of_w5_is_duplicates():
    prompts = [tuple(prompt) for prompt in make_workload("W5").task.prompts]
    assert len(set(prompts)) * 2 == len(prompts)


def test_a_job_is_the_same_after_its_file_is_read(tmp_path):
    job = Job("model", make_workload("W3", 0.1).task, 2, 1, "scratch", {"batch_size": 8})
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job


def test_batches_have_every_prompt_once_by_length():
    task = Task([[0] * n for n in (3, 1, 2, 5, 4)], max_tokens=1)
    assert batches(task, 2) == [[3, 4], [0, 2], [1]]


def test_a_system_that_generates_too_little_is_an_error():
    task = Task([[1], [2]], max_tokens=3)
    check(task, [[0, 0, 0], [0, 0, 0]])
    with pytest.raises(ValueError, match="asked for 2 completions of 3 tokens, got 2 of"):
        check(task, [[0, 0, 0], [0, 0]])
    with pytest.raises(ValueError, match="got 1 of"):
        check(task, [[0, 0, 0]])


def test_measuring_repeats_and_reports():
    task = Task([[1], [2]], max_tokens=3)

    def load(job):
        return Ready(lambda t: [[7] * t.max_tokens for _ in range(len(t.prompts) * t.n)], "1.0", "fast")

    result = measure(load, Job("model", task, 1, 3, ""))
    assert len(result["seconds"]) == 3
    assert result["first_tokens"] == [7, 7]


def test_a_part_of_a_task_spans_its_lengths():
    task = make_workload("W4").task
    part = task.part(4, 2)
    lengths = [len(prompt) for prompt in part.prompts]
    assert len(lengths) == 16
    assert max(lengths) - min(lengths) > 500
    assert part.max_tokens == 2


@pytest.mark.parametrize("name", KINDS)
def test_a_slice_fills_the_largest_batch_of_every_core(name):
    workload = make_workload(name)
    part = workload.slice(2)
    assert len(part.task.prompts) >= 2 * max(workload.batch_sizes)
    assert len(part.task.prompts) <= len(workload.task.prompts)
    assert part.name != workload.name


def test_tuning_changes_one_option_after_the_other(tmp_path, monkeypatch):
    """b is tried with the best a; settings that fail are not taken, and much slower ones are ended early."""
    seconds = {(1, 1): 5.0, (2, 1): 3.0, (3, 1): None, (2, 2): 2.0}
    limits = []

    def run(system, part, options, jobs, repeat, cache, limit):
        limits.append(limit)
        taken = seconds[options["a"], options["b"]]
        if taken is None:
            raise MissingError("out of memory")
        return {"seconds": [taken]}

    monkeypatch.setattr(bench, "run_system", run)
    system = System("peer", "run_peer", lambda system, cache: cache, choices=lambda *_: {"a": (1, 2, 3), "b": (1, 2)})
    args = Namespace(jobs=2, tune=True, limit=100.0)
    best, tried = bench.best_options(system, make_workload("W1", 0.1), args, tmp_path)
    assert best == {"a": 2, "b": 2}
    assert list(tried.values()) == [5.0, 3.0, "out of memory", 2.0]
    assert limits[0] == 100
    assert all(5 <= limit < 6 for limit in limits[1:])
    assert bench.best_options(system, make_workload("W5", 0.1), args, tmp_path) == (best, tried)
    assert len(limits) == 4  # W5 uses the settings of W1, which are known now
    bench.best_options(system, make_workload("W2", 0.1), args, tmp_path)
    assert len(limits) == 8
    args.tune = False
    assert bench.best_options(system, make_workload("W1", 0.1), args, tmp_path) == ({"a": 1, "b": 1}, {})


def test_tuning_fails_with_the_reason_if_nothing_runs(tmp_path, monkeypatch):
    def run(*_):
        raise MissingError("no such library")

    monkeypatch.setattr(bench, "run_system", run)
    system = System("peer", "run_peer", lambda system, cache: cache, choices=lambda *_: {"a": (1, 2)})
    with pytest.raises(MissingError, match="no such library"):
        bench.best_options(system, make_workload("W1", 0.1), Namespace(jobs=1, tune=True, limit=1.0), tmp_path)


def test_huggingface_names_cover_every_tensor_once():
    tensors = random_tensors(CONFIG)
    names = [name for name, _ in huggingface_tensors(tensors)]
    assert len(set(names)) == len(tensors) - 1  # lm_head is wte
    assert {"transformer.wte.weight", "transformer.h.1.attn.c_attn.bias", "transformer.ln_f.weight"} <= set(names)


def test_safetensors_can_be_read_back(tmp_path):
    tensors = dict(huggingface_tensors(random_tensors(CONFIG)))
    write_safetensors(tmp_path / "model.safetensors", tensors)
    data = (tmp_path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    for name, tensor in tensors.items():
        first, last = header[name]["data_offsets"]
        values = np.frombuffer(data[start + first : start + last], "<f4").reshape(header[name]["shape"])
        np.testing.assert_array_equal(values, tensor)


def test_a_missing_system_is_a_row_with_its_reason():
    workload = make_workload("W1", 0.05)
    ours = Row("W1", "batchgen-float32", tokens_per_s=200.0, seconds=[1.0], first_tokens=[1, 2])
    int8 = replace(ours, system="batchgen-int8", tokens_per_s=500.0)
    peer = replace(ours, system="peer", tokens_per_s=100.0, first_tokens=[1, 3])
    lines = section(workload, [ours, int8, peer, Row("W1", "other", missing="no wheel")], 100.0, 2)
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0] == HEADER
    assert table[4][:4] == ["peer", "100", "2.00x", "5.00x"]
    assert table[4][6] == "50%"
    assert table[5] == ["other", "missing", "", "", "", "", "", "no wheel"]


def test_texts_to_score_have_exact_numbers_of_tokens():
    words = scores.Words(Tokenizer.load(gpt2_vocabulary_dir()))
    texts = [words.text(n) for n in (1, 7, 200)]
    assert [len(words.tokens(text)) for text in texts] == [2, 8, 201]  # <|endoftext|> before each
    assert len(words.tokens(texts[1] + texts[2])) == 208  # what is joined has no token of both
    assert scores.Words(words.tokenizer).text(1) == texts[0]


def test_a_peer_must_score_every_token_but_the_first(tmp_path):
    job = scoring.ScoreJob("model", [[5, 6, 7], [8, 9]], 2)
    job.write(tmp_path / "job.json")
    assert scoring.ScoreJob.read(tmp_path / "job.json") == job

    def load(first):
        return lambda job: scoring.Scorer(lambda texts: [[-1.0] * len(ids[first:]) for ids in texts], "1.0", "fast")

    assert scoring.measure(load(1), job)["log_probs"] == [[-1.0, -1.0], [-1.0]]
    with pytest.raises(ValueError, match="one log-probability for each token"):
        scoring.measure(load(0), job)
    assert scoring.batches([[0] * n for n in (3, 1, 2, 5, 4)], 2) == [[3, 4], [0, 2], [1]]


def test_scores_are_compared_by_speed_and_by_token():
    assert set(scores.SCRIPTS) <= set(SYSTEMS)
    ours = scores.Measured("batchgen float32", 2, 400, 2.0, 2**30, [[-1.0, -2.0], [-3.0]])
    int8 = replace(ours, system="batchgen int8", seconds=1.0)
    peer = scores.Measured("peer", 1, 200, 4.0, 2**29, [[-1.5, -2.0]], "1.0")  # the first of the texts alone
    lines = [scores.cells(row, [ours, int8]) for row in (ours, peer, scores.Measured("other", missing="no wheel"))]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert table[0][2:8] == ["1.0", "200", "1.00x", "2.00x", "1.00", ""]
    assert table[1][2:8] == ["0.2", "50", "4.00x", "8.00x", "0.50", "5.0e-01"]
    assert table[2] == ["other", "missing", "", "", "", "", "", "", "no wheel"]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_counts_children():
    code = "import sys, time; kept = bytearray(50_000_000); kept[::4096] = b'x' * len(kept[::4096]); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert child.pid in tree(os.getpid())
        with PeakMemory(os.getpid()) as memory:
            while proportional_bytes(child.pid) < 50_000_000:
                assert child.poll() is None
        own = proportional_bytes(os.getpid())
    finally:
        child.kill()
        child.wait()
    assert memory.peak > own


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_failing_command_gives_its_reason(tmp_path):
    command = [sys.executable, "-c", "raise RuntimeError('no such library')"]
    with pytest.raises(MissingError, match="RuntimeError: no such library"):
        run_logged(command, tmp_path / "log", dict(os.environ), 10)
    with pytest.raises(MissingError, match="no result in 0 s"):
        run_logged([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", dict(os.environ), 0.2)


@pytest.mark.parametrize("precision", get_args(Precision))
def test_the_clock_separates_the_parts_of_a_step(precision):
    weights = pack(nest(random_tensors(CONFIG), CONFIG.n_layer), precision)
    engine = Engine(weights, CONFIG, eos_ids=(), kv_bytes=2**20)
    prompt = Prompt(0, (1, 2, 3), SamplingParams(max_tokens=1, ignore_eos=True), (0,))
    case = measure_steps(engine, "Prefill", 3, lambda: list(engine.generate([prompt])))
    assert set(case.parts) >= {"products with weights", "attention", "layer norm", "sampling"}
    assert sum(case.shapes.values()) == 4 * CONFIG.n_layer + 1
    assert case.products_alone > 0


def test_a_picture_has_a_line_for_each_precision():
    svg = draw("Tokens/s", [Line("float32", [(1, 20.0), (4, 60.5)]), Line("int8", [(1, 70.0), (4, 199.0)])])
    ElementTree.fromstring(svg)
    assert svg.count("<polyline") == 2
    assert ">200<" in svg


def test_batchgen_itself_can_be_measured(tmp_path):
    model = write_byte_model(tmp_path / "bytes")
    task = Task([[97, 98, 99], [100]], max_tokens=4)
    ready = run_batchgen.load(Job(str(model), task, 2, 1, str(tmp_path), {"precision": "int8"}))
    assert ready.warm_up is not None
    check(task, ready.complete(task))
    started = ready.warm_up()
    assert 0 < started["worker_first_token_s"] < started["worker_first_part_s"]


@pytest.mark.processes
def test_made_up_outputs_are_such_as_the_commands_take(capsys):
    """The benchmark compares what reuse and merge write with what a whole run would have written."""
    datasets.main(["reuse", "merge", "peek", "--rows", "80", "--parts", "3", "--jobs", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("`")[1].split()[0] for line in lines if "`" in line] == ["generate"] * 2 + ["merge"] + [
        "peek"
    ] * 3
