"""jobs/harness.py: lm-evaluation-harness gets the answers that its own tokenization and the readable model give."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from batchgen.errors import InputError, UsageError
from batchgen.gpt2 import pico
from batchgen.jobs.cli import app
from batchgen.models.model import Model

api = pytest.importorskip("lm_eval.api.model", reason="lm_eval is not installed (pip install '.[lm-eval]')")

from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.utils import postprocess_generated_text  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

from batchgen.jobs.harness import BatchgenLM, row_parameters  # noqa: E402

TALES = Model.open("tales")
LONG = "The king had a daughter, and she went into the wood. " * 60
PAIRS = [
    ("Once upon a time", " there was a king"),
    ("Once upon a time ", "there was a king"),  # the space goes to the continuation
    ("Once upon a time \n ", "\n there"),
    ("Once upon a ti", "me there was"),  # other tokens together than apart
    ("", "The king"),
    ("", "<|endoftext|>The king"),
    ("<|endoftext|>Once", " upon"),
    ("Ein König", " naïve 日本"),
    (LONG, " and a queen"),  # longer than n_ctx
    (LONG, " and a wolf"),
    ("Once upon a time", " there was a king"),
]
TEXTS = ["The king", "", "a", LONG[:1500], LONG, "<|endoftext|>The king"]


def requests(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=one) for one in arguments]


class Readable(api.TemplateLM):
    """The harness's own way from texts to tokens, and the readable model, one request at a time."""

    eot_token_id = 2559

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.n_ctx = TALES.load_tokenizer().encode, TALES.config.n_ctx
        self.params = {name: value for name, value in TALES.load_params().items() if name != "lm_head"}  # wte does
        self.params["n_head"] = TALES.config.n_head

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return self.encode(string, "parse")

    def _loglikelihood_tokens(self, requests, **kwargs):
        return [self.score(context, continuation) for _, context, continuation in requests]

    def score(self, context, continuation):
        ids = (context + continuation)[-(self.n_ctx + 1) :]
        logits = pico.gpt2(ids[:-1], **self.params)[-len(continuation) :].astype(np.float64)
        wanted = logits[np.arange(len(continuation)), continuation]
        total = (wanted - np.log(np.exp(logits).sum(axis=1))).sum()
        return float(total), bool((logits.max(axis=1) == wanted).all())

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return [
            sum(self.score(*make_disjoint_window(window))[0] for window in self.windows(request.args[0]))
            for request in requests
        ]

    def windows(self, text):
        return get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.n_ctx, context_len=1)

    def generate_until(self, requests, disable_tqdm=False):
        return [self.write(request.args[0], **request.args[1]) for request in requests]

    def write(self, context, until, max_gen_toks):
        ids = self.tok_encode(context)[-(self.n_ctx - max_gen_toks) :]
        return postprocess_generated_text(self.continue_(ids, max_gen_toks), until, None)

    def continue_(self, ids, n):
        head, params = self.params["n_head"], {k: v for k, v in self.params.items() if k != "n_head"}
        return TALES.load_tokenizer().decode(pico.generate(ids, params, head, n))


@pytest.fixture(scope="module")
def readable():
    return Readable()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return BatchgenLM("tales", precision="float32", jobs=1, work_dir=str(tmp_path_factory.mktemp("work")))


# ---- answers


def test_log_likelihoods_are_of_the_tokens_that_the_harness_scores(model, readable, caplog):
    pairs = requests(*PAIRS, ("Once", readable.continue_(readable.encode("Once"), 3)))
    found, expected = (one.loglikelihood(pairs, disable_tqdm=True) for one in (model, readable))
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[-1][1]
    assert found[0] == found[-2]
    assert "2 loglikelihood requests are longer than the model's 512 tokens" in caplog.text


def test_texts_of_any_length_have_the_log_likelihood_of_the_harness_windows(model, readable):
    texts = requests(*((text,) for text in TEXTS))
    found, expected = (one.loglikelihood_rolling(texts, disable_tqdm=True) for one in (model, readable))
    assert found == pytest.approx(expected, abs=2e-3)
    assert found[1] == 0.0


def test_greedy_continuations_end_before_the_first_of_the_strings(model, readable, caplog):
    asked = {"until": [" and", "\n\n"], "max_gen_toks": 4}
    contexts = requests(*((context, asked) for context in (LONG, "Once upon a time", "The wolf said")))
    found, expected = (one.generate_until(contexts, disable_tqdm=True) for one in (model, readable))
    assert found == expected
    assert "1 generate_until requests are longer" in caplog.text


def test_equal_requests_that_sample_have_their_own_draws_which_the_seed_gives_again(model):
    again = requests(*[("Once upon a time", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8})] * 3)
    found = model.generate_until(again, disable_tqdm=True)
    assert len(set(found)) == 3
    assert found == BatchgenLM("tales", precision="float32", jobs=1).generate_until(again, disable_tqdm=True)


