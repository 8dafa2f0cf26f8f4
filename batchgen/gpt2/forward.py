"""GPT-2's forward pass over packed rows with a KV cache: picoGPT's functions, which write into buffers of the caller.

A *row* is one position of one sequence. One pass takes rows of many sequences: whole prompts (prefill) and last tokens
(decode) go through the same matrix products, and only attention separates the sequences.

A row's bits do not depend on the other rows, if the BLAS computes each row of a product alike (`engine/probe.py` checks
that): every product has at least `min_rows` rows; every sum over keys has a fixed order (kv_cache.BLOCK); nothing else
mixes rows. Everything is float32. NumPy 2 promotes to float64 on contact with an np.float64, so constants are Python
floats.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, Unpack

import numpy as np

from batchgen.gpt2.activations import ACTIVATIONS, Activation
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.kv_cache import BLOCK, LANES, KVArena, Segment, round_up
from batchgen.gpt2.params import Array, Block, Mlp, Params

QUERY_BLOCK = 64  # queries of a prompt that attend together: the scores of one block stay in the L2 cache
DECODE_GROUP = 32  # sequences whose scores are normalised together
ROW_BLOCK = 32  # rows that pass through the activation together: 32 x 3072 floats stay in the L2 cache

# OpenBLAS has other kernels for products of up to 100**3 multiplications, which split long sums differently.
_SMALL_PRODUCT = 100**3

_QUERIES, _KEYS, _VALUES = range(3)  # the thirds of c_attn's output


def min_rows(config: GPT2Config) -> int:
    """The fewest rows of a product with weights: at least 2, as BLAS has another routine for 1, and not a small one."""
    smallest = config.n_embd * min(config.n_embd, config.inner_dim, config.n_vocab)
    return min(max(2, _SMALL_PRODUCT // smallest + 1), 1024)


# ---- picoGPT's functions


def softmax(x: Array, n_block: int) -> Array:
    """Replace x [..., n_block*BLOCK] by its exponentials, not normalised, and return their sums [..., 1].

    The blocks are added up first and the elements of the total last, so that more masked blocks change no bit.
    """
    x -= x.max(axis=-1, keepdims=True)
    np.exp(x, out=x)
    total: Array = x.reshape(*x.shape[:-1], n_block, BLOCK).sum(axis=-2).sum(axis=-1, keepdims=True)
    return total


def layer_norm(x: Array, g: Array, b: Array, eps: float, out: Array) -> Array:
    """[n_row, n_embd] -> [n_row, n_embd]: rows to mean 0 and variance 1, then * g + b."""
    np.subtract(x, x.mean(axis=-1, keepdims=True), out=out)
    scale = np.vecdot(out, out)[:, None]  # [n_row, 1]
    scale /= x.shape[-1]
    scale += eps
    np.sqrt(scale, out=scale)
    out /= scale
    out *= g
    out += b
    return out


def linear(x: Array, w: Array, b: Array, out: Array) -> Array:
    """[n_row, n_in] @ [n_in, n_out] + [n_out] -> [n_row, n_out]."""
    np.matmul(x, w, out=out)
    out += b
    return out


def ffn(x: Array, mlp: Mlp, activate: Activation, hidden: Array, scratch: Array, out: Array) -> Array:
    """[n_row, n_embd] -> [n_row, inner_dim] -> [n_row, n_embd]."""
    c_fc = mlp["c_fc"]
    np.matmul(x, c_fc["w"], out=hidden)  # [n_row, n_embd] @ [n_embd, inner_dim] -> [n_row, inner_dim]
    for first in range(0, len(hidden), ROW_BLOCK):
        rows = hidden[first : first + ROW_BLOCK]
        rows += c_fc["b"]
        activate(rows, scratch[: len(rows)])
    return linear(hidden, **mlp["c_proj"], out=out)


# ---- attention


@dataclass(slots=True, eq=False)
class Prefill:
    """Consecutive positions of one segment that one pass reads."""

    segment: Segment
    token_ids: Sequence[int]
    n_logits: int = 0  # the caller needs the logits of this many last rows
    copied: Segment | None = None  # copy its content into the empty segment first; it is complete before this prefill
    first_row: int = 0  # set by the pass, as is first_position
    first_position: int = 0

    @property
    def n_row(self) -> int:
        return len(self.token_ids)

    @property
    def rows(self) -> slice:
        """Its rows of the pass."""
        return slice(self.first_row, self.first_row + self.n_row)


# (left, right, out) of left @ right[layer] -> out in every layer. A pass makes these views once: making them costs as
# much as a small product.
Product: TypeAlias = tuple[Array, Array, Array]


def score_product(q: Array, segment: Segment, n_key: int, out: Array) -> Product:
    """Queries times keys: [n_head, n_q, d_head] @ [n_head, d_head, n_key] -> the segment's columns of out.

    out is [n_head, n_q, all keys]. n_key is rounded up to LANES: the caller masks the columns after it, whose content
    is arbitrary.
    """
    width = round_up(n_key, LANES)
    return q, segment.k[:, :, :, :width], out[:, :, segment.start : segment.start + width]


def value_products(p: Array, segment: Segment, n_key: int, out: Array) -> Iterator[Product]:
    """Weights times values, block by block of keys -> the segment's blocks of out [n_head, n_block, n_q, d_head].

    p is [n_head, n_q, all keys].
    Whole blocks: [n_head, n_full, n_q, BLOCK] @ [n_head, n_full, BLOCK, d_head] -> [n_head, n_full, n_q, d_head].
    The rest: [n_head, n_q, n_rest] @ [n_head, n_rest, d_head] -> [n_head, n_q, d_head].
    """
    n_head, n_q, _ = p.shape
    first_block, n_full = segment.start // BLOCK, n_key // BLOCK
    whole = n_full * BLOCK
    p = p[:, :, segment.start : segment.start + n_key]
    if n_full:
        weights = p[:, :, :whole].reshape(n_head, n_q, n_full, BLOCK).transpose(0, 2, 1, 3)
        values = segment.v[:, :, :whole].reshape(-1, n_head, n_full, BLOCK, out.shape[3])
        yield weights, values, out[:, first_block : first_block + n_full]
    if n_key > whole:
        yield p[:, :, whole:], segment.v[:, :, whole:n_key], out[:, first_block + n_full]


def n_blocks(n_key: int) -> int:
    return -(-n_key // BLOCK)


@dataclass(slots=True, eq=False)
class _DecodeGroup:
    """Adjacent decode rows whose scores lie in one array [n_seq, n_head, 2, n_block*BLOCK].

    The axis of 2 holds a query and a row of zeros. A product with a segment of one sequence alone has both rows,
    since BLAS has another routine, with other bits, for a single row.
    """

    rows: slice
    n_block: int
    new_keys: list[Array]  # for each sequence [n_layer, n_head, d_head]: this pass writes the new key there
    new_values: list[Array]
    pairs: Array  # [n_seq, n_head, 2, d_head] queries and zeros
    p: Array  # [n_seq, n_head, n_block*BLOCK] scores, then weights
    last_keys: Array  # [n_seq, n_head, n_last_key]: the columns of p that some sequence does not have
    mask: Array  # [n_seq, 1, n_last_key]: 0 if the sequence has the key, else -inf
    o: Array  # [n_seq, n_head, n_block, d_head] weighted values
    past_end: list[Array]  # parts of o that no product writes
    scores: list[Product]
    values: list[Product]


def _cut_into_groups(segments: Sequence[Segment]) -> Iterator[slice]:
    """Groups of up to DECODE_GROUP adjacent rows with the same number of blocks or the same first segment."""
    first = 0
    for i in range(1, len(segments) + 1):
        if i < len(segments) and i - first < DECODE_GROUP:
            before, here = segments[i - 1], segments[i]
            if here.path[0] is before.path[0] or n_blocks(here.end) == n_blocks(before.end):
                continue
        yield slice(first, i)
        first = i


def _shared_rows(segments: Sequence[Segment]) -> Iterator[tuple[Segment, int, int]]:
    """Each segment on the paths of these, with the adjacent rows lo ... hi-1 that share it."""
    for depth in range(max(len(segment.path) for segment in segments)):
        lo = 0
        for hi in range(1, len(segments) + 1):
            part = segments[lo].path[depth] if depth < len(segments[lo].path) else None
            if hi < len(segments) and depth < len(segments[hi].path) and segments[hi].path[depth] is part:
                continue
            if part is not None:
                yield part, lo, hi
            lo = hi


class Forward:
    """One model's forward pass and its work buffers, for up to max_rows rows and max_logits rows of logits a pass."""

    def __init__(self, params: Params, config: GPT2Config, max_rows: int, max_logits: int) -> None:
        self.params, self.config = params, config
        self._eps, self._activate = config.layer_norm_epsilon, ACTIVATIONS[config.activation_function]
        self.min_rows = min_rows(config)
        self.max_rows = max_rows
        n_row = max(max_rows, self.min_rows) + 1  # one more, so that the last query has a row after it to pair with
        n_embd, inner_dim = config.n_embd, config.inner_dim
        self._x = np.zeros((n_row, n_embd), np.float32)
        self._norm = np.zeros((n_row, n_embd), np.float32)
        self._qkv = np.zeros((n_row, 3 * n_embd), np.float32)
        self._attended = np.zeros((n_row, n_embd), np.float32)
        self._spare = np.zeros(n_row * max(inner_dim, 2 * n_embd), np.float32)  # for the MLP, and for the last block
        self._hidden = self._spare[: n_row * inner_dim].reshape(n_row, inner_dim)
        self._scratch = np.zeros((ROW_BLOCK, inner_dim), np.float32)
        self._logits = np.zeros((max(max_logits, self.min_rows), config.n_vocab), np.float32)
        n_q, n_block = max(QUERY_BLOCK, 2 * DECODE_GROUP), n_blocks(config.n_ctx)
        self._scores = np.zeros(n_q * config.n_head * n_block * BLOCK, np.float32)
        self._weighted = np.zeros(n_q * config.n_head * n_block * config.d_head, np.float32)
        self._pairs = np.zeros((DECODE_GROUP, config.n_head, 2, config.d_head), np.float32)
        is_later = np.arange(QUERY_BLOCK + BLOCK) > np.arange(QUERY_BLOCK)[:, None]
        self._causal = np.where(is_later, np.float32(-np.inf), np.float32(0))  # column 0 is the first query's own key

    def _pad(self, n_row: int) -> int:
        """Enough rows for every product; the rows after n_row are computed and ignored."""
        return max(n_row, self.min_rows)

    def _heads(self, third: int, rows: slice) -> Array:
        """Queries, keys or values of some rows, [n_row, n_head, d_head]."""
        c = self.config
        return self._qkv[rows, third * c.n_embd : (third + 1) * c.n_embd].reshape(-1, c.n_head, c.d_head)

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
        np.take(self.params["wte"], token_ids, axis=0, out=x, mode="clip")  # in the mode "raise", take buffers out
        x += self.params["wpe"][positions]
        self._x[len(token_ids) : self.min_rows] = 0
        return len(token_ids)

    def _decode_group(self, rows: slice, segments: Sequence[Segment]) -> _DecodeGroup:
        """The views of one group's arrays, for all layers of this pass."""
        n_head, d_head = self.config.n_head, self.config.d_head
        ends = np.array([segment.end for segment in segments])
        n_seq, n_block, first_masked = len(segments), n_blocks(int(ends.max())), int(ends.min())
        s = self._scores[: n_seq * n_head * 2 * n_block * BLOCK].reshape(n_seq, n_head, 2, n_block * BLOCK)
        o = self._weighted[: n_seq * n_head * n_block * 2 * d_head].reshape(n_seq, n_head, n_block, 2, d_head)
        pairs = self._pairs[:n_seq]
        past_end = np.arange(first_masked, n_block * BLOCK) >= ends[:, None]  # [n_seq, n_last_key]
        group = _DecodeGroup(
            rows=rows,
            n_block=n_block,
            new_keys=[segment.k[:, :, :, segment.length - 1] for segment in segments],
            new_values=[segment.v[:, :, segment.length - 1] for segment in segments],
            pairs=pairs,
            p=s[:, :, 0],
            last_keys=s[:, :, 0, first_masked:],
            mask=np.where(past_end, np.float32(-np.inf), np.float32(0))[:, None],
            o=o[:, :, :, 0],
            past_end=[o[i, :, n_blocks(end) :] for i, end in enumerate(ends.tolist()) if n_blocks(end) < n_block],
            scores=[],
            values=[],
        )
        for segment, lo, hi in _shared_rows(segments):
            if hi - lo == 1:  # the sequence's query and a row of zeros
                group.scores.append(score_product(pairs[lo], segment, segment.length, out=s[lo]))
                group.values += value_products(s[lo], segment, segment.length, out=o[lo])
            else:  # [n_head, hi - lo, d_head]: the queries of all sequences that share the segment
                q, p = pairs[lo:hi, :, 0].transpose(1, 0, 2), group.p[lo:hi].transpose(1, 0, 2)
                group.scores.append(score_product(q, segment, segment.length, out=p))
                group.values += value_products(p, segment, segment.length, out=group.o[lo:hi].transpose(1, 2, 0, 3))
        return group

    def _write_cache(self, layer: int, groups: list[_DecodeGroup], prefills: Sequence[Prefill]) -> None:
        """Write keys and values of all rows into their segments."""
        for group in groups:
            keys, values = self._heads(_KEYS, group.rows), self._heads(_VALUES, group.rows)
            for i, (new_key, new_value) in enumerate(zip(group.new_keys, group.new_values, strict=True)):
                new_key[layer] = keys[i]
                new_value[layer] = values[i]
        for prefill in prefills:
            k, v = prefill.segment.k[layer], prefill.segment.v[layer]
            lo = prefill.first_position - prefill.segment.start
            hi = lo + prefill.n_row
            if prefill.copied is not None:
                k[:, :, :lo] = prefill.copied.k[layer][:, :, :lo]
                v[:, :lo] = prefill.copied.v[layer][:, :lo]
            k[:, :, lo:hi] = self._heads(_KEYS, prefill.rows).transpose(1, 2, 0)  # [n_head, d_head, n_row]
            v[:, lo:hi] = self._heads(_VALUES, prefill.rows).transpose(1, 0, 2)  # [n_head, n_row, d_head]

    def _attend_decode(self, layer: int, group: _DecodeGroup) -> None:
        """Write the attention of a group's queries over all their keys to _attended."""
        scale = self.config.attention_scale(layer)
        np.multiply(self._heads(_QUERIES, group.rows), scale, out=group.pairs[:, :, 0])
        for q, keys, out in group.scores:
            np.matmul(q, keys[layer], out=out)  # [n_head, n_q, d_head] @ [n_head, d_head, n_key]: see score_product
        np.add(group.last_keys, group.mask, out=group.last_keys)
        total = softmax(group.p, group.n_block)  # [n_seq, n_head, 1]
        for p, values, out in group.values:
            np.matmul(p, values[layer], out=out)  # [n_head, ..., n_q, n_key] @ [n_head, ..., n_key, d_head]
        for rest in group.past_end:
            rest[...] = 0
        attended = self._attended[group.rows].reshape(-1, self.config.n_head, self.config.d_head)
        np.divide(group.o.sum(axis=2), total, out=attended)  # [n_seq, n_head, d_head]

    def _attend_prefill(self, layer: int, prefill: Prefill, first_query: int) -> None:
        """Write the attention of a prefill's queries from first_query on to _attended; each sees keys up to its own."""
        n_head, d_head, scale = self.config.n_head, self.config.d_head, self.config.attention_scale(layer)
        path = prefill.segment.path
        for lo in range(first_query, prefill.n_row, QUERY_BLOCK):
            n_row = min(QUERY_BLOCK, prefill.n_row - lo)
            n_q = max(n_row, 2)  # no product has a single row; the second row is ignored
            row, position = prefill.first_row + lo, prefill.first_position + lo
            n_key = position + n_row
            n_block = n_blocks(n_key)
            q = (self._heads(_QUERIES, slice(row, row + n_q)) * scale).transpose(1, 0, 2)  # [n_head, n_q, d_head]
            s = self._scores[: n_head * n_q * n_block * BLOCK].reshape(n_head, n_q, n_block * BLOCK)
            for segment in path:
                q, keys, out = score_product(q, segment, min(segment.length, n_key - segment.start), out=s)
                np.matmul(q, keys[layer], out=out)  # [n_head, n_q, d_head] @ [n_head, d_head, n_key]
            s[:, :, position:] += self._causal[:n_q, : n_block * BLOCK - position]
            total = softmax(s, n_block)  # [n_head, n_q, 1]
            o = self._weighted[: n_head * n_block * n_q * d_head].reshape(n_head, n_block, n_q, d_head)
            for segment in path:
                for p, values, out in value_products(s, segment, min(segment.length, n_key - segment.start), out=o):
                    np.matmul(p, values[layer], out=out)  # [n_head, ..., n_q, n_key] @ [n_head, ..., n_key, d_head]
            attended = self._attended[row : row + n_row].reshape(n_row, n_head, d_head).transpose(1, 0, 2)
            np.divide(o.sum(axis=1)[:, :n_row], total[:, :n_row], out=attended)  # [n_head, n_row, d_head]

    def _finish_block(self, block: Block, n_row: int) -> None:
        """The part of a block after attention: add c_proj of _attended to _x, then the MLP."""
        x, norm, attended = self._x[:n_row], self._norm[:n_row], self._attended[:n_row]
        x += linear(attended, **block["attn"]["c_proj"], out=norm)
        layer_norm(x, **block["ln_2"], eps=self._eps, out=norm)
        x += ffn(norm, block["mlp"], self._activate, hidden=self._hidden[:n_row], scratch=self._scratch, out=attended)

    def _transformer_block(
        self, layer: int, n_row: int, groups: list[_DecodeGroup], prefills: Sequence[Prefill]
    ) -> None:
        """_x [n_row, n_embd] -> _x, through attention and the MLP."""
        block = self.params["blocks"][layer]
        x, norm, qkv = self._x[:n_row], self._norm[:n_row], self._qkv[:n_row]
        linear(layer_norm(x, **block["ln_1"], eps=self._eps, out=norm), **block["attn"]["c_attn"], out=qkv)
        self._write_cache(layer, groups, prefills)
        for group in groups:
            self._attend_decode(layer, group)
        for prefill in prefills:
            self._attend_prefill(layer, prefill, 0)
        self._finish_block(block, n_row)

    def _last_block(self, layer: int, n_row: int, groups: list[_DecodeGroup], prefills: Sequence[Prefill]) -> int:
        """_transformer_block for the last layer; moves rows with logits to the front of _x, returns their number."""
        block = self.params["blocks"][layer]
        logit_rows = np.arange(groups[-1].rows.stop if groups else 0)
        for prefill in prefills:
            logit_rows = np.append(logit_rows, np.arange(prefill.rows.stop - prefill.n_logits, prefill.rows.stop))
        n_embd, n_logits = self.config.n_embd, len(logit_rows)
        x, norm, qkv = self._x[:n_row], self._norm[:n_row], self._qkv[:n_row]
        w, b = block["attn"]["c_attn"]["w"], block["attn"]["c_attn"]["b"]
        layer_norm(x, **block["ln_1"], eps=self._eps, out=norm)
        linear(norm, w[:, n_embd:], b[n_embd:], out=qkv[:, n_embd:])  # keys and values of all rows [n_row, 2*n_embd]
        self._write_cache(layer, groups, prefills)
        if not n_logits:
            return 0
        n = self._pad(n_logits)
        chosen, q = self._spare[: 2 * n * n_embd].reshape(2, n, n_embd)
        np.take(norm, logit_rows, axis=0, out=chosen[:n_logits], mode="clip")
        qkv[logit_rows, :n_embd] = linear(chosen, w[:, :n_embd], b[:n_embd], out=q)[:n_logits]  # [n_logits, n_embd]
        for group in groups:
            self._attend_decode(layer, group)
        for prefill in prefills:
            if prefill.n_logits:
                self._attend_prefill(layer, prefill, prefill.n_row - prefill.n_logits)
        x[:n_logits] = x[logit_rows]
        self._attended[:n_logits] = self._attended[logit_rows]
        self._finish_block(block, n)
        return n_logits

    def _lm_head(self, n_logits: int) -> Array:
        """_x [n_logits, n_embd] @ [n_embd, n_vocab] -> logits [n_logits, n_vocab], after the last layer norm."""
        if n_logits:
            n = self._pad(n_logits)
            norm = layer_norm(self._x[:n], **self.params["ln_f"], eps=self._eps, out=self._norm[:n])
            np.matmul(norm, self.params["lm_head"], out=self._logits[:n])
            if "absent_ids" in self.params:
                self._logits[:n_logits, self.params["absent_ids"]] = -np.inf
        return self._logits[:n_logits]

    def __call__(
        self,
        decode_ids: Sequence[int] = (),
        decode_segments: Sequence[Segment] = (),
        prefills: Sequence[Prefill] = (),
    ) -> Array:
        """Read one more token of each decode segment and the tokens of each prefill; cache their keys and values.

        Decode and prefill rows share every product with weights (chunked prefill, in vLLM's words). Sequences that
        share segments should be adjacent in decode_segments. The parents of a prefill's segment are read in an earlier
        pass or by an earlier prefill of this one. Returns the logits [n_decode + all n_logits, n_vocab] of the decode
        rows, then of the prefills: a view that the next call overwrites.
        """
        n_row = self._pad(self._embed(decode_ids, decode_segments, prefills))
        groups = [self._decode_group(rows, decode_segments[rows]) for rows in _cut_into_groups(decode_segments)]
        last = self.config.n_layer - 1
        with np.errstate(over="ignore"):  # exp in an activation may overflow
            for layer in range(last):
                self._transformer_block(layer, n_row, groups, prefills)
            n_logits = self._last_block(last, n_row, groups, prefills)
        return self._lm_head(n_logits)


def gpt2(inputs: Sequence[int], *, n_head: int, **params: Unpack[Params]) -> Array:
    """[n_seq] token ids -> [n_seq, n_vocab] logits of every position: picoGPT's `gpt2`, in float32."""
    (n_vocab, n_embd), (n_ctx, _) = params["wte"].shape, params["wpe"].shape
    _, n_inner = params["blocks"][0]["mlp"]["c_fc"]["w"].shape
    config = GPT2Config(n_vocab, n_ctx, n_embd, n_head, len(params["blocks"]), n_inner=n_inner)
    segment = KVArena(config, len(inputs)).allocate(len(inputs), start=0)
    assert segment is not None
    forward = Forward(params, config, max_rows=len(inputs), max_logits=len(inputs))
    return forward(prefills=[Prefill(segment, inputs, n_logits=len(inputs))])
