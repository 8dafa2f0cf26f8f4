import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from batchgen.errors import ModelError
from batchgen.gpt2.activations import ACTIVATIONS, SYNONYMS
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.forward import Forward, Prefill
from batchgen.gpt2.kv_cache import KVArena
from batchgen.jobs.cli import app
from batchgen.models.convert import convert_checkpoint
from batchgen.models.huggingface import hf_names, read_hf_config
from batchgen.models.model import Model
from batchgen.models.shards import load_manifest, load_tensors, model_hash, verify_shards
from batchgen.text.tokenizer import Tokenizer
from tests.support import reference
from tests.support.hf_checkpoint import hf_config, hf_tensors, write_hf_model, write_safetensors
from tests.support.logits import gpt2
from tests.support.models import BYTES, sharp_tensors, write_byte_model

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("hf") / "src")


@pytest.fixture
def src(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "src")


def convert(src: Path) -> Path:
    dst = src.parent / "dst"
    convert_checkpoint(src, dst, name="dst", replace=dst.exists())
    return dst


def set_config(src: Path, **values: Any) -> None:
    path = src / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_holds(model: Path, config: GPT2Config, seed: int = 0) -> None:
    expected = sharp_tensors(config, seed)
    verify_shards(model)
    assert load_manifest(model).config == config
    for name, found in load_tensors(model).items():
        np.testing.assert_array_equal(found, expected[name], err_msg=name)


# --- conversion -------------------------------------------------------------------------------------------


def test_an_adapter_and_weights_without_a_config_are_named(tmp_path):
    src = write_hf_model(tmp_path / "src")
    (src / "config.json").unlink()
    with pytest.raises(ModelError, match=r"src/config\.json: is missing"):
        convert_checkpoint(src, tmp_path / "dst", name="dst")
    (src / "model.safetensors").rename(src / "adapter_model.safetensors")
    (src / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="src: is an adapter to a model; merge the adapter into the model"):
        convert_checkpoint(src, tmp_path / "dst", name="dst")


def test_a_converted_directory_equals_the_model_written_with_openais_names(src: Path, tmp_path: Path) -> None:
    dst = convert(src)
    assert_holds(dst, BYTES)
    ours, theirs = load_manifest(write_byte_model(tmp_path / "same")), load_manifest(dst)
    assert (theirs.tensors, theirs.config) == (ours.tensors, ours.config)
    assert theirs.tokenizer.items() > ours.tokenizer.items()  # and special_tokens.json
    assert load_manifest(dst).source["format"] == "Hugging Face directory"


def test_names_with_a_prefix_and_mask_buffers_give_the_same_model(tmp_path: Path) -> None:
    src = write_hf_model(tmp_path / "src", prefix="transformer.")
    tensors = load_file(src / WEIGHTS)
    for layer in range(BYTES.n_layer):
        tensors[f"transformer.h.{layer}.attn.bias"] = np.ones((1, 1, 128, 128), np.uint8)
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    write_safetensors(src / WEIGHTS, tensors)
    assert_holds(convert(src), BYTES)


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "model.",
        "_orig_mod.module.model.transformer.",
        "base_model.model.transformer.",
        "gpt.backbone.",
    ],
)
def test_any_prefix_gives_the_same_model(prefix: str, tmp_path: Path) -> None:
    src = write_hf_model(tmp_path / "src", prefix=prefix)
    tensors = load_file(src / WEIGHTS)
    head = {"lm_head.weight": tensors[f"{prefix}wte.weight"]}
    write_safetensors(src / WEIGHTS, tensors | head)
    assert_holds(convert(src), BYTES)
    outer = prefix.removesuffix("transformer.").removesuffix("backbone.")
    write_safetensors(src / WEIGHTS, tensors | {f"{outer}lm_head.weight": head["lm_head.weight"]})
    assert_holds(convert(src), BYTES)


def test_modules_compiled_or_sharded_one_by_one_give_the_same_model(src: Path) -> None:
    tensors = {
        re.sub(r"^h\.(\d+)\.", r"h.\1._orig_mod._fsdp_wrapped_module.", name): tensor
        for name, tensor in load_file(src / WEIGHTS).items()
    }
    write_safetensors(src / WEIGHTS, tensors)
    assert_holds(convert(src), BYTES)


