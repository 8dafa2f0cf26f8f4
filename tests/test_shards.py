import hashlib
import json
import math
import os
import pickle
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchgen.errors import ModelError
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.params import Array, nest
from batchgen.gpt2.weights import pack, to_panels
from batchgen.models import shards
from batchgen.models.shards import (
    Description,
    load_manifest,
    load_params,
    map_weights,
    model_hash,
    shard_shapes,
    verify_shards,
    write_model,
)
from tests.support.models import npy_sha256
from tests.support.tensors import random_tensors

CONFIG = GPT2Config(n_vocab=50, n_ctx=16, n_embd=8, n_head=2, n_layer=2)
TENSORS = random_tensors(CONFIG)
TINY = Description("tiny", CONFIG, {"format": "random"})
SHARD = "h1.mlp.c_fc.w.panels.npy"  # the one that the tests damage


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    return _write_tokenizer(tmp_path / "tokenizer")


def _write_tokenizer(directory: Path) -> Path:
    directory.mkdir()
    (directory / "encoder.json").write_text('{"<|endoftext|>": 0}')
    (directory / "vocab.bpe").write_text("#version: 0.2\n")
    return directory


@pytest.fixture(scope="module")
def written_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("written")
    return _write(directory / "model", _write_tokenizer(directory / "tokenizer"))


@pytest.fixture
def model(tmp_path: Path, written_model: Path) -> Path:
    return shutil.copytree(written_model, tmp_path / "model")  # faster than writing one, which syncs every file


def _write(directory: Path, tokenizer_dir: Path, tensors: dict[str, Any] = TENSORS, **options: Any) -> Path:
    description = replace(TINY, **{name: options.pop(name) for name in ("name", "source") if name in options})
    write_model(directory, description, iter(tensors.items()), tokenizer_dir=tokenizer_dir, **options)
    return directory


def _arrays(weights: Any) -> Iterator[Array]:
    """The arrays of records in records."""
    if isinstance(weights, np.ndarray):
        yield weights
    elif is_dataclass(weights):
        for field in fields(weights):
            yield from _arrays(getattr(weights, field.name))
    elif isinstance(weights, list | dict):
        for child in weights.values() if isinstance(weights, dict) else weights:
            yield from _arrays(child)


def _leaves(node: Any) -> Iterator[Array]:
    if isinstance(node, np.ndarray):
        yield node
    else:
        for child in node.values() if isinstance(node, dict) else node:
            yield from _leaves(child)


def _assert_equal(found: Any, expected: Any) -> None:
    pairs = list(zip(_leaves(found), _leaves(expected), strict=True))
    assert pairs
    for left, right in pairs:
        np.testing.assert_array_equal(left.view("u4"), right.view("u4"))


def _snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in directory.iterdir()}


# --- writing and reading --------------------------------------------------------------------------------


def test_a_written_model_is_read_back_bit_for_bit(model: Path) -> None:
    ordered = {name: TENSORS[name] for name in shard_shapes(CONFIG)}
    _assert_equal(load_params(model), nest(ordered, CONFIG.n_layer))


def test_numpy_reads_every_shard_and_the_panels_of_the_matrices(model: Path) -> None:
    for name, shard in load_manifest(model).tensors.items():
        array = np.load(model / shard.file, allow_pickle=False)
        assert array.dtype.str == "<f4"
        assert array.flags.c_contiguous
        assert shard.file.endswith(".panels.npy") == shard.in_panels == (name == "lm_head" or name.endswith("/w"))
        np.testing.assert_array_equal(array, to_panels(TENSORS[name]) if shard.in_panels else TENSORS[name])


