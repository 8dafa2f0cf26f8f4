"""What --heal does for prompts that end within a word, or in a space: python -m benchmarks.healing TEXT.

TEXT is a file of English text, also as .xz. It is cut at random places; the characters before each are a prompt. Of the
word that the completion ends or begins with, the table says how often it is that of the text, and how often it is a
word at all: one that the text has more than once. The model is tales.
"""

import lzma
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from batchgen.generator import Generator

CHARACTERS, TOKENS = 200, 8  # of a prompt, and of a completion
WORD = re.compile(r"[A-Za-z]+")


class Cut(NamedTuple):
    """A prompt, the part of the word that it has, and the whole word."""

    prompt: str
    begun: str
    word: str


def list_cuts(text: str, n: int, at_space: bool) -> Iterator[Cut]:
    """Cuts before words, after their spaces, or within words."""
    rng = np.random.default_rng(0)
    words = [match for match in WORD.finditer(text, CHARACTERS) if len(match[0]) > 1 or at_space]
    if at_space:
        words = [match for match in words if text[match.start() - 1] == " "]
    for place in rng.permutation(len(words))[:n]:
        begin, end = words[place].span()
        at = begin if at_space else int(rng.integers(begin + 1, end))
        prompt = text[at - CHARACTERS : at]
        yield Cut(prompt[prompt.index(" ") + 1 :], text[begin:at], text[begin:end])


def shares(generator: Generator, cuts: list[Cut], known: set[str], **options: object) -> tuple[float, float]:
    """How often the word is that of the text, and how often a known one."""
    rows = generator.generate([cut.prompt for cut in cuts], max_tokens=TOKENS, **options)
    found = [cut.begun + re.match("[A-Za-z]*", row.completion or "")[0] for cut, row in zip(cuts, rows, strict=True)]  # type: ignore[index]
    same = sum(word == cut.word for word, cut in zip(found, cuts, strict=True))
    return same / len(cuts), sum(word.lower() in known for word in found) / len(cuts)


def main() -> int:
    path = Path(sys.argv[1])
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        text = file.read()
    counts = Counter(map(str.lower, WORD.findall(text)))
    known = {word for word, count in counts.items() if count > 1}
    generator = Generator("tales")
    print("| prompts end | | word of the text | a word |\n|---|---|--:|--:|")
    for place, at_space in (("within a word", False), ("in a space", True)):
        cuts = list(list_cuts(text, 500, at_space))
        for drawn, temperature in (("greedy", 0.0), ("temperature 0.8", 0.8)):
            for name, heal in (("", False), (" --heal", True)):
                same, is_word = shares(generator, cuts, known, temperature=temperature, heal=heal)
                print(f"| {place} | {drawn}{name} | {same:.0%} | {is_word:.0%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
