"""The index of a TensorFlow checkpoint, read to be checked: TensorFlow itself ends the process on some bad ones.

It is a sorted table of entries, LevelDB's: blocks with a checksum each, whose keys share prefixes, then a block that
says where those are, then a footer of 48 bytes. A key is a tensor's name and its value a BundleEntryProto; the empty
key's is a BundleHeaderProto.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from batchgen.errors import ModelError
from batchgen.models.shards import open_file, short

_REMEDY = "download the checkpoint again"
_LIMIT = 2**22  # 1558M's has 20 kB
_FOOTER, _MAGIC = 48, 0xDB4775248B80FB57.to_bytes(8, "little")
_FLOAT32 = 1
_VARINT, _BYTES, _FIXED32 = 0, 2, 5  # protobuf's wire types

_Fields = list[tuple[int, int, int | bytes]]  # (field number, wire type, value)


def check_index(index: Path, data: Path) -> None:
    """See that an index holds only whole float32 tensors inside the data file; raises ModelError with the reason.

    Checksums are left to TensorFlow, which compares them all.
    """
    with open_file(index) as file:
        table = file.read(_LIMIT + 1)
    try:
        if len(table) > _LIMIT:
            raise ValueError(f"it is larger than {_LIMIT} bytes")
        for key, value in _entries(table):
            if key:
                end = _check_entry(value, name := short(key.decode("ascii")))
                if end > os.stat(data).st_size:
                    raise ModelError(f"{data} cannot be read (it ends before {name}, at byte {end}, does); {_REMEDY}")
            else:
                _check_header(value)
    except ValueError as error:
        raise ModelError(f"{index} cannot be read ({short(error)}); {_REMEDY}") from error


def _check_header(value: bytes) -> None:
    """BundleHeaderProto: 1 num_shards, 2 endianness (0 is little), 3 version {1 producer, 2 min_consumer}."""
    fields = _message(value, {1: _VARINT, 2: _VARINT, 3: _BYTES})
    _once(fields)
    found = {number: content for number, _, content in fields}
    if found.get(1) != 1 or found.get(2, 0) != 0:
        raise ValueError("the header is not that of one little-endian data file")
    _message(_content(found.get(3, b"")), {1: _VARINT, 2: _VARINT})


def _check_entry(value: bytes, name: str) -> int:
    """Returns where the tensor's data ends.

    BundleEntryProto: 1 dtype, 2 shape {2 dim {1 size}}, 3 shard_id, 4 offset, 5 size, 6 crc32c; 7 are slices.
    """
    fields = _message(value, {1: _VARINT, 2: _BYTES, 3: _VARINT, 4: _VARINT, 5: _VARINT, 6: _FIXED32})
    _once(fields)
    found = {number: content for number, _, content in fields}
    dims = []
    for _, _, dim in _message(_content(found.get(2, b"")), {2: _BYTES}):
        sizes = _message(_content(dim), {1: _VARINT})
        _once(sizes)
        dims.append(_number(sizes[0][2]) if sizes else 0)
    if found.get(1) != _FLOAT32:
        raise ValueError(f"{name}: expected float32, found type {found.get(1)!r}")
    offset, size = _number(found.get(4, 0)), _number(found.get(5, 0))
    if found.get(3, 0) != 0 or len(dims) > 8 or size != 4 * math.prod(dims):
        raise ValueError(f"{name}: {size} bytes are not of shape {dims[:8]}, or not in the first data file")
    return offset + size


# --- the table -----------------------------------------------------------------------------------------------


def _entries(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Every key and value, in the order of the keys, which must be strict."""
    footer = table[-_FOOTER:]
    if len(footer) < _FOOTER or footer[-8:] != _MAGIC:
        raise ValueError("it does not end as a table does")
    at = 0
    for _ in range(2):  # the footer has the handle of the meta index, then of the index
        offset, at = _varint(footer, at)
        size, at = _varint(footer, at)
    last = None
    for _, handle in _block(table, offset, size):
        first, after = _varint(handle, 0)
        length, after = _varint(handle, after)
        if after != len(handle):
            raise ValueError("a block's handle is too long")
        for key, value in _block(table, first, length):
            if last is not None and key <= last:
                raise ValueError("keys are out of order")
            last = key
            yield key, value
    if last is None:
        raise ValueError("it has no entries")


def _block(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The entries of a block: (shared, own, value) lengths, the key's own part, the value; then the restart points."""
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
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or at + own + length > end or (starts[-1] in restarts and shared):
            raise ValueError("an entry reaches over its block")
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length
    if starts and (restarts[0] != 0 or restarts != sorted(set(restarts)) or not set(restarts) <= set(starts)):
        raise ValueError("a block's restart points are not entries")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, low first: 0xAC 0x02 -> 300; and where it ends."""
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


# --- protobuf ------------------------------------------------------------------------------------------------


def _message(data: bytes, known: dict[int, int]) -> _Fields:
    """The fields of a message, each of which must be known, with its wire type."""
    fields: _Fields = []
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if known.get(number) != kind:
            raise ValueError(f"field {number} of type {kind} is none of a plain tensor's")
        value: int | bytes
        if kind == _VARINT:
            value, at = _varint(data, at)
        else:
            length, at = (4, at) if kind == _FIXED32 else _varint(data, at)
            value, at = data[at : at + length], at + length
        if at > len(data):
            raise ValueError("a field is cut off")
        fields.append((number, kind, value))
    return fields


def _once(fields: _Fields) -> None:
    if len({number for number, _, _ in fields}) != len(fields):
        raise ValueError("a field is there twice")


def _content(value: int | bytes) -> bytes:
    assert isinstance(value, bytes)
    return value


def _number(value: int | bytes) -> int:
    assert isinstance(value, int)
    return value
