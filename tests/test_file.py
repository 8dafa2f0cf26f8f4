"""parts.py, file.py: a path is absent, its previous version, or the complete new file; no other file is left."""

import hashlib
import json
import os
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchgen.errors import OutputError, UsageError
from batchgen.output import file as file_module
from batchgen.output import parts as parts_module
from batchgen.output.file import FileOutput, write_json_lines, write_parquet
from batchgen.output.ledger import Ledger
from batchgen.output.parts import count_part, merge_rows, part_name, read_parts, write_part
from batchgen.output.schema import Columns, rows_to_table
from batchgen.types import OutputRow
from tests.support.plans import plan_of
from tests.support.stand_ins import Prompts

SCHEMA = Columns().schema()
TEMPORARY = ".out.parquet.batchgen-tmp"
PLAN = plan_of()


def merge(parts: Iterable[Path], out: Path, schema: pa.Schema, rows: int) -> None:
    """What FileOutput.publish does with the parts of a ledger."""
    write = write_json_lines if out.suffix == ".jsonl" else write_parquet
    plan = replace(PLAN, rows=rows)  # of one sample each
    FileOutput(out, Prompts(), write).replace_rows(Ledger(out), read_parts(parts, schema), plan, schema, rows)


def check(out: Path, inputs: list[Path]) -> None:
    FileOutput(out, Prompts(local_paths=inputs), write_parquet).check()


def ok(row: int, sample: int = 0, prompt: str = "Once") -> OutputRow:
    return OutputRow(row, sample, f"id-{row}", prompt, f" upon {row}\n", 1, 4, "length", "ok", None, 7, (1, 2, row))


def bad(row: int) -> OutputRow:
    return OutputRow(row, 0, None, None, None, None, None, None, "rejected", f"p.jsonl:{row + 1}: not JSON", None)


def commit_part(rows: list[OutputRow], folder: Path, chunk: int = 0, schema: pa.Schema = SCHEMA) -> Path:
    """What a worker and the ledger do; returns the committed part."""
    sha256 = write_part(rows, folder / "part", schema)
    return (folder / "part").rename(folder / part_name(chunk, sha256))


def write_parts(folder: Path, sizes: list[int], schema: pa.Schema = SCHEMA) -> tuple[list[Path], list[OutputRow]]:
    parts: list[Path] = []
    rows: list[OutputRow] = []
    for index, size in enumerate(sizes):
        part = [bad(row) if row % 5 == 3 else ok(row) for row in range(len(rows), len(rows) + size)]
        parts.append(commit_part(part, folder, index, schema))
        rows += part
    return parts, rows


def records(rows: list[OutputRow], schema: pa.Schema = SCHEMA) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = rows_to_table(rows, schema).to_pylist()
    return table


@pytest.fixture
def parts_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "parts"
    folder.mkdir()
    return folder


@pytest.fixture
def out_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Every write past the limit fails, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


# ---- parts


def test_a_part_is_hashed_as_it_lies_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    digest = write_part([ok(0), bad(1)], path, SCHEMA)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert pq.read_table(path).to_pylist() == records([ok(0), bad(1)])


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    rows = [ok(row) if row % 3 else bad(row) for row in range(1000)]
    assert len({write_part(rows, tmp_path / name, SCHEMA) for name in ("a", "b", "c")}) == 1


def test_a_part_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    path.write_bytes(b"there")
    with pytest.raises(OutputError, match="File exists"):
        write_part([ok(0)], path, SCHEMA)
    assert path.read_bytes() == b"there"


def test_a_part_on_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    with file_size_limit(2000), pytest.raises(OutputError, match="cannot be written: File too large; make room"):
        write_part([ok(row, prompt=os.urandom(50).hex()) for row in range(1000)], path, SCHEMA)


def test_a_part_of_rows_that_share_a_long_prompt_is_written_in_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_module, "GROUP_BYTES", 10_000)
    schema = pa.schema([*SCHEMA, ("k", pa.int64())])
    rows = [ok(row, 0, "x" * 4_000) for row in range(10)]
    taken: list[int] = []

    def keep(numbers: npt.NDArray[np.int64]) -> pa.Table:
        taken.append(len(numbers))
        return pa.table({"k": 10 * numbers})

    part = tmp_path / part_name(0, write_part(rows, tmp_path / "part", schema, keep))
    (tmp_path / "part").rename(part)
    assert taken == [3, 3, 3, 1]
    found = list(read_parts([part], schema))
    assert [len(batch) for batch in found] == taken  # and read again group by group
    assert [row["k"] for batch in found for row in batch.to_pylist()] == list(range(0, 100, 10))


