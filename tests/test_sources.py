"""sources.py: an input is a list of files in a known order; a missing file is named."""

import gzip
import hashlib
import io
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.errors import InputError, OutputError
from batchgen.files import Contents, SteadyFile
from batchgen.input.prompts import Cut, Prompts
from batchgen.input.sources import Source, find_sources, local_paths
from batchgen.output.place import check_folder, refuse_input
from batchgen.types import Rejected
from tests.support.inputs import PARAMS, open_prompts, read, refusal, scan, unchecked

GOOD = b'{"id": "a", "prompt": "Once"}'


def line(prompt: str) -> bytes:
    return json.dumps({"prompt": prompt}).encode() + b"\n"


def write(path: Path, *prompts: str) -> Path:
    """A file of these prompts in the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(map(line, prompts))
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"prompt": pa.array(prompts, pa.string())}), path)
    elif path.suffix in (".csv", ".tsv"):
        path.write_text("\n".join(("prompt", *prompts)) + "\n")
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix == ".zst":
        path.write_bytes(pa.compress(data, codec="zstd", asbytes=True))
    else:
        path.write_bytes(data)
    return path


def prompts_of(files: Any) -> list[str | None]:
    rows = files.requests(PARAMS) if isinstance(files, Prompts) else read(files)
    return [row.prompt for row in rows]


def names(inputs: Any) -> list[str]:
    return [source.name for source in find_sources(inputs)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Any:
    def give(data: bytes) -> None:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))

    return give


# ---- several


def test_rows_run_on_over_the_files_in_the_order_given(here: Path) -> None:
    files = [write(here / name, name, "x") for name in ("b.parquet", "c.csv", "a.jsonl", "d.jsonl.gz", "e.jsonl.zst")]
    rows = read(files)
    assert [row.row for row in rows] == list(range(10))
    assert [row.prompt for row in rows] == [text for file in files for text in (file.name, "x")]
    assert [row.place for row in rows[::2]] == [
        "b.parquet:row 0",
        "c.csv:2",
        "a.jsonl:1",
        "d.jsonl.gz:1",
        "e.jsonl.zst:1",
    ]
    assert scan(files).rows == 10


def test_places_of_files_with_one_name_differ(here: Path) -> None:
    for folder in ("x", "y"):
        write(here / folder / "p.jsonl", "a")
    write(here / "q.jsonl", "a")
    assert names(["x/p.jsonl", "y/p.jsonl", "q.jsonl"]) == ["x/p.jsonl", "y/p.jsonl", "q.jsonl"]
    assert names(["x/p.jsonl", "q.jsonl"]) == ["p.jsonl", "q.jsonl"]


def test_the_hash_depends_on_bytes_and_order_not_on_names(here: Path) -> None:
    a, b = write(here / "a.jsonl", "1"), write(here / "b.jsonl", "2")
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (a, b)]
    facts = scan([a, b])
    assert facts.sha256 == hashlib.sha256("".join(f"{value}\n" for value in hashes).encode()).hexdigest()
    assert facts.bytes == a.stat().st_size + b.stat().st_size
    assert scan([b, a]).sha256 != facts.sha256
    joined = here / "joined.jsonl"
    joined.write_bytes(a.read_bytes() + b.read_bytes())
    assert scan(joined).sha256 == hashlib.sha256(joined.read_bytes()).hexdigest()
    a.rename(here / "z.jsonl")
    assert scan([here / "z.jsonl", b]) == facts


def test_the_partition_is_part_of_the_hash(here: Path) -> None:
    for folder in ("x", "y"):
        write(here / folder / "lang=en" / "p.jsonl", "a")
    write(here / "z" / "lang=de" / "p.jsonl", "a")
    assert scan("x").sha256 == scan("y").sha256 != scan("z").sha256


def test_a_file_that_is_named_twice_is_refused(here: Path) -> None:
    write(here / "a.jsonl", "x")
    (here / "link.jsonl").symlink_to("a.jsonl")
    assert refusal(["a.jsonl", "*.jsonl"]).startswith("a.jsonl: named twice; name it once")
    assert "named twice" in refusal(["./a.jsonl", "link.jsonl"])


def test_an_empty_list_of_inputs_is_refused() -> None:
    assert refusal("").startswith("an empty name is not an input; name a file")
    assert refusal([]) == "no input; name a file, a directory, a glob, or - for standard input"


def test_the_error_names_the_bad_file_among_many(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write(here / f"{n:03}.jsonl", "x") for n in range(30)]
    files[17].write_bytes(b"\xff" * 100)
    assert refusal(files).startswith(f"{files[17]}: none of the first 1 rows is a JSON object")
    write(files[17], "x")
    before = open

    def refuse(path: Any, *more: Any, **options: Any) -> Any:
        if path == files[20]:
            raise PermissionError(13, "Permission denied")  # as root, file modes refuse nothing
        return before(path, *more, **options)

    monkeypatch.setattr("builtins.open", refuse)
    assert refusal(files) == f"{files[20]}: cannot be read: Permission denied"


# ---- files that are refused


def test_a_missing_file_names_its_nearest(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(GOOD)
    assert f"did you mean {tmp_path}/prompts.jsonl?" in refusal(tmp_path / "promts.jsonl")
    assert "check the name" in refusal(tmp_path / "entirely different.parquet")
    assert "no such file" in refusal(tmp_path / "nowhere" / "prompts.jsonl")


def test_only_regular_files_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").mkdir()
    os.mkfifo(tmp_path / "f.jsonl")
    assert "no file in this directory" in refusal(tmp_path / "d.jsonl")
    assert "a pipe or device" in refusal(tmp_path / "f.jsonl")
    assert "cannot be read" in refusal(tmp_path / "d.jsonl" / ("x" * 300))


@pytest.fixture
def unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "p.jsonl"
    path.write_bytes(GOOD)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")  # as root, file modes refuse nothing

    monkeypatch.setattr("builtins.open", refuse)
    yield path
    monkeypatch.undo()


def test_an_unreadable_file_is_refused(unreadable: Path) -> None:
    assert refusal(unreadable) == f"{unreadable}: cannot be read: Permission denied"


@pytest.mark.parametrize("name", ["p.xlsx", "p", "p.md.gz", "p.parquet.gz", "p.gz", "p.csv.bz2"])
def test_an_unknown_suffix_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(GOOD)
    assert "rename or convert" in refusal(tmp_path / name)


@pytest.mark.parametrize("is_stream", [True, False])
def test_an_arrow_file_is_named_with_the_command_that_makes_it_parquet(here: Path, is_stream: bool) -> None:
    table = pa.table({"prompt": pa.array(["a", "b"], pa.string_view())})
    with (pa.ipc.new_stream if is_stream else pa.ipc.new_file)("it's.arrow", table.schema) as file:
        file.write_table(table)
    command = refusal("it's.arrow").partition("an Arrow file; write it as Parquet: python ")[2]
    subprocess.run([sys.executable, *shlex.split(command)], check=True)
    assert prompts_of(open_prompts("prompts.parquet")) == ["a", "b"]


def test_places_can_be_written_if_the_name_of_the_file_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"p\xff.jsonl")
    path.write_bytes(b"nonsense")
    (row,) = read(path)
    assert isinstance(row, Rejected)
    assert row.error.encode().startswith("p\ufffd.jsonl:1: not JSON".encode())


# ---- globs


def test_a_glob_is_its_files_sorted(here: Path) -> None:
    for name in ("b10.jsonl", "b2.jsonl", "B.jsonl", "c.csv", "deep/er/b.jsonl"):
        write(here / name, name)
    write(here / ".hidden.jsonl", "hidden")
    assert names("*.jsonl") == ["B.jsonl", "b10.jsonl", "b2.jsonl"]
    assert names("**/*.jsonl") == ["B.jsonl", "b10.jsonl", "b2.jsonl", "b.jsonl"]
    assert names([str(here / "b[0-9].jsonl"), "?.csv"]) == ["b2.jsonl", "c.csv"]


def test_a_file_whose_name_is_a_pattern_is_that_file(here: Path) -> None:
    write(here / "a[1].jsonl", "brackets")
    write(here / "a1.jsonl", "one")
    assert prompts_of("a[1].jsonl") == ["brackets"]


@pytest.mark.parametrize("pattern", ["*.csv", "nowhere/*.jsonl", "fol*"])
def test_a_glob_without_a_file_is_refused(here: Path, pattern: str) -> None:
    write(here / "folder" / "a.jsonl", "x")
    assert refusal(pattern).startswith(f"{pattern}: ")
    assert "match; check the pattern" in refusal(pattern) or "only directories match" in refusal(pattern)


# ---- directories


def test_a_directory_is_its_files_sorted_by_path(here: Path) -> None:
    for name in ("b.jsonl", "a/z.parquet", "a-b.csv", "a/y.jsonl.zst"):
        write(here / "d" / name, name)
    for name in ("_SUCCESS", ".hidden", "_metadata", "a/.x.jsonl.crc", "_tmp/x.jsonl", "o.parquet.batchgen/plan.json"):
        write(here / "d" / name, "never")
    (here / "d" / "o.parquet.batchgen" / "lock").touch()
    assert prompts_of("d") == ["a-b.csv", "a/y.jsonl.zst", "a/z.parquet", "b.jsonl"]
    assert prompts_of(here / "d") == prompts_of("d/")


def test_a_file_of_another_kind_in_a_directory_is_refused_not_skipped(here: Path) -> None:
    write(here / "d" / "a.jsonl", "x")
    (here / "d" / "README.md").write_text("# Prompts")
    error = refusal("d")
    assert error.startswith("d/README.md: unknown format; use .parquet, .jsonl, ")
    assert "name the others with a glob" in error
    assert prompts_of("d/*.jsonl") == ["x"]


def test_text_in_a_directory_is_read_only_if_it_is_named(here: Path) -> None:
    write(here / "d" / "a.jsonl", "x")
    (here / "d" / "LICENSE.txt").write_text("all rights\n")
    assert refusal("d").startswith("d/LICENSE.txt: is this text a prompt a line, or a note about the others? name such")
    assert prompts_of("d/*.txt") == ["all rights"]
    (here / "d" / "a.jsonl").unlink()
    assert prompts_of(open_prompts("d", format="txt")) == ["all rights"]


def test_an_empty_directory_is_refused(here: Path) -> None:
    (here / "d" / "deeper").mkdir(parents=True)
    (here / "d" / "_SUCCESS").touch()
    assert refusal("d").startswith("d: no file in this directory")


def test_links_are_followed_but_a_circle_is_refused(here: Path) -> None:
    write(here / "elsewhere" / "a.jsonl", "a")
    (here / "d").mkdir()
    (here / "d" / "link").symlink_to(here / "elsewhere")
    assert prompts_of("d") == ["a"]
    (here / "elsewhere" / "back").symlink_to(here / "d")
    assert "a link to a directory that contains it" in refusal("d")


def test_a_dangling_link_is_named(here: Path) -> None:
    (here / "d").mkdir()
    (here / "d" / "a.jsonl").symlink_to("gone.jsonl")
    assert refusal("d") == "d/a.jsonl: cannot be read: No such file or directory"


def test_a_pipe_in_a_directory_is_refused(here: Path) -> None:
    (here / "d").mkdir()
    os.mkfifo(here / "d" / "a.jsonl")
    assert refusal("d").startswith("d/a.jsonl: a pipe or device")


def test_folders_of_a_dataset_make_its_partition(here: Path) -> None:
    for folder in ("lang=en/year=2024", "lang=a%2Fb/year=2023", "lang=__HIVE_DEFAULT_PARTITION__/more"):
        write(here / "d" / folder / "part-0.parquet", "x")
    assert {source.partition for source in find_sources("d")} == {
        (("lang", "en"), ("year", "2024")),
        (("lang", "a/b"), ("year", "2023")),
        (("lang", None),),
    }
    assert [source.partition for source in find_sources("d/lang=en/*/*.parquet")] == [(("year", "2024"),)]
    assert find_sources("d/lang=en/year=2024/part-0.parquet")[0].partition == ()


def test_an_output_in_an_input_directory_is_refused(here: Path) -> None:
    write(here / "d" / "deeper" / "a.jsonl", "x")
    sources = find_sources("d")
    for out in ("d/out.parquet", "d/deeper/out.jsonl"):
        with pytest.raises(OutputError, match="it would be in the input d and be read with it"):
            check_folder(Path(out), local_paths(sources))
    check_folder(here / "out.parquet", local_paths(sources))
    with pytest.raises(OutputError, match="this is the input"):
        refuse_input(here / "d" / "deeper" / "a.jsonl", local_paths(find_sources("d/deeper/*.jsonl")))


# ---- what is skipped, and nothing else is

STATUS = {"state": "finished", "exit_code": 0, "output": "o.parquet", "rows_done": 1}


def test_only_what_a_run_keeps_beside_its_output_is_skipped(here: Path) -> None:
    for name in ("a.jsonl", "orders.status.json", "orders.plan.json", "x.batchgen/b.jsonl"):
        write(here / "d" / name, name)
    for name, values in (("o.status.json", STATUS), ("o.plan.json", {"sha256": "", "statuses": {}, "plan": {}})):
        (here / "d" / name).write_text(json.dumps(values))
    write(here / "d" / "o.parquet.batchgen" / "b.jsonl", "never")
    (here / "d" / "o.parquet.batchgen" / "lock").touch()
    given = ["a.jsonl", "orders.plan.json", "orders.status.json", "x.batchgen/b.jsonl"]
    assert prompts_of("d") == prompts_of("d/**/*.json*") == given
    by_shell = sorted(path for path in (here / "d").iterdir() if path.is_file())
    assert prompts_of(by_shell) == prompts_of("d/*.json*") == given[:3]
    assert "no key 'prompt'" in refusal(here / "d" / "o.status.json")  # named alone


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.jsonl", ["_a.jsonl", "b.jsonl"]),
        ("*", ["_a.jsonl", "b.jsonl"]),
        ("**/*.jsonl", ["_a.jsonl", "b.jsonl"]),
        ("_*/*.jsonl", ["c.jsonl"]),
        (".*/*.jsonl", ["d.jsonl"]),
        (".*.jsonl", [".e.jsonl"]),
        ("_[a]*", ["_a.jsonl"]),
        ("_a.jsonl", ["_a.jsonl"]),
        (".e.jsonl", [".e.jsonl"]),
        (".", ["b.jsonl"]),
    ],
)
def test_a_hidden_file_is_read_if_it_is_named(here: Path, pattern: str, found: list[str]) -> None:
    for name in ("_a.jsonl", "b.jsonl", "_tmp/c.jsonl", ".tmp/d.jsonl", ".e.jsonl", "_SUCCESS", "_metadata"):
        write(here / name, name)
    assert names(pattern) == found


def test_packed_data_is_read_to_its_end_or_it_is_named_as_truncated(here: Path) -> None:
    for suffix in ("jsonl.gz", "csv.zst"):
        path, one, two = here / f"p.{suffix}", line("Once"), line("upon") * 3
        pack = gzip.compress if suffix.endswith("gz") else partial(pa.compress, codec="zstd", asbytes=True)
        whole = pack(one) + pack(two)
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            if length == len(pack(one)):  # no sign of a second
                continue
            with pytest.raises(InputError, match=rf"p.{suffix}.*(truncated|damaged)"):
                unchecked(path).scan()
        for tail in (b"x", b"\x1f", b"(\xb5", whole[:3], b"x" * 100):
            path.write_bytes(whole + tail)
            with pytest.raises(InputError, match=rf"p.{suffix}.*(truncated|damaged)"):
                unchecked(path).scan()
        path.write_bytes(pack(b""))
        assert scan(path).rows == 0


# ---- what was changed meanwhile


KINDS = ["jsonl", "csv", "parquet", "jsonl.gz", "jsonl.zst"]
BLOCK = 2048


def write_many(path: Path, word: str) -> tuple[list[str], bytes]:
    """Prompts in a file of many blocks, and its bytes."""
    prompts = [f"{word} {hashlib.sha256(b'%d' % n).hexdigest()}" for n in range(1500)]
    return prompts, write(path, *prompts).read_bytes()


@pytest.fixture(params=KINDS)
def swapped(request: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str], bytes, bytes]:
    """A file of many small blocks that is open for reading, its prompts, its bytes and those of another file."""
    monkeypatch.setattr("batchgen.input.sources.BUFFER_BYTES", BLOCK)
    path = here / f"p.{request.param}"
    _, other = write_many(path, "other")
    prompts, own = write_many(path, "first")
    assert min(len(own), len(other)) > 20 * BLOCK
    return path, prompts, own, other


@pytest.mark.parametrize("is_put_back", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_no_chunk_has_a_row_of_other_bytes_than_the_scan_read(
    swapped: Any, monkeypatch: pytest.MonkeyPatch, is_put_back: bool, in_place: bool
) -> None:
    path, prompts, own, other = swapped
    monkeypatch.setattr("batchgen.input.prompts.check_local_unchanged", lambda _: None)  # the bytes alone must do

    def put(data: bytes) -> None:
        if in_place:
            path.write_bytes(data)
        else:
            path.rename(path.with_name("old"))
            path.write_bytes(data)

    for before, after in ((0, 400), (3, 9), (100, 700), (1024, 1400)):
        path.write_bytes(own)
        opened = open_prompts(path)
        facts, found, error = opened.scan(), [], None
        try:
            put(other if before == 0 else own)
            for chunk in opened.chunks(facts, PARAMS, lambda item: item, Cut(50)):  # type: ignore[arg-type, return-value]
                found += [item.prompt for item in chunk.items]
                if before <= len(found) and path.read_bytes() != other:
                    put(other)
                if is_put_back and after <= len(found):
                    put(own)
        except InputError as caught:
            error = str(caught)
        assert found == prompts[: len(found)]
        assert found == prompts or error
        assert error is None or error.startswith(f"{path}: the file was changed while it was being read; put it back")


def test_a_file_that_changes_during_the_scan_is_noticed_when_it_was_read(swapped: Any) -> None:
    path, _, own, other = swapped
    for first, then in ((own, other), (own, own + other), (own, own[:-BLOCK]), (own, own[: len(own) // BLOCK * BLOCK])):
        path.write_bytes(first)
        opened = open_prompts(path)
        opened.scan()
        path.write_bytes(then)
        os.utime(path, ns=(1, 1))
        with pytest.raises(InputError, match="the file was changed while it was being read"):
            opened.scan()


def test_a_file_that_gets_longer_is_noticed_at_the_next_rows(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchgen.input.formats.BATCH_ROWS", 10)
    path = here / "p.jsonl"
    write_many(path, "first")
    opened = open_prompts(path)
    opened.scan()
    rows = opened.requests(PARAMS)
    next(rows)
    with open(path, "ab") as file:
        file.write(line("more"))
    assert len(list(zip(range(9), rows, strict=False))) == 9
    with pytest.raises(InputError, match="the file was changed while it was being read"):
        next(rows)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
@pytest.mark.parametrize("change", ["touched", "copied", "gone"])
def test_bytes_decide_whether_a_file_has_changed(here: Path, name: str, change: str) -> None:
    path = write(here / name, "a", "b")
    prompts = open_prompts([path, write(here / "z.jsonl", "z")])
    rows = prompts.requests(PARAMS)
    first = next(rows)
    if change == "touched":
        os.utime(path, ns=(1, 1))
    elif change == "copied":
        os.replace(write(here / f"new-{name}", "a", "b"), path)
    else:
        path.unlink()
    assert [row.prompt for row in (first, *rows)] == ["a", "b", "z"]
    if change == "gone":
        with pytest.raises(InputError, match=rf"^{path}: "):
            prompts.scan()
    else:
        assert prompts.scan() == open_prompts([path, here / "z.jsonl"]).scan()


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 24])
def test_a_steady_file_reads_as_any_file(size: int) -> None:
    data, rng = os.urandom(size), random.Random(size)
    contents = Contents(block_bytes=8)
    for _ in range(20):
        plain, steady = io.BytesIO(data), SteadyFile(io.BytesIO(data), contents, AssertionError)
        for _ in range(20):
            place, whence = rng.choice([(rng.randrange(30), 0), (0, 1), (3, 1), (-min(size, 3), 2), (0, 2)])
            assert plain.seek(place, whence) == steady.seek(place, whence) == steady.tell()
            count = rng.randrange(-1, 30)
            assert plain.read(count) == steady.read(count)


@pytest.mark.parametrize("other", [b"0123456789abcdeX", b"0123456789abcde", b"0123456789abcdef+", b"", b"01234567"])
def test_a_steady_file_raises_instead_of_giving_other_bytes(other: bytes) -> None:
    data, contents = b"0123456789abcdef", Contents(block_bytes=8)
    assert SteadyFile(io.BytesIO(data), contents, ZeroDivisionError).read() == data
    file = SteadyFile(io.BytesIO(other), contents, ZeroDivisionError)
    found: list[bytes] = []
    with pytest.raises(ZeroDivisionError):
        found.extend(iter(lambda: file.read(3), b""))
    assert data.startswith(b"".join(found))


# ---- standard input


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_standard_input_is_recognized_by_its_bytes_and_can_be_read_again(here: Path, stdin: Any, suffix: str) -> None:
    path = write(here / f"a.{suffix}", "Once", "upon")
    stdin(path.read_bytes())
    prompts = open_prompts("-", spool=here)
    assert prompts.scan() == scan(path)
    interleaved = zip(*(prompts.requests(PARAMS) for _ in range(2)), strict=True)
    assert [(a.prompt, b.prompt) for a, b in interleaved] == [("Once", "Once"), ("upon", "upon")]
    assert [row.place for row in prompts.requests(PARAMS)][0] in ("stdin:1", "stdin:row 0")
    assert sorted(os.listdir(here)) == [path.name]  # the copy has no name


def test_text_on_standard_input_is_named_with_the_option(stdin: Any) -> None:
    stdin(b"id,prompt\n1,Once\n")
    assert refusal("-").endswith("or pass --input-format for CSV or text")


def test_standard_input_can_be_csv_if_the_format_is_named(here: Path, stdin: Any) -> None:
    stdin(b"prompt\nOnce\n")
    assert prompts_of(open_prompts("-", format="csv")) == ["Once"]
    stdin(b"prompt\nOnce\n")
    assert "none of the first 2 rows is a JSON object" in refusal("-")


def test_standard_input_may_be_one_of_several(here: Path, stdin: Any) -> None:
    stdin(line("s"))
    assert prompts_of(open_prompts([write(here / "a.jsonl", "a"), "-"])) == ["a", "s"]
    stdin(line("s"))
    assert "named twice" in refusal(["-", "-"])


def test_a_terminal_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = os.openpty()
    with open(follower, "rb") as terminal:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=terminal))
        assert refusal("-").startswith("-: standard input is a terminal; pipe prompts into it")
    os.close(leader)
    monkeypatch.setattr("sys.stdin", None)
    assert refusal("-").startswith("-: standard input is closed; pipe prompts into it")


def test_standard_input_that_does_not_block_is_read_to_its_end(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its writer is slower than the reader; the program that made the pipe, or one that used it before, set that."""
    pipe, end = os.pipe()
    os.set_blocking(pipe, False)
    os.write(end, line("a"))
    over = threading.Event()

    def write_late() -> None:
        while not (os.get_blocking(pipe) or over.wait(0.001)):
            pass
        os.write(end, line("b"))
        os.close(end)

    writer = threading.Thread(target=write_late)
    with os.fdopen(pipe, "rb") as file:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=file))
        writer.start()
        prompts = open_prompts("-")
        over.set()
        writer.join()
    assert prompts.scan().rows == 2


