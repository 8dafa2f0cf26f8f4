"""Train the embedded `tales` model from plain text: BPE, GPT-2, loss curve, export.

    python data/models/tales/train.py TEXT --out data/models/tales --work work --minutes 90

TEXT is a plain-text file (.txt, .txt.xz, .txt.gz) or a folder of them, with blank
lines between paragraphs.  Needs torch, tokenizers, a C++ compiler (kernels.cpp) and this
project; only this script uses PyTorch.  The network is GPT-2's, layer for layer, at a size
that one CPU core trains in an hour and a half.  A run that was cut off goes on if the same
command, with the same --work, is given again.  `--start MODEL` begins with that model's
weights and vocabulary instead of random weights and a new vocabulary.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import lzma
import math
import random
import re
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from kernels import Add, Attention, CrossEntropy, Gelu, LayerNorm

END_OF_TEXT = "<|endoftext|>"
OPENERS: dict[str, Callable[..., object]] = {".txt": open, ".xz": lzma.open, ".gz": gzip.open}
PUNCTUATION = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"',
                             "\u2013": "-", "\u2014": "--", "\u2026": "..."})
GUTENBERG_BODY = re.compile(r"\*\*\* ?START OF.*?\*\*\*(.*?)(?:\*\*\* ?END OF|\Z)", re.S)
TALE_START = re.compile(
    r"""["']?(Once upon a time|Once there (was|were|lived)|There (was|were|lived) (once|formerly)"""
    r"""|There once (was|were|lived)|There lived|Once on a time|Long,? long ago|A long time ago"""
    r"""|Many years ago|A (very )?long while ago|In (olden|old|former|ancient) (times|days)"""
    r"""|In the (olden|old) (times|days)|In times of old|Long ago"""
    r"""|There was (a|an) (king|queen|man|woman|poor|rich|miller|farmer|fisherman|widow|merchant)\b"""
    r"""|A (king|queen|man|woman|miller|farmer|widow|merchant|poor man|poor woman) (once )?had\b"""
    r"""|An? (certain|old|poor|rich) \w+ once (had|lived|was))""", re.I)
PROMPTS = ("Once upon a time", "The king said to his youngest daughter,",
           "In the middle of the forest there stood")


@dataclass(frozen=True)
class Shape:
    """The network's size; 5,918,720 parameters as it stands."""

    n_vocab: int = 4096
    n_ctx: int = 512
    n_embd: int = 256
    n_head: int = 4
    n_layer: int = 6


# ---------------------------------------------------------------- text


def read_texts(path: Path) -> dict[str, str]:
    """The text files at `path` (one file, or a folder's, in name order), by name."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in OPENERS)
    if not files:
        raise SystemExit(f"no .txt, .txt.xz or .txt.gz file in {path}")
    texts = {}
    for file in files:
        with OPENERS[file.suffix](file, "rt", encoding="utf-8-sig") as stream:
            texts[str(file.relative_to(path.parent))] = stream.read()
    return texts


def paragraphs(text: str) -> list[str]:
    """Unwrapped ASCII paragraphs of a text, without Project Gutenberg's header and footer."""
    body = GUTENBERG_BODY.search(text)
    text = (body.group(1) if body else text).translate(PUNCTUATION)
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")
    blocks = re.split(r"\n\s*\n", text.replace("\r\n", "\n"))
    return [block for block in (" ".join(b.split()) for b in blocks) if block]


def documents(text: str, rng: random.Random) -> Iterator[str]:
    """Cut a text where a tale seems to begin, or else every 1,500 to 2,500 characters."""
    parts: list[str] = []
    size, limit = 0, rng.randint(1500, 2500)
    for paragraph in paragraphs(text):
        if parts and (size >= limit or (size >= 200 and TALE_START.match(paragraph))):
            yield "\n\n".join(parts)
            parts, size, limit = [], 0, rng.randint(1500, 2500)
        parts.append(paragraph)
        size += len(paragraph) + 2
    if parts:
        yield "\n\n".join(parts)


