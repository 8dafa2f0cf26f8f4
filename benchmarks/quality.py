"""What int8 costs in quality, beside CTranslate2's int8: python -m benchmarks.quality [--text FILE] [--large].

Perplexity, KL divergence of the next-token distributions from those of float32, and how often both have the same most
likely token. The model is tales. FILE is the text that it was trained on (data/models/tales/README.md), of which the
held-out documents are read; without it, the text is what the model itself samples. --large adds random models of
124M's shape, one of them with outlier columns like GPT-2's.
"""

import argparse
import importlib
import lzma
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from batchgen.generator import Generator
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.forward import Forward, Prefill
from batchgen.gpt2.kv_cache import KVArena
from batchgen.gpt2.params import Array
from batchgen.gpt2.weights import Weights, pack
from batchgen.models.model import Model
from batchgen.models.shards import Description, load_tensors, write_model
from batchgen.text.tokenizer import END_OF_TEXT
from benchmarks.models import SIZE_124M, write_huggingface
from tests.support.tensors import random_tensors
from tests.support.vocabulary import gpt2_vocabulary_dir

TALES = Path(__file__).resolve().parents[1] / "data" / "models" / "tales"
OUTLIERS, SIZE = (138, 378, 447, 640), 50  # columns of a norm's output, and how many times the others they are

Windows = Array  # [n, n_token + 1] token ids, each window read alone
LogProbs = Iterable[Array]  # for each window, [n_token, n_vocab]


@dataclass(frozen=True, slots=True)
class Score:
    """Of a model that is compared with the same model in float32."""

    perplexity: float
    divergence: float  # KL divergence from float32, nats a token
    same_best: float  # share of positions with the same most likely token


def compare(exact: LogProbs, found: LogProbs, windows: Windows) -> Score:
    loss, divergence, same, n = 0.0, 0.0, 0, 0
    for window, a, b in zip(windows, exact, found, strict=True):
        n += len(a)
        loss -= float(b[np.arange(len(b)), window[1:]].sum(dtype=np.float64))
        divergence += float((np.exp(a) * (a - b)).sum(dtype=np.float64))
        same += int((a.argmax(axis=1) == b.argmax(axis=1)).sum())
    return Score(float(np.exp(loss / n)), divergence / n, same / n)


def log_softmax(logits: Array) -> Array:
    x = logits - logits.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))  # type: ignore[no-any-return]


def batchgen_log_probs(weights: Weights, config: GPT2Config, windows: Windows) -> Iterator[Array]:
    n = windows.shape[1] - 1
    forward, arena = Forward(weights, config, n, n), KVArena(config, n, weights.precision)
    for window in windows:
        arena.clear()
        segment = arena.allocate(n, start=0)
        assert segment is not None
        yield log_softmax(forward(prefills=[Prefill(segment, window[:-1].tolist(), n_logits=n)]))


def ctranslate2_log_probs(huggingface: Path, quantization: str, windows: Windows) -> Iterator[Array]:
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    converted = huggingface.with_name(quantization)
    TransformersConverter(str(huggingface)).convert(str(converted), quantization=quantization)
    generator = ctranslate2.Generator(str(converted), compute_type=quantization, intra_threads=1)
    for window in windows:
        yield np.array(generator.forward_batch([window[:-1].tolist()], return_log_probs=True))[0]


def read_held_out(text: Path, model: Path, n_ctx: int) -> Windows:
    """The documents that train.py holds out, as its windows: <|endoftext|> before each and at the end."""
    sys.path.append(str(model))
    train = importlib.import_module("train")
    with (lzma.open if text.suffix == ".xz" else open)(text, "rt", encoding="utf-8") as stream:
        _, held_out = train.split_documents({"text": stream.read()}, seed=1)
    tokenizer = Model.load(model).load_tokenizer()
    end = tokenizer.encoder[END_OF_TEXT]
    ids = [end]
    for document in held_out["text"]:
        ids += [*tokenizer.encode(document), end]
    return cut_windows(ids, n_ctx)


def cut_windows(ids: list[int], n: int) -> Windows:
    """Windows of n + 1 ids, each beginning with the last id of the one before."""
    return np.array([ids[i : i + n + 1] for i in range(0, len(ids) - n, n)])