def test_mapped_weights_are_the_packed_ones_and_begin_at_a_cache_line(model: Path) -> None:
    mapped = map_weights(model, load_manifest(model), {})
    packed = pack(nest(TENSORS, CONFIG.n_layer))
    for found, expected in zip(_arrays(mapped), _arrays(packed), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.ctypes.data % 64 == 0 or not found.any()  # the zeros that stand for lm_head's biases are no file's


def test_a_shard_that_numpy_writes_is_read(model: Path) -> None:
    np.save(model / SHARD, np.load(model / SHARD))
    _assert_equal(load_params(model)["blocks"][1]["mlp"]["c_fc"]["w"][None], TENSORS["h1/mlp/c_fc/w"][None])


def test_lm_head_is_wte_transposed_for_every_block_size(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = set()
    for block in (1, 7, 50, 101, 10**6):
        monkeypatch.setattr(shards, "_BLOCK", block)
        params = load_params(_write(tmp_path / str(block), tokenizer_dir))
        np.testing.assert_array_equal(params["lm_head"], params["wte"].T)
        hashes.add(model_hash(load_manifest(tmp_path / str(block))))
    assert len(hashes) == 1


def test_params_are_plain_read_only_contiguous_arrays(model: Path) -> None:
    for array in _leaves(load_params(model)):
        assert type(array) is np.ndarray
        assert array.flags.c_contiguous
        assert array.flags.aligned
        assert not array.flags.writeable


def test_the_order_and_the_layout_of_given_tensors_do_not_matter(tmp_path: Path, tokenizer_dir: Path) -> None:
    other: dict[str, Any] = {name: np.asfortranarray(TENSORS[name]) for name in reversed(TENSORS)}
    other["wpe"] = other["wpe"].astype(">f4")
    other["ln_f/g"] = other["ln_f/g"].astype("f8")
    first, second = _write(tmp_path / "a", tokenizer_dir), _write(tmp_path / "b", tokenizer_dir, other, name="other")
    assert model_hash(load_manifest(first)) == model_hash(load_manifest(second))


def test_the_manifest_holds_the_hash_of_every_file_in_its_plain_form(model: Path) -> None:
    manifest = load_manifest(model)
    files = {shard.file for shard in manifest.tensors.values()}
    assert files | {"manifest.json", *manifest.tokenizer} == {path.name for path in model.iterdir()}
    for name, expected in manifest.tokenizer.items():
        assert hashlib.sha256((model / name).read_bytes()).hexdigest() == expected
    for name, shard in manifest.tensors.items():
        assert shard.sha256 == npy_sha256(TENSORS[name])
        assert shard.in_panels or shard.sha256 == hashlib.sha256((model / shard.file).read_bytes()).hexdigest()


def test_the_model_hash_is_that_of_the_plain_model_of_format_1(model: Path) -> None:
    """Plans and outputs of older versions have it."""
    assert model_hash(load_manifest(model)) == "3a370f37cf2afde5"


def test_the_manifest_is_read_back_and_pickles(model: Path) -> None:
    manifest = load_manifest(model)
    assert (manifest.name, manifest.config, manifest.source) == ("tiny", CONFIG, {"format": "random"})
    assert pickle.loads(pickle.dumps(manifest)) == manifest


def test_the_model_hash_changes_with_one_weight_config_or_vocabulary(tmp_path: Path, tokenizer_dir: Path) -> None:
    tensors = TENSORS | {"ln_f/b": np.nextafter(TENSORS["ln_f/b"], np.float32(1))}
    hashes = [model_hash(load_manifest(_write(tmp_path / "a", tokenizer_dir)))]
    hashes.append(model_hash(load_manifest(_write(tmp_path / "b", tokenizer_dir, tensors))))
    (tokenizer_dir / "vocab.bpe").write_text("#version: 0.2\na b\n")
    hashes.append(model_hash(load_manifest(_write(tmp_path / "c", tokenizer_dir))))
    assert len(set(hashes)) == 3
    assert all(len(text) == 16 for text in hashes)


def test_hugging_faces_vocabulary_names_are_accepted(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tokenizer_dir / "encoder.json").rename(tokenizer_dir / "vocab.json")
    (tokenizer_dir / "vocab.bpe").rename(tokenizer_dir / "merges.txt")
    model = _write(tmp_path / "model", tokenizer_dir)
    assert (model / "encoder.json").read_bytes() == (tokenizer_dir / "vocab.json").read_bytes()
    assert (model / "vocab.bpe").read_bytes() == (tokenizer_dir / "merges.txt").read_bytes()


def test_a_missing_vocabulary_is_found_before_a_tensor_is_read(tmp_path: Path) -> None:
    tensors = iter(TENSORS.items())
    with pytest.raises(ModelError, match=r"neither encoder\.json nor vocab\.json"):
        write_model(tmp_path / "model", TINY, tensors, tokenizer_dir=tmp_path)
    assert len(list(tensors)) == len(TENSORS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wpe": None}, "tensor wpe is missing"),
        ({"h2/ln_1/g": np.ones(8, "f4")}, "tensor 'h2/ln_1/g' does not belong to a GPT-2 of 2 layers"),
        ({"../../escape": np.ones(8, "f4")}, "does not belong to a GPT-2"),
        ({"ln_f/g": np.ones(9, "f4")}, r"tensor ln_f/g: expected shape \[8\] from the config, found \[9\]"),
        ({"ln_f/g": np.ones(8, "i4")}, "tensor ln_f/g: expected floating point numbers, found int32"),
        ({"ln_f/g": np.full(8, np.nan, "f4")}, "tensor ln_f/g: holds nan"),
        ({"ln_f/g": np.full(8, -np.inf, "f4")}, "tensor ln_f/g: holds nan, infinity"),
        ({"ln_f/g": np.full(8, 1e300)}, "too large for float32"),
        ({"lm_head": TENSORS["lm_head"] + np.float32(1)}, "lm_head is not wte transposed"),
    ],
)
def test_tensors_that_are_not_a_gpt2_are_refused_and_leave_nothing(
    change: dict[str, Any], message: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    tensors = {name: array for name, array in (TENSORS | change).items() if array is not None}
    with pytest.raises(ModelError, match=message):
        _write(tmp_path / "model", tokenizer_dir, tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_a_tensor_that_comes_twice_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    twice = [*TENSORS.items(), ("wpe", TENSORS["wpe"])]
    with pytest.raises(ModelError, match="tensor wpe came twice"):
        write_model(tmp_path / "model", TINY, twice, tokenizer_dir=tokenizer_dir)


@pytest.mark.parametrize("text", ["", "a\nb", "\x1b[31m", "\ud800", "x" * 501])
def test_a_name_or_source_that_cannot_be_shown_on_one_line_is_refused(
    text: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    with pytest.raises(ModelError, match="printable"):
        _write(tmp_path / "model", tokenizer_dir, name=text)
    with pytest.raises(ModelError, match="printable"):
        _write(tmp_path / "model", tokenizer_dir, source={"from": text})


# --- the directory of a new model -----------------------------------------------------------------------


def test_the_model_gets_the_users_umask(tmp_path: Path, tokenizer_dir: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    model = _write(tmp_path / "model", tokenizer_dir)
    assert stat.S_IMODE(model.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_missing_parents_are_made_and_an_empty_directory_is_used(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "a" / "b" / "model", tmp_path / "empty"):
        verify_shards(_write(directory, tokenizer_dir))


def test_writing_the_same_model_again_changes_no_file(model: Path, tokenizer_dir: Path) -> None:
    before = _snapshot(model)
    _write(model, tokenizer_dir)
    assert _snapshot(model) == before


def test_another_model_is_refused_and_stays(model: Path, tokenizer_dir: Path) -> None:
    before = _snapshot(model)
    with pytest.raises(ModelError, match="holds another model"):
        _write(model, tokenizer_dir, random_tensors(CONFIG, seed=1))
    other = GPT2Config(50, 16, 8, 2, 1)
    with pytest.raises(ModelError, match="holds another model"):
        write_model(model, Description("x", other, {}), random_tensors(other).items(), tokenizer_dir=tokenizer_dir)
    assert _snapshot(model) == before
    assert {path.name for path in model.parent.iterdir()} == {"model", "tokenizer"}


def test_a_damaged_copy_of_the_same_model_is_refused(model: Path, tokenizer_dir: Path) -> None:
    _flip(model / SHARD, -1)
    with pytest.raises(ModelError, match=f"{SHARD}: is damaged"):
        _write(model, tokenizer_dir)
    _write(model, tokenizer_dir, replace=True)
    verify_shards(model)


def test_a_replaced_model_is_never_rewritten_in_place(model: Path, tokenizer_dir: Path) -> None:
    params = load_params(model)
    inodes = {path.stat().st_ino for path in model.iterdir()}
    other = random_tensors(CONFIG, seed=1)
    _write(model, tokenizer_dir, other, replace=True)
    np.testing.assert_array_equal(params["wte"], TENSORS["wte"])  # a process that has mapped the old model keeps it
    np.testing.assert_array_equal(load_params(model)["wte"], other["wte"])
    assert not inodes & {path.stat().st_ino for path in model.iterdir()}


def test_files_beside_a_model_are_kept_when_it_is_replaced(model: Path, tokenizer_dir: Path) -> None:
    (model / "README.md").write_text("about")
    (model / "data.npy").write_text("not a shard's name")
    (model / "h9.ln_1.g.npy").write_text("a shard of a deeper model")
    _write(model, tokenizer_dir, replace=True)
    assert (model / "README.md").read_text() == "about"
    assert (model / "data.npy").exists()
    assert not (model / "h9.ln_1.g.npy").exists()


@pytest.mark.parametrize("replace", [False, True])
def test_a_path_that_is_not_a_model_is_never_replaced(replace: bool, tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "home" / "documents").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ModelError, match="home"):
        _write(tmp_path / "home", tokenizer_dir, replace=replace)
    with pytest.raises(ModelError, match="is not a directory"):
        _write(tmp_path / "file", tokenizer_dir, replace=replace)
    assert (tmp_path / "home" / "documents").is_dir()
    assert (tmp_path / "file").read_text() == "mine"


def test_the_old_model_is_restored_if_the_new_one_cannot_be_renamed(
    model: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _snapshot(model)
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ModelError, match="cannot be written"):
        _write(model, tokenizer_dir, replace=True)
    assert _snapshot(model) == before


def test_a_full_disk_gives_one_line_and_leaves_nothing(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ModelError, match=r"model: cannot be written \(No space left on device\)"):
        _write(tmp_path / "model", tokenizer_dir)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


# --- damage ---------------------------------------------------------------------------------------------


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _resave(**options: Any) -> Any:
    def damage(path: Path) -> None:
        np.save(path, np.load(path).astype(**options))

    return damage


def _transpose(path: Path) -> None:
    np.save(path, np.load(path).T.copy())


def _structure(path: Path) -> None:
    np.save(path, np.load(path).view([("x", "<f4")]))


def _pickle(path: Path) -> None:
    np.save(path, np.load(path).astype(object), allow_pickle=True)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _zip(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, np.ones(8))


def _version_2(path: Path) -> None:
    array = np.load(path)
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, version=(2, 0))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "the file is truncated"),
        (_append, "the file is too long"),
        (lambda path: path.write_bytes(b""), r"expected a version 1\.0 \.npy file"),
        (lambda path: path.write_bytes(path.read_bytes()[:50]), "expected header"),
        (_resave(dtype="<f2"), r"expected header .*<f4.*, found .*<f2"),
        (_resave(dtype="<f8"), r"expected header .*<f4.*, found .*<f8"),
        (_resave(dtype="<i4"), r"expected header .*<f4.*, found .*<i4"),
        (_resave(dtype=">f4"), r"expected header .*<f4.*, found .*>f4"),
        (_resave(dtype="<f4", order="F"), r"expected header .*False.*, found .*True"),
        (_transpose, r"expected header .*\(1, 8, 64\).*, found .*\(64, 8, 1\)"),
        (_structure, "expected header"),
        (_pickle, r"expected header .*<f4.*, found .*O"),
        (_zip, r"expected a version 1\.0 \.npy file"),
        (_version_2, r"expected a version 1\.0 \.npy file"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: (path.unlink(), path.mkdir()), "is not a file"),
        (lambda path: (path.unlink(), path.symlink_to(path)), "cannot be read"),
        (_pipe, "is not a file"),
        (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "is not a file"),
    ],
)
def test_a_bad_shard_is_named_before_it_is_mapped(damage: Any, message: str, model: Path) -> None:
    damage(model / SHARD)
    with pytest.raises(ModelError, match=f"{SHARD}: .*{message}"):
        load_params(model)
    with pytest.raises(ModelError, match=f"{SHARD}: .*{message}"):
        verify_shards(model)


def test_a_pickled_shard_is_not_unpickled(model: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "attacked",))

    np.save(model / SHARD, np.array([Attack()], dtype=object), allow_pickle=True)
    with pytest.raises(ModelError, match=SHARD):
        load_params(model)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("name", ["wpe.npy", "encoder.json", "vocab.bpe"])
