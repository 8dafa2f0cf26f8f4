"""generator.py and the package itself: what a job writes, for prompts in memory."""

import json
import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count, zip_longest
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from joblib import Parallel, delayed

import batchgen
from batchgen import Generator, Job, SamplingParams, WorkOptions, run_job
from batchgen.errors import ModelError, UsageError
from batchgen.generator import _open_again
from batchgen.gpt2.forward import Forward
from batchgen.models.shards import Description, write_model
from tests.support import reference
from tests.support.jobs import make_job
from tests.support.logits import gpt2
from tests.support.models import BYTES, sharp_tensors, write_byte_model, write_wide_model

OTHERS = ["abc", "the second", "x" * 90]
PARAMETERS = [
    SamplingParams(max_tokens=100),
    SamplingParams(max_tokens=1),
    SamplingParams(max_tokens=90, temperature=0.9, seed=3),
    SamplingParams(max_tokens=90, temperature=1.5, top_k=200, repetition_penalty=1.2, seed=11),
    SamplingParams(max_tokens=60, temperature=5.0, ignore_eos=True, min_tokens=60),
    SamplingParams(max_tokens=90, temperature=2.0, seed=5, stop=("e", "ab", "the end")),
    SamplingParams(max_tokens=90, temperature=2.0, seed=6, stop=("\ufffd",), include_stop=True, echo=True),
    SamplingParams(max_tokens=90, temperature=2.0, seed=7, stop=("zz",), min_tokens=20, bad_words=("a", "e")),
    SamplingParams(max_tokens=90, logit_bias=((195, 100.0),), stop_loops=True),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("generator") / "bytes")


@pytest.fixture(scope="module")
def generator(model) -> Generator:
    return Generator(model)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_rows_are_those_of_a_job(model, tmp_path, precision):
    prompts = ["abc" * (1 + row % 9) for row in range(40)]
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in prompts))
    params = SamplingParams(max_tokens=7, temperature=0.9, n=2, seed=5)
    run_job(
        Job(tmp_path / "p.jsonl", tmp_path / "o.parquet", str(model), params, work=WorkOptions(precision=precision))
    )
    written = pq.read_table(tmp_path / "o.parquet").to_pylist()
    rows = Generator(model, precision=precision).generate(prompts, params)
    columns = ("row", "sample", "prompt", "completion", "completion_tokens", "finish_reason", "seed", "status")
    assert [[getattr(row, name) for name in columns] for row in rows] == [
        [row[name] for name in columns] for row in written
    ]


def test_options_are_the_fields_of_sampling_params(generator):
    [row] = generator.generate(["abc"], max_tokens=3, ignore_eos=True)
    assert (row.completion_tokens, row.finish_reason) == (3, "length")
    assert generator.generate(["abc"], SamplingParams(max_tokens=3, ignore_eos=True)) == [row]


def test_more_prompts_than_a_chunk_come_back_in_order(generator):
    rows = generator.generate((f"{row}" for row in range(1100)), max_tokens=1)
    assert [row.prompt for row in rows] == [f"{row}" for row in range(1100)]
    assert [row.row for row in rows] == list(range(1100))


