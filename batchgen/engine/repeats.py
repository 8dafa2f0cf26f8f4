"""Repetitions in a sequence's tokens, compiled: lower the logits of the tokens that would continue one.

Both kernels find earlier occurrences of the last tokens, in time linear in the number of tokens.
"""

import numpy as np

from batchgen.engine.draw import LOWEST
from batchgen.gpt2.compiled import inline, kernel

F32, I32 = np.float32, np.int32

HIGHEST = float(np.finfo(np.float32).max)


@inline
def _count_matches(tokens):
    """[n + 1]: for each k from 1 to n - 1, how many of the last tokens also occur k places earlier; 0 for n.

    tokens a b c c b c y a b c -> 3 at k = 7: a b c; 2 at k = 4: b c; 1 at k = 6: c (the Z algorithm, from the end)
    """
    n = tokens.size
    last = n - 1
    matches = np.zeros(n + 1, I32)
    left = right = 0  # of the match that reaches farthest back
    for k in range(1, n):
        m = min(right - k, matches[k - left]) if k < right else 0
        while k + m < n and tokens[last - m] == tokens[last - k - m]:
            m += 1
        if k + m > right:
            left, right = k, k + m
        matches[k] = m
    return matches


@kernel("void(f4[::1], i4[::1], i8)")
def ban_repeated(logits, tokens, size):
    """-inf for each token that would repeat `size` tokens in a row of tokens [n]."""
    matches = _count_matches(tokens)
    for k in range(1, tokens.size + 1):
        if matches[k] >= size - 1:
            logits[tokens[tokens.size - k]] = -np.inf


@inline
def _is_head(token, marks):
    """Whether a breaker begins with it: spares most tokens the search."""
    return token < 32 * marks.size and marks[token >> 5] >> np.uint32(token & 31) & np.uint32(1) != 0


@inline
def _longest_tail(tokens, at, heads, bounds, tails):
    """The length of the longest tail that follows the token at this place, its head; -1 if there is none."""
    longest = -1
    i = np.searchsorted(heads, tokens[at])
    while i < heads.size and heads[i] == tokens[at]:
        length = bounds[i + 1] - bounds[i]
        if length > longest and at + length < tokens.size:
            same = 0
            while same < length and tails[bounds[i] + same] == tokens[at + 1 + same]:
                same += 1
            longest = length if same == length else longest
        i += 1
    return longest


@inline
def _since_break(tokens, marks, heads, bounds, tails):
    """How many tokens follow the breaker that begins last; all tokens if there is none."""
    for at in range(tokens.size - 1, -1, -1):
        if _is_head(tokens[at], marks):
            longest = _longest_tail(tokens, at, heads, bounds, tails)
            if longest >= 0:
                return tokens.size - 1 - at - longest
    return tokens.size


@kernel("void(f4[::1], i4[::1], u4[::1], i4[::1], i4[::1], i4[::1], f8, f8, i8)")
def lower_repeated(logits, tokens, marks, heads, bounds, tails, multiplier, base, allowed):
    """DRY, as in llama.cpp: lower each token that would continue a repetition of `allowed` tokens or more.

    The penalty is multiplier * base ** (its length - allowed). No logit goes below LOWEST, so no token is banned.
    """
    n, limit = tokens.size, _since_break(tokens, marks, heads, bounds, tails)
    if limit < allowed:
        return
    matches = _count_matches(tokens)
    longest = np.empty(logits.size, I32)  # repetition that a token continues; set only for tokens that occur
    for k in range(1, n):
        longest[tokens[n - k]] = -1
    for k in range(1, n):
        longest[tokens[n - k]] = max(longest[tokens[n - k]], min(matches[k], limit))
    powers = np.ones(limit + 1)  # of base; those above the highest float32 keep the one before
    for e in range(1, limit + 1):
        powers[e] = powers[e - 1] * base if powers[e - 1] * base <= HIGHEST else powers[e - 1]
    for k in range(1, n):
        token = tokens[n - k]
        if longest[token] >= allowed and logits[token] > -np.inf:
            penalty = F32(min(multiplier * powers[longest[token] - allowed], HIGHEST))
            if _is_head(token, marks):
                is_breaker = _longest_tail(tokens[n - k : n - k + 1], 0, heads, bounds, tails) == 0  # by itself
                penalty = F32(0) if is_breaker else penalty
            logits[token] = max(F32(logits[token] - penalty), LOWEST)
        longest[token] = -1  # done