@pytest.mark.parametrize(
    "names",
    [
        ["v_head.summary.weight", "v_head.summary.bias"],
        ["multiple_choice_head.summary.weight"],
        ["score.weight"],
        ["classifier.weight", "classifier.bias"],
        ["qa_outputs.weight"],
        ["_orig_mod.value_head.0.weight"],
    ],
)
def test_a_head_that_generating_does_not_need_is_left_out_and_named(
    names: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    src = write_hf_model(tmp_path / "src", prefix="_orig_mod.transformer.")
    write_safetensors(src / WEIGHTS, load_file(src / WEIGHTS) | {name: np.zeros((1, 3), "f4") for name in names})
    assert_holds(convert(src), BYTES)
    named = ", ".join(map(repr, sorted(names)))
    assert caplog.messages == [f"{src}: left out, because generating does not need it: {named}"]


# --- nanoGPT exported to safetensors: nn.Linear's layout, perhaps no biases ------------------------------------


def _as_nanogpt(src: Path, *, bias: bool) -> dict[str, Any]:
    """Lay the weights out as nanoGPT does; returns the tensors under OpenAI's names."""
    tensors, saved = sharp_tensors(BYTES), {}
    for name, theirs in hf_names(BYTES).items():
        if name.endswith("/b") and not bias:
            del tensors[name]
            continue
        saved[f"transformer.{theirs}"] = np.ascontiguousarray(tensors[name].T) if "/w" in name else tensors[name]
    saved["lm_head.weight"] = tensors["wte"]
    saved["transformer.h.0.attn.bias"] = np.ones((1, 1, 128, 128), np.float32)  # the mask
    write_safetensors(src / WEIGHTS, saved)
    values = json.loads((src / CONFIG).read_text())
    values |= {"block_size": values.pop("n_positions"), "bias": bias, "dropout": 0.0}
    del values["activation_function"]
    (src / CONFIG).write_text(json.dumps(values))
    return tensors


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_computes_the_same_logits(bias: bool, src: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = _as_nanogpt(src, bias=bias)
    with pytest.raises(ModelError, match=r"config.json: activation_function is missing, .* nanoGPT's; add \"gelu\" if"):
        convert(src)
    set_config(src, activation_function="gelu", use_rmsnorm=True)
    with pytest.raises(ModelError, match=r"config.json: 'use_rmsnorm' is true, which batchgen does not compute"):
        convert(src)
    set_config(src, use_rmsnorm=False, use_cache=True)
    dst = convert(src)
    assert load_manifest(dst).config == replace(BYTES, activation_function="gelu")
    weights, ids = Model.load(dst).load_weights(), [5, 6, 7, 8]
    segment = KVArena(BYTES, 9).allocate(9, start=0)
    assert segment is not None
    found = Forward(weights, load_manifest(dst).config, 4, 4)(prefills=[Prefill(segment, ids, n_logits=4)])
    expected = reference.logits(ids, tensors, BYTES.n_head, reference.Options("gelu"))
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.abs(expected).max()))
    assert bool(caplog.messages) is not bias
    if not bias:
        kinds = "'attn/c_attn', 'attn/c_proj', 'ln_1', 'ln_2', 'ln_f', 'mlp/c_fc' and 1 more"
        assert caplog.messages == [f"{src}: has no bias of {kinds}; they are zeros"]


def test_two_layouts_in_one_model_are_refused(src: Path) -> None:
    _as_nanogpt(src, bias=True)
    set_config(src, activation_function="gelu")
    tensors = load_file(src / WEIGHTS)
    name = "transformer.h.1.mlp.c_fc.weight"
    write_safetensors(src / WEIGHTS, tensors | {name: np.ascontiguousarray(tensors[name].T)})
    with pytest.raises(ModelError, match=r"c_fc.weight': expected shape \[128, 32\] .*, found \[32, 128\]"):
        convert(src)