def test_no_prompts_are_no_rows(generator):
    assert generator.generate([]) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["a", ""], {}, r"prompts\[1\]: the prompt is empty"),
        (["a" * 500], {}, r"prompts\[0\]: .*exceed n_ctx 128"),
        (["\ud800"], {}, r"prompts\[0\]: .*surrogate"),
        (["a"], {"max_tokens": 0}, "max_tokens 0 is out of range"),
        ([""], {}, "pass empty_prompt='unconditional'"),
        (["a" * 500], {}, "pass on_too_long='truncate-left'"),
        (["a", None], {}, r"prompts\[1\]: None \(NoneType\) is not a string; leave it out"),
        (["a", "b", float("nan")], {}, r"prompts\[2\]: nan \(float\) is not a string"),
        (["a", pd.NA], {}, r"prompts\[1\]: <NA> \(NAType\) is not a string"),
        ([{"prompt": "a"}], {}, r"prompts\[0\]: {'prompt': 'a'} \(dict\) is not a string"),
        ({"prompt": ["a"]}, {}, r"prompts is a dict; give one column of it: prompts\['prompt'\]"),
        (pd.DataFrame({"prompt": ["a"]}), {}, "prompts is a DataFrame; give one column of it"),
        (b"abc", {}, r"prompts\[0\]: 97 \(int\) is not a string"),
        ("abc", {}, r"prompts is one string \('abc'\); give a list of them: \[prompt\]"),
        (["a"], {"params": SamplingParams(), "seed": 1}, "params and seed were given; give the one or the others"),
    ],
)
def test_what_a_job_would_reject_is_an_error_that_names_the_prompt(python_names, generator, prompts, options, message):
    with pytest.raises(UsageError, match=message):
        generator.generate(prompts, **options)


def test_lists_are_written_as_in_python(generator):
    whole = generator.generate(["abc"], max_tokens=20, ignore_eos=True)[0].completion
    tuples = generator.generate(["abc"], max_tokens=20, ignore_eos=True, stop=(whole[5],), logit_bias=((1, -5.0),))
    written = {"stop": whole[5], "logit_bias": {1: -5.0}}
    assert generator.generate(["abc"], max_tokens=20, ignore_eos=True, **written) == tuples
    assert len(tuples[0].completion) <= 5


def test_an_unknown_option_is_an_error(generator):
    with pytest.raises(
        UsageError, match="'max_tokenz' is not an option of SamplingParams or Policy; did you mean 'max_tokens'"
    ):
        generator.generate(["a"], max_tokenz=3)


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(ModelError, match="unknown model 'nowhere'"):
        Generator("nowhere")


# ---- score


def expected_logprobs(text: str, first: int) -> np.ndarray:
    """The log-probabilities of the bytes of a text from `first` on, in float64."""
    ids = list(text.encode())
    x = reference.logits(ids, sharp_tensors(BYTES), BYTES.n_head)
    table = (
        x - np.log(np.exp(x - x.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True)) - x.max(axis=1, keepdims=True)
    )
    return table[np.arange(first - 1, len(ids) - 1), ids[first:]]


def test_a_completion_has_the_log_probability_of_its_tokens(generator):
    pairs = [("Once upon", " a time"), ("ab", "c"), ("Once upon", " the")]
    rows = generator.score([prompt for prompt, _ in pairs], [completion for _, completion in pairs], per_token=True)
    for row, (prompt, completion) in zip(rows, pairs, strict=True):
        logprobs = expected_logprobs(prompt + completion, len(prompt))
        np.testing.assert_allclose(row.token_logprobs, logprobs, atol=1e-4)
        assert row.logprob == pytest.approx(logprobs.sum(), abs=1e-4)
        assert (row.prompt_tokens, row.tokens) == (len(prompt), len(completion))
        assert row.greedy == (set(row.token_ranks) == {1})


def test_choices_are_scored_as_completions_are(generator):
    choices = [["c", "dd"], ["e"], ("f", "gg", "hhh")]
    rows = generator.score(["ab", "abc", "Once"], choices)
    for prompt, row, own in zip(["ab", "abc", "Once"], rows, choices, strict=True):
        alone = [generator.score([prompt], [choice])[0].logprob for choice in own]
        assert row.logprobs == tuple(alone)
        assert row.best == int(np.argmax(alone))
    assert rows[1].choices == ("e",)


def test_a_text_is_scored_alone(generator):
    [row, other] = generator.score(["Once upon", "abc"], first_token="given")
    nats = -expected_logprobs("Once upon", 1).sum()
    assert (row.tokens, row.nats) == (8, pytest.approx(nats, abs=1e-3))
    assert row.perplexity == pytest.approx(np.exp(nats / 8), rel=1e-4)
    assert generator.score(["abc"], first_token="given") == [replace(other, row=0)]


