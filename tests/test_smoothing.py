"""smoothing.py: a few large columns do not cost the others their digits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from batchgen.gpt2 import kernels
from batchgen.gpt2.forward import Forward, Prefill
from batchgen.gpt2.kv_cache import KVArena
from batchgen.gpt2.params import Array, nest
from batchgen.gpt2.weights import GROUP, Float32Linear, Int8Linear, Weights, pack, round_up, to_int8, to_panels
from batchgen.models.model import Model
from batchgen.models.shards import Description, write_model
from batchgen.models.smoothing import _fit, _Inputs, fit_inputs
from batchgen.text.tokenizer import Tokenizer
from tests.support.models import BYTES, sharp_tensors, write_byte_vocabulary, write_wide_model

CONFIG = replace(BYTES, n_layer=1, n_embd=64)


def product(x: Array, w: Int8Linear) -> Array:
    """x [n_row, n_in] @ w + b, with x rounded to bytes."""
    n_row, n_in = x.shape
    u = np.zeros((n_row, round_up(n_in, GROUP)), np.uint8)
    scale, zero = np.zeros(n_row, np.float32), np.zeros(n_row, np.int32)
    kernels.quantise(x, w.inverse, w.offset, u, scale, zero)
    out = np.empty((n_row, len(w.b)), np.float32)
    kernels.linear_int8(u, scale, zero, w.panels, w.scale, w.column_sum, w.b, kernels.STORE, out)
    return out


def relative_error(found: Array, expected: Array) -> float:
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected - expected.mean()).mean()))


def fitted(x: Array, w: Array, b: Array) -> Int8Linear:
    inputs = _Inputs(x.shape[1])
    inputs.add(x)
    return to_int8(w, b, *_fit(inputs, Float32Linear(to_panels(w), b)))


@pytest.mark.parametrize("n_in", [7, 64, 300])
def test_a_product_of_columns_that_differ_in_size_and_mean(n_in: int) -> None:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape, dtype=np.float32) for shape in ((200, n_in), (n_in, 70)))
    b = rng.standard_normal(70, dtype=np.float32)
    x[:, 3], w[3] = x[:, 3] * 50 + 400, w[3] / 50
    expected = x.astype(np.float64) @ w + b
    assert relative_error(product(x, fitted(x[:100], w, b)), expected) < 0.012
    assert relative_error(product(x, to_int8(w, b)), expected) > 0.2


def test_the_columns_that_are_rounded_have_the_mean_0_and_sizes_alike() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 40), dtype=np.float32) * np.geomspace(1, 100, 40, dtype=np.float32) + 30
    w = fitted(x, rng.standard_normal((40, 8), dtype=np.float32), np.zeros(8, np.float32))
    y = x * w.inverse + w.offset
    assert abs(y.mean(axis=0)).max() < 1e-4 * abs(y).max()
    sizes = abs(y).max(axis=0)
    assert sizes.max() / np.median(sizes) < 5  # x: 10


def test_columns_that_are_always_0_or_overflow_get_finite_numbers() -> None:
    x = np.ones((4, 8), np.float32)
    x[:, 0], x[0, 1], w = 0, np.inf, np.zeros((8, 3), np.float32)
    for linear in (fitted(x, w, w[0]), fitted(x[:, :1] * 0, w[:1], w[0])):
        assert np.isfinite(linear.inverse).all()
        assert (linear.inverse > 0).all()
        assert np.isfinite(linear.offset).all()
        assert np.isfinite(linear.b).all()


def write_outlier_model(directory: Path) -> Model:
    """Three columns of both norms' outputs are 50 times as large as the others, and do as much as they."""
    tensors = sharp_tensors(CONFIG)
    columns = [3, 20, 41]
    for norm, product in (("ln_1", "attn/c_attn"), ("ln_2", "mlp/c_fc")):
        tensors[f"h0/{norm}/g"][columns] *= 50
        tensors[f"h0/{norm}/b"][columns] += 20
        tensors[f"h0/{product}/w"][columns] /= 50
    del tensors["lm_head"]
    vocabulary = write_byte_vocabulary(directory.with_name("vocabulary"))
    write_model(directory, Description("outliers", CONFIG, {}), tensors.items(), tokenizer_dir=vocabulary)
    return Model.load(directory, precision="int8")


def logits(weights: Weights) -> Array:
    segment = KVArena(CONFIG, 100, weights.precision).allocate(100, start=0)
    assert segment is not None
    ids = np.random.default_rng(5).integers(0, 257, 100).tolist()
    return Forward(weights, CONFIG, 100, 100)(prefills=[Prefill(segment, ids, n_logits=100)])


def test_outlier_columns_of_a_model_cost_nothing(tmp_path: Path) -> None:
    model = write_outlier_model(tmp_path / "outliers")
    expected = logits(model.with_precision("float32").load_weights())
    assert relative_error(logits(model.with_precision("int8").load_weights()), expected) < 0.03
    assert relative_error(logits(pack(model.load_params(), "int8")), expected) > 0.1


def test_rows_of_wte_that_no_token_has_are_never_read(tmp_path: Path) -> None:
    directory = write_wide_model(tmp_path / "wide")
    model = Model.load(directory)
    weights, tokenizer = model.with_precision("float32").load_weights(), Tokenizer.load(directory)
    wte = weights.wte.copy()
    wte[tokenizer.absent_ids(len(wte))] = np.nan
    found, expected = (
        fit_inputs(given, model.manifest.config, tokenizer) for given in (replace(weights, wte=wte), weights)
    )
    for name, arrays in expected.items():
        np.testing.assert_array_equal(found[name], arrays)


def test_finite_weights_of_any_size_are_rounded_to_finite_numbers_without_a_warning(tmp_path: Path) -> None:
    w = np.array([[3e38, 1e-45], [-3e38, 0]], np.float32)
    linear = to_int8(w, np.zeros(2, np.float32), np.full(2, 1e-3, np.float32), np.ones(2, np.float32))
    assert np.isfinite(linear.scale).all()
    assert linear.panels[0, 0, 0].tolist() == [127, -127, 0, 0]
    tensors = sharp_tensors(CONFIG)
    tensors["h0/ln_1/g"][:] = 3e38  # the inputs overflow: columns are inf and nan
    vocabulary = Tokenizer.load(write_byte_vocabulary(tmp_path / "vocabulary"))
    for inverse, offset in fit_inputs(pack(nest(tensors, CONFIG.n_layer), CONFIG), CONFIG, vocabulary).values():
        assert np.isfinite(inverse).all()
        assert np.isfinite(offset).all()
