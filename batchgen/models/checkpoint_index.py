"""The index of a TensorFlow checkpoint, checked before TensorFlow reads it: some bad ones crash TensorFlow's process.

The index is a LevelDB table of sorted entries: blocks, each with a checksum, whose keys share prefixes; then an index
block with the places of those blocks; then a footer of 48 bytes. A key is a tensor's name and its value a
BundleEntryProto; the value of the empty key is a BundleHeaderProto.
Source: tensorflow/core/util/tensor_bundle, tensorflow/core/protobuf/tensor_bundle.proto.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from batchgen.errors import ModelError
from batchgen.models.shards import open_file, show

_REMEDY = "download the checkpoint again"
_LIMIT = 2**22  # bytes; the index of 1558M has 20 kB
_FOOTER, _MAGIC = 48, 0xDB4775248B80FB57.to_bytes(8, "little")
# Bytes of a number by its DataType, of tensorflow/core/framework/types.proto: float, double, int32, ... Only float32 is
# read; the others are slots and counters of an optimizer.
_WIDTHS = {1: 4, 2: 8, 3: 4, 4: 1, 5: 2, 6: 1, 9: 8, 10: 1, 14: 2, 17: 2, 19: 2, 22: 4, 23: 8}
_STRING = 7
_VARINT, _BYTES, _FIXED32 = 0, 2, 5  # protobuf's wire types


# ---- protobuf


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Read a number of 7 bits a byte, low bits first, and return it with its end: 0xAC 0x02 -> (300, 2)."""
    number = 0
    for i in range(10):
        if at + i >= len(data):
            break
        number |= (data[at + i] & 0x7F) << 7 * i
        if data[at + i] < 0x80:
            if number >= 2**63:
                break
            return number, at + i + 1
    raise ValueError("a number is cut off or too large")


def _read_message(data: bytes, known: dict[int, int]) -> tuple[dict[int, int], dict[int, list[bytes]]]:
    """({field: number}, {field: [contents, ...]}) of a message; `known` gives the wire type of each allowed field."""
    numbers: dict[int, int] = {}
    contents: dict[int, list[bytes]] = {}
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        field, wire_type = tag >> 3, tag & 7
        if known.get(field) != wire_type:
            raise ValueError(f"field {field} of type {wire_type} does not belong to a plain tensor")
        if field in numbers:
            raise ValueError("a field occurs twice")
        if wire_type == _VARINT:
            numbers[field], at = _read_varint(data, at)
        else:
            length, at = (4, at) if wire_type == _FIXED32 else _read_varint(data, at)
            contents.setdefault(field, []).append(data[at : at + length])
            at += length
        if at > len(data):
            raise ValueError("a field is cut off")
    return numbers, contents


def _read_single(data: bytes, known: dict[int, int]) -> tuple[dict[int, int], dict[int, bytes]]:
    """Like _read_message, for a message whose fields occur at most once."""
    numbers, contents = _read_message(data, known)
    if any(len(values) > 1 for values in contents.values()):
        raise ValueError("a field occurs twice")
    return numbers, {field: values[0] for field, values in contents.items()}


# ---- the table