def test_completions_may_come_from_a_column_of_arrays(generator):
    frame = pd.DataFrame({"prompt": ["ab", "cd"], "choices": [np.array(["x", "y"]), np.array(["z"])]})
    found = generator.score(frame["prompt"].to_numpy(str), frame["choices"])
    assert repr(found) == repr(generator.score(["ab", "cd"], [["x", "y"], ["z"]]))  # strings of NumPy are strings


@pytest.mark.parametrize(
    ("prompts", "completions", "options", "message"),
    [
        ("ab", ["c"], {}, "prompts is one string"),
        (["ab"], "c", {}, r"completions is one string \('c'\); give a list of them: \[completion\]"),
        (["ab"], {"a": "c"}, {}, r"completions is a dict; give one column of it: completions\['completion'\]"),
        (["ab"], pd.DataFrame({"c": ["c"]}), {}, "completions is a DataFrame; give one column"),
        (["ab", "cd"], ["c"], {}, "2 prompts and 1 completions were given; give one for each prompt, or a list"),
        (["ab"], [None], {}, r"completions\[0\]: the completion is null"),
        (["ab"], [3], {}, r"completions\[0\]: the completion is a number \(3\)"),
        (["ab"], [b"c"], {}, r"completions\[0\]: the completion is "),
        (["ab"], [""], {}, r"completions\[0\]: the completion is empty"),
        (["ab"], [[]], {}, r"completions\[0\]: the list of choices is empty"),
        (["ab", "cd"], [["x"], [1.5]], {}, r"completions\[1\]: choice 0 \(from 0\) is a number \(1.5\)"),
        (["ab", "cd"], [["x"], "y"], {}, r"completions\[1\]: the choices are 'y', which is no list"),
        (["ab", None], None, {}, r"prompts\[1\]: None \(NoneType\) is not a string"),
        (["a" * 500], ["c"], {}, r"prompts\[0\]: .*128"),
        (["ab"], None, {"temperature": 1}, "'temperature' is not an option of ScoreOptions or Policy"),
        (["ab"], None, {"stride": 0}, "stride '0': must be a whole number"),
        (["ab"], ["c"], {"stride": 9}, "stride=9 is about a text that is scored alone; leave it out"),
        (["ab"], None, {"stride": 129}, "stride=129 is out of range"),
    ],
)
def test_what_cannot_be_scored_is_named(python_names, generator, prompts, completions, options, message):
    with pytest.raises(UsageError, match=message):
        generator.score(prompts, completions, **options)


# ---- stream


def stream_completion(model: Path, prompt: str, params: SamplingParams, **policy):
    return Generator(model, batch_size=1).stream(prompt, params, **policy)


@pytest.mark.parametrize("params", PARAMETERS, ids=range(len(PARAMETERS)))
def test_the_joined_pieces_are_row_0_of_a_job(model, tmp_path, params):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ["Once upon", *OTHERS]))
    run_job(make_job(path, tmp_path / "out.parquet", str(model), params, jobs=1))
    row = pq.read_table(tmp_path / "out.parquet").to_pylist()[0]
    assert "".join(stream_completion(model, "Once upon", params)) == row["completion"]


def test_a_stream_yields_text_while_it_is_generated(model):
    pieces = stream_completion(model, "Once upon", SamplingParams(max_tokens=100))
    assert sum(bool(piece) for piece in pieces) > 10


def test_a_stream_may_be_closed_early_and_another_begun(model):
    params = SamplingParams(max_tokens=50)
    whole = "".join(stream_completion(model, "Once", params))
    pieces = stream_completion(model, "Once", params)
    begun = next(pieces) + next(pieces)
    pieces.close()
    assert whole.startswith(begun)
    assert "".join(stream_completion(model, "Once", params)) == whole