# ---- merge


@pytest.mark.parametrize("token_ids", [False, True])
def test_a_merge_keeps_every_row_in_order(parts_folder: Path, out_folder: Path, token_ids: bool) -> None:
    schema = Columns(token_ids).schema()
    parts, rows = write_parts(parts_folder, [3, 1, 10, 7], schema)
    out = out_folder / "out.parquet"
    merge(parts, out, schema, len(rows))
    table = pq.read_table(out, page_checksum_verification=True)
    assert table.schema.equals(schema)
    assert table.to_pylist() == records(rows, schema)
    assert pq.ParquetFile(out).num_row_groups == 1
    assert list(out_folder.iterdir()) == [out]


def test_json_lines_hold_the_same_rows(parts_folder: Path, out_folder: Path) -> None:
    schema = Columns(token_ids=True).schema()
    rows = [ok(0, prompt='\u2028"\n\0\x85é\U0001f98a'), bad(1), ok(2)]
    part = commit_part(rows, parts_folder, schema=schema)
    out = out_folder / "out.jsonl"
    merge([part], out, schema, 3)
    lines = out.read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == records(rows, schema)
    assert lines[-1] == b""
    assert list(json.loads(lines[0])) == schema.names
    assert "é\U0001f98a".encode() in lines[0]
    assert sorted(out_folder.iterdir()) == [out, out_folder / "out.jsonl.plan.json"]


@given(sizes=st.lists(st.integers(0, 9), max_size=12), group_rows=st.integers(1, 20), batch_rows=st.integers(1, 20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
def test_row_groups_are_bounded_and_coalesced(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], group_rows: int, batch_rows: int
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)  # hundreds of files
        for module in (file_module, parts_module):
            patch.setattr(module, "GROUP_ROWS", group_rows)
        patch.setattr(parts_module, "BATCH_ROWS", batch_rows)
        parts, rows = write_parts(folder, sizes)
        merge(parts, folder / "out.parquet", SCHEMA, len(rows))
    assert pq.read_table(folder / "out.parquet").to_pylist() == records(rows)
    metadata = pq.read_metadata(folder / "out.parquet")
    groups = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    batch = min(group_rows, batch_rows, 9)
    assert all(size <= group_rows for size in groups)
    assert all(size + after > group_rows - batch for size, after in zip(groups, groups[1:], strict=False))


def test_a_merge_of_parts_of_a_row_holds_few_batches_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_module, "GROUP_BATCHES", 8)
    batches = [pa.RecordBatch.from_pydict({"row": [row]}) for row in range(100)]
    (group,) = file_module._groups(iter(batches))
    assert len(group) <= 8
    assert pa.Table.from_batches(group)["row"].to_pylist() == list(range(100))


def test_large_rows_make_small_row_groups(
    parts_folder: Path, out_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "GROUP_BYTES", 10_000)
    parts = [commit_part([ok(row, prompt="x" * 4000)], parts_folder, row) for row in range(9)]
    merge(parts, out_folder / "o.parquet", SCHEMA, 9)
    assert 4 <= pq.ParquetFile(out_folder / "o.parquet").num_row_groups <= 5


def test_a_merge_does_not_depend_on_how_rows_were_cut_into_parts_but_for_row_groups(
    parts_folder: Path, out_folder: Path
) -> None:
    tables = []
    for name, sizes in (("a", [20]), ("b", [1, 0, 19])):
        (parts_folder / name).mkdir()
        parts, rows = write_parts(parts_folder / name, sizes)
        merge(parts, out_folder / f"{name}.parquet", SCHEMA, len(rows))
        tables.append(pq.read_table(out_folder / f"{name}.parquet"))
    assert tables[0].equals(tables[1])