def test_a_flipped_bit_is_found_and_its_file_named(name: str, model: Path) -> None:
    verify_shards(model)
    expected = hashlib.sha256((model / name).read_bytes()).hexdigest()
    _flip(model / name, -3)
    found = hashlib.sha256((model / name).read_bytes()).hexdigest()
    with pytest.raises(ModelError, match=f"{name}: is damaged .expected sha256 {expected}, found {found}"):
        verify_shards(model)


@pytest.mark.parametrize("tensor", ["h1/mlp/c_fc/w", "lm_head"])
def test_every_flipped_bit_of_a_panel_is_found_in_its_columns_and_in_the_padding(tensor: str, model: Path) -> None:
    shard = load_manifest(model).tensors[tensor]
    path, n_out = model / shard.file, shard.shape[1]
    original = path.read_bytes()
    start = len(original) - 4 * math.prod(shard.stored_shape)
    for column in (0, n_out - 1, n_out, 63):  # of the second row of the only panel
        _flip(path, start + 4 * (64 + column))
        found = (
            f"the columns after column {n_out} are not zeros" if column >= n_out else f"expected sha256 {shard.sha256}"
        )
        with pytest.raises(ModelError, match=f"{path.name}: is damaged .{found}"):
            verify_shards(model)
        path.write_bytes(original)
    verify_shards(model)
    for position in range(start):
        _flip(path, position)
        with pytest.raises(ModelError, match=path.name):
            verify_shards(model)
        path.write_bytes(original)