def test_no_room_for_standard_input_is_one_line(here: Path, stdin: Any) -> None:
    stdin(line("s"))
    assert "cannot be copied to nowhere: No such file" in refusal("-", spool=Path("nowhere"))


# ---- formats by name


@pytest.mark.parametrize("name", ["p", "p.txt", "p.parquet"])
def test_a_named_format_overrides_the_suffix(here: Path, name: str) -> None:
    (here / name).write_bytes(line("Once"))
    assert prompts_of(open_prompts(name, format="jsonl")) == ["Once"]
    with pytest.raises(InputError, match=rf"^{name}: not a Parquet file"):
        open_prompts(name, format="parquet")


@pytest.mark.parametrize("damage", ["cut", "tail", "none", "one byte"])
def test_a_damaged_zstd_is_found_by_the_scan(here: Path, damage: str) -> None:
    path = here / "p.jsonl.zst"
    packed = pa.compress(b"".join(line(str(n**7)) for n in range(5000)), codec="zstd", asbytes=True)
    spoilt = {"cut": packed[: len(packed) // 2], "tail": packed + b"tail", "none": line("x"), "one byte": packed[:1]}
    path.write_bytes(spoilt[damage])
    for call in (scan, prompts_of):
        with pytest.raises(InputError, match=r"^p\.jsonl\.zst:\d+: the zstd data is truncated or damaged here"):
            call(path)
    if damage in ("none", "one byte"):
        assert "not a zstd file, or a damaged one" in refusal(path)


def test_zstd_of_several_frames_is_read_to_its_end(here: Path) -> None:
    path = here / "p.jsonl.zst"
    path.write_bytes(b"".join(pa.compress(line(text), codec="zstd", asbytes=True) for text in "abc"))
    assert prompts_of(path) == ["a", "b", "c"]


def test_a_long_zstd_window_is_named_with_the_command_that_unpacks_it(here: Path) -> None:
    text, window = line("a"), (31 - 10) << 3  # 2 GiB, as zstd --long=31 makes them; then one block, stored, the last
    frame = b"\x28\xb5\x2f\xfd" + bytes([0, window]) + (len(text) << 3 | 1).to_bytes(3, "little") + text
    small = pa.compress(line("x") * 1000, codec="zstd", asbytes=True)
    for data in (frame, small + frame):
        (here / "p.jsonl.zst").write_bytes(data)
        with pytest.raises(InputError, match=r"more than 128 MiB; unpack it first: zstd -d --long=31 p\.jsonl\.zst$"):
            open_prompts("p.jsonl.zst").scan()
    if zstd := shutil.which("zstd"):
        subprocess.run([zstd, "-q", "-d", "--long=31", "p.jsonl.zst"], check=True)
        assert len(prompts_of("p.jsonl")) == 1001


def test_a_file_that_is_packed_twice_is_refused(here: Path) -> None:
    path = here / "p.jsonl.zst"
    path.write_bytes(pa.compress(gzip.compress(line("x")), codec="zstd", asbytes=True))
    assert "this is a gzip file, not JSON lines" in refusal(path)


@pytest.mark.parametrize("uri", ["foo://x/y.jsonl", "http://127.0.0.1:9/x.jsonl", "s3://", "s3://bucket/a b.jsonl"])
def test_the_error_names_an_address_that_cannot_be_read(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # which would be looked for, for some seconds
    assert refusal(uri).startswith(f"{uri}: ")


def test_a_file_address_is_a_local_file(here: Path) -> None:
    write(here / "a.jsonl", "x")
    assert prompts_of(f"file://{here}/a.jsonl") == ["x"]
    assert refusal(f"file://{here}/b.jsonl").startswith(f"{here}/b.jsonl: no such file; did you mean {here}/a.jsonl?")


def test_a_bad_row_is_rejected_and_its_file_is_not(here: Path) -> None:
    (here / "a.jsonl").write_bytes(b"nonsense\n" + line("x"))
    rows = read(["a.jsonl"])
    assert [type(row) for row in rows][0] is Rejected
    assert isinstance(find_sources("a.jsonl")[0], Source)
