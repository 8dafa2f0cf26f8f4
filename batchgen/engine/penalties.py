"""Changes a sequence's logits by its parameters before a token is chosen; sampler.py has the order of all steps."""

from collections.abc import Sequence as Seq

import numpy as np

from batchgen.engine.draw import keep
from batchgen.engine.repeats import ban_repeated, lower_repeated
from batchgen.engine.sequence import Sequence
from batchgen.gpt2.params import Array

_NOTHING = np.empty(0, np.int32)


def penalise(row: Array, sequence: Sequence, eos_ids: Seq[int]) -> None:
    """Apply all penalties and bans to one row [n_vocab], in place; if every logit becomes -inf, no token may come next.

    repetition_penalty (Keskar et al., 2019), no_repeat_ngram_size and bad_words (transformers) and DRY (llama.cpp)
    count prompt and generated tokens; presence_penalty and frequency_penalty (OpenAI) count generated tokens only.
    """
    p = sequence.params
    reads_context = p.repetition_penalty != 1.0 or p.no_repeat_ngram_size or p.dry_multiplier
    context = sequence.context if reads_context else _NOTHING
    for token, bias in p.logit_bias:
        row[token] += bias
    if p.repetition_penalty != 1.0:
        x = row[context]
        row[context] = np.where(x > 0, x / p.repetition_penalty, x * p.repetition_penalty)
    if (p.presence_penalty or p.frequency_penalty) and sequence.token_ids:
        generated, count = np.unique(np.array(sequence.token_ids, np.intp), return_counts=True)
        row[generated] -= (p.presence_penalty + p.frequency_penalty * count).astype(np.float32)
    if p.no_repeat_ngram_size:
        ban_repeated(row, context, p.no_repeat_ngram_size)
    if p.dry_multiplier:
        given = float(np.float32(p.dry_multiplier)), float(np.float32(p.dry_base))  # llama.cpp's are float32
        lower_repeated(row, context, *sequence.prompt.breakers, *given, p.dry_allowed_length)
    for word in sequence.prompt.bad_words:
        if sequence.ends_with(word[:-1]):
            row[word[-1]] = -np.inf
    for allowed in (sequence.allowed, sequence.guide and sequence.guide.allowed()):
        if allowed is not None:
            keep(row, allowed)
    if len(sequence.token_ids) < p.min_tokens:
        row[[token for token in p.stop_token_ids if not sequence.is_given(token)]] = -np.inf
        if not p.ignore_eos:
            row[list(eos_ids)] = -np.inf