def test_the_first_bad_file_is_named(model: Path) -> None:
    for name in (SHARD, "wpe.npy", "ln_f.b.npy"):
        _flip(model / name, -1)
    with pytest.raises(ModelError, match=r"wpe\.npy: is damaged"):
        verify_shards(model)


# --- hostile manifests ----------------------------------------------------------------------------------


def _set(*path: str, to: object) -> Any:
    def change(values: Any) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = to

    return change


def _drop(*path: str) -> Any:
    def change(values: Any) -> None:
        for key in path[:-1]:
            values = values[key]
        del values[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format", to=3), "format is 3, and this batchgen reads formats 1 and 2"),
        (_set("format", to=1), r"tensors: h0/attn/c_attn/w: unknown key 'layout'"),
        (_drop("tensors", "lm_head", "layout"), "tensors: lm_head: 'layout' is missing"),
        (_set("tensors", "lm_head", "layout", to="plain"), "lm_head: layout: expected 'panels', found 'plain'"),
        (_set("tensors", "lm_head", "layout", to=[]), "lm_head: layout: expected a string"),
        (_set("tensors", "wpe", "layout", to="panels"), "wpe: unknown key 'layout'"),
        (_set("tensors", "lm_head", "shape", to=[1, 8, 64]), r"lm_head: shape: expected \[8, 50\] from the config"),
        (_set("precision", to="int4"), "precision: expected one of float32, int8, found 'int4'"),
        (_set("precision", to=8), "precision: expected a string, found 8"),
        (_set("format", to=True), "format is True"),
        (_drop("format"), "format is None"),
        (_drop("source"), "'source' is missing"),
        (_set("tensor", to={}), r"unknown key 'tensor' \(nearest: 'tensors'\)"),
        (_set("name", to=5), "name: expected a string, found 5"),
        (_set("name", to="a\nb"), "name: expected 1 to 500 printable"),
        (_set("source", to={"a": 1}), "source 'a': expected 1 to 500 printable"),
        (_set("config", to=[]), "config: expected an object, found a list of 0"),
        (_set("config", "n_layer", to=2.0), "n_layer: expected a whole number, found 2.0"),
        (_set("config", "n_layer", to=True), "n_layer is True"),
        (_set("config", "n_layer", to=2**24), "config: n_layer is 16777216; it must be a whole number from 1 to 4096"),
        (_set("config", "n_layer", to=4096), r"tensors: 'h2/ln_1/g' is missing"),
        (_set("config", "n_layer", to=1), r"tensors: unknown key 'h1/"),
        (_set("config", "n_vocab", to=2**24), r"wte: shape: expected \[16777216, 8\] from the config, found \[50, 8\]"),
        (_set("config", "n_haed", to=2), r"config: unknown key 'n_haed' \(nearest: 'n_head'\)"),
        (_drop("tensors", "wpe"), "tensors: 'wpe' is missing"),
        (_set("tensors", "wpe", to=[]), "tensors: wpe: expected an object"),
        (_drop("tensors", "wpe", "sha256"), "wpe: 'sha256' is missing"),
        (_set("tensors", "wpe", "sha256", to="00"), "wpe: expected 64 hex digits"),
        (_set("tensors", "wpe", "file", to="wte.npy"), r"wpe: file 'wte\.npy' is also that of wte"),
        (_set("tensors", "wpe", "dtype", to=">f4"), "wpe: dtype: expected '<f4', found '>f4'"),
        (
            _set("tensors", "wpe", "shape", to=[8, 16]),
            r"wpe: shape: expected \[16, 8\] from the config, found \[8, 16\]",
        ),
        (_set("tensors", "wpe", "shape", to=[16.0, 8]), "wpe: shape"),
        (_set("tensors", "wpe", "shape", to=[[[16]], 8]), "wpe: shape"),
        (_set("tokenizer", to={"encoder.json": "0" * 64}), r"tokenizer: 'vocab\.bpe' is missing"),
        *(
            (_set("tensors", "wpe", "file", to=name), "wpe: file .* is not a plain .npy name")
            for name in (
                "../wpe.npy",
                "/etc/wpe.npy",
                "a/b.npy",
                ".npy",
                "..",
                "wpe",
                "w\0.npy",
                "\ud800.npy",
                "a\\b.npy",
            )
        ),
    ],
)
def test_the_error_for_a_wrong_manifest_names_the_place(change: Any, message: str, model: Path) -> None:
    values = json.loads((model / "manifest.json").read_text())
    change(values)
    (model / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=f"manifest.json: .*{message}") as caught:
        load_params(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"\xef\xbb\xbf{}",
        b"null",
        b"{",
        b'{"format": NaN}',
        b'{"format": 1e999}',
        b'{"format": ' + b"1" * 5000 + b"}",
        b'{"format": 1, "format": 1}',
        b"[" * 100_000,
        b'{"format":' * 100_000,
        b'{"format": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"format": 1, "name": "' + b"x" * 1_000_000 + b'"}',
        b" " * (16 * 2**20) + b"{}",
    ],
    ids=lambda data: ascii(data[:20]),
)
def test_an_invalid_manifest_gives_one_short_line(data: bytes, model: Path) -> None:
    (model / "manifest.json").write_bytes(data)
    with pytest.raises(ModelError, match=r"manifest\.json") as caught:
        load_manifest(model)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000 + len(str(model))


