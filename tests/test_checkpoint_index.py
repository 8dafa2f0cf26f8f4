import math
from contextlib import suppress
from pathlib import Path

import pytest

from batchgen.errors import ModelError
from batchgen.models.checkpoint_index import check_index
from tests.support.fuzz_formats import CRC32C, masked

DATA_BYTES = 4 * 50 * 8


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def entry(shape: tuple[int, ...] = (50, 8), dtype: int = 1, offset: int = 0, **more: int) -> bytes:
    dims = b"".join(field(2, field(1, size)) for size in shape)
    size = more.get("size", 4 * math.prod(shape))
    fields = field(1, dtype) + field(2, dims) + (field(4, offset) if offset else b"") + field(5, size)
    return fields + varint(6 << 3 | 5) + b"\1\2\3\4"


def block(entries: list[tuple[bytes, bytes]]) -> bytes:
    """A block with one restart point and whole keys, followed by its type and checksum."""
    body = b"".join(varint(0) + varint(len(key)) + varint(len(value)) + key + value for key, value in entries)
    body += (0).to_bytes(4, "little") + (1).to_bytes(4, "little") + b"\0"
    crc = 0xFFFFFFFF
    for byte in body:
        crc = CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    return body + masked(crc)


def table(entries: list[tuple[bytes, bytes]]) -> bytes:
    data, meta = block(entries), block([])
    index = block([(b"z", varint(0) + varint(len(data) - 5))])
    handles = varint(len(data)) + varint(len(meta) - 5) + varint(len(data) + len(meta)) + varint(len(index) - 5)
    return data + meta + index + handles.ljust(40, b"\0") + 0xDB4775248B80FB57.to_bytes(8, "little")


HEADER = (b"", field(1, 1) + field(3, field(1, 1)))

COMPRESSED = table([HEADER])[: len(block([HEADER])) - 5] + b"\1" + table([HEADER])[len(block([HEADER])) - 4 :]


def check(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "i").write_bytes(text)
    (tmp_path / "d").write_bytes(bytes(DATA_BYTES))
    check_index(tmp_path / "i", tmp_path / "d")


def test_a_plain_index_is_accepted(tmp_path: Path) -> None:
    check(tmp_path, table([HEADER, (b"model/wpe", entry((10, 8))), (b"model/wte", entry((40, 8), offset=320))]))
    check(tmp_path, table([HEADER, (b"scalar", entry(()))]))


def test_an_optimizers_counters_and_a_saved_graph_are_accepted(tmp_path: Path) -> None:
    check(tmp_path, table([HEADER, (b"_OBJECT_GRAPH", entry((), dtype=7, size=900)), (b"model/wte", entry())]))
    check(tmp_path, table([HEADER, (b"global_step", entry((), dtype=9, size=8))]))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "it has no entries"),
        ([HEADER, (b"b", entry()), (b"a", entry())], "keys are out of order"),
        ([HEADER, HEADER], "keys are out of order"),
        ([(b"", field(1, 2))], "the header is not that of one little-endian data file"),
        ([(b"", field(1, 1) + field(2, 1))], "the header is not that of one"),
        ([(b"", field(9, 1))], "field 9 of type 0 does not belong to a plain tensor"),
        ([HEADER, (b"a", entry(dtype=9))], r"'a': 1600 bytes are not of shape \[50, 8\]"),
        ([HEADER, (b"a", entry((2**62,), dtype=7, size=16))], "bytes are not of shape"),
        ([HEADER, (b"a", entry(dtype=21))], "'a': is of type 21, neither numbers nor strings"),
        ([HEADER, (b"a", entry(offset=4))], "it ends before 'a' does, at byte 1604"),
        ([HEADER, (b"a", entry(size=8))], r"'a': 8 bytes are not of shape \[50, 8\]"),
        ([HEADER, (b"a", entry(offset=2**62))], "it ends before 'a'"),
        ([HEADER, (b"a", entry((2**62, 2**62), size=16))], "bytes are not of shape"),
        ([HEADER, (b"a", entry((1,) * 9))], "bytes are not of shape"),
        ([HEADER, (b"a", entry() + field(3, 1))], "or not in the first data file"),
        ([HEADER, (b"a", entry() + field(7, b""))], "field 7 of type 2 does not belong to a plain tensor"),
        ([HEADER, (b"a", entry() + field(1, 1))], "a field occurs twice"),
        ([HEADER, (b"a", entry() + b"\x2d\1")], "a field occurs twice|a field is cut off|does not belong to a plain"),
        ([HEADER, (b"a", b"\x08" + b"\xff" * 11)], "a number is cut off or too large"),
        ([HEADER, (b"\xff", entry())], "can't decode byte 0xff"),
    ],
)
def test_an_invalid_entry_is_refused(entries: list[tuple[bytes, bytes]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"cannot be read .*{message}.*download the checkpoint again"):
        check(tmp_path, table(entries))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "it does not end as a table does"),
        (bytes(48), "it does not end as a table does"),
        (table([HEADER])[:5] + table([HEADER])[6:], "cannot be read"),
        (COMPRESSED, "a block is missing, cut off, or compressed"),
        (table([HEADER]) * 90_000, "it is larger than 4194304 bytes"),
    ],
)
def test_a_file_that_is_not_a_table_is_refused(text: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        check(tmp_path, text)


def test_every_truncation_is_refused_and_every_flipped_bit_is_refused_or_read(tmp_path: Path) -> None:
    whole = table([HEADER, (b"model/wpe", entry((10, 8)))])
    for n in range(len(whole)):
        with pytest.raises(ModelError, match="cannot be read"):
            check(tmp_path, whole[:n])
    for bit in range(8 * len(whole)):
        with suppress(ModelError):  # not for bits of checksums, which TensorFlow compares, and of padding
            check(tmp_path, _flipped(whole, bit))


def _flipped(data: bytes, bit: int) -> bytes:
    out = bytearray(data)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)
