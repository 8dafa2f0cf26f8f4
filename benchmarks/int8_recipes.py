"""Ways of rounding to int8 that the engine does not have, compared: python -m benchmarks.int8_recipes TEXT.

A simulation in NumPy: bytes are kept as floats, so a recipe can be tried before it has a kernel. TEXT is the text that
tales was trained on; its held-out documents are read. The second table is of a random model of 124M's shape with
outlier columns (benchmarks/quality.py).
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.params import Array, Params, nest
from batchgen.gpt2.pico import gelu, layer_norm, softmax
from batchgen.models.shards import load_manifest, load_params
from benchmarks.models import SIZE_124M
from benchmarks.quality import TALES, compare, log_softmax, outlier_tensors, print_head, print_score, read_held_out


@dataclass(frozen=True, slots=True)
class Recipe:
    """How products are rounded; float32 rounds nothing."""

    name: str
    float32: bool = False
    symmetric: bool = False  # rows are int8 without a zero point, not uint8
    alpha: float | None = None  # SmoothQuant's
    centred: bool = False  # the mean of each column is subtracted first
    float_columns: int = 0  # so many input columns of each product, the largest, stay float32


FLOAT32 = Recipe("float32", float32=True)
RECIPES = (
    Recipe("rows symmetric", symmetric=True),
    Recipe("rows with a zero point"),
    *(Recipe(f"and scaled, alpha {alpha}", alpha=alpha) for alpha in (0.25, 0.5, 0.75)),
    Recipe("and centred", centred=True),
    Recipe("and centred and scaled, alpha 0.5 (the engine's)", alpha=0.5, centred=True),
    *(Recipe(f"and {n} columns float32", float_columns=n) for n in (4, 16)),
    Recipe("the engine's, and 4 columns float32", alpha=0.5, centred=True, float_columns=4),
)


@dataclass(frozen=True, slots=True)
class Product:
    """x @ w + b, where (x - mean) * inverse and w / inverse are rounded, but for `columns` of x."""

    recipe: Recipe
    w: Array  # rounded
    b: Array
    mean: Array
    inverse: Array
    columns: Array
    w_columns: Array

    def __call__(self, x: Array) -> Array:
        if self.recipe.float32:
            return x @ self.w + self.b
        rows = round_rows((x - self.mean) * self.inverse, self.recipe.symmetric)
        return rows @ self.w + x[:, self.columns] @ self.w_columns + self.b


def round_rows(x: Array, symmetric: bool) -> Array:
    low, high = np.minimum(x.min(axis=1, keepdims=True), 0), np.maximum(x.max(axis=1, keepdims=True), 0)
    if symmetric:
        scale = np.maximum(np.maximum(-low, high), 1e-30) / np.float32(127)
        return np.rint(x / scale) * scale
    scale = np.maximum(high - low, 1e-30) / np.float32(255)
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


def round_columns(w: Array) -> Array:
    scale = np.maximum(np.abs(w).max(axis=0), 1e-30) / np.float32(127)
    return np.rint(w / scale) * scale


def prepare(recipe: Recipe, w: Array, b: Array, x: Array) -> Product:
    """x [n_row, n_in]: what the product reads in a pass over random tokens."""
    n_in = len(w)
    mean = x.mean(axis=0) if recipe.centred else np.zeros(n_in, np.float32)
    largest, inverse = np.abs(x - mean).max(axis=0), np.ones(n_in, np.float32)
    if recipe.float32:
        return Product(recipe, w, b, mean, inverse, np.zeros(0, int), w[:0])
    if recipe.alpha is not None:
        inverse = np.abs(w).max(axis=1) ** (1 - recipe.alpha) / largest**recipe.alpha
    columns = np.argsort(largest * inverse)[n_in - recipe.float_columns :]
    scaled, moved_b = w / inverse[:, None], b + mean @ w
    moved_b -= mean[columns] @ w[columns]
    scaled[columns], inverse[columns] = 0, 0
    return Product(recipe, round_columns(scaled), moved_b, mean, inverse, columns, w[columns])


def bfloat16(x: Array) -> Array:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


class Model:
    """GPT-2 without a cache, its products rounded by a recipe."""

    def __init__(self, params: Params, config: GPT2Config, recipe: Recipe, inputs: dict[str, Array]) -> None:
        self.params, self.config, self.recipe, self.inputs = params, config, recipe, inputs
        self.products = {
            name: prepare(recipe, w, b, inputs.get(name, w.T)) for name, w, b in linears(params, config.n_vocab)
        }

    def _linear(self, name: str, x: Array) -> Array:
        if self.recipe.float32:
            self.inputs[name] = x
        return self.products[name](x)

    def _attend(self, qkv: Array) -> Array:
        n, config = len(qkv), self.config
        q, k, v = (np.ascontiguousarray(part) for part in qkv.reshape(n, 3, config.n_head, -1).transpose(1, 2, 0, 3))
        if not self.recipe.float32:
            k, v = bfloat16(k), bfloat16(v)
        mask = np.triu(np.full((n, n), -np.inf, np.float32), k=1)
        weights = softmax(q @ k.swapaxes(1, 2) * np.float32(config.d_head**-0.5) + mask)
        mixed: Array = (weights @ v).transpose(1, 0, 2).reshape(n, -1)
        return mixed

    def logits(self, ids: Array, step: int = 1) -> Array:
        """[n] ids at positions 0, step, 2 * step ... -> [n, n_vocab]."""
        p = self.params
        x = p["wte"][ids] + p["wpe"][::step][: len(ids)]
        for i, block in enumerate(p["blocks"]):
            attended = self._attend(self._linear(f"{i}/c_attn", layer_norm(x, **block["ln_1"])))
            x = x + self._linear(f"{i}/attn_proj", attended)
            hidden = gelu(self._linear(f"{i}/c_fc", layer_norm(x, **block["ln_2"])))
            x = x + self._linear(f"{i}/mlp_proj", hidden)
        return self._linear("lm_head", layer_norm(x, **p["ln_f"]))


def linears(params: Params, n_vocab: int) -> Iterator[tuple[str, Array, Array]]:
    for i, block in enumerate(params["blocks"]):
        attn, mlp = block["attn"], block["mlp"]
        named = {"c_attn": attn["c_attn"], "attn_proj": attn["c_proj"], "c_fc": mlp["c_fc"], "mlp_proj": mlp["c_proj"]}
        for name, linear in named.items():
            yield f"{i}/{name}", linear["w"], linear["b"]
    yield "lm_head", params["lm_head"], np.zeros(n_vocab, np.float32)


def record_inputs(exact: Model, n_sequence: int = 8, length: int = 128) -> dict[str, Array]:
    """What every product reads in random tokens over all positions of the context."""
    config, rng = exact.config, np.random.default_rng(0)
    seen: list[dict[str, Array]] = []
    for _ in range(n_sequence):
        exact.logits(rng.integers(0, config.n_vocab, length), config.n_ctx // length)
        seen.append(dict(exact.inputs))
    return {name: np.concatenate([inputs[name] for inputs in seen]) for name in seen[0]}


def tabulate(title: str, params: Params, config: GPT2Config, windows: Array, *, is_text: bool) -> None:
    exact = Model(params, config, FLOAT32, {})
    inputs = record_inputs(exact)
    expected = [log_softmax(exact.logits(window[:-1])) for window in windows]
    base = compare(expected, expected, windows).perplexity if is_text else None
    print_head(title, base)
    for recipe in RECIPES:
        model = Model(params, config, recipe, inputs)
        found = (log_softmax(model.logits(window[:-1])) for window in windows)
        print_score(recipe.name, base, compare(expected, found, windows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    options = parser.parse_args()
    config = load_manifest(TALES).config
    windows = read_held_out(options.text, TALES, config.n_ctx)[::4]
    tabulate("tales, a quarter of the held-out text", load_params(TALES), config, windows, is_text=True)
    random_windows = np.random.default_rng(0).integers(0, 50_000, (2, 257))
    tabulate(
        "124M's shape with outliers",
        nest(outlier_tensors(), SIZE_124M.n_layer),
        SIZE_124M,
        random_windows,
        is_text=False,
    )


if __name__ == "__main__":
    main()