@pytest.mark.parametrize("depth", range(700, 1000, 20))
def test_nesting_at_the_edge_of_the_recursion_limit_is_refused(depth: int, model: Path) -> None:
    values = json.loads((model / "manifest.json").read_text())
    for field, key in (("config", "n_embd"), ("source", "format")):
        text = json.dumps(values | {field: values[field] | {key: "BOMB"}})
        (model / "manifest.json").write_text(text.replace('"BOMB"', "[" * depth + "]" * depth))
        with pytest.raises(ModelError, match=r"manifest\.json"):
            load_manifest(model)


def test_a_directory_without_a_manifest_is_not_a_model(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelError, match="is not a model"):
            load_manifest(directory)


# --- fuzzing: either a ModelError or the right weights ---------------------------------------

FUZZ = settings(
    max_examples=int(os.environ.get("BATCHGEN_FUZZ", "300")),
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(max_size=8)), min_size=1, max_size=4
)  # (place, number of bytes removed, bytes inserted)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def _edit(data: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for place, removed, inserted in edits:
        position = int(place * len(data))
        data = data[:position] + inserted + data[position + removed :]
    return data


def _load_or_refuse(directory: Path) -> None:
    problem = "no problem"
    try:
        params = load_params(directory)
    except ModelError as error:
        problem = str(error)
    else:
        _assert_equal(params, nest({name: TENSORS[name] for name in shard_shapes(CONFIG)}, CONFIG.n_layer))
    assert problem.isprintable()  # one line of characters that a terminal can show


