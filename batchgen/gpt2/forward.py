"""GPT-2's forward pass over packed rows with a cache of keys and values.

A *row* is one position of one sequence. One pass takes rows of many sequences: whole prompts (prefill) and last tokens
(decode) go through the same products, and only attention separates the sequences. A row's bits do not depend on the
other rows of its pass: each kernel fixes the order of every sum (kernels.py, attention.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from batchgen.gpt2.activations import ACTIVATIONS
from batchgen.gpt2.attention import attend, write
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.kernels import ACTIVATE, ADD, STORE, layer_norm, linear_float32, linear_int8, quantise
from batchgen.gpt2.kv_cache import Numbers, Segment
from batchgen.gpt2.params import Array
from batchgen.gpt2.weights import GROUP, Float32Linear, Linear, Weights, aligned, round_up

QUERIES = 96  # each tile of a group looks through its parts for its own

Table: TypeAlias = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class Prefill:
    """Consecutive positions of one segment that one pass reads."""

    segment: Segment
    token_ids: Sequence[int]
    n_logits: int = 0  # the caller needs the states, or logits, of this many last rows
    copied: Segment | None = None  # copy its content into the empty segment first; it is complete before this prefill
    first_row: int = 0  # set by the pass, as is first_position
    first_position: int = 0

    @property
    def n_row(self) -> int:
        return len(self.token_ids)


# ---- the tables of a pass for the kernels of attention.py, which says what the columns are


class Queries(NamedTuple):
    """The rows that attend, in groups, and the segments that they read."""

    queries: Table  # [n_query, 2]
    groups: Table  # [n_group, 4]
    parts: Table  # [n_part, 5]


def _shared_parts(segments: Sequence[Segment], lo: int, hi: int, depth: int = 0) -> Iterator[tuple[Segment, int, int]]:
    """Each segment on the paths of rows lo ... hi-1, after its parent, with the adjacent rows that share it."""
    if hi - lo == 1:
        yield from ((segment, lo, hi) for segment in segments[lo].path[depth:])
        return
    for segment, rows in groupby(range(lo, hi), lambda row: dict(enumerate(segments[row].path)).get(depth)):
        if segment is not None:
            first, *rest = rows
            end = first + len(rest) + 1
            yield segment, first, end
            yield from _shared_parts(segments, first, end, depth + 1)


def _groups(
    segments: Sequence[Segment], prefills: Sequence[Prefill], first_queries: Sequence[int]
) -> Iterator[tuple[int, int, list[tuple[Segment, int, int]]]]:
    """The queries of each group, from ... to, and the segments that they read, with the queries of each.

    A group is up to QUERIES adjacent decode rows with the same first segment, or the rows of a prefill.
    """
    for _, same in groupby(range(len(segments)), lambda row: segments[row].path[0]):
        first, *rest = same
        for lo in range(first, first + len(rest) + 1, QUERIES):
            hi = min(lo + QUERIES, first + len(rest) + 1)
            yield lo, hi, list(_shared_parts(segments, lo, hi))
    query = len(segments)
    for prefill, first in zip(prefills, first_queries, strict=True):
        end = query + prefill.n_row - first
        yield query, end, [(segment, query, end) for segment in prefill.segment.path]
        query = end


def _queries(segments: Sequence[Segment], prefills: Sequence[Prefill], only_logits: bool) -> Queries:
    """The tables for all rows of a pass, or for those with logits."""
    first_queries = [prefill.n_row - prefill.n_logits if only_logits else 0 for prefill in prefills]
    rows, ends = list(range(len(segments))), [segment.end for segment in segments]
    for prefill, first in zip(prefills, first_queries, strict=True):
        rows += range(prefill.first_row + first, prefill.first_row + prefill.n_row)
        ends += range(prefill.first_position + first + 1, prefill.first_position + prefill.n_row + 1)
    groups: list[tuple[int, ...]] = []
    parts: list[tuple[int, ...]] = []
    for lo, hi, read in _groups(segments, prefills, first_queries):
        groups.append((lo, hi, len(parts), len(parts) + len(read)))
        parts += [(segment.base, segment.size, segment.start, first, end) for segment, first, end in read]
    return Queries(
        np.array([rows, ends], np.int64).T.copy(),
        np.array(groups, np.int64).reshape(-1, 4),
        np.array(parts, np.int64).reshape(-1, 5),
    )


def _writes(segments: Sequence[Segment], prefills: Sequence[Prefill]) -> Table:
    """What rows write to the cache [n_write, 7]: a table for `write`."""
    writes = [(row, 1, s.base, s.size, s.length - 1, 0, 0) for row, s in enumerate(segments)]
    for prefill in prefills:
        s, copied = prefill.segment, prefill.copied
        source = (copied.base, copied.size) if copied else (0, 0)
        writes.append((prefill.first_row, prefill.n_row, s.base, s.size, prefill.first_position - s.start, *source))
    return np.array(writes, np.int64).reshape(-1, 7)


def _floats(*shape: int) -> Array:
    return aligned(shape, np.float32)  # type: ignore[return-value]


class Forward:
    """One model's forward pass and its work buffers, for up to max_rows rows and max_logits rows of logits a pass."""

    def __init__(self, weights: Weights, config: GPT2Config, max_rows: int, max_logits: int) -> None:
        self.weights, self.config, self.max_rows, self.max_logits = weights, config, max_rows, max_logits
        n_embd, inner_dim = config.n_embd, config.inner_dim
        self._activate = ACTIVATE + ACTIVATIONS.index(config.activation_function)
        self._x = _floats(max_rows, n_embd)
        self._norm = _floats(max_rows, n_embd)
        self._qkv = _floats(max_rows, 3 * n_embd)
        self._attended = _floats(max_rows, n_embd)
        self._hidden = _floats(max_rows, inner_dim)
        self._logits = _floats(max_logits, config.n_vocab)
        self._bytes = np.zeros(max_rows * round_up(max(n_embd, inner_dim), GROUP), np.uint8)  # of rows in int8
        self._scale, self._zero = np.zeros(max_rows, np.float32), np.zeros(max_rows, np.int32)

    def _linear(self, x: Array, w: Linear, epilogue: int, out: Array) -> None:
        """[n_row, n_in] @ [n_in, n_out] + [n_out] -> [n_row, n_out], stored, added or activated."""
        if isinstance(w, Float32Linear):
            linear_float32(x, w.panels, w.b, epilogue, out)
            return
        n_row, n_in = x.shape
        width = round_up(n_in, GROUP)
        u, scale, zero = self._bytes[: n_row * width].reshape(n_row, width), self._scale[:n_row], self._zero[:n_row]
        quantise(x, w.inverse, w.offset, u, scale, zero)
        linear_int8(u, scale, zero, w.panels, w.scale, w.column_sum, w.b, epilogue, out)

    def _layer_norm(self, x: Array, g: Array, b: Array) -> Array:
        """[n_row, n_embd] -> [n_row, n_embd]."""
        norm = self._norm[: len(x)]
        layer_norm(x, g, b, self.config.layer_norm_epsilon, norm)
        return norm

    def _embed(self, decode_ids: Sequence[int], segments: Sequence[Segment], prefills: Sequence[Prefill]) -> int:
        """Write token plus position embeddings of all rows to _x and lengthen their segments; returns the rows."""
        token_ids = list(decode_ids)
        positions = [segment.end for segment in segments]
        for segment in segments:
            segment.length += 1
        for prefill in prefills:
            prefill.first_row = len(token_ids)
            if prefill.copied is not None:
                prefill.segment.length = prefill.copied.length
            prefill.first_position = prefill.segment.end
            token_ids.extend(prefill.token_ids)
            positions.extend(range(prefill.first_position, prefill.first_position + prefill.n_row))
            prefill.segment.length += prefill.n_row
        x = self._x[: len(token_ids)]
        np.take(self.weights.wte, token_ids, axis=0, out=x, mode="clip")  # in the mode "raise", take buffers out
        x += self.weights.wpe[positions]
        return len(token_ids)

    def _transformer_block(self, layer: int, x: Array, writes: Table, queries: Queries, memory: Numbers) -> Array:
        """x [n_row, n_embd] -> [n_query, n_embd], in place: the rows that `queries` names, which come first then."""
        c, block = self.config, self.weights.blocks[layer]
        qkv = self._qkv[: len(x)]
        self._linear(self._layer_norm(x, **block.ln_1), block.c_attn, STORE, qkv)  # [n_row, 3*n_embd]
        write(memory, layer, c.n_head, c.d_head, qkv, writes)
        n_query = len(queries.queries)
        if n_query < len(x):
            x[:n_query] = x[queries.queries[:, 0]]
        x, attended, hidden = x[:n_query], self._attended[:n_query], self._hidden[:n_query]
        heads = attended.reshape(n_query, c.n_head, c.d_head)
        attend(memory, layer, c.attention_scale(layer), qkv, *queries, c.n_ctx, heads)
        self._linear(attended, block.attn_proj, ADD, x)
        self._linear(self._layer_norm(x, **block.ln_2), block.c_fc, self._activate, hidden)  # [n_query, inner_dim]
        self._linear(hidden, block.mlp_proj, ADD, x)
        return x

    def states(
        self,
        decode_ids: Sequence[int] = (),
        decode_segments: Sequence[Segment] = (),
        prefills: Sequence[Prefill] = (),
        layer: int | None = None,
    ) -> Array:
        """Read one more token of each decode segment and the tokens of each prefill; cache their keys and values.

        Decode and prefill rows share every product with weights (chunked prefill, in vLLM's words). Sequences that
        share segments should be adjacent in decode_segments. The parents of a prefill's segment are read in an earlier
        pass or by an earlier prefill of this one. Returns the states [n_decode + all n_logits, n_embd] of the decode
        rows, then of the prefills, for `head`: a view that the next call overwrites. With a layer below n_layer they
        are those between the blocks: 0 is before the first one, and nothing else is computed.
        """
        n_block = self.config.n_layer if layer is None else layer
        n_row = self._embed(decode_ids, decode_segments, prefills)
        memory = (*decode_segments, *(prefill.segment for prefill in prefills))[0].memory
        writes = _writes(decode_segments, prefills)
        queries = _queries(decode_segments, prefills, only_logits=False)
        wanted = _queries(decode_segments, prefills, only_logits=True) if prefills else queries
        x = self._x[:n_row]
        for number in range(n_block):  # in the last block, rows that are not wanted end after keys and values
            x = self._transformer_block(number, x, writes, wanted if number == n_block - 1 else queries, memory)
        if not n_block:
            x = x[wanted.queries[:, 0]]
        return x if n_block < self.config.n_layer else self._layer_norm(x, **self.weights.ln_f)

    def head(self, states: Array) -> Array:
        """[n_row, n_embd] -> logits [n_row, n_vocab] of up to max_logits rows: a view that the next call overwrites."""
        logits = self._logits[: len(states)]
        self._linear(states, self.weights.lm_head, STORE, logits)
        if self.weights.absent_ids is not None:
            logits[:, self.weights.absent_ids] = -np.inf
        return logits

    def __call__(
        self, decode_ids: Sequence[int] = (), decode_segments: Sequence[Segment] = (), prefills: Sequence[Prefill] = ()
    ) -> Array:
        """The logits of `states`' rows [n_decode + all n_logits, n_vocab]."""
        return self.head(self.states(decode_ids, decode_segments, prefills))
