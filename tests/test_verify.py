import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from batchgen import planning as planner
from batchgen.errors import BatchgenError, ModelError
from batchgen.gpt2.forward import gpt2
from batchgen.gpt2.pico import generate
from batchgen.jobs.cli import app
from batchgen.models import verify
from batchgen.models.openai import CONFIGS, KNOWN_COMPLETIONS, KNOWN_LOGITS, Completion, Logits
from batchgen.models.registry import list_models
from batchgen.models.shards import file_sha256, load_manifest, load_params
from batchgen.models.verify import openai_size, verify_model
from batchgen.planning import check_memory
from batchgen.text.tokenizer import Tokenizer
from tests.support.models import BYTES, write_byte_model
from tests.support.vocabulary import gpt2_vocabulary_dir


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_byte_model(tmp_path / "124M")


@pytest.fixture
def published(model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the tiny model OpenAI's: its shape, its vocabulary, its completions and logits are the known ones."""
    params, manifest, tokenizer = load_params(model), load_manifest(model), Tokenizer.load(model)
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
    return model


def test_a_right_model_is_found_right_line_by_line(published: Path) -> None:
    assert list(verify_model(published)) == [
        f"files: {len(BYTES.tensor_shapes()) + 1} shards and 2 vocabulary files have the length, header and sha256 "
        "that the manifest says",
        "weights: all finite; lm_head is wte transposed",
        "vocabulary: 257 tokens, ids 0 to 256",
        "vocabulary: OpenAI's own, by sha256",
        "completions: 2 published greedy ones, and the logits after 1 prompts, come out",
    ]


def test_what_was_not_checked_is_said(model: Path, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "KNOWN_COMPLETIONS", {})
    monkeypatch.setattr(verify, "KNOWN_LOGITS", {})
    assert list(verify_model(published))[-1].startswith("completions: none of 124M are published")
    monkeypatch.setattr(verify, "CONFIGS", CONFIGS)
    assert list(verify_model(published))[-1] == "completions: none are known of this model, so none were checked"


def test_another_model_under_openais_name_is_found_out(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = verify.KNOWN_COMPLETIONS["124M"][0]
    wrong = (known.completion[0], (int(known.completion[1]) + 1) % 256, *known.completion[2:])
    monkeypatch.setattr(verify, "KNOWN_COMPLETIONS", {"124M": (Completion("abc", wrong),)})  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="124M: token 1 after 'abc' should be .*is not the model that it says"):
        list(verify_model(published))
    monkeypatch.setattr(verify, "KNOWN_COMPLETIONS", {})
    right = verify.KNOWN_LOGITS["124M"][0].largest
    for largest in ({token: value + 0.1 for token, value in right.items()}, dict.fromkeys([0, 1], 0.0)):
        monkeypatch.setattr(verify, "KNOWN_LOGITS", {"124M": (Logits("xyz", largest),)})
        with pytest.raises(ModelError, match="logits after 'xyz' should be"):
            list(verify_model(published))
    monkeypatch.setattr(verify, "known_file", lambda size, name: (None, "0" * 64))
    with pytest.raises(ModelError, match="encoder.json: is not OpenAI's"):
        list(verify_model(published))


def _rewrite(model: Path, shard: str, change: Callable[[np.ndarray], object]) -> None:
    """Change a shard and the manifest with it: what a stranger could send."""
    array = np.load(model / shard)
    change(array)
    np.save(model / shard, array)
    manifest = json.loads((model / "manifest.json").read_text())
    for entry in manifest["tensors"].values():
        if entry["file"] == shard:
            entry["sha256"] = file_sha256(model / shard)
    (model / "manifest.json").write_text(json.dumps(manifest))


def test_weights_that_no_conversion_writes_are_found(model: Path) -> None:
    _rewrite(model, "h1.mlp.c_fc.w.npy", lambda array: array.__setitem__((3, 4), np.nan))
    with pytest.raises(ModelError, match="tensor h1/mlp/c_fc/w holds nan or infinity"):
        list(verify_model(model))


def test_a_head_that_is_not_wtes_is_found(model: Path) -> None:
    _rewrite(model, "lm_head.npy", lambda array: array.__setitem__((3, 4), 9))
    with pytest.raises(ModelError, match="lm_head is not wte transposed"):
        list(verify_model(model))


def test_a_flipped_bit_is_named(model: Path) -> None:
    data = bytearray((model / "wpe.npy").read_bytes())
    data[-3] ^= 1
    (model / "wpe.npy").write_bytes(data)
    result = CliRunner().invoke(app, ["verify", str(model)])
    assert "wpe.npy: is damaged (expected sha256" in str(result.exception)
    assert "ok" not in result.output


def test_verifying_is_remembered_for_these_very_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHGEN_MODELS", str(tmp_path))
    model = write_byte_model(tmp_path / "mine")
    assert _verified("mine") is None
    result = CliRunner().invoke(app, ["verify", "mine"])
    assert result.exit_code == 0, result.output
    assert result.output.count("ok  ") == 4
    assert _verified("mine") == verify.datetime.datetime.now(verify.datetime.UTC).date().isoformat()
    assert "VERIFIED" in CliRunner().invoke(app, ["models"]).output
    _rewrite(model, "wpe.npy", lambda array: array.__setitem__((3, 4), 9))
    assert _verified("mine") is None
    (tmp_path / "verified.json").write_text("{")
    assert _verified("mine") is None


def _verified(name: str) -> str | None:
    return next(info.verified for info in list_models() if info.name == name)


def test_only_a_model_of_openais_name_and_shape_is_taken_for_one(model: Path) -> None:
    manifest = load_manifest(model)
    assert openai_size(manifest) is None  # its name, but not its shape
    right = replace(manifest, config=CONFIGS["355M"])
    assert openai_size(right) is None
    assert openai_size(replace(right, name="355M")) == "355M"
    assert openai_size(replace(right, name="x", source={"model": "OpenAI's 355M"})) == "355M"


def test_the_known_texts_are_the_ids_that_gpt2s_vocabulary_gives() -> None:
    tokenizer = Tokenizer.load(gpt2_vocabulary_dir())
    assert tokenizer.encode(KNOWN_LOGITS["124M"][0].prompt) == [6601, 32704, 795, 30132, 2985, 284]
    turing = KNOWN_COMPLETIONS["124M"][0]
    assert isinstance(turing.completion, str)
    assert len(tokenizer.encode(turing.completion)) == 40
    for known in KNOWN_COMPLETIONS["124M"]:
        if isinstance(known.prompt, str) and isinstance(known.completion, str):
            together = tokenizer.encode(known.prompt + known.completion)
            assert together == tokenizer.encode(known.prompt) + tokenizer.encode(known.completion)


def test_a_model_that_memory_cannot_hold_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["1558M"]
    monkeypatch.setattr(planner, "available_memory", lambda: 4 * 10**9)
    with pytest.raises(BatchgenError, match=r"1558M needs 7.\d GB of memory \(6.6 of weights, .* and 4.0 GB are free"):
        check_memory("1558M", config, 6_552_000_000)
    monkeypatch.setattr(planner, "available_memory", lambda: 16 * 10**9)
    check_memory("1558M", config, 6_552_000_000)