@pytest.mark.parametrize(("prompt", "named"), [("", "the prompt is empty"), ("x" * 120, "exceed n_ctx 128")])
def test_a_stream_refuses_what_a_job_would_reject(model, prompt, named):
    with pytest.raises(UsageError, match=named):
        next(stream_completion(model, prompt, SamplingParams(max_tokens=9)))


def test_a_stream_of_no_tokens_is_the_prompt_that_it_begins_with(model):
    assert "".join(stream_completion(model, "abc", SamplingParams(max_tokens=0, echo=True))) == "abc"
    assert "".join(stream_completion(model, "abc", SamplingParams(max_tokens=0, prompt_logprobs=1))) == ""


def test_a_stream_has_the_options_that_its_errors_name(model):
    nine, eight = (SamplingParams(max_tokens=n, ignore_eos=True) for n in (9, 8))
    shortened = stream_completion(model, "x" * 120, nine, on_too_long="shorten")
    assert "".join(shortened) == "".join(stream_completion(model, "x" * 120, eight))
    truncated = stream_completion(model, "y" * 9 + "x" * 119, nine, on_too_long="truncate-left")
    assert "".join(truncated) == "".join(stream_completion(model, "x" * 119, nine))
    assert "".join(stream_completion(model, "", nine, empty_prompt="unconditional"))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (None, {}, "prompts is None; give a list of strings"),
        (["a"], {"params": {"n": 2}}, "params is .*; give a SamplingParams, or its fields as keywords"),
        (["a"], {"policy": {"trim": True}}, "policy is .*; give a Policy, or its fields as keywords"),
    ],
)
def test_what_is_no_list_and_no_record_is_refused_by_name(prompts, options, message, generator):
    with pytest.raises(UsageError, match=message):
        generator.generate(prompts, **options)


def test_a_stream_refuses_at_the_call_what_is_no_prompt(generator):
    with pytest.raises(UsageError, match=r"PROMPT: None \(NoneType\) is not a string"):
        generator.stream(None)


# ---- one generator in many places


GREEDY = SamplingParams(max_tokens=12)
SAMPLED = SamplingParams(max_tokens=12, temperature=2.0, seed=3)


def texts(rows) -> list[str]:
    return [row.completion for row in rows]