def sample_windows(model: Path, n: int = 40) -> Windows:
    """Texts that the model samples at temperature 1, n_ctx tokens long."""
    generator = Generator(model, precision="float32")
    options = {"temperature": 1.0, "max_tokens": generator.config.n_ctx - 1, "n": n, "seed": 1, "ignore_eos": True}
    end = generator.tokenizer.encoder[END_OF_TEXT]
    rows = generator.generate([END_OF_TEXT], special_tokens="parse", **options)
    return np.array([[end, *(row.completion_token_ids or ())] for row in rows])


def outlier_tensors() -> dict[str, Array]:
    """Random weights; a few columns of both norms' outputs are SIZE times the others, and do as much as they."""
    tensors, columns = ordinary_tensors(), list(OUTLIERS)
    for layer in range(SIZE_124M.n_layer):
        for norm, product in (("ln_1", "attn/c_attn"), ("ln_2", "mlp/c_fc")):
            tensors[f"h{layer}/{norm}/g"][columns] *= SIZE
            tensors[f"h{layer}/{norm}/b"][columns] *= SIZE
            tensors[f"h{layer}/{product}/w"][columns] /= SIZE
    return tensors


def ordinary_tensors() -> dict[str, Array]:
    """Random weights whose logits have about the spread of a trained model's."""
    tensors = random_tensors(SIZE_124M)
    tensors["ln_f/g"] *= 6
    return tensors


def print_head(title: str, base: float | None) -> None:
    """base: the perplexity in float32, None if the tokens are random and no text."""
    shown = " perplexity | against float32 |" if base else ""
    print(f"\n| {title} |{shown} KL divergence | same best token |\n|---|{'--:|--:|' if base else ''}--:|--:|")
    print_score("float32", base, Score(base or 0, 0, 1))


def print_score(name: str, base: float | None, score: Score) -> None:
    shown = f" {score.perplexity:.3f} | {100 * (score.perplexity / base - 1):+.2f} % |" if base else ""
    print(f"| {name} |{shown} {score.divergence:.5f} | {100 * score.same_best:.1f} % |", flush=True)


def measure(title: str, directory: Path, windows: Windows, huggingface: Path, *, is_text: bool) -> None:
    """A table for a model: batchgen's int8, the same without centring and scaling, and CTranslate2's."""
    model = Model.load(directory)
    config = model.config
    weights = {
        "int8": Model.load(directory, precision="int8").load_weights(),
        "int8, neither centred nor scaled": pack(model.load_params(), "int8"),
    }
    found = {name: batchgen_log_probs(w, config, windows) for name, w in weights.items()}
    write_huggingface(huggingface, load_tensors(directory), config, directory)
    for kind in ("float32", "int8"):
        found[f"CTranslate2 {kind}"] = ctranslate2_log_probs(huggingface, kind, windows)
    exact = list(batchgen_log_probs(model.with_precision("float32").load_weights(), config, windows))
    base = compare(exact, exact, windows).perplexity if is_text else None
    print_head(f"{title}, {windows.shape[0] * (windows.shape[1] - 1):,} tokens", base)
    for name, log_probs in found.items():
        print_score(name, base, compare(exact, log_probs, windows))


def measure_large(scratch: Path) -> None:
    windows = np.random.default_rng(0).integers(0, 50_000, (2, 257))
    kinds = {
        "124M's shape, random": ordinary_tensors,
        f"the same, {len(OUTLIERS)} columns {SIZE} times": outlier_tensors,
    }
    for i, (title, make) in enumerate(kinds.items()):
        directory = scratch / f"random-{i}"
        tensors = make()
        del tensors["lm_head"]
        write_model(directory, Description(title, SIZE_124M, {}), tensors.items(), tokenizer_dir=gpt2_vocabulary_dir())
        measure(title, directory, windows, scratch / f"huggingface-{i}" / "model", is_text=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="the training text of tales")
    parser.add_argument("--large", action="store_true", help="random models of 124M's shape too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quality-") as scratch:
        model = Model.load(TALES)
        windows = read_held_out(options.text, TALES, model.config.n_ctx) if options.text else sample_windows(TALES)
        title = "tales, held-out text" if options.text else "tales, text of its own"
        measure(title, TALES, windows, Path(scratch, "tales", "model"), is_text=True)
        if options.large:
            measure_large(Path(scratch))


if __name__ == "__main__":
    main()
