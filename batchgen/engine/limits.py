"""What an engine can do, and in how much memory; a process that has no engine knows it without loading the kernels."""

from collections.abc import Sequence as Seq

import numpy as np

from batchgen.engine.sequence import Prompt
from batchgen.errors import UsageError
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.kv_cache import BLOCK, LANES
from batchgen.gpt2.weights import round_up
from batchgen.options import say
from batchgen.types import Precision, SamplingParams

MAX_BATCH = 256  # sequences in flight by default; larger products are no faster
LARGEST_BATCH = 4096
MIB = 2**20


def tokens_needed(n_prompt: int, max_tokens: int) -> int:
    """Positions in the arena that suffice for one sequence alone, with and without shared prefixes."""
    return round_up(n_prompt + max_tokens, LANES) + BLOCK


def stem_of(n_prompt: int) -> int:
    """Positions of a prompt in whole blocks, which no beam writes to: all before the last 1 to BLOCK of them."""
    return (n_prompt - 1) // BLOCK * BLOCK


def beam_tokens_needed(n_prompt: int, max_tokens: int, num_beams: int) -> int:
    """Positions of the blocks after the stem that suffice for the beams, if they share none of them."""
    return num_beams * round_up(n_prompt - stem_of(n_prompt) + max_tokens, BLOCK)


def search_tokens_needed(n_prompt: int, max_tokens: int, num_beams: int) -> int:
    """Positions in the arena that suffice for one beam search alone, with and without shared prefixes."""
    return stem_of(n_prompt) + BLOCK + beam_tokens_needed(n_prompt, max_tokens, num_beams)


def words_of_small(n_prompt: int, params: SamplingParams, room: int, per_token: int) -> str | None:
    """Why a beam search does not fit into an arena of `room` positions, with a remedy; None if it does."""
    needed = search_tokens_needed(n_prompt, params.max_tokens, params.num_beams) if params.searches else 0
    if needed <= room:
        return None
    what = f"num_beams {params.num_beams} needs keys and values of {needed:,} tokens at once"
    size = -(-needed * per_token // MIB)
    return f"{what}, and memory holds {room:,}; lower num_beams or max_tokens, or raise {say('kv_bytes')} to {size}M"


def kv_bytes_per_token(config: GPT2Config, precision: Precision) -> int:
    """Bytes of keys and values of one position in all layers: float32, or bfloat16 in int8."""
    return 2 * config.n_layer * config.n_embd * (2 if precision == "int8" else 4)


def check_limits(config: GPT2Config, precision: Precision, kv_bytes: int, max_batch: int) -> None:
    """Raise UsageError, with a remedy, if no engine can work within these limits."""
    if not 1 <= max_batch <= LARGEST_BATCH:
        raise UsageError(
            f"{say('batch_size', max_batch)} is out of range (1 to {LARGEST_BATCH}); "
            f"more than {MAX_BATCH} sequences gain no speed"
        )
    needed = tokens_needed(config.n_ctx, 0) * kv_bytes_per_token(config, precision)
    if kv_bytes < needed:
        raise UsageError(
            f"memory budget {kv_bytes / MIB:.0f} MiB is too small for one sequence of n_ctx {config.n_ctx}: "
            f"its keys and values need {needed / MIB:.0f} MiB; "
            f"raise {say('kv_bytes')} to {-(-needed // MIB)}M ({needed} bytes)"
        )


def layer_index(layer: int, config: GPT2Config) -> int:
    """The number of blocks before a layer, an index into transformers' hidden_states; UsageError if there is none."""
    n_layer = config.n_layer
    if not -(n_layer + 1) <= layer <= n_layer:
        layers = f"{-(n_layer + 1)} to {n_layer}: the model has {n_layer} blocks"
        raise UsageError(f"{say('layer', layer)} is out of range ({layers})")
    return layer % (n_layer + 1)


def _check_begun(prompt: Prompt, config: GPT2Config) -> None:
    """Raise UsageError for samples that a prompt does not have, and for first tokens that leave none to generate."""
    p = prompt.params
    if p.searches:
        raise UsageError(f"row {prompt.row}: beam search (num_beams {p.num_beams}) continues no begun samples")
    samples = range(prompt.first_sample, prompt.first_sample + len(prompt.seeds))
    for one in prompt.samples:
        n = len(one.token_ids)
        where = f"row {prompt.row}, sample {one.sample}"
        if one.sample not in samples:
            raise UsageError(f"{where}: is none of its samples {samples.start} to {samples.stop - 1}")
        if n and n >= p.max_tokens:
            raise UsageError(f"{where}: begins with {n} tokens, and max_tokens {p.max_tokens} leaves none to generate")
        for token in one.token_ids:
            if not 0 <= token < config.n_vocab:
                raise UsageError(f"{where}: token id {token} is outside the vocabulary of {config.n_vocab}")


def check_searches(prompts: Seq[Prompt], config: GPT2Config, precision: Precision, room: int) -> None:
    """Raise UsageError for a beam search that does not fit into an arena of `room` positions."""
    for prompt in prompts:
        small = words_of_small(len(prompt.token_ids), prompt.params, room, kv_bytes_per_token(config, precision))
        if small:
            raise UsageError(f"row {prompt.row}: {small}")


def check_prompts(prompts: Seq[Prompt], config: GPT2Config, last_is_read: bool = False) -> None:
    """Raise UsageError for a prompt that does not fit the model's arrays; callers validate prompts before."""
    for prompt in prompts:
        if prompt.begun is not None:
            _check_begun(prompt, config)
        ids = np.asarray(prompt.token_ids)  # [n_prompt]
        p = prompt.params
        most = config.n_ctx + (not p.max_tokens and not last_is_read)
        if not len(ids) or len(ids) + p.max_tokens > most:
            raise UsageError(
                f"row {prompt.row}: {len(ids)} prompt tokens + {p.max_tokens} max_tokens; "
                f"there must be at least one prompt token, and at most n_ctx {config.n_ctx} in all"
            )
        if prompt.scored is not None and not 1 <= prompt.scored <= len(ids):
            raise UsageError(f"row {prompt.row}: scored {prompt.scored} is out of range (1 to {len(ids)})")
        bad = [token for word in prompt.bad_words for token in word]
        named = [*p.stop_token_ids, *p.allowed_token_ids, *(token for token, _ in p.logit_bias), *bad]
        for token in (int(ids.min()), int(ids.max()), *named):
            if not 0 <= token < config.n_vocab:
                raise UsageError(f"row {prompt.row}: token id {token} is outside the vocabulary of {config.n_vocab}")