def _fresh(model: Path, file: str, data: bytes) -> None:
    """Replace a file by a new one; an earlier example may still have mapped the old one."""
    (model / file).unlink()
    (model / file).write_bytes(data)


@FUZZ
@given(edits=EDITS)
def test_edited_bytes_of_a_manifest_load_correctly_or_are_refused(edits: list[Any], model: Path) -> None:
    original = (model / "manifest.json").read_bytes()
    _fresh(model, "manifest.json", _edit(original, edits))
    try:
        _load_or_refuse(model)
    finally:
        _fresh(model, "manifest.json", original)


@FUZZ
@given(data=st.data(), value=JSON)
def test_any_value_in_a_manifest_loads_correctly_or_is_refused(data: Any, value: Any, model: Path) -> None:
    original = (model / "manifest.json").read_bytes()
    values = node = json.loads(original)
    while True:
        key = data.draw(st.sampled_from(sorted(node)))
        if not isinstance(node[key], dict) or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = value
    _fresh(model, "manifest.json", json.dumps(values).encode())
    try:
        _load_or_refuse(model)
    finally:
        _fresh(model, "manifest.json", original)


@FUZZ
@given(edits=EDITS)
def test_edited_bytes_of_a_shards_header_load_correctly_or_are_refused(edits: list[Any], model: Path) -> None:
    original = (model / SHARD).read_bytes()
    start = len(original) - 4 * math.prod(load_manifest(model).tensors["h1/mlp/c_fc/w"].stored_shape)
    _fresh(model, SHARD, _edit(original[:start], edits) + original[start:])
    try:
        _load_or_refuse(model)
    finally:
        _fresh(model, SHARD, original)


# --- untrusted values in errors -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": 1}, "an object of 1"),
        ([1, 2], "a list of 2"),
        ("a\nb\u00e4", r"'a\nb\xe4'"),
        (ValueError("first line\nsecond line"), "first line"),
        (ValueError(), "ValueError"),
        ("x" * 400, "'" + "x" * 296 + "..."),
    ],
)
def test_show_gives_one_short_line(value: object, text: str) -> None:
    assert shards.show(value) == text


# --- imports -------------------------------------------------------------------------------


def test_reading_models_imports_neither_tensorflow_nor_requests() -> None:
    code = (
        "import sys, batchgen.models.shards, batchgen.models.registry, batchgen.models.convert;"
        "print(sorted({'tensorflow', 'requests', 'pyarrow', 'joblib'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