def split_documents(texts: dict[str, str], seed: int) -> tuple[list[str], dict[str, list[str]]]:
    """Shuffled training documents, and the 2 % of each file that are held out, by the file's name.

    Every file is split as if it were alone, so another file does not change what is held out.
    """
    kept: list[str] = []
    held_out: dict[str, list[str]] = {}
    for name, text in texts.items():
        rng = random.Random(seed)
        everything = list(documents(text, rng))
        rng.shuffle(everything)
        count = max(1, len(everything) // 50)
        held_out[name], rest = everything[:count], everything[count:]
        kept += rest
    random.Random(seed).shuffle(kept)
    return kept, held_out


# ---------------------------------------------------------------- tokens


def train_bpe(texts: list[str], n_vocab: int) -> Tokenizer:
    """A byte-level BPE with GPT-2's split pattern; the last id is end-of-text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=n_vocab - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != n_vocab - 1:
        raise SystemExit(f"the text is too small for {n_vocab - 1} tokens")
    return tokenizer


def save_bpe(tokenizer: Tokenizer, out: Path) -> None:
    """Write the vocabulary as OpenAI's `encoder.json` and `vocab.bpe`."""
    model = json.loads(tokenizer.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    vocab[END_OF_TEXT] = len(vocab)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (out / "encoder.json").write_text(json.dumps(vocab), encoding="utf-8")
    (out / "vocab.bpe").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def load_bpe(folder: Path) -> Tokenizer:
    """The vocabulary that `save_bpe` wrote."""
    vocab = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    del vocab[END_OF_TEXT]
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    tokenizer = Tokenizer(models.BPE(vocab, [(a, b) for a, b in map(str.split, lines)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """One stream of tokens, with end-of-text before each document and at the end."""
    end = tokenizer.get_vocab_size()
    stream = [end]
    for encoding in tokenizer.encode_batch_fast(texts):
        stream += encoding.ids
        stream.append(end)
    return torch.tensor(stream)


# ---------------------------------------------------------------- network


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A layer's product in bfloat16; its weights stay float32."""
    return F.linear(x, layer.weight.bfloat16(), layer.bias.bfloat16())


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """A layer norm, from float32 to bfloat16."""
    return LayerNorm.apply(x, layer.weight, layer.bias)


class Block(nn.Module):
    """A GPT-2 layer: attention, then a multilayer perceptron, each behind a layer norm."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        n = shape.n_embd
        self.n_head, self.dropout = shape.n_head, dropout
        self.ln_1, self.ln_2 = nn.LayerNorm(n, eps=1e-5), nn.LayerNorm(n, eps=1e-5)
        self.c_attn, self.c_proj = nn.Linear(n, 3 * n), nn.Linear(n, n)
        self.c_fc, self.c_out = nn.Linear(n, 4 * n), nn.Linear(4 * n, n)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the two halves compute to the residual stream."""
        dropout = self.dropout if self.training else 0.0
        batch, length, width = x.shape
        qkv = linear(self.c_attn, norm(self.ln_1, x)).view(batch, length, 3, self.n_head, width // self.n_head)
        x = Add.apply(x, linear(self.c_proj, Attention.apply(qkv)), dropout)
        hidden = Gelu.apply(linear(self.c_fc, norm(self.ln_2, x)))
        return Add.apply(x, linear(self.c_out, hidden), dropout)


class GPT2(nn.Module):
    """GPT-2 with the token embedding tied to the output head."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape, self.dropout = shape, dropout
        self.wte = nn.Embedding(shape.n_vocab, shape.n_embd)
        self.wpe = nn.Embedding(shape.n_ctx, shape.n_embd)
        self.blocks = nn.ModuleList(Block(shape, dropout) for _ in range(shape.n_layer))
        self.ln_f = nn.LayerNorm(shape.n_embd, eps=1e-5)
        self.initialise()

    def initialise(self) -> None:
        """GPT-2's initial weights: 0.02, less for what writes to the residual stream."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("c_proj.weight", "c_out.weight"))
                scale = math.sqrt(2 * self.shape.n_layer) if residual else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits for each position's next token."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return F.linear(norm(self.ln_f, x), self.wte.weight.bfloat16())


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats a token over windows of n_ctx + 1 tokens."""
    logits = model(windows[:, :-1])
    return CrossEntropy.apply(logits.flatten(0, 1), windows[:, 1:].flatten())


# ---------------------------------------------------------------- optimisers


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrix, for a batch."""
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.float()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised; for the layers' matrices.

    A matrix is cut into pieces of n_embd rows (or columns), so that query, key and
    value are each orthogonalised alone and equal shapes go in one batch.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "decay": decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every matrix once."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for same in shapes.values():
                self.update(same, group)

    def update(self, same: list[nn.Parameter], group: dict[str, float]) -> None:
        """Update the matrices of one shape, which is [out, in]."""
        directions = []
        for parameter in same:
            state = self.state[parameter]
            average = state.setdefault("average", torch.zeros_like(parameter))
            average.lerp_(parameter.grad, 1 - group["momentum"])
            directions.append(parameter.grad.lerp(average, group["momentum"]))
        stack = torch.stack(directions)
        rows, columns = stack.shape[1:]
        if rows == 3 * columns:
            turned = orthogonalise(stack.view(-1, columns, columns)).view_as(stack)
        elif rows > columns:
            turned = orthogonalise(stack.mT).mT * math.sqrt(rows / columns)
        else:
            turned = orthogonalise(stack)
        for parameter, change in zip(same, turned, strict=True):
            parameter.mul_(1 - group["lr"] * group["decay"]).sub_(change, alpha=group["lr"])


def optimisers(model: GPT2, lr: float, muon_lr: float, decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, norms and biases."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    embeddings = [model.wte.weight, model.wpe.weight]
    groups = [{"params": embeddings, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    return [adam, Muon(matrices, muon_lr, decay)]


# ---------------------------------------------------------------- training


@dataclass
class Progress:
    """Where a run stands; `done` goes from 0 to 1 by steps or by the clock. whole: no window is cut in half."""

    steps: int
    seconds: float
    whole: bool = False
    step: int = 0
    tokens: int = 0
    elapsed: float = 0.0

    @property
    def done(self) -> float:
        """The part of the run that is over."""
        return min(1.0, self.step / self.steps if self.steps else self.elapsed / self.seconds)

    def rate(self) -> float:
        """The learning rate's factor: warm-up, a plateau, then a straight line to zero."""
        return min(1.0, (self.step + 1) / 100, (1.0 - self.done) / 0.7)

    def length(self, n_ctx: int) -> int:
        """Half windows in the first half of a run from random weights, which saves time in attention."""
        return n_ctx if self.whole or self.done >= 0.5 else n_ctx // 2


def windows(stream: Tensor, starts: Tensor, length: int) -> Tensor:
    """Windows of length + 1 tokens from a stream."""
    return stream[starts[:, None] + torch.arange(length + 1)]


@torch.no_grad()
def evaluate(model: GPT2, stream: Tensor, at_most: int = 0) -> float:
    """Loss over a stream's successive whole windows, or over a spread of `at_most`."""
    length = model.shape.n_ctx
    starts = torch.arange(0, len(stream) - length, length)
    if at_most and len(starts) > at_most:
        starts = starts[:: len(starts) // at_most][:at_most]
    model.eval()
    losses = [loss_of(model, windows(stream, part, length)) * len(part) for part in starts.split(8)]
    model.train()
    return float(sum(losses)) / len(starts)


@torch.no_grad()
def sample(model: GPT2, tokenizer: Tokenizer, prompt: str, count: int, heat: float = 0.8) -> str:
    """Continue a prompt by at most `count` tokens."""
    end = tokenizer.get_vocab_size()
    ids = [end, *tokenizer.encode(prompt).ids]
    model.eval()
    for _ in range(count):
        logits = model(torch.tensor([ids[-model.shape.n_ctx :]]))[0, -1].float()
        ids.append(int(torch.multinomial((logits / heat).softmax(-1), 1)))
        if ids[-1] == end:
            break
    model.train()
    return tokenizer.decode([i for i in ids if i != end])


def step(model: GPT2, optims: list[torch.optim.Optimizer], stream: Tensor, batch: int, at: Progress) -> float:
    """One step over `batch` tokens; returns its loss."""
    length, rate = at.length(model.shape.n_ctx), at.rate()
    starts = torch.randint(len(stream) - length, (batch // length,))
    loss = loss_of(model, windows(stream, starts, length))
    if not loss.isfinite():
        raise SystemExit(f"step {at.step}: the loss is {loss.item()}")
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optim in optims:
        for group in optim.param_groups:
            group["lr"] = group.setdefault("peak", group["lr"]) * rate
        optim.step()
        optim.zero_grad()
    at.step, at.tokens = at.step + 1, at.tokens + starts.numel() * length
    return loss.item()


@dataclass
class Run:
    """What a run needs to go on: the network, its optimisers, where it stands, its best weights."""

    model: GPT2
    optims: list[torch.optim.Optimizer]
    at: Progress
    rows: list[tuple[int, int, float, float, float]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_loss: float = math.inf

    def save(self, path: Path) -> None:
        """Write everything, in one move."""
        state = {"shape": vars(self.model.shape), "model": self.model.state_dict(), "at": vars(self.at),
                 "optims": [optim.state_dict() for optim in self.optims], "random": torch.get_rng_state(),
                 "rows": self.rows, "recent": self.recent, "best": self.best, "best_loss": self.best_loss}
        beside = path.with_name("new.pt")
        torch.save(state, beside)
        beside.replace(path)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        state = torch.load(path)
        if state["shape"] != vars(self.model.shape):
            raise SystemExit(f"{path} is from another network: {state['shape']}")
        self.model.load_state_dict(state["model"])
        for optim, saved in zip(self.optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        at = state["at"]
        self.at.step, self.at.tokens, self.at.elapsed = at["step"], at["tokens"], at["elapsed"]
        self.rows, self.recent = [tuple(row) for row in state["rows"]], state["recent"]
        self.best, self.best_loss = state["best"], state["best_loss"]
        torch.set_rng_state(state["random"])


def write_curve(path: Path, rows: list[tuple[int, int, float, float, float]]) -> None:
    """Write the loss curve."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["step", "tokens", "minutes", "train_loss", "val_loss"])
        for at, tokens, minutes, train_loss, val_loss in rows:
            writer.writerow([at, tokens, f"{minutes:.2f}", f"{train_loss:.4f}", f"{val_loss:.4f}"])


def train(run: Run, tokenizer: Tokenizer, data: tuple[Tensor, Tensor], args: argparse.Namespace) -> None:
    """Run the schedule, with 50 points on the loss curve and a few samples on the way.

    The network ends with the weights of the point that had the least held-out loss.
    """
    (stream, held_out), model, at = data, run.model, run.at
    saved = args.work / "run.pt" if args.work else None
    if saved and saved.exists():
        run.load(saved)
        print(f"going on from step {at.step}, minute {at.elapsed / 60:.2f}", flush=True)
    started = time.monotonic() - at.elapsed
    last_save = at.elapsed
    while at.done < 1.0:
        point = int(at.done * 50)
        run.recent.append(step(model, run.optims, stream, args.batch, at))
        at.elapsed = time.monotonic() - started
        if int(at.done * 50) > point:
            val_loss = evaluate(model, held_out, 64)
            run.rows.append((at.step, at.tokens, at.elapsed / 60, sum(run.recent) / len(run.recent), val_loss))
            print("step %d tokens %d minutes %.2f train %.4f val %.4f" % run.rows[-1], flush=True)
            run.recent.clear()
            write_curve(args.out / "loss.csv", run.rows)
            if val_loss < run.best_loss:
                run.best_loss = val_loss
                run.best = {name: t.clone() for name, t in model.state_dict().items()}
            if (point + 1) % 6 == 0:
                print(sample(model, tokenizer, PROMPTS[0], 120), flush=True)
        if saved and (at.elapsed - last_save > 180 or at.done == 1.0):
            run.save(saved)
            last_save = at.elapsed
    model.load_state_dict(run.best)


# ---------------------------------------------------------------- export


def named_weights(model: GPT2) -> dict[str, Tensor]:
    """The weights, named and laid out ([in, out]) as in OpenAI's TensorFlow checkpoints."""
    layers = {"ln_1": "ln_1", "attn/c_attn": "c_attn", "attn/c_proj": "c_proj",
              "ln_2": "ln_2", "mlp/c_fc": "c_fc", "mlp/c_proj": "c_out"}
    found = {"wte": model.wte.weight, "wpe": model.wpe.weight}
    for i, block in enumerate(model.blocks):
        for name, attribute in layers.items():
            layer = getattr(block, attribute)
            norm = isinstance(layer, nn.LayerNorm)
            found[f"h{i}/{name}/{'g' if norm else 'w'}"] = layer.weight if norm else layer.weight.T
            found[f"h{i}/{name}/b"] = layer.bias
    found |= {"ln_f/g": model.ln_f.weight, "ln_f/b": model.ln_f.bias}
    return {name: tensor.detach() for name, tensor in found.items()}


def mix_in(model: GPT2, folder: Path, share: float) -> None:
    """Move the weights this share of the way to those of a model that `export` wrote; 1: all of it.

    Weights between those before and after a second training may predict unseen text better than either (Wortsman et
    al., arXiv:2109.01903).
    """
    from batchgen.models.shards import load_tensors

    stored = load_tensors(folder)
    for name, weight in named_weights(model).items():
        weight.lerp_(torch.from_numpy(np.array(stored[name])), share)


def export(model: GPT2, out: Path, source: dict[str, str]) -> None:
    """Write the shards and the manifest that batchgen reads; `out` keeps its other files."""
    from batchgen.models.shards import Description, write_model
    from batchgen.gpt2.config import GPT2Config

    tensors = {name: np.ascontiguousarray(weight.numpy()) for name, weight in named_weights(model).items()}
    config = GPT2Config(**vars(model.shape))
    write_model(out, Description("tales", config, source), tensors.items(), tokenizer_dir=out, replace=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a plain-text file or a folder of them")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--start", type=Path, help="folder of a model of this shape to begin with")
    parser.add_argument("--mix", type=float, default=0.25, help="how much of its weights the trained ones get")
    parser.add_argument("--work", type=Path, help="folder for the run's state, from which it can go on")
    parser.add_argument("--minutes", type=float, default=90.0, help="length of the run by the clock")
    parser.add_argument("--steps", type=int, default=0, help="length of the run in steps, instead of minutes")
    parser.add_argument("--batch", type=int, default=8192, help="tokens a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="AdamW's peak learning rate")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="Muon's peak learning rate")
    parser.add_argument("--decay", type=float, default=0.02, help="Muon's weight decay")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Train and export."""
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    shape = Shape()
    for folder in filter(None, (args.out, args.work)):
        folder.mkdir(parents=True, exist_ok=True)
    train_texts, val_texts = split_documents(read_texts(args.text), args.seed)
    tokenizer = load_bpe(args.start) if args.start else train_bpe(train_texts, shape.n_vocab)
    save_bpe(tokenizer, args.out)
    stream, held_out = encode(tokenizer, train_texts), {name: encode(tokenizer, t) for name, t in val_texts.items()}
    model = GPT2(shape, args.dropout)
    if args.start:
        mix_in(model, args.start, 1.0)
    at = Progress(args.steps, args.minutes * 60, whole=bool(args.start))
    run = Run(model, optimisers(model, args.lr, args.muon_lr, args.decay), at)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(train_texts)} documents, "
          f"{len(stream)} tokens; held out: { {name: len(t) for name, t in val_texts.items()} }", flush=True)
    everything = torch.cat(list(held_out.values()))
    train(run, tokenizer, (stream, everything), args)
    if args.start:
        mix_in(model, args.start, args.mix)
    run.rows[-1] = (*run.rows[-1][:4], evaluate(model, everything))
    write_curve(args.out / "loss.csv", run.rows)
    for name, part in held_out.items():
        loss, size = evaluate(model, part), sum(len(text.encode()) for text in val_texts[name])
        print(f"{name}: {loss:.4f} nats a token, {loss * len(part) / size / math.log(2):.4f} bits a byte held out "
              f"({len(val_texts[name])} documents, {len(part)} tokens, {size} bytes)", flush=True)
    for prompt in PROMPTS:
        print("-" * 8, sample(model, tokenizer, prompt, 240), sep="\n", flush=True)
    source = {"script": "train.py", "text": args.text.name, "seed": str(args.seed), "steps": str(run.at.step)}
    if args.start:
        source["start"] = args.start.name
    export(model, args.out, source)


if __name__ == "__main__":
    main()
