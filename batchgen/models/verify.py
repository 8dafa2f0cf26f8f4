"""Whether a model on disk is what it says: its files, its structure, and, for OpenAI's, what it is known to say."""

import datetime
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from batchgen.errors import ModelError
from batchgen.gpt2.forward import gpt2
from batchgen.gpt2.params import Params
from batchgen.models.openai import CONFIGS, KNOWN_COMPLETIONS, KNOWN_LOGITS, Completion, Logits, known_file
from batchgen.models.records import Records
from batchgen.models.registry import VERIFIED, models_dir
from batchgen.models.shards import Manifest, load_manifest, load_params, model_hash, verify_shards
from batchgen.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_ROWS = 4096  # of a tensor, looked at together
_TIE = 1e-3  # logits this close may change places with the order of additions
_CLOSE = 0.02  # of published logits of about -100, whose fourth digit is rounding
_NOT_IT = "is not the model that it says, or was damaged before it was converted; fetch or convert it again"


def verify_model(directory: Path) -> Iterator[str]:
    """Check a model, and yield a line on each thing that was checked; raises ModelError on the first that is wrong.

    Every weight is read. For a model that says it is OpenAI's, its known completions and logits are computed.
    """
    manifest = load_manifest(directory)
    verify_shards(directory)
    files = f"{len(manifest.tensors)} shards and {len(manifest.tokenizer)} vocabulary files"
    yield f"files: {files} have the length, header and sha256 that the manifest says"
    params = load_params(directory, manifest)
    yield check_weights(directory, manifest, params)
    tokenizer = Tokenizer.load(directory)
    if tokenizer.n_vocab > manifest.config.n_vocab:
        raise ModelError(
            f"{directory}: {tokenizer.n_vocab} tokens for {manifest.config.n_vocab} rows of wte; {_NOT_IT}"
        )
    yield f"vocabulary: {tokenizer.n_vocab} tokens, ids 0 to {tokenizer.n_vocab - 1}"
    size = openai_size(manifest)
    if size is None:
        yield "completions: none are known of this model, so none were checked"
    else:
        yield from check_openai(directory, size, manifest, params, tokenizer)


def record_verified(manifest: Manifest) -> None:
    """Remember, beside the user's models, that this model was found right today; where that cannot be, go on."""
    try:
        folder = models_dir()
        folder.mkdir(parents=True, exist_ok=True)
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        Records(folder / VERIFIED).update({model_hash(manifest): today})
    except (ModelError, OSError) as error:
        logger.info("not remembered that the model was verified: %s", error)


def openai_size(manifest: Manifest) -> str | None:
    """Which of OpenAI's models this one says it is, by its name or its source, if its shape is that one's."""
    for size, config in CONFIGS.items():
        said = manifest.name == size or manifest.source.get("model") == f"OpenAI's {size}"
        if said and manifest.config == config:
            return size
    return None


def check_weights(directory: Path, manifest: Manifest, params: Params) -> str:
    """Every number finite, and lm_head wte transposed where the config has the two tied."""
    for name, shard in manifest.tensors.items():
        array = np.load(directory / shard.file, mmap_mode="r", allow_pickle=False)
        for first in range(0, len(array), _ROWS):
            if not np.isfinite(array[first : first + _ROWS]).all():
                raise ModelError(f"{directory / shard.file}: tensor {name} holds nan or infinity; {_NOT_IT}")
    if not manifest.config.tie_word_embeddings:
        return "weights: all finite; lm_head is a matrix of its own"
    for first in range(0, manifest.config.n_vocab, _ROWS):
        rows, columns = params["wte"][first : first + _ROWS], params["lm_head"][:, first : first + _ROWS]
        if not np.array_equal(rows.T, columns):
            raise ModelError(f"{directory}: lm_head is not wte transposed near token {first}; {_NOT_IT}")
    return "weights: all finite; lm_head is wte transposed"


def check_openai(directory: Path, size: str, manifest: Manifest, params: Params, tokenizer: Tokenizer) -> Iterator[str]:
    """Its vocabulary, and its published completions and logits, as far as there are any."""
    for name, found in manifest.tokenizer.items():
        if found != known_file(size, name)[1]:
            raise ModelError(f"{directory / name}: is not OpenAI's (sha256 {found}); {_NOT_IT}")
    yield "vocabulary: OpenAI's own, by sha256"
    completions, logits = KNOWN_COMPLETIONS.get(size, ()), KNOWN_LOGITS.get(size, ())
    if not completions and not logits:
        yield f"completions: none of {size} are published that batchgen knows, so none were checked"
        return
    n_head = manifest.config.n_head
    for known in completions:
        check_completion(directory, known, params, n_head, tokenizer)
    for pair in logits:
        check_logits(directory, pair, params, n_head, tokenizer)
    yield f"completions: {len(completions)} published greedy ones, and the logits after {len(logits)} prompts, come out"


def check_completion(directory: Path, known: Completion, params: Params, n_head: int, tokenizer: Tokenizer) -> None:
    """One pass over prompt and completion: each of its tokens must have the largest logit after those before it."""
    prompt, completion = _ids(known.prompt, tokenizer), _ids(known.completion, tokenizer)
    logits = gpt2([*prompt, *completion][:-1], **params, n_head=n_head)[len(prompt) - 1 :]
    for i, (row, expected) in enumerate(zip(logits, completion, strict=True)):
        found = int(row.argmax())
        if row[found] - row[expected] > _TIE:
            raise ModelError(
                f"{directory}: token {i} after {_short(known.prompt)} should be {expected} "
                f"({tokenizer.decode([expected])!r}), and is {found} ({tokenizer.decode([found])!r}); {_NOT_IT}"
            )


def check_logits(directory: Path, known: Logits, params: Params, n_head: int, tokenizer: Tokenizer) -> None:
    """The two largest logits after a prompt."""
    row = gpt2(tokenizer.encode(known.prompt), **params, n_head=n_head)[-1]
    found = {int(token_id): float(row[token_id]) for token_id in np.argsort(row)[: -len(known.largest) - 1 : -1]}
    expected = known.largest
    if found.keys() != expected.keys() or any(abs(found[token] - expected[token]) > _CLOSE for token in expected):
        raise ModelError(f"{directory}: logits after {known.prompt!r} should be {expected}, and are {found}; {_NOT_IT}")


def _ids(text: str | tuple[int, ...], tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(text) if isinstance(text, str) else list(text)


def _short(prompt: str | tuple[int, ...]) -> str:
    return repr(prompt)[:80]