def test_weights_in_several_files_give_the_same_model(src: Path) -> None:
    tensors = list(load_file(src / WEIGHTS).items())
    (src / WEIGHTS).unlink()
    places = {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        write_safetensors(src / file, dict(tensors[i::3]))
        places |= dict.fromkeys(dict(tensors[i::3]), file)
    (src / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    assert_holds(convert(src), BYTES)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_halves_are_widened_exactly(dtype: str, src: Path) -> None:
    expected, halves = {}, {}
    for name, array in load_file(src / WEIGHTS).items():
        if dtype == "F16":
            halves[name] = array.astype(np.float16)
            expected[name] = halves[name].astype(np.float32)
        else:
            bits = array.view(np.uint32) & 0xFFFF0000
            halves[name] = ("BF16", (bits >> 16).astype(np.uint16))
            expected[name] = bits.view(np.float32)
    write_safetensors(src / WEIGHTS, halves)
    found = load_tensors(convert(src))
    for name, theirs in hf_names(BYTES).items():
        np.testing.assert_array_equal(found[name], expected[theirs], err_msg=name)


def test_a_saved_copy_of_the_tied_head_and_the_head_alone_give_the_same_model(src: Path) -> None:
    tensors = load_file(src / WEIGHTS)
    write_safetensors(src / WEIGHTS, tensors | {"lm_head.weight": tensors["wte.weight"]})
    assert_holds(convert(src), BYTES)
    set_config(src, tie_word_embeddings=False)  # the config says so, but the two are equal
    assert_holds(convert(src), BYTES)
    head = tensors.pop("wte.weight")
    write_safetensors(src / WEIGHTS, tensors | {"lm_head.weight": head})
    set_config(src, tie_word_embeddings=True)
    assert_holds(convert(src), BYTES)


OTHER = [
    replace(BYTES, tie_word_embeddings=False),
    replace(BYTES, n_inner=100),
    replace(BYTES, n_inner=7),
    replace(BYTES, scale_attn_weights=False),
    replace(BYTES, scale_attn_by_inverse_layer_idx=True),
    replace(BYTES, n_inner=33, tie_word_embeddings=False, scale_attn_by_inverse_layer_idx=True),
    replace(BYTES, layer_norm_epsilon=1e-6),
    replace(BYTES, layer_norm_epsilon=0.5),
    *(replace(BYTES, activation_function=name) for name in ACTIVATIONS if name != "gelu_new"),
]
REFERENCE_OPTIONS = (
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
)


@pytest.mark.parametrize("config", OTHER, ids=lambda config: str(list(config.as_dict().items())[5:]))
def test_options_that_openais_models_lack_are_kept_and_computed(config: GPT2Config, tmp_path: Path) -> None:
    tensors = sharp_tensors(config)
    if not config.tie_word_embeddings:
        tensors["lm_head"] = np.random.default_rng(1).standard_normal((32, 257), dtype=np.float32)
    src = write_hf_model(tmp_path / "src", config)
    if not config.tie_word_embeddings:
        saved = load_file(src / WEIGHTS) | {"lm_head.weight": np.ascontiguousarray(tensors["lm_head"].T)}
        write_safetensors(src / WEIGHTS, saved)
    model = Model.load(convert(src))
    assert model.config == config
    np.testing.assert_array_equal(model.load_params()["lm_head"], tensors["lm_head"])
    ids = list(range(3, 43))
    segment = KVArena(config, len(ids)).allocate(len(ids), start=0)
    assert segment is not None
    options = reference.Options(*(getattr(config, name) for name in REFERENCE_OPTIONS))
    expected = reference.logits(ids, tensors, config.n_head, options)
    forward, near = Forward(model.load_weights(), config, len(ids), len(ids)), 2e-4 * float(np.abs(expected).max())
    logits = forward(prefills=[Prefill(segment, ids[:-1], n_logits=len(ids) - 1)])
    np.testing.assert_allclose(logits, expected[:-1], atol=near)
    np.testing.assert_allclose(forward([ids[-1]], [segment]), expected[-1:], atol=near)  # a decode step


def test_an_explicit_mlp_of_the_usual_width_gives_the_same_model(src: Path) -> None:
    before = model_hash(load_manifest(convert(src)))
    set_config(src, n_inner=4 * BYTES.n_embd, scale_attn_weights=True, reorder_and_upcast_attn=True)
    assert model_hash(load_manifest(convert(src))) == before


def test_the_config_may_have_the_names_that_all_models_of_transformers_share(src: Path) -> None:
    shared = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
    values = json.loads((src / CONFIG).read_text())
    for ours, theirs in (shared | {"n_positions": "max_position_embeddings"}).items():
        values[theirs] = values.pop(ours)
    (src / CONFIG).write_text(json.dumps(values))
    assert_holds(convert(src), BYTES)


def test_convert_makes_a_precision_the_models_default_and_can_take_it_back(src: Path) -> None:
    dst = src.parent / "dst"
    for precision, default in (("int8", "int8"), (None, "int8"), ("float32", "float32")):
        arguments = ["convert", str(src), str(dst), *(["--precision", precision] if precision else [])]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert Model.load(dst).precision == default
    assert (dst / "int8").exists()
    assert_holds(dst, BYTES)


def test_a_second_conversion_changes_nothing(src: Path) -> None:
    dst = convert(src)
    inodes = {path.name: path.stat().st_ino for path in dst.iterdir()}
    convert_checkpoint(src, dst, name="dst")
    assert {path.name: path.stat().st_ino for path in dst.iterdir()} == inodes


def test_progress_counts_every_shard(src: Path) -> None:
    calls: list[tuple[int, int]] = []
    convert_checkpoint(src, src.parent / "dst", name="dst", on_progress=lambda *call: calls.append(call))
    total = len(BYTES.tensor_shapes()) + 1
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)


def test_picogpts_function_computes_an_mlp_of_another_width() -> None:
    config = replace(BYTES, n_inner=50)
    tensors = sharp_tensors(config)
    from batchgen.gpt2.params import nest

    found = gpt2([1, 2, 3], **nest(tensors, config.n_layer), n_head=config.n_head)
    np.testing.assert_allclose(found, reference.logits([1, 2, 3], tensors, config.n_head), rtol=1e-3, atol=1e-3)


# --- vocabularies --------------------------------------------------------------------------------------------


def _as_tokenizer_json(src: Path, pairs: bool = True, **changes: Any) -> None:
    """Move the directory's vocabulary into a tokenizer.json, with one merge and one added token."""
    vocabulary = json.loads((src / "vocab.json").read_text(encoding="utf-8"))
    eos = vocabulary.pop("<|endoftext|>")
    vocabulary["th"] = eos
    values = {
        "version": "1.0",
        "added_tokens": [{"id": 257, "content": "<|endoftext|>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["t", "h"]] if pairs else ["t h"]},
    }
    (src / "tokenizer.json").write_text(json.dumps(values | changes))
    (src / "vocab.json").unlink()
    (src / "merges.txt").unlink()
    set_config(src, vocab_size=260)
    tensors = load_file(src / WEIGHTS)
    tensors["wte.weight"] = np.vstack([tensors["wte.weight"], np.zeros((3, BYTES.n_embd), np.float32)])
    write_safetensors(src / WEIGHTS, tensors)


@pytest.mark.parametrize("pairs", [True, False])
def test_a_tokenizer_json_alone_is_enough(pairs: bool, src: Path) -> None:
    _as_tokenizer_json(src, pairs)
    tokenizer = Tokenizer.load(convert(src))
    assert (tokenizer.n_vocab, tokenizer.special.start) == (258, 257)
    assert tokenizer.encode("the") == [256, ord("e")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer is an object of 1"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "pre_tokenizer.type is 'Metaspace'"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": 1}}, "pre_tokenizer.add_prefix_space is 1"),
        ({"model": {"type": "Unigram"}}, "model.type is 'Unigram'; batchgen has only GPT-2's byte-level BPE"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "model.byte_fallback is True"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": "t h"}}, "model has no vocab and merges"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": [[1, 2]]}}, "in merges is not a pair of strings"),
        ({"model": []}, "tokenizer.json: model is a list of 0, not an object"),
        ({"added_tokens": [3]}, "an entry of added_tokens is 3, not an object"),
    ],
)
def test_another_kind_of_tokenizer_is_refused_with_its_option(changes: dict[str, Any], message: str, src: Path) -> None:
    _as_tokenizer_json(src, **changes)
    with pytest.raises(ModelError, match=message):
        convert(src)