@given(data=st.data(), window=st.integers(1, 30), n_row=st.integers(0, 60))
@settings(deadline=None, max_examples=60)
def test_a_merge_has_each_row_once_and_in_order_however_rows_are_dealt_to_streams(
    data: st.DataObject, window: int, n_row: int
) -> None:
    """Rows of one or several samples, each in one stream; streams in batches of any length."""
    samples = [data.draw(st.integers(1, 3)) for _ in range(n_row)]
    streams: list[list[dict[str, int]]] = []
    for begin in range(0, n_row, window):
        dealt: list[list[dict[str, int]]] = [[] for _ in range(4)]
        for row in range(begin, min(begin + window, n_row)):
            dealt[data.draw(st.integers(0, 3))] += [{"row": row, "sample": sample} for sample in range(samples[row])]
        streams += sorted((one for one in dealt if one), key=lambda one: one[0]["row"])
    opened: list[int] = []

    def batches(number: int, rows: list[dict[str, int]]) -> Iterator[pa.RecordBatch]:
        opened.append(number)
        length = data.draw(st.integers(1, 5))
        for at in range(0, len(rows), length):
            yield pa.RecordBatch.from_pylist(
                rows[at : at + length], pa.schema({"row": pa.int64(), "sample": pa.int32()})
            )
        opened.remove(number)

    made: list[dict[str, int]] = []
    for batch in merge_rows(batches(number, rows) for number, rows in enumerate(streams)):
        made += batch.to_pylist()
        assert len(opened) <= 5  # those of a window, and the first of the next
    assert made == [{"row": row, "sample": sample} for row in range(n_row) for sample in range(samples[row])]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.dictionary(pa.int8(), pa.string()),
        pa.string_view(),
        pa.list_(pa.string_view()),
        pa.struct([("a", pa.dictionary(pa.int32(), pa.string()))]),
        pa.list_(pa.dictionary(pa.int32(), pa.string())),
    ],
    ids=str,
)
def test_kept_values_of_any_type_are_merged(tmp_path: Path, kind: pa.DataType) -> None:
    def value(row: int) -> Any:
        text = None if row == 3 else f"text of row {row}"
        return {"a": text} if pa.types.is_struct(kind) else [text] if pa.types.is_list(kind) else text

    schema = Columns().schema(pa.schema([("k", kind)]))
    parts = []
    for chunk, rows in enumerate(([0, 3, 4], [1, 2, 5])):
        values = pa.table({"k": pa.array(map(value, rows), kind)})
        sha256 = write_part([ok(row) for row in rows], tmp_path / "part", schema, lambda _, values=values: values)
        parts.append((tmp_path / "part").rename(tmp_path / part_name(chunk, sha256)))
    merge(parts, tmp_path / "out.parquet", schema, 6)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["row"].to_pylist() == list(range(6))
    assert table["k"].to_pylist() == [value(row) for row in range(6)]


@pytest.mark.parametrize("empty_parts", [0, 2])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_zero_rows_make_an_empty_file_of_the_full_schema(
    parts_folder: Path, out_folder: Path, empty_parts: int, suffix: str
) -> None:
    parts, _ = write_parts(parts_folder, [0] * empty_parts)
    out = out_folder / f"out.{suffix}"
    merge(parts, out, SCHEMA, 0)
    if suffix == "jsonl":
        assert out.read_bytes() == b""
    else:
        assert pq.read_table(out).num_rows == 0
        assert pq.read_schema(out).equals(SCHEMA)


def test_the_plan_is_in_the_file(parts_folder: Path, out_folder: Path) -> None:
    parts, rows = write_parts(parts_folder, [2])
    out = out_folder / "out.parquet"
    merge(parts, out, SCHEMA, len(rows))
    assert pq.read_schema(out).metadata.keys() == {b"batchgen"}
    for metadata in (pq.read_schema(out).metadata, pq.read_metadata(out).metadata):
        assert json.loads(metadata[b"batchgen"]) == replace(PLAN, rows=2).to_json()


