"""Compare beam search with transformers' own: python -m benchmarks.hf_beams [--write FILE].

Three models (the embedded one and two of random weights), 200 prompts each, many settings. Both search with the same
float32 weights. Completions must be equal, and their scores within 1e-5 (of those above 1, of their size), unless
numbers that decided differ by less than 1e-4. Exit code 1 if one is not. --write makes the vectors of
tests/cases/beams.json anew.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel

from batchgen.engine.engine import Engine
from batchgen.engine.sequence import Prompt
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.params import nest
from batchgen.gpt2.weights import pack
from batchgen.models.huggingface import hf_names
from batchgen.models.model import Model
from batchgen.models.shards import load_tensors
from batchgen.types import SamplingParams
from tests.support.beams import Rules, search
from tests.support.hf_checkpoint import hf_config
from tests.support.models import BYTES, TINY, sharp_tensors

PROMPTS, VECTORS = 200, 24
MARGIN, TOLERANCE = 1e-4, 1e-5
Ids = tuple[int, ...]


@dataclass
class Peer:
    """A model in both libraries, and where its prompts come from."""

    name: str
    engine: Engine
    model: GPT2LMHeadModel
    text: Ids  # tokens to cut prompts from; none: random ones


def make_peer(name: str, config: GPT2Config, tensors: dict[str, Any], text: Ids = ()) -> Peer:
    head = tensors.get("lm_head", np.ascontiguousarray(tensors["wte"].T))
    engine = Engine(
        pack(nest(tensors | {"lm_head": head}, config.n_layer)), config, eos_ids=(), kv_bytes=2**30, max_batch=64
    )
    model = GPT2LMHeadModel(HFConfig(**hf_config(config), attn_implementation="eager")).eval()
    named = {f"transformer.{theirs}": torch.tensor(tensors[ours]) for ours, theirs in hf_names(config).items()}
    missing = model.load_state_dict(named, strict=False).missing_keys
    assert all("lm_head" in key or key.endswith(".attn.bias") for key in missing), missing
    model.tie_weights()
    return Peer(name, engine, model, text)


def peers() -> Iterator[Peer]:
    tales = Model.open("tales")
    lines = Path("data/prompts/sample.jsonl").read_text(encoding="utf-8")
    text = tuple(tales.load_tokenizer().encode(" ".join(json.loads(line)["prompt"] for line in lines.splitlines())))
    yield make_peer("tales", tales.config, {k: np.array(v) for k, v in load_tensors(tales.directory).items()}, text)
    yield make_peer("tiny", TINY, sharp_tensors(TINY, 1))
    yield make_peer("bytes", BYTES, sharp_tensors(BYTES, 2))


def settings(rng: np.random.Generator, n_vocab: int, often: list[int]) -> SamplingParams:
    """A search, some with what changes logits; it stops at tokens that the model often writes."""
    num_beams = int(rng.choice([2, 3, 4, 5, 8]))
    extra: dict[str, Any] = rng.choice(
        [
            {},
            {},
            {"repetition_penalty": 1.3},
            {"min_tokens": 4},
            {"logit_bias": ((int(rng.integers(n_vocab)), 3.0), (int(rng.integers(n_vocab)), -100.0))},
        ]
    )
    return SamplingParams(
        num_beams=num_beams,
        n=int(rng.integers(1, num_beams + 1)),
        max_tokens=int(rng.integers(4, 25)),
        length_penalty=float(rng.choice([1.0, 1.0, 0.0, -1.0, 0.6, 2.0])),
        early_stopping=str(rng.choice(["false", "true", "never"])),  # type: ignore[arg-type]
        stop_token_ids=tuple(rng.choice(often, int(rng.integers(0, 4)), replace=False).tolist()),
        logprobs=0,
        **extra,
    )


def requests(peer: Peer, n: int) -> list[Prompt]:
    rng, n_vocab = np.random.default_rng(19), peer.engine.config.n_vocab
    found = []
    for row in range(n):
        length = int(rng.integers(1, 90 if row % 4 else 8))
        start = int(rng.integers(max(len(peer.text) - length, 1)))
        ids = peer.text[start : start + length] or tuple(rng.integers(0, n_vocab, length).tolist())
        often = torch.topk(peer.model(torch.tensor([ids])).logits[0].exp().sum(0), min(n_vocab, 12)).indices.tolist()
        params = settings(rng, n_vocab, often)
        first, second, third = [token for token in often if token not in params.stop_token_ids][:3]
        bad = ((first,), (second, third)) if row % 5 == 0 else ()  # transformers bans no stop token
        found.append(Prompt(row, ids, params, (0,) * params.n, bad_words=bad))
    return found


def processors(prompt: Prompt) -> dict[str, Any]:
    params = prompt.params
    given: dict[str, Any] = {"repetition_penalty": params.repetition_penalty}
    if prompt.bad_words:
        given["bad_words_ids"] = [list(word) for word in prompt.bad_words]
    if params.min_tokens and params.stop_token_ids:
        given["min_new_tokens"] = params.min_tokens
    if params.logit_bias:
        given["sequence_bias"] = [[[token], bias] for token, bias in dict(params.logit_bias).items()]
    return given


def search_by_transformers(model: GPT2LMHeadModel, prompt: Prompt) -> list[tuple[float, Ids]]:
    """Their completions, best first, each with the token that ended it."""
    p, ids = prompt.params, torch.tensor([prompt.token_ids])
    stops = [*p.stop_token_ids] or None
    model.generation_config.eos_token_id = stops
    model.generation_config.pad_token_id = 0
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=p.num_beams,
        num_return_sequences=p.n,
        max_new_tokens=p.max_tokens,
        length_penalty=p.length_penalty,
        early_stopping={"true": True, "false": False}.get(p.early_stopping, p.early_stopping),
        eos_token_id=stops,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **processors(prompt),
    )
    rows = [row[len(prompt.token_ids) :] for row in found.sequences.tolist()]
    ends = [next((at + 1 for at, token in enumerate(row) if token in p.stop_token_ids), len(row)) for row in rows]
    return [
        (float(score), tuple(row[:end])) for score, row, end in zip(found.sequences_scores, rows, ends, strict=True)
    ]


def margin_of(model: GPT2LMHeadModel, prompt: Prompt) -> float:
    """The least difference that decided in the plain search, over transformers' logits and processors."""
    p = prompt.params

    @lru_cache(None)
    def next_logprobs(new: Ids) -> Any:
        ids = torch.tensor([[*prompt.token_ids, *new]])
        row = model(ids).logits[:, -1].log_softmax(-1)
        for token, bias in p.logit_bias:
            row[0, token] += bias
        if p.repetition_penalty != 1.0:
            row = transformers.RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(ids, row)
        for *first, last in prompt.bad_words:
            if not first or ids[0, -len(first) :].tolist() == first:
                row[0, last] = -np.inf
        if len(new) < p.min_tokens:
            row[0, list(p.stop_token_ids)] = -np.inf
        return row[0].double().numpy()

    rules = Rules(p.num_beams, p.max_tokens, p.stop_token_ids, p.length_penalty, p.early_stopping)
    return search(next_logprobs, rules)[1]