def test_the_error_for_a_wrong_tokenizer_json_names_the_directory_and_no_temporary_file(src: Path) -> None:
    _as_tokenizer_json(src, model={"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}, added_tokens=[])
    with pytest.raises(ModelError) as caught:
        convert(src)
    assert str(caught.value).startswith(f"{src}: the vocabulary made from it is not GPT-2's: vocab.json: 'a' and 'b'")


def test_added_tokens_join_the_vocabulary(src: Path) -> None:
    (src / "added_tokens.json").write_text('{"<|pad|>": 257}')
    tensors = load_file(src / WEIGHTS)
    tensors["wte.weight"] = np.vstack([tensors["wte.weight"], np.zeros((1, BYTES.n_embd), np.float32)])
    write_safetensors(src / WEIGHTS, tensors)
    set_config(src, vocab_size=258)
    assert Tokenizer.load(convert(src)).decode([257]) == "<|pad|>"


def test_a_vocabulary_larger_than_the_model_is_refused(src: Path) -> None:
    vocabulary = json.loads((src / "vocab.json").read_text(encoding="utf-8"))
    (src / "vocab.json").write_text(json.dumps(vocabulary | {"ab": 257}))
    with pytest.raises(ModelError, match="the vocabulary has ids up to 257, the model 257"):
        convert(src)


# --- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gpt_neo"}, "model_type is 'gpt_neo'; batchgen computes only \"gpt2\""),
        (
            {"activation_function": "mish"},
            "activation_function is 'mish'; batchgen computes gelu_new, gelu, quick_gelu",
        ),
        ({"activation_function": ["gelu"]}, r"activation_function is \['gelu'\]; batchgen computes"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0; it must be a number from 1e-37 to 1"),
        ({"layer_norm_epsilon": True}, "layer_norm_epsilon is True; it must be a number"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5'; it must be a number"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map is an object of 1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is an object of 1"),
        ({"reorder_and_upcast_attn": 1}, "reorder_and_upcast_attn is 1"),
        ({"scale_attn_weights": 1}, "scale_attn_weights is 1; it must be true or false"),
        ({"n_inner": -1}, "n_inner is -1; it must be a whole number"),
        ({"n_head": None}, "n_head is missing"),
        ({"n_head": 3}, "n_embd 32 is not a multiple of n_head 3"),
        ({"n_layer": 3}, "src: lacks tensor 'h.2."),
        ({"n_layer": 1}, "src: has tensor 'h.1."),
        ({"n_positions": 64}, r"'wpe.weight': expected shape \[64, 32\] from the config, found \[128, 32\]"),
        ({"tie_word_embeddings": False}, "lacks tensor 'lm_head.weight'"),
    ],
)
def test_an_option_that_is_not_computed_exactly_is_named(values: dict[str, Any], message: str, src: Path) -> None:
    set_config(src, **values)
    with pytest.raises(ModelError, match=message):
        convert(src)
    assert [path.name for path in src.parent.iterdir()] == ["src"]


@pytest.mark.parametrize(
    ("name", "ours"),
    [*SYNONYMS.items(), *((name, name) for name in ACTIVATIONS)],
)
def test_an_activation_has_several_names(name: str, ours: str, src: Path) -> None:
    set_config(src, activation_function=name)
    assert read_hf_config(src / CONFIG) == replace(BYTES, activation_function=ours)


def _change(**tensors: Any) -> Callable[[Path], object]:
    def change(src: Path) -> None:
        found = load_file(src / WEIGHTS) | {name.replace("__", "."): value for name, value in tensors.items()}
        write_safetensors(src / WEIGHTS, {name: value for name, value in found.items() if value is not None})

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_change(ln_f__bias=None), "lacks tensor 'ln_f.bias'"),
        (_change(h__1__ln_2__bias=None), "lacks tensor 'h.1.ln_2.bias'"),
        (_change(h__1__mlp__c_fc__bias=None), "lacks tensor 'h.1.mlp.c_fc.bias'"),
        (_change(lm_head__bias=np.zeros(257, "f4")), "has tensor 'lm_head.bias', unlike a GPT-2"),
        (_change(h__0__attn__c_attn__lora_A__weight=np.zeros((2, 32), "f4")), "lora_A.weight', .* merge the adapter"),
        (_change(transformer__wte__weight=np.zeros((257, 32), "f4")), "has tensor 'transformer.wte.weight'"),
        (_change(module__wte__weight=np.zeros((257, 32), "f4")), "tensor '.*wte.weight' occurs twice"),
        (_change(ref__wpe__weight=np.zeros((128, 32), "f4")), "has 2 models: '' and 'ref.'; save one of them alone"),
        (_change(ln_f__bias=np.zeros(32, "f8")), "'ln_f.bias': expected one of F32, F16, BF16, found 'F64'"),
        (_change(ln_f__bias=np.zeros(31, "f4")), r"'ln_f.bias': expected shape \[32\] from the config, found \[31\]"),
        (_change(ln_f__bias=np.full(32, np.inf, "f4")), "tensor ln_f/b: holds nan, infinity"),
        (_change(lm_head__weight=np.zeros((257, 32), "f4")), "lm_head.weight is not wte.weight, but config.json"),
        (lambda src: (src / WEIGHTS).write_bytes(b"x" * 100), "safetensors cannot be read"),
        (lambda src: (src / WEIGHTS).write_bytes((src / WEIGHTS).read_bytes()[:-1]), "safetensors cannot be read"),
        (lambda src: (src / WEIGHTS).unlink(), "has no model.safetensors and no model.safetensors.index.json"),
        (lambda src: (src / WEIGHTS).rename(src / "pytorch_model.bin"), "runs any code in them; if you"),
        (lambda src: (src / "vocab.json").unlink(), "has neither vocab.json and merges.txt nor tokenizer.json"),
        (lambda src: (src / CONFIG).write_text("{"), "config.json: is not JSON"),
        (lambda src: (src / CONFIG).write_text("[]"), "config.json: expected an object, found a list of 0"),
        (lambda src: (src / CONFIG).write_text(" " * 2**20 + "{}"), "is larger than 1048576 bytes"),
        (lambda src: (src / "vocab.json").write_text("[]"), "vocab.json: expected an object"),
    ],
)
def test_a_damaged_directory_is_refused_and_leaves_nothing(damage: Any, message: str, src: Path) -> None:
    damage(src)
    with pytest.raises(ModelError, match=message) as caught:
        convert(src)
    assert "\n" not in str(caught.value)
    assert [path.name for path in src.parent.iterdir()] == ["src"]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"wte.weight": "../other.safetensors"}, "is not a plain .safetensors name inside the directory"),
        ({"wte.weight": "/etc/passwd"}, "is not a plain .safetensors name"),
        ({"wte.weight": "model.bin"}, "is not a plain .safetensors name"),
        ({"wte.weight": ["a"]}, "is not a plain .safetensors name"),
        ({"wte.weight": "one.safetensors"}, "one.safetensors: holds tensor"),
        ({"x": "none.safetensors"}, "none.safetensors: is missing"),
        ({}, "has no weight_map"),
    ],
)
def test_an_index_cannot_name_a_file_elsewhere(weight_map: dict[str, Any], message: str, src: Path) -> None:
    (src / WEIGHTS).rename(src / "one.safetensors")
    (src / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=message):
        convert(src)


def test_pickles_are_never_opened(src: Path) -> None:
    set_config(src)
    (src / WEIGHTS).unlink()
    (src / "pytorch_model.bin").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="only pickled weights"):
        convert(src)


def test_the_test_models_have_every_tensor_and_a_config() -> None:
    assert len(hf_tensors()) == len(BYTES.tensor_shapes())
    assert hf_config()["vocab_size"] == BYTES.n_vocab