def _read_block(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the entries of a block.

    An entry is the lengths (shared, own, value), then the key's own part, which follows the `shared` first bytes of
    the key before it, then the value. The restart points, offsets of entries with whole keys, end the block.
    """
    block = table[offset : offset + size]
    if len(block) != size or size < 4 or table[offset + size : offset + size + 1] != b"\0":
        raise ValueError("a block is missing, cut off, or compressed")
    n_restarts = int.from_bytes(block[-4:], "little")
    end = size - 4 - 4 * n_restarts
    if n_restarts < 1 or end < 0:
        raise ValueError("a block's restart points are missing")
    restarts = [int.from_bytes(block[i : i + 4], "little") for i in range(end, size - 4, 4)]
    at, key, starts = 0, b"", []
    while at < end:
        starts.append(at)
        shared, at = _read_varint(block, at)
        own, at = _read_varint(block, at)
        length, at = _read_varint(block, at)
        if shared > len(key) or at + own + length > end or (starts[-1] in restarts and shared):
            raise ValueError("an entry reaches beyond its block")
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length
    if starts and (restarts[0] != 0 or restarts != sorted(set(restarts)) or not set(restarts) <= set(starts)):
        raise ValueError("a block's restart points are not entries")


def _read_entries(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield every key and value; keys must ascend strictly."""
    footer = table[-_FOOTER:]
    if len(footer) < _FOOTER or footer[-8:] != _MAGIC:
        raise ValueError("it does not end as a table does")
    at = 0
    for _ in range(2):  # the footer begins with the handles of the meta index and of the index
        offset, at = _read_varint(footer, at)
        size, at = _read_varint(footer, at)
    last = None
    for _, handle in _read_block(table, offset, size):
        first, after = _read_varint(handle, 0)
        length, after = _read_varint(handle, after)
        if after != len(handle):
            raise ValueError("a block's handle is too long")
        for key, value in _read_block(table, first, length):
            if last is not None and key <= last:
                raise ValueError("keys are out of order")
            last = key
            yield key, value
    if last is None:
        raise ValueError("it has no entries")


def _check_header(value: bytes) -> None:
    """BundleHeaderProto: 1 num_shards, 2 endianness (0 is little), 3 version {1 producer, 2 min_consumer}."""
    numbers, contents = _read_single(value, {1: _VARINT, 2: _VARINT, 3: _BYTES})
    if numbers.get(1) != 1 or numbers.get(2, 0) != 0:
        raise ValueError("the header is not that of one little-endian data file")
    _read_message(contents.get(3, b""), {1: _VARINT, 2: _VARINT})


def _check_entry(value: bytes, name: str) -> int:
    """Check one tensor's entry and return the offset at which its data ends.

    BundleEntryProto: 1 dtype, 2 shape {2 dim {1 size}}, 3 shard_id, 4 offset, 5 size, 6 crc32c; 7 are slices.
    """
    types = {1: _VARINT, 2: _BYTES, 3: _VARINT, 4: _VARINT, 5: _VARINT, 6: _FIXED32}
    numbers, contents = _read_single(value, types)
    dims = _read_message(contents.get(2, b""), {2: _BYTES})[1].get(2, [])
    shape = [_read_message(dim, {1: _VARINT})[0].get(1, 0) for dim in dims]
    dtype, offset, size = numbers.get(1, 0), numbers.get(4, 0), numbers.get(5, 0)
    if dtype not in (*_WIDTHS, _STRING):
        raise ValueError(f"{name}: is of type {dtype}, neither numbers nor strings")
    is_whole = size == _WIDTHS[dtype] * math.prod(shape) if dtype != _STRING else math.prod(shape) <= size
    if numbers.get(3, 0) != 0 or len(shape) > 8 or not is_whole:
        raise ValueError(f"{name}: {size} bytes are not of shape {shape[:8]}, or not in the first data file")
    return offset + size


def check_index(index: Path, data: Path) -> None:
    """Check that an index holds only whole tensors inside the data file; TensorFlow compares the checksums."""
    with open_file(index) as file:
        table = file.read(_LIMIT + 1)
    try:
        if len(table) > _LIMIT:
            raise ValueError(f"it is larger than {_LIMIT} bytes")
        for key, value in _read_entries(table):
            if not key:
                _check_header(value)
                continue
            end = _check_entry(value, name := show(key.decode("ascii")))
            if end > os.stat(data).st_size:
                raise ModelError(f"{data} cannot be read (it ends before {name} does, at byte {end}); {_REMEDY}")
    except ValueError as error:
        raise ModelError(f"{index} cannot be read ({show(error)}); {_REMEDY}") from error
