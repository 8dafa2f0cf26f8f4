from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from batchgen.errors import ModelError
from batchgen.gpt2.pico import generate
from batchgen.jobs.cli import app
from batchgen.models import verify
from batchgen.models.model import Model
from batchgen.models.openai import CONFIGS, KNOWN_COMPLETIONS, KNOWN_LOGITS, Completion, Logits
from batchgen.models.registry import list_models
from batchgen.models.shards import load_manifest
from batchgen.models.verify import openai_size, verify_model
from batchgen.text.tokenizer import Tokenizer
from tests.support.logits import gpt2
from tests.support.models import BYTES, rewrite_tensor, write_byte_model, write_wide_model
from tests.support.vocabulary import gpt2_vocabulary_dir


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_byte_model(tmp_path / "124M")


@pytest.fixture
def published(model: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """Make the tiny model one of OpenAI's: its config, vocabulary, completions and logits are the known ones."""
    opened = Model.load(model)
    params, manifest, tokenizer = opened.load_params(), opened.manifest, opened.load_tokenizer()
    pico = {name: value for name, value in params.items() if name != "lm_head"}
    new = generate(list(b"abc"), pico, BYTES.n_head, 12)
    row = gpt2(list(b"xyz"), **params, n_head=BYTES.n_head)[-1]
    first, second = (int(token) for token in np.argsort(row)[:-3:-1])
    completions = (Completion("abc", tuple(new)), Completion(tuple(b"abc"), tuple(new)))
    monkeypatch.setattr(verify, "CONFIGS", {"124M": BYTES, "355M": replace(BYTES, n_head=1)})
    monkeypatch.setattr(verify, "known_file", lambda size, name: (None, manifest.tokenizer[name]))
    monkeypatch.setattr(verify, "KNOWN_COMPLETIONS", {"124M": completions})
    logits = Logits("xyz", {first: float(row[first]), second: float(row[second])})
    monkeypatch.setattr(verify, "KNOWN_LOGITS", {"124M": (logits,)})
    assert tokenizer.encode("abc") == list(b"abc")
    return opened


def test_an_intact_model_gives_a_line_for_each_check(published: Model) -> None:
    assert list(verify_model(published)) == [
        f"files: {len(BYTES.tensor_shapes()) + 1} shards and 2 vocabulary files have the length, header and sha256 "
        "of the manifest",
        "weights: all finite; lm_head is wte transposed",
        "vocabulary: 257 tokens, ids 0 to 256",
        "vocabulary: OpenAI's own, by sha256",
        "completions: equal to 2 published ones; logits: equal after 1 prompts",
    ]


def test_rows_of_wte_that_belong_to_no_token_are_counted(tmp_path: Path) -> None:
    lines = list(verify_model(Model.load(write_wide_model(tmp_path / "wide"))))
    assert "vocabulary: 257 tokens, ids 0 to 300; 64 rows of wte belong to no token and are never generated" in lines


def test_a_skipped_check_is_reported(published: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "KNOWN_COMPLETIONS", {})
    monkeypatch.setattr(verify, "KNOWN_LOGITS", {})
    assert list(verify_model(published))[-1].startswith(
        "completions: not checked, because batchgen knows no published ones of 124M"
    )
    monkeypatch.setattr(verify, "CONFIGS", CONFIGS)
    assert list(verify_model(published))[-1] == "completions: not checked, because none are known of this model"


def test_another_model_with_openais_name_is_refused(published: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    known = verify.KNOWN_COMPLETIONS["124M"][0]
    wrong = (known.completion[0], (int(known.completion[1]) + 1) % 256, *known.completion[2:])
    monkeypatch.setattr(verify, "KNOWN_COMPLETIONS", {"124M": (Completion("abc", wrong),)})  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="124M: token 1 after 'abc' is .*, not .*is not the model"):
        list(verify_model(published))
    monkeypatch.setattr(verify, "KNOWN_COMPLETIONS", {})
    right = verify.KNOWN_LOGITS["124M"][0].largest
    for largest in ({token: value + 0.1 for token, value in right.items()}, dict.fromkeys([0, 1], 0.0)):
        monkeypatch.setattr(verify, "KNOWN_LOGITS", {"124M": (Logits("xyz", largest),)})
        with pytest.raises(ModelError, match="logits after 'xyz' are"):
            list(verify_model(published))
    monkeypatch.setattr(verify, "known_file", lambda size, name: (None, "0" * 64))
    with pytest.raises(ModelError, match="encoder.json: is not OpenAI's"):
        list(verify_model(published))


def test_nan_in_a_shard_is_found(model: Path) -> None:
    rewrite_tensor(model, "h1/mlp/c_fc/w", lambda array: array.__setitem__((3, 4), np.nan))
    with pytest.raises(ModelError, match="tensor h1/mlp/c_fc/w holds nan or infinity"):
        list(verify_model(Model.load(model)))


def test_a_tied_head_that_is_not_wte_is_found(model: Path) -> None:
    rewrite_tensor(model, "lm_head", lambda array: array.__setitem__((3, 4), 9))
    with pytest.raises(ModelError, match="lm_head is not wte transposed"):
        list(verify_model(Model.load(model)))


def test_the_file_of_a_flipped_bit_is_named(model: Path) -> None:
    data = bytearray((model / "wpe.npy").read_bytes())
    data[-3] ^= 1
    (model / "wpe.npy").write_bytes(data)
    result = CliRunner().invoke(app, ["verify", str(model)])
    assert "wpe.npy: is damaged (expected sha256" in str(result.exception)
    assert "ok" not in result.output


def test_a_verification_is_recorded_for_exactly_these_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHGEN_MODELS", str(tmp_path))
    model = write_byte_model(tmp_path / "mine")
    assert _verified("mine") is None
    result = CliRunner().invoke(app, ["verify", "mine"])
    assert result.exit_code == 0, result.output
    assert result.output.count("ok  ") == 4
    assert _verified("mine") == verify.datetime.datetime.now(verify.datetime.UTC).date().isoformat()
    assert "VERIFIED" in CliRunner().invoke(app, ["models"]).output
    rewrite_tensor(model, "wpe", lambda array: array.__setitem__((3, 4), 9))
    assert _verified("mine") is None
    (tmp_path / "verified.json").write_text("{")
    assert _verified("mine") is None


def _verified(name: str) -> str | None:
    return next(info.verified for info in list_models() if info.name == name)


def test_a_model_claims_to_be_openais_by_name_and_config(model: Path) -> None:
    manifest = load_manifest(model)
    assert openai_size(manifest) is None  # its name, but not its shape
    right = replace(manifest, config=CONFIGS["355M"])
    assert openai_size(right) is None
    assert openai_size(replace(right, name="355M")) == "355M"
    assert openai_size(replace(right, name="x", source={"model": "OpenAI's 355M"})) == "355M"


def test_known_texts_encode_to_the_published_ids() -> None:
    tokenizer = Tokenizer.load(gpt2_vocabulary_dir())
    assert tokenizer.encode(KNOWN_LOGITS["124M"][0].prompt) == [6601, 32704, 795, 30132, 2985, 284]
    turing = KNOWN_COMPLETIONS["124M"][0]
    assert isinstance(turing.completion, str)
    assert len(tokenizer.encode(turing.completion)) == 40
    for known in KNOWN_COMPLETIONS["124M"]:
        if isinstance(known.prompt, str) and isinstance(known.completion, str):
            together = tokenizer.encode(known.prompt + known.completion)
            assert together == tokenizer.encode(known.prompt) + tokenizer.encode(known.completion)