def test_answers_go_to_the_harness_cache_and_are_done_once_in_a_work_dir(tmp_path):
    lm, cached = BatchgenLM("tales", jobs=1, work_dir=str(tmp_path / "new")), []
    lm.set_cache_hook(SimpleNamespace(add_partial=lambda *one: cached.append(one)))
    asked = requests(("Once", " upon"), ("Once", " more"))
    found = lm.loglikelihood(asked, disable_tqdm=True)
    assert cached == [("loglikelihood", one.args, answer) for one, answer in zip(asked, found, strict=True)]
    (output,) = (tmp_path / "new").glob("loglikelihood-*.parquet")
    written = output.stat().st_mtime_ns
    assert lm.loglikelihood(asked, disable_tqdm=True) == found
    assert output.stat().st_mtime_ns == written
    other = BatchgenLM("tales", jobs=1, precision="int8", work_dir=str(tmp_path / "new"))
    assert other.loglikelihood(asked, disable_tqdm=True) != found


# ---- what is refused


def test_a_request_that_cannot_be_answered_is_named(model):
    with pytest.raises(InputError, match=r"^1 of 2 loglikelihood requests .* ends in 'Once a': .* leaves none to the"):
        model.loglikelihood(requests(("a", " b"), ("Once a", LONG)), disable_tqdm=True)
    with pytest.raises(InputError, match=r"^1 of 1 .* ends in 'a': the completion is empty, and has no token to score"):
        model.loglikelihood(requests(("a", "")), disable_tqdm=True)
    with pytest.raises(UsageError, match=r"max_gen_toks 512 is out of range \(1 to 511: n_ctx is 512\); lower it"):
        model.generate_until(requests(("a", {"max_gen_toks": 512})), disable_tqdm=True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pretrained": "gpt2"}, "'pretrained' is not an option of the model batchgen; these are: model, seed"),
        ({"precison": "int8"}, "did you mean 'precision'"),
        ({"precision": "int4"}, "precision 'int4' is none of float32, int8"),
        ({"seed": -1}, "seed -1 is out of range"),
    ],
)
def test_an_argument_of_another_model_is_refused_by_name(given, words):
    with pytest.raises(UsageError, match=words):
        BatchgenLM(**given)


def test_what_the_harness_gives_every_model_changes_nothing():
    lm = BatchgenLM.create_from_arg_string(
        "model=tales,jobs=2", {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}
    )
    assert lm.get_model_info()["model_sha"] == TALES.hash
    with pytest.raises(UsageError, match="no chat template"):
        lm.tokenizer_name  # noqa: B018


# ---- parameters of generation

GREEDY = {"max_tokens": 256, "stop": [], "temperature": 0.0, "skip_special_tokens": True}


@pytest.mark.parametrize(
    ("asked", "row"),
    [
        ({}, GREEDY),
        ({"until": None, "max_gen_toks": 8}, GREEDY | {"max_tokens": 8}),
        ({"until": "\n", "do_sample": False, "temperature": 0.0}, GREEDY | {"stop": ["\n"]}),
        ({"until": ["a", ""], "max_new_tokens": 4, "top_p": 0.9}, GREEDY | {"stop": ["a"], "max_tokens": 4}),
        ({"do_sample": True, "temperature": 0.7}, GREEDY | {"temperature": 0.7, "top_k": 50}),
        ({"temperature": 1, "top_p": 0.9, "top_k": 0}, GREEDY | {"temperature": 1.0, "top_p": 0.9, "top_k": 0}),
        ({"num_beams": 1, "repetition_penalty": 1.1}, GREEDY | {"num_beams": 1, "repetition_penalty": 1.1}),
        ({"num_beams": 4, "top_k": 50, "early_stopping": True}, GREEDY | {"num_beams": 4, "early_stopping": True}),
    ],
)
def test_generation_arguments_mean_what_hf_makes_of_them(asked, row):
    assert row_parameters(asked) == row


@pytest.mark.parametrize("name", ["num_beam_groups", "max_length", "stop", "echo"])
def test_a_generation_argument_that_batchgen_does_not_know_is_refused(name):
    with pytest.raises(UsageError, match=f"'{name}' is not an option of generate_until"):
        row_parameters({name: 4})


# ---- the command


def test_the_command_knows_the_model_and_passes_every_word_on(monkeypatch):
    words = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: words.extend(sys.argv))
    monkeypatch.setattr(sys, "argv", ["pytest"])
    asked = ["--model", "batchgen", "--model_args", "model=tales", "-t", "a,b", "--help"]
    done = CliRunner().invoke(app, ["lm-eval", *asked])
    assert (done.exit_code, words) == (0, ["lm-eval", *asked])
    assert get_model("batchgen") is BatchgenLM
    assert get_model("dummy")  # and the harness's own