def test_columns_are_zstd_with_page_checksums(parts_folder: Path, out_folder: Path) -> None:
    parts, rows = write_parts(parts_folder, [50])
    merge(parts, out_folder / "o.parquet", SCHEMA, len(rows))
    for path in (parts[0], out_folder / "o.parquet"):
        group = pq.read_metadata(path).row_group(0)
        assert {group.column(index).compression for index in range(group.num_columns)} == {"ZSTD"}
        data = bytearray(path.read_bytes())
        column = group.column(SCHEMA.names.index("prompt"))
        data[column.data_page_offset + column.total_compressed_size - 3] ^= 1
        path.write_bytes(data)
        with pytest.raises(OSError, match="CRC checksum"):
            pq.read_table(path, page_checksum_verification=True)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_of_a_new_file(parts_folder: Path, out_folder: Path, umask: int) -> None:
    parts, rows = write_parts(parts_folder, [1])
    old = os.umask(umask)
    try:
        merge(parts, out_folder / "out.parquet", SCHEMA, len(rows))
    finally:
        os.umask(old)
    assert (out_folder / "out.parquet").stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_file_is_synced_before_its_rename_and_the_folder_after(
    parts_folder: Path, out_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, rows = write_parts(parts_folder, [5])
    out = out_folder / "out.parquet"
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def traced_fsync(descriptor: int) -> None:
        calls.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def traced_replace(old: Path, new: Path) -> None:
        assert pq.read_table(old).num_rows == len(rows)  # whole, footer and all
        calls.append(f"rename {old.name} {new.name}")
        replace(old, new)

    monkeypatch.setattr("os.fsync", traced_fsync)
    monkeypatch.setattr("os.replace", traced_replace)
    merge(parts, out, SCHEMA, len(rows))
    assert calls == [f"sync {TEMPORARY}", f"rename {TEMPORARY} out.parquet", "sync out"]


# ---- faults: each must leave the previous file or none, and no temporary file


def flip_a_byte(part: Path) -> None:
    column = pq.read_metadata(part).row_group(0).column(SCHEMA.names.index("completion"))
    data = bytearray(part.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 3] ^= 1
    part.write_bytes(data)


def swap(part: Path) -> None:
    other = min(part.parent.iterdir())
    data = other.read_bytes()
    part.write_bytes(data)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped byte": (flip_a_byte, "the part is damaged: .*; the same command makes it again"),
    "cut": (lambda part: os.truncate(part, 100), "the part is damaged"),
    "emptied": (lambda part: os.truncate(part, 0), "the part is damaged"),
    "another part": (swap, "the part is damaged"),
    "gone": (lambda part: part.unlink(), "the part cannot be read .No such file or directory.; the same command"),
    "a folder": (lambda part: (part.unlink(), part.mkdir()), "the part cannot be read .Is a directory"),
    "other columns": (
        lambda part: commit_part([ok(0)], part.parent, 1, Columns(token_ids=True).schema()),
        "the part has other columns",
    ),
    "too few rows": (lambda part: commit_part([ok(0)], part.parent, 1), "does not hold each of its 60 input rows"),
}


@pytest.mark.parametrize("previous", [None, b"the previous version"])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_part_leaves_the_output_as_it_was(
    parts_folder: Path, out_folder: Path, fault: str, suffix: str, previous: bytes | None
) -> None:
    parts, rows = write_parts(parts_folder, [30, 30])
    spoil, message = FAULTS[fault]
    if isinstance(other := spoil(parts[1]), Path):
        parts[1] = other
    out = out_folder / f"out.{suffix}"
    if previous is not None:
        out.write_bytes(previous)
    with pytest.raises(OutputError, match=message) as caught:
        merge(parts, out, SCHEMA, len(rows))
    assert "\n" not in str(caught.value)
    assert [path.read_bytes() for path in out_folder.iterdir()] == ([] if previous is None else [previous])