@pytest.fixture
def eager_threads():
    """Threads change after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_that_share_a_generator_get_what_each_would_get_alone(model, eager_threads):
    generator = Generator(model)
    asked = [([f"{row % 4} and the king" * (1 + row % 3)], (GREEDY, SAMPLED)[row % 2]) for row in range(40)]
    alone = [texts(generator.generate(*one)) for one in asked]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda one: texts(generator.generate(*one)), asked))
    assert sum(a == b for a, b in zip(alone, together, strict=True)) == 40
    assert [texts(generator.generate(*one)) for one in asked[:4]] == alone[:4]


def test_jobs_in_two_threads_do_not_share_workers(model, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Once upon"}\n{"prompt": "The king had"}\n' * 20)
    jobs = [make_job(tmp_path / "p.jsonl", tmp_path / f"{n}.parquet", str(model), SAMPLED, jobs=n) for n in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        assert [summary.ok for summary in pool.map(run_job, jobs)] == [40, 40]
    first, second = (pq.read_table(job.output.path) for job in jobs)
    assert first.equals(second)


def test_streams_take_turns_and_calls_come_between(model):
    generator, prompts = Generator(model), ["Once upon", "The king had", "A fox"]
    alone = ["".join(generator.stream(prompt, SAMPLED)) for prompt in prompts]
    between = texts(generator.generate(prompts, SAMPLED))
    joined = [""] * len(prompts)
    for pieces in zip_longest(*(generator.stream(prompt, SAMPLED) for prompt in prompts), fillvalue=""):
        joined = [text + piece for text, piece in zip(joined, pieces, strict=True)]
        assert texts(generator.generate(prompts, SAMPLED)) == between
    assert joined == alone


def test_a_stream_that_is_abandoned_half_way_leaves_the_next_calls_right(model):
    generator = Generator(model)
    alone = "".join(generator.stream("Once upon", SAMPLED))
    held = generator.stream("Once upon", SAMPLED)
    begun = [next(held) for _ in range(3)]
    assert "".join(generator.stream("Once upon", SAMPLED)) == alone
    assert texts(generator.generate(["Once upon"], SAMPLED)) == [alone]
    assert "".join([*begun, *held]) == alone


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ZeroDivisionError])
def test_after_any_exception_the_next_call_is_right(model, monkeypatch, error):
    generator, prompts = Generator(model), ["Once upon", "The king had", "A fox"]
    alone = texts(generator.generate(prompts, SAMPLED))
    block, calls = Forward._transformer_block, count()

    def fails(*arguments, **named):
        if next(calls) == 3:  # between two layers
            raise error
        return block(*arguments, **named)

    monkeypatch.setattr(Forward, "_transformer_block", fails)
    with pytest.raises(error):
        generator.generate(prompts, SAMPLED)
    assert texts(generator.generate(prompts, SAMPLED)) == alone


def test_a_call_within_a_call_is_right(model):
    generator, inner = Generator(model), []
    alone = texts(generator.generate(["The king had"], SAMPLED))
    rows = generator.generate(
        ["Once", "upon"],
        SAMPLED,
        progress=lambda *_: inner.append(texts(generator.generate(["The king had"], SAMPLED))),
    )
    assert inner == [alone, alone]
    assert texts(rows) == texts(generator.generate(["Once", "upon"], SAMPLED))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_goes_on_with_a_generator_and_its_streams(model):
    generator = Generator(model)
    alone = "".join(generator.stream("Once upon", SAMPLED))
    stream = generator.stream("Once upon", SAMPLED)
    begun = next(stream) + next(stream)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(
        target=lambda: answers.put([begun + "".join(stream), *texts(generator.generate(["Once upon"], SAMPLED))])
    )
    child.start()
    mine = [begun + "".join(stream), *texts(generator.generate(["Once upon"], SAMPLED))]
    assert answers.get(timeout=60) == mine == [alone, alone]
    child.join()


def test_a_pickled_generator_is_its_models_name(model, tmp_path):
    generator = Generator(model, batch_size=3)
    data = pickle.dumps(generator)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert texts(again.generate(["Once"], SAMPLED)) == texts(generator.generate(["Once"], SAMPLED))
    assert again._engine.max_batch == 3
    assert pickle.loads(data) is again  # a pool's process opens it once
    other = write_byte_model(tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match="was pickled"):
        _open_again(str(other), *generator._pickled[1:])


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_joblib_shares_a_generator_also_after_a_job(model, backend, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Once upon"}\n')
    run_job(make_job(tmp_path / "p.jsonl", tmp_path / "o.parquet", str(model), SAMPLED, jobs=1))
    generator, prompts = Generator(model), ["Once upon", "The king had", "A fox"]
    alone = [texts(generator.generate([prompt], SAMPLED)) for prompt in prompts]
    found = Parallel(2, backend=backend)(delayed(generator.generate)([prompt], SAMPLED) for prompt in prompts)
    assert list(map(texts, found)) == alone


def test_progress_counts_every_prompt(generator):
    seen = []
    generator.generate(["a", "b", "a", "c"], max_tokens=2, n=3, temperature=1.0, progress=lambda *one: seen.append(one))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


# ---- the package


def test_all_public_names_can_be_imported():
    for name in batchgen.__all__:
        assert getattr(batchgen, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        batchgen.nothing  # noqa: B018


def test_importing_the_package_imports_no_numpy():
    code = "import sys, batchgen; sys.exit('numpy' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- ids that no token has: 64 rows of wte past the vocabulary and in its holes, with the largest logits


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Generator:
    return Generator(write_wide_model(tmp_path_factory.mktemp("wide") / "wide"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "n": 20},
        {"temperature": 100.0, "n": 20, "top_k": 300},
        {"temperature": 100.0, "n": 20, "top_p": 0.999},
        {"temperature": 100.0, "n": 20, "min_p": 1e-9},
        {"temperature": 100.0, "n": 20, "top_k": 2, "bad_words": ("a", "e")},
        {"logit_bias": tuple((token, -100.0) for token in range(256))},
        {"logit_bias": tuple((token, -100.0) for token in range(256)), "temperature": 100.0, "n": 20},
        {"repetition_penalty": 100.0, "presence_penalty": 100.0, "frequency_penalty": 100.0},
        {"repetition_penalty": 0.01, "temperature": 2.0, "n": 20},
        {"min_tokens": 40, "stop_token_ids": tuple(range(64))},
        {"bad_words": tuple(map(chr, range(32, 96)))},
    ],
)
def test_ids_that_no_token_has_are_never_drawn(options, wide):
    for row in wide.generate(["abc", "x"], max_tokens=40, ignore_eos=not options.get("min_tokens"), **options):
        assert set(row.completion_token_ids) <= {*range(256), 300}
        assert len(row.completion_token_ids) == 40


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_log_probabilities_are_normalised_over_the_tokens_alone(temperature, wide):
    [row] = wide.generate(["abc"], max_tokens=9, temperature=temperature, logprobs=100, ignore_eos=True)
    params = wide._model.load_params()
    logits = gpt2([*b"abc", *row.completion_token_ids][:-1], **params, n_head=BYTES.n_head)[2:].astype(float)
    assert logits[:, 256:300].min() > logits[:, :256].max()
    real = [*range(256), 300]
    expected = logits[:, real] - np.log(np.exp(logits[:, real]).sum(axis=1, keepdims=True))
    rows = zip(row.completion_token_ids, row.logprobs, row.top_logprobs, strict=True)
    for i, (token, logprob, top) in enumerate(rows):
        assert logprob == pytest.approx(expected[i, real.index(token)], abs=1e-4)
        assert len(top) == 100
        assert {entry[0] for entry in top} <= set(real)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Generator:
    """Two tokens, 0 and 5, and nine rows of wte."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "encoder.json").write_text('{"a": 0, "b": 5}')
    (folder / "vocab.bpe").write_text("")
    tensors = sharp_tensors(replace(BYTES, n_vocab=9))
    del tensors["lm_head"]
    description = Description("ab", replace(BYTES, n_vocab=9), {})
    write_model(folder / "ab", description, tensors.items(), tokenizer_dir=folder)
    return Generator(folder / "ab")


