"""What is known of OpenAI's four models: addresses, files, sizes, hashes, shapes, and some published completions."""

from dataclasses import dataclass
from typing import Literal

from batchgen.gpt2.config import GPT2Config

BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"  # {BASE_URL}/{size}/{file}, as in picoGPT
DATA, INDEX = "model.ckpt.data-00000-of-00001", "model.ckpt.index"
FILES = ("checkpoint", "encoder.json", "hparams.json", DATA, INDEX, "model.ckpt.meta", "vocab.bpe")
CONFIGS = {
    "124M": GPT2Config(n_vocab=50257, n_ctx=1024, n_embd=768, n_head=12, n_layer=12),
    "355M": GPT2Config(n_vocab=50257, n_ctx=1024, n_embd=1024, n_head=16, n_layer=24),
    "774M": GPT2Config(n_vocab=50257, n_ctx=1024, n_embd=1280, n_head=20, n_layer=36),
    "1558M": GPT2Config(n_vocab=50257, n_ctx=1024, n_embd=1600, n_head=25, n_layer=48),
}
SIZES = tuple(CONFIGS)
_VOCABULARY = {
    "encoder.json": (1_042_301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "vocab.bpe": (456_318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
}
# Of the larger models only the size of the data is known; the first fetch records the hashes.
_KNOWN: dict[str, dict[str, tuple[int, str | None]]] = {
    "124M": {
        "checkpoint": (77, "dd1b025d2e155283f5e300ce95bf6d5b6bc0f7fe010db73daa6975eb896ab9cb"),
        "hparams.json": (90, "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318"),
        DATA: (497_759_232, "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118"),
        INDEX: (5_215, "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687"),
    },
    "355M": {DATA: (1_419_292_672, None)},
    "774M": {DATA: (3_096_120_320, None)},
    "1558M": {DATA: (6_230_444_800, None)},
}


def known_file(size: str, name: str) -> tuple[int | None, str | None]:
    """The bytes and the SHA-256 of one of a model's files, each None if unknown: (90, "d9d5...") or (None, None)."""
    return _KNOWN[size].get(name) or _VOCABULARY.get(name) or (None, None)


@dataclass(frozen=True, slots=True)
class FetchProgress:
    """Progress of a fetch: bytes downloaded (those of earlier attempts included), or shards written."""

    phase: Literal["download", "convert"]
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its greedy completion, each as the text or the token ids that were published."""

    prompt: str | tuple[int, ...]
    completion: str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Logits:
    """The largest logits after a prompt, as {token id: logit}."""

    prompt: str
    largest: dict[int, float]


# Greedy completions from picoGPT's README and the tests of transformers; logits computed by transformers in float32.
KNOWN_COMPLETIONS: dict[str, tuple[Completion, ...]] = {
    "124M": (
        Completion(
            "Alan Turing theorized that computers would one day become",
            " the most powerful machines on the planet.\n\nThe computer is a machine that can perform complex "
            "calculations, and it can perform these calculations in a way that is very similar to the human brain.\n",
        ),
        Completion(
            (464, 3290),
            (373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13, 198, 198, 464, 3290),
        ),
        Completion("Hello, my dog is a little", " bit of a mess. I'm not sure if he's going"),
        Completion("Today, I", "'m going to be doing a lot of research on this. I"),
    )
}
KNOWN_LOGITS: dict[str, tuple[Logits, ...]] = {
    "124M": (
        Logits("Data visualization empowers users to", {38350: -135.9132, 2251: -136.6836}),
        Logits("Artificial Intelligence is transforming the", {835: -100.8785, 995: -101.0488}),
        Logits("As the spaceship was approaching the", {5440: -92.8636, 4417: -94.1827}),
        Logits("On the deserted planet they discovered a", {6283: -89.0186, 11428: -89.2613}),
        Logits("IEEE VIS conference highlights the", {6817: -93.2510, 3452: -93.7715}),
    )
}
