"""Compare --heal with transformers' token_healing: python -m benchmarks.hf_healing [--write FILE].

Of prompts that end anywhere in a text, `GenerationMixin.heal_tokens` replaces the last token, with a bias of 10 for the
tokens that begin with it and 11 for itself. batchgen draws from the same tokens without a bias. So both have the same
greedy token, unless a bias decides: then batchgen's is the likeliest by transformers' own logits. Prompts of which
batchgen draws more than one token again, and those that end in what transformers strips, are left out. FILE gets what
transformers found, for the tests. Exit code 1 if a token is another one.
"""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2LMHeadModel, GPT2Tokenizer
from transformers.utils.logging import disable_progress_bar

from batchgen.generator import Generator
from batchgen.models.convert import convert_checkpoint
from batchgen.models.huggingface import hf_names
from batchgen.text.healing import beginnings_of
from batchgen.text.tokenizer import END_OF_TEXT, Tokenizer
from tests.support.hf_checkpoint import hf_config, write_safetensors
from tests.support.models import MERGED, merged_tensors, write_merged_vocabulary

TEXT = (  # in any order of its words
    "Once the king and the third son sat so long in the tiny castle, the others told the time. https://a.b is there... "
    "He said: another 12345 things and the café. On the other hand, the king's son sold the old tin timer, the ring."
)
LENGTH = 60  # characters of a prompt, or fewer


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt, and what became of its last token."""

    prompt: str
    theirs: int  # transformers' token
    likeliest: int  # the most likely token that begins with the last one of the prompt, by transformers' logits


def write_model(directory: Path) -> Path:
    """A random model with a small vocabulary, as Hugging Face writes it."""
    write_merged_vocabulary(directory)
    shutil.copy(directory / "encoder.json", directory / "vocab.json")
    shutil.copy(directory / "vocab.bpe", directory / "merges.txt")
    (directory / "config.json").write_text(
        json.dumps(hf_config(MERGED) | dict.fromkeys(("bos_token_id", "eos_token_id"), 256))
    )
    tensors = merged_tensors()
    named = {theirs: tensors[name] for name, theirs in hf_names(MERGED).items()}
    write_safetensors(directory / "model.safetensors", named)
    return directory


def list_prompts(tokenizer: Tokenizer) -> list[str]:
    """Those that both heal by one token; transformers searches the vocabulary by characters, and so only for ASCII."""
    beginnings, found = beginnings_of(tokenizer), []
    rng = np.random.default_rng(0)
    for _ in range(1000):
        text = " ".join(rng.permutation(TEXT.split()))
        prompt = text[: rng.integers(2, LENGTH)]
        read, again = beginnings.back_up(tuple(tokenizer.encode(prompt)))
        is_plain = prompt == prompt.strip() and len(again) == 1 and tokenizer.decode(again).isascii()
        if is_plain and read != (tokenizer.special.start,):
            found.append(prompt)
    return found


@torch.no_grad()
def heal(directory: Path, prompts: list[str], tokenizer: Tokenizer) -> list[Case]:
    model = GPT2LMHeadModel.from_pretrained(directory).eval()
    theirs = GPT2Tokenizer.from_pretrained(directory, pad_token=END_OF_TEXT)
    beginnings, cases = beginnings_of(tokenizer), []
    for prompt in prompts:
        ids = theirs(prompt, return_tensors="pt").input_ids
        assert ids[0].tolist() == tokenizer.encode(prompt), prompt
        logits = model(ids[:, :-1]).logits[0, -1]
        may_come = torch.from_numpy(beginnings.list_ids((int(ids[0, -1]),)))
        healed: Any = model.heal_tokens(ids, theirs)
        assert healed[0, :-1].tolist() == ids[0, :-1].tolist(), prompt
        cases.append(Case(prompt, int(healed[0, -1]), int(may_come[logits[may_come].argmax()])))
    return cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        directory = write_model(Path(folder, "hf"))
        tokenizer = Tokenizer.load(directory)
        cases = heal(directory, list_prompts(tokenizer), tokenizer)
        convert_checkpoint(directory, Path(folder, "converted"), name="merged")
        rows = Generator(Path(folder, "converted")).generate(
            [case.prompt for case in cases], max_tokens=1, heal=True, ignore_eos=True
        )
    ours = [row.completion_token_ids for row in rows]
    equal = sum(case.likeliest == case.theirs for case in cases)
    wrong = [case.prompt for case, ids in zip(cases, ours, strict=True) if ids != (case.likeliest,)]
    print(f"{len(cases)} prompts, {equal} of them with transformers' token; of the others its bias decides")
    print(f"{len(wrong)} with another token than the likeliest{''.join(f'; {prompt!r}' for prompt in wrong[:5])}")
    if options.write:
        source = {"made_by": "benchmarks/hf_healing.py", "transformers": version("transformers")}
        options.write.write_text(json.dumps(source | {"cases": [asdict(case) for case in cases]}, indent=0) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