def test_top_logprobs_name_no_more_tokens_than_there_are(two):
    [row] = two.generate(["ab"], max_tokens=5, logprobs=9)
    assert [{entry[0] for entry in top} for top in row.top_logprobs] == [{0, 5}] * 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "options", [{"bad_words": ("a", "b")}, {"min_tokens": 2, "stop_token_ids": (0,), "bad_words": "b"}]
)
def test_parameters_that_leave_no_token_to_draw_are_refused(options, temperature, two):
    with pytest.raises(UsageError, match="bad_words and min_tokens may ban every token of this vocabulary of 2"):
        two.generate(["ab"], max_tokens=5, temperature=temperature, **options)
    fewer = options | {"bad_words": ()}
    assert {*two.generate(["ab"], max_tokens=5, **fewer)[0].completion_token_ids} <= {0, 5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {260: 100.0}}, "logit_bias has token id 260, which no token has; correct it"),
        ({"stop_token_ids": (299,)}, "stop_token_ids has token id 299, which no token has"),
        ({"stop_token_ids": (301,)}, r"token id 301, outside the vocabulary \(0 to 300\)"),
    ],
)
def test_a_parameter_cannot_name_an_id_that_no_token_has(options, message, wide):
    with pytest.raises(UsageError, match=message):
        wide.generate(["abc"], **options)