@torch.no_grad()
def check(peer: Peer) -> bool:
    """Print one line on a model; whether it is ok."""
    started = time.monotonic()
    prompts = requests(peer, PROMPTS)
    ours = {(one.row, one.sample): one for one in peer.engine.generate(prompts)}
    different, wrong, largest = [], 0, 0.0
    for prompt in prompts:
        theirs = search_by_transformers(peer.model, prompt)
        pairs = [(ours[prompt.row, sample], one) for sample, one in enumerate(theirs)]
        if all(mine.token_ids == _without_stop(ids, prompt.params) for mine, (_, ids) in pairs):
            largest = max(largest, *(abs(mine.beam_score - one) / max(abs(one), 1.0) for mine, (one, _) in pairs))
        else:
            different.append(margin_of(peer.model, prompt))
            wrong += different[-1] > MARGIN
    print(
        f"{peer.name:6} {PROMPTS - len(different)} of {PROMPTS} prompts equal, scores within {largest:.1e}; "
        f"{len(different)} differ, by less than {max(different, default=0):.1e} where it was decided: "
        f"{'ok' if not wrong and largest < TOLERANCE else 'WRONG'} ({time.monotonic() - started:.0f} s)",
        flush=True,
    )
    return not wrong and largest < TOLERANCE


def _without_stop(ids: Ids, params: SamplingParams) -> Ids:
    return ids[:-1] if ids and ids[-1] in params.stop_token_ids else ids


@torch.no_grad()
def write(path: Path) -> None:
    """The searches of the two random models, of which the tests have the weights, with clear margins."""
    cases = []
    for peer in peers():
        if peer.text:
            continue
        prompts = [one for one in requests(peer, VECTORS) if margin_of(peer.model, one) > MARGIN]
        cases += [
            {
                "model": peer.name,
                "prompt": prompt.token_ids,
                "bad_words": prompt.bad_words,
                "params": {k: v for k, v in prompt.params.as_dict().items() if v != getattr(SamplingParams(), k)},
                "found": search_by_transformers(peer.model, prompt),
            }
            for prompt in prompts
        ]
    lines = ",\n".join(json.dumps(case) for case in cases)
    made = {"transformers": transformers.__version__, "torch": torch.__version__}
    path.write_text(f'{{"made_by": {json.dumps(made)}, "cases": [\n{lines}\n]}}\n')
    print(f"{len(cases)} cases: {path}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the vectors of the tests")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.write:
        write(options.write)
        return 0
    return 0 if all([check(peer) for peer in peers()]) else 1


if __name__ == "__main__":
    sys.exit(main())