def test_every_flipped_byte_of_a_part_is_found_before_it_is_read(tmp_path: Path) -> None:
    """Also in the footer, where Arrow has no checksums; nothing but an OutputError is raised."""
    part = commit_part([ok(0), bad(1)], tmp_path)
    data = part.read_bytes()
    assert count_part(part)[0] == 2
    found = 0
    with open(part, "r+b", buffering=0) as file:
        for at, byte in enumerate(data):
            os.pwrite(file.fileno(), bytes([byte ^ (1 << at % 8)]), at)
            with suppress(OutputError):
                found -= count_part(part)[0]
            found += 1
            os.pwrite(file.fileno(), bytes([byte]), at)
    assert found == len(data)
    assert count_part(part)[0] == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_an_exception_in_the_middle_leaves_nothing(
    parts_folder: Path, out_folder: Path, suffix: str, error: type[BaseException]
) -> None:
    parts, _ = write_parts(parts_folder, [30])

    def interrupted() -> Iterator[Path]:
        yield parts[0]
        raise error

    with pytest.raises(error):
        merge(interrupted(), out_folder / f"out.{suffix}", SCHEMA, 30)
    assert list(out_folder.iterdir()) == []


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_full_disk_is_an_output_error_and_leaves_nothing(parts_folder: Path, out_folder: Path, suffix: str) -> None:
    rows = [ok(row, prompt=os.urandom(50).hex()) for row in range(2000)]
    part = commit_part(rows, parts_folder)
    out = out_folder / f"out.{suffix}"
    size = sum(path.stat().st_size for path in parts_folder.iterdir())
    for limit in (0, 100, size // 2, size - 200):
        with file_size_limit(limit), pytest.raises(OutputError, match=r"out\.\w+: cannot be written: File too large;"):
            merge([part], out, SCHEMA, len(rows))
        assert list(out_folder.iterdir()) == []


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_a_failing_disk_is_an_output_error_and_leaves_nothing(
    parts_folder: Path, out_folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    parts, rows = write_parts(parts_folder, [5])

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(call, fail)
    with pytest.raises(OutputError, match="cannot be written: Input/output error"):
        merge(parts, out_folder / "out.parquet", SCHEMA, len(rows))
    assert list(out_folder.iterdir()) == []


def test_a_temporary_file_of_a_killed_run_is_removed(parts_folder: Path, out_folder: Path) -> None:
    parts, rows = write_parts(parts_folder, [5])
    (out_folder / TEMPORARY).write_bytes(b"half a file")
    merge(parts, out_folder / "out.parquet", SCHEMA, len(rows))
    assert [path.name for path in out_folder.iterdir()] == ["out.parquet"]


# ---- the check before the run


def test_a_good_output_path_passes_and_is_not_made(out_folder: Path) -> None:
    for name in ("new.parquet", "new.jsonl", "NEW.PARQUET"):
        check(out_folder / name, [])
    assert list(out_folder.iterdir()) == []


def test_a_previous_output_passes_untouched(out_folder: Path) -> None:
    (out_folder / "old.parquet").write_bytes(b"old")
    check(out_folder / "old.parquet", [out_folder / "missing.jsonl"])
    assert [path.read_bytes() for path in out_folder.iterdir()] == [b"old"]


@pytest.mark.parametrize("name", ["out.csv", "out", "out.parquet.gz", ".parquet"])
def test_an_unknown_suffix_is_a_usage_error(out_folder: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"not one of \.parquet, \.jsonl"):
        check(out_folder / name, [])


def test_the_input_itself_is_refused_under_any_name(out_folder: Path) -> None:
    source = out_folder / "in.jsonl"
    source.write_bytes(b"{}")
    (out_folder / "hard.jsonl").hardlink_to(source)
    for out in (source, out_folder / ".." / "out" / "in.jsonl", out_folder / "hard.jsonl"):
        with pytest.raises(OutputError, match="this is the input"):
            check(out, [out_folder / "missing.jsonl", source])


def test_what_a_rename_cannot_replace_is_refused(out_folder: Path) -> None:
    (out_folder / "target.jsonl").write_bytes(b"")
    (out_folder / "link.jsonl").symlink_to("target.jsonl")
    (out_folder / "dangling.jsonl").symlink_to("nothing")
    (out_folder / "folder.jsonl").mkdir()
    os.mkfifo(out_folder / "pipe.jsonl")
    for name, message in [
        ("link", "a symbolic link"),
        ("dangling", "a symbolic link"),
        ("folder", "a directory; name a file in it"),
        ("pipe", "a pipe or device"),
    ]:
        with pytest.raises(OutputError, match=message):
            check(out_folder / f"{name}.jsonl", [])


def test_a_missing_folder_and_a_file_in_its_place_are_refused(out_folder: Path) -> None:
    (out_folder / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=r"is no such folder; create it \(mkdir -p\)"):
        check(out_folder / "missing" / "o.parquet", [])
    with pytest.raises(OutputError, match="is not a folder"):
        check(out_folder / "file" / "o.parquet", [])
    with pytest.raises(OutputError, match="cannot be written: File name too long"):
        check(out_folder / ("x" * 300 + ".parquet"), [])


def test_a_folder_that_takes_no_files_is_refused(out_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OutputError, match="the folder cannot be written: Read-only file system; choose another"):
        check(out_folder / "o.parquet", [])
