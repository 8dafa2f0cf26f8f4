"""Whether a model on disk is what it claims to be: its files, its weights and, for OpenAI's, its known completions."""

import datetime
import logging
from collections.abc import Iterator

import numpy as np

from batchgen.errors import ModelError
from batchgen.files import JsonObject
from batchgen.gpt2.pico import gpt2
from batchgen.gpt2.weights import PANEL
from batchgen.models.int8 import INT8_MANIFEST, check_int8, existing_int8, verify_int8
from batchgen.models.model import Model
from batchgen.models.openai import CONFIGS, KNOWN_COMPLETIONS, KNOWN_LOGITS, Completion, Logits, known_file
from batchgen.models.registry import VERIFIED, models_dir
from batchgen.models.shards import Manifest, map_shards
from batchgen.models.string_map import update_string_map
from batchgen.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_ROWS = 2**16  # of a tensor, checked at a time
_TIE = 1e-3  # logits this close may change places with the order of additions
_CLOSE = 0.02  # for published logits of about -100, whose fourth digit is rounded
_REMEDY = "is not the model that it claims to be, or was damaged before it was converted; fetch or convert it again"


def openai_size(manifest: Manifest) -> str | None:
    """The OpenAI model that this one claims to be by its name or source, if its config is that model's."""
    for size, config in CONFIGS.items():
        is_claimed = manifest.name == size or manifest.source.get("model") == f"OpenAI's {size}"
        if is_claimed and manifest.config == config:
            return size
    return None


def _check_weights(model: Model) -> str:
    """Check that every number is finite, and that lm_head is wte transposed if the config ties the two."""
    stored = dict(map_shards(model.packed, model.manifest, model.files))
    for name, array in stored.items():
        rows = array.reshape(-1, array.shape[-1])  # of panels: 64 numbers each
        for first in range(0, len(rows), _ROWS):
            if not np.isfinite(rows[first : first + _ROWS]).all():
                raise ModelError(f"{model.directory}: tensor {name} holds nan or infinity; {_REMEDY}")
    if not model.config.tie_word_embeddings:
        return "weights: all finite; lm_head is a matrix of its own"
    wte = stored["wte"]
    for i, panel in enumerate(stored["lm_head"]):  # [n_embd, PANEL]
        tokens = wte[i * PANEL : (i + 1) * PANEL]
        if not np.array_equal(tokens.T, panel[:, : len(tokens)]):
            raise ModelError(f"{model.directory}: lm_head is not wte transposed near token {i * PANEL}; {_REMEDY}")
    return "weights: all finite; lm_head is wte transposed"


def _token_ids(text: str | tuple[int, ...], tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(text) if isinstance(text, str) else list(text)


def _check_completion(model: Model, known: Completion, params: JsonObject, tokenizer: Tokenizer) -> None:
    """Check in one pass that each token of the completion has the largest logit after the tokens before it."""
    prompt, completion = _token_ids(known.prompt, tokenizer), _token_ids(known.completion, tokenizer)
    logits = gpt2([*prompt, *completion][:-1], **params, n_head=model.config.n_head)  # type: ignore[no-untyped-call]
    for i, (row, expected) in enumerate(zip(logits[len(prompt) - 1 :], completion, strict=True)):
        found = int(row.argmax())
        if row[found] - row[expected] > _TIE:
            raise ModelError(
                f"{model.directory}: token {i} after {repr(known.prompt)[:80]} is {found} "
                f"({tokenizer.decode([found])!r}), not {expected} ({tokenizer.decode([expected])!r}); {_REMEDY}"
            )


def _check_logits(model: Model, known: Logits, params: JsonObject, tokenizer: Tokenizer) -> None:
    """Check the largest logits after a prompt."""
    row = gpt2(tokenizer.encode(known.prompt), **params, n_head=model.config.n_head)[-1]  # type: ignore[no-untyped-call]
    found = {int(token_id): float(row[token_id]) for token_id in np.argsort(row)[: -len(known.largest) - 1 : -1]}
    expected = known.largest
    if found.keys() != expected.keys() or any(abs(found[token] - expected[token]) > _CLOSE for token in expected):
        raise ModelError(f"{model.directory}: logits after {known.prompt!r} are {found}, not {expected}; {_REMEDY}")


def _check_openai(model: Model, size: str, tokenizer: Tokenizer) -> Iterator[str]:
    """Check the vocabulary, and the completions and logits that are known."""
    for name, found in model.manifest.tokenizer.items():
        if found != known_file(size, name)[1]:
            raise ModelError(f"{model.directory / name}: is not OpenAI's (sha256 {found}); {_REMEDY}")
    yield "vocabulary: OpenAI's own, by sha256"
    completions, logits = KNOWN_COMPLETIONS.get(size, ()), KNOWN_LOGITS.get(size, ())
    if not completions and not logits:
        yield f"completions: not checked, because batchgen knows no published ones of {size}"
        return
    params = {name: value for name, value in model.load_params().items() if name != "lm_head"}  # picoGPT's
    for completion in completions:
        _check_completion(model, completion, params, tokenizer)
    for known in logits:
        _check_logits(model, known, params, tokenizer)
    yield f"completions: equal to {len(completions)} published ones; logits: equal after {len(logits)} prompts"


def verify_model(model: Model) -> Iterator[str]:
    """Check a model and yield a line for each thing checked; ModelError names the first that is wrong."""
    model.verify()
    files = f"{len(model.manifest.tensors)} shards and {len(model.manifest.tokenizer)} vocabulary files"
    yield f"files: {files} have the length, header and sha256 of the manifest"
    yield _check_weights(model)
    int8 = model.int8 or existing_int8(model.packed, model.manifest)
    if int8 is not None:
        verify_int8(int8)
        check_int8(model.packed, model.manifest, int8, model.files)
        yield f"int8: {len(int8.hashes)} files have the sha256 of {INT8_MANIFEST}, and are these weights rounded"
    tokenizer = model.load_tokenizer()
    absent = tokenizer.absent_ids(model.config.n_vocab)
    unused = f"; {len(absent)} rows of wte belong to no token and are never generated" if absent else ""
    yield f"vocabulary: {len(tokenizer.encoder)} tokens, ids 0 to {tokenizer.n_vocab - 1}{unused}"
    size = openai_size(model.manifest)
    if size is None:
        yield "completions: not checked, because none are known of this model"
    else:
        yield from _check_openai(model, size, tokenizer)


def record_verified(model: Model) -> None:
    """Record today as the day when this model was verified; a failure is only logged."""
    try:
        folder = models_dir()
        folder.mkdir(parents=True, exist_ok=True)
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        update_string_map(folder / VERIFIED, {model.hash: today})
    except (ModelError, OSError) as error:
        logger.info("the verification of %s is not recorded: %s", model.name, error)
