"""Words that tales invents: python -m benchmarks.words [--text FILE ...] [--model DIRECTORY].

The model continues 20 openings at temperature 0.8, by 200 tokens at most. A word counts as unknown if Debian's large
American and British lists do not have it (apt-get install wamerican-large wbritish-large), and as invented if the
training text, FILE, does not have it either. A name of the training text is known. Hyphens part words, and a
contraction or a possessive is known if its stem is. The last word of a text that was cut is not read.
"""

import argparse
import lzma
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from batchgen.generator import Generator
from batchgen.job import DEFAULT_MODEL

LISTS = [Path("/usr/share/dict", f"{kind}-english-large") for kind in ("american", "british")]
WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*")
ENDINGS = re.compile(r"('s|'ll|'d|'ve|'re|'m|n't|'t|')+$")
OPENINGS = (
    "Once upon a time",
    "The king said to his youngest daughter,",
    "In the middle of the forest there stood",
    "There was once a poor woodcutter who",
    '"Dear me!" said the old fox,',
    "When the princess awoke the next morning,",
    "Far away in the land of the north",
    "The little boy ran to the window and",
    "A certain rich merchant had three sons.",
    "At last they came to a great river,",
    "The old woman laughed and said,",
    "Dorothy looked at the Scarecrow and",
    "It was a cold winter's night, and",
    "The dragon opened his mouth and",
    "After supper the children",
    "Long, long ago there lived a giant",
    "The soldier took his sword and",
    "Under the apple tree in the garden",
    "The wolf knocked at the door.",
    "And so they were married, and",
)


def read_text(path: Path) -> str:
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as stream:
        return stream.read()


def known_words(lists: list[Path], text: str) -> tuple[set[str], set[str], set[str]]:
    """The lists' words, the names of the text (written large more often than not), and all words of the text."""
    listed = {word.lower() for path in lists for word in path.read_text(encoding="utf-8").split()}
    counts = Counter(WORD.findall(text))
    names = {word.lower() for word, n in counts.items() if word[0].isupper() and n > counts[word.lower()]}
    return listed, names, {word.lower() for word in counts}


def words_of(text: str, is_whole: bool) -> Iterator[str]:
    found = list(WORD.finditer(text))
    for match in found:
        if is_whole or match.end() < len(text):
            yield match.group()


def is_known(word: str, known: set[str]) -> bool:
    """Whether the word is known: as it stands, or without its endings."""
    word = word.lower()
    return word in known or ENDINGS.sub("", word) in known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, action="append", default=[], help="training text; can be given again")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=["float32", "int8"], default="float32")
    options = parser.parse_args()
    listed, names, written = known_words(LISTS, "\n".join(map(read_text, options.text)))
    generator = Generator(options.model, precision=options.precision)
    n_words, clean, real = 0, 0, 0
    for row in generator.generate(OPENINGS, temperature=0.8, max_tokens=200, seed=options.seed):
        # with the opening: the completion may begin with the rest of its last word
        words = list(words_of(OPENINGS[row.row] + (row.completion or ""), row.finish_reason == "stop"))
        unlisted = [word for word in words if not is_known(word, listed)]
        unknown = [word for word in unlisted if not (word[0].isupper() and is_known(word, names))]
        invented = [word for word in unknown if not is_known(word, written)]
        n_words, clean, real = n_words + len(words), clean + (not unknown), real + (not invented)
        print(f"{row.row:3}  unknown: {' '.join(unknown) or '-'}  invented: {' '.join(invented) or '-'}")
    print(f"{n_words} words; of {len(OPENINGS)} texts, {clean} have no unknown word, {real} no invented word")


if __name__ == "__main__":
    main()
