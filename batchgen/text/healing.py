"""Token healing: the last tokens of a prompt are drawn again, if a longer token may stand in their place.

In the texts that a model learned from, `://` after `http` is one token. So after a prompt that ends in `http:`, whose
last token is `:`, the model expects anything but `//`. With `heal`, the model does not read such tokens; a token that
begins with their text, perhaps the same one, is drawn instead. This also mends a space at the end, which belongs to the
next word's token, and half of a word.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from batchgen.text.tokenizer import Tokenizer
from batchgen.types import Guide, Ids, Mask, make_mask

MAX_MASKS = 512  # of 6 KB each for GPT-2's vocabulary


class Beginnings:
    """The tokens of BPE in the order of their bytes, so that tokens with the same beginning are adjacent."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        special = tokenizer.special
        beside = {token.id for token in special.added} | {*special.begin, *special.end, special.start, special.unknown}
        self._bytes = {token: data for token, data in tokenizer.token_bytes.items() if data and token not in beside}
        ids = sorted(self._bytes, key=self._bytes.__getitem__)
        self._texts = [self._bytes[token] for token in ids]
        self._ids = np.array(ids, np.int64)
        self.longest = max(map(len, self._texts), default=0)
        self._start = special.start
        self.mask = lru_cache(MAX_MASKS)(lambda again: make_mask(self.list_ids(again), tokenizer.n_vocab))

    def text_of(self, ids: Sequence[int]) -> bytes:
        """The bytes of tokens; none for a token that is not of BPE."""
        return b"".join(self._bytes.get(token, b"") for token in ids)

    def back_up(self, ids: Ids) -> tuple[Ids, Ids]:
        """The tokens of a prompt that are read, one or more, and those after them that are drawn again.

        The text of the latter is the longest with which a longer token begins. If no token is left to read,
        <|endoftext|> is read, as for an empty prompt; a vocabulary without it keeps a token.

        ids of "a", " ti", with " time" among the tokens -> ids of "a", ids of " ti"
        """
        data, n_kept = b"", len(ids)
        for at in range(len(ids) - 1, -1 if self._start is not None else 0, -1):
            data = self._bytes.get(ids[at], b"") + data
            if ids[at] not in self._bytes or len(data) >= self.longest:
                break
            after = bisect_right(self._texts, data)
            is_begun = any(text.startswith(data) for text in self._texts[after : after + 1])  # by a longer token
            if is_begun and not 0x80 <= data[0] < 0xC0:  # at the beginning of a character
                n_kept = at
        return ids[:n_kept] or (self._start,), ids[n_kept:]  # type: ignore[return-value]

    def list_ids(self, again: Ids) -> npt.NDArray[np.int64]:
        """The tokens that may come if these are left to draw again: those that begin with their text, and the first."""
        text = self.text_of(again)
        end = bisect_left(self._texts, text + b"\xff" * self.longest)  # no token is longer
        longer = self._ids[bisect_left(self._texts, text) : end]  # or equal: the one that is left
        return longer if len(again) == 1 else np.append(longer, again[0])


@lru_cache(maxsize=4)
def beginnings_of(tokenizer: Tokenizer) -> Beginnings:
    """The Beginnings of a tokenizer, made once."""
    return Beginnings(tokenizer)


class HealingGuide(Guide):
    """Until the text of the tokens to draw again is complete, allows only tokens that agree with it.

    inner: the guide of the completion's pattern, which begins with that text.
    """

    def __init__(self, beginnings: Beginnings, again: Ids, inner: Guide | None = None) -> None:
        self._beginnings, self._left, self._inner = beginnings, again, inner

    def copy(self) -> "HealingGuide":
        return HealingGuide(self._beginnings, self._left, self._inner and self._inner.copy())

    def allowed(self) -> "Mask | None":
        mask = self._beginnings.mask(self._left) if self._left else None
        inner = self._inner.allowed() if self._inner else None
        return inner if mask is None else mask if inner is None else mask & inner

    def is_given(self, token: int) -> bool:
        text = self._beginnings.text_of((token,))
        return bool(text) and self._beginnings.text_of(self._left).startswith(text)

    def may_end(self) -> bool:
        return self._inner is not None and self._inner.may_end()

    def advance(self, token: int) -> bool:
        if self._left:
            self._left = self._left[1:] if token == self._left[0] else ()
        return self._inner is not None and self._inner.advance(token)
