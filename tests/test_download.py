import hashlib
import json
import os
import random
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchgen.errors import ModelError
from batchgen.models import download as module
from batchgen.models.download import Patience, Remote, Stopped, download, shown
from tests.support.fault_server import (
    Fault,
    FaultServer,
    both,
    chunked,
    claim,
    content_range,
    drip,
    drop,
    etag,
    good,
    header,
    ignore_range,
    other_file,
    other_part,
    redirect,
    stall,
    status,
    without,
    wrong_offset,
)

DATA = random.Random(0).randbytes(400_000)
OTHER = random.Random(1).randbytes(400_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
QUICK = Patience(
    connect=5, read=0.3, tries=4, first_wait=0.001, longest_wait=0.01, longest_retry_after=2, tries_unreached=2
)
CUT = drop(after=150_000)
NAME = "model.ckpt.data"


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer({"/file": DATA, "/empty": b""}) as running:
        yield running


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / NAME


def remote(server: FaultServer, **known: Any) -> Remote:
    return Remote(**({"url": server.url("/file"), "size": len(DATA), "sha256": SHA256} | known))


def get(server: FaultServer, path: Path, **known: Any) -> str:
    return download(remote(server, **known), path, patience=QUICK)


def assert_only(path: Path, data: bytes = DATA) -> None:
    assert path.read_bytes() == data
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def ranges(server: FaultServer) -> list[str | None]:
    return [asked.headers.get("range") for asked in server.requests["/file"]]


# --- what ends well ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [{}, {"sha256": None}, {"size": None}, {"size": None, "sha256": None}])
@pytest.mark.parametrize(
    "faults",
    [
        [],
        [CUT, CUT],
        [drop(after=150_000, reset=True)],
        [drop(after=0)] * 3,
        [stall(after=100_000), good],
        [stall(after=0)],
        [status(500), status(502), status(503)],
        [status(429, Retry_After="0"), status(408)],
        [CUT, ignore_range],
        [CUT, both(ignore_range, drop(after=200_000))],
        [CUT, wrong_offset(+1000)],
        [CUT, wrong_offset(-1000)],
        [CUT, content_range("")],
        [CUT, content_range("bytes */400000")],
        [CUT, content_range("bytes 150000-399999/*")],
        [CUT, content_range("chunks 150000-399999/400000")],
        [CUT, content_range("bytes 150000-999/400000")],
        [CUT, content_range("bytes 150000-399999/99999999999999999999999")],
        [CUT, status(416, Content_Range="bytes */400000")],
        [header(Content_Encoding="gzip")],
        [CUT, header(Content_Encoding="br")],
        [both(CUT, without("ETag"))],
        [both(CUT, without("ETag"), header(Last_Modified="Mon, 02 Nov 2026 10:00:00 GMT"))],
        [both(CUT, header(ETag='W/"weak"'))],
        [CUT, without("ETag")],
        [CUT, other_part(OTHER)],
    ],
)
def test_whatever_the_server_does_the_file_is_whole(
    faults: list[Fault], known: dict[str, Any], server: FaultServer, path: Path
) -> None:
    server.faults["/file"] = list(faults)
    assert get(server, path, **known) == SHA256
    assert_only(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_has_come_is_not_asked_for_again(server: FaultServer, path: Path) -> None:
    server.faults["/file"] = [drop(after=100_000)] * 3
    get(server, path)
    assert ranges(server) == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]
    assert [asked.headers.get("if-range") for asked in server.requests["/file"]] == [None] + [etag(DATA)] * 3
    assert {asked.headers["accept-encoding"] for asked in server.requests["/file"]} == {"identity"}


def test_without_validator_and_hash_nothing_is_gone_on_with(server: FaultServer, path: Path) -> None:
    server.faults["/file"] = [both(CUT, without("ETag")), good]
    get(server, path, sha256=None)
    assert ranges(server) == [None, None]
    assert_only(path)


def test_a_file_that_changes_on_the_way_is_begun_anew(server: FaultServer, path: Path) -> None:
    server.faults["/file"] = [CUT]
    server.always["/file"] = other_file(OTHER)
    assert get(server, path, sha256=None) == hashlib.sha256(OTHER).hexdigest()
    assert_only(path, OTHER)


def test_a_wrong_hash_is_given_a_second_try_from_the_start(server: FaultServer, path: Path) -> None:
    server.faults["/file"] = [both(CUT, without("ETag")), other_part(OTHER), good]
    assert get(server, path) == SHA256
    assert ranges(server) == [None, "bytes=150000-", None]


@pytest.mark.parametrize("extra", [b"", b"x" * 100_000])
def test_chunks_are_read_up_to_the_expected_size(extra: bytes, server: FaultServer, path: Path) -> None:
    server.always["/file"] = chunked(extra)
    assert get(server, path) == SHA256
    assert_only(path)


def test_an_empty_file_is_a_file(server: FaultServer, path: Path) -> None:
    download(Remote(server.url("/empty")), path, patience=QUICK)
    assert_only(path, b"")


def test_a_process_that_is_killed_goes_on_where_it_was(server: FaultServer, path: Path) -> None:
    server.faults["/file"] = [CUT]
    stop = threading.Event()
    with pytest.raises(Stopped):
        download(remote(server, sha256=None), path, patience=QUICK, on_bytes=lambda *_: stop.set(), stop=stop)
    had = path.with_name(NAME + ".part").stat().st_size
    assert 0 < had < len(DATA)
    assert stat.S_IMODE(path.with_name(NAME + ".part").stat().st_mode) == 0o600
    server.faults["/file"] = []
    get(server, path, sha256=None)
    assert ranges(server) == [None, f"bytes={had}-"]
    assert_only(path)


def test_a_part_that_is_whole_already_is_only_checked(server: FaultServer, path: Path) -> None:
    _part(path, DATA)
    get(server, path)
    assert ranges(server) == []
    assert_only(path)


def test_a_file_that_is_there_is_kept_and_another_is_replaced(server: FaultServer, path: Path) -> None:
    path.write_bytes(DATA)
    get(server, path)
    assert ranges(server) == []
    for wrong in (OTHER, b"short"):
        path.write_bytes(wrong)
        get(server, path)
        assert_only(path)
    assert ranges(server) == [None, None]


def _part(path: Path, data: bytes, note: object = None) -> Path:
    part = path.with_name(NAME + ".part")
    part.touch(mode=0o600)
    part.write_bytes(data)
    if note is not None:
        path.with_name(NAME + ".part.json").write_text(note if isinstance(note, str) else json.dumps(note))
    return part


@pytest.mark.parametrize(
    "note",
    [
        "",
        "[]",
        "{}",
        "[" * 50_000,
        "\x00",
        {"total": "x", "validator": 3},
        {"total": -1, "validator": None},
        {"total": 400_000, "validator": "a\r\nX: y"},
        {"total": 10, "validator": '"x"'},
        {"total": 10**30, "validator": '"x"'},
        {"total": 400_000, "validator": '"x"'},
    ],
)
@pytest.mark.parametrize("known", [{}, {"size": None, "sha256": None}])
def test_whatever_is_in_a_note_the_file_is_whole(
    known: dict[str, Any], note: object, server: FaultServer, path: Path
) -> None:
    _part(path, OTHER[:1000], note)
    assert get(server, path, **known) == SHA256
    assert_only(path)


def test_a_part_that_is_a_link_or_open_to_others_is_not_written_through(server: FaultServer, path: Path) -> None:
    target = path.with_name("target")
    target.write_bytes(b"precious")
    part = path.with_name(NAME + ".part")
    for make in (lambda: part.symlink_to(target), lambda: os.link(target, part), lambda: part.mkdir(mode=0o700)):
        make()
        if part.is_dir() and not part.is_symlink():
            with pytest.raises(ModelError, match="cannot be written"):
                get(server, path)
            part.rmdir()
            continue
        get(server, path)
        assert target.read_bytes() == b"precious"
        path.unlink()
    part.write_bytes(DATA[:1000])
    part.chmod(0o666)
    get(server, path)
    assert ranges(server)[-1] is None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_two_writers_never_share_a_part(server: FaultServer, path: Path) -> None:
    seen: list[str] = []

    def second(*_: object) -> None:
        if not seen:
            with pytest.raises(ModelError, match="is being downloaded by another process; wait for it") as caught:
                get(server, path)
            seen.append(str(caught.value))

    download(remote(server), path, patience=QUICK, on_bytes=second)
    assert seen
    assert_only(path)


def test_progress_starts_at_what_was_there_and_ends_at_the_size(server: FaultServer, path: Path) -> None:
    _part(path, DATA[:100_000], {"total": len(DATA), "validator": etag(DATA)})
    calls: list[tuple[int, int | None]] = []
    download(remote(server), path, patience=QUICK, on_bytes=lambda *call: calls.append(call))
    assert calls[0] == (100_000, len(DATA))
    assert calls[-1] == (len(DATA), len(DATA))
    assert calls == sorted(calls)


# --- waiting -------------------------------------------------------------------------------------------------


class Waits(threading.Event):
    """Takes the place of sleeping, and remembers for how long it would have been."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.found.append(timeout or 0)
        return False


def test_waits_grow_and_have_a_limit(server: FaultServer, path: Path) -> None:
    waits = Waits()
    server.faults["/file"] = [status(503)] * 7
    download(remote(server), path, patience=replace(QUICK, tries=9, first_wait=1, longest_wait=10), stop=waits)
    assert waits.found == sorted(waits.found)
    assert 0.75 <= waits.found[0] <= 1.25
    assert waits.found[-1] == 10


def test_retry_after_is_heeded_in_seconds_and_as_a_date(
    server: FaultServer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = Waits()
    monkeypatch.setattr(module.time, "time", lambda: 1_000_000_000.0)
    server.faults["/file"] = [
        status(429, Retry_After="7"),
        status(503, Retry_After="Sun, 09 Sep 2001 01:46:49 GMT"),
        status(503, Retry_After="Sun, 09 Sep 2001 01:46:00 GMT"),
        status(503, Retry_After="soon"),
    ]
    download(remote(server), path, patience=replace(QUICK, tries=9, longest_retry_after=60), stop=waits)
    assert waits.found[:2] == [7, 9]
    assert max(waits.found[2:]) <= 0.0125


def test_a_server_that_asks_for_an_hour_gets_it_from_the_user(server: FaultServer, path: Path) -> None:
    server.faults["/file"] = [status(429, Retry_After="3600")]
    with pytest.raises(ModelError, match="it asks to wait 3600 s: run the same command again then"):
        get(server, path)


def test_tries_count_only_those_without_progress(server: FaultServer, path: Path) -> None:
    tries = 30  # of 70 kB each, with a failure between: far more than QUICK.tries
    data = random.Random(2).randbytes(70_000 * tries)
    server.files["/file"] = data
    server.faults["/file"] = [drop(after=70_000), status(500)] * (tries - 1)
    get(server, path, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    assert_only(path, data)


def test_drops_at_the_same_place_are_not_progress(server: FaultServer, path: Path) -> None:
    server.always["/file"] = both(ignore_range, drop(after=200_000))
    with pytest.raises(ModelError, match="gave up after 4 tries; run the same command again to go on"):
        get(server, path)
    assert len(ranges(server)) == 5


def test_a_connection_that_only_drips_is_dropped(server: FaultServer, path: Path) -> None:
    server.always["/file"] = drip(0.02)
    slow = replace(QUICK, slow_window=0.1, slow_bytes=10_000, tries=1)
    with pytest.raises(ModelError, match=r"\d+ bytes came in 0 s; gave up after 1 tries"):
        download(remote(server), path, patience=slow)


# --- what ends in one line -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "known", "message"),
    [
        (status(401), {}, "wants a password \\('401 Unauthorized'\\); check the address, or use another --mirror"),
        (status(403), {}, "is refused \\('403 Forbidden'\\)"),
        (status(404), {}, "is not there \\('404 Not Found'\\)"),
        (status(410), {}, "is gone"),
        (status(204), {}, "cannot be had \\('204 No Content'\\)"),
        (status(500), {}, "answered '500 Internal Server Error'; gave up after 4 tries"),
        (drop(after=0), {}, "gave up after 4 tries"),
        (stall(after=0), {}, "timed out; gave up after 4 tries"),
        (header(Content_Encoding="gzip"), {}, "sent 'gzip' though asked not to; gave up"),
        (claim(300_000), {}, "expected 400000 bytes, the server has 300000; gave up"),
        (claim(500_000), {}, "expected 400000 bytes, the server has 500000; gave up"),
        (claim(500_000), {"size": None}, "gave up after"),
        (both(without("Content-Length"), drop(after=5)), {"size": None}, "does not say how long the file is"),
        (
            other_file(OTHER),
            {},
            f"expected sha256 {SHA256} \\(OpenAI's\\), found .*, 2 times; the file there is another",
        ),
        (other_file(OTHER[:-1]), {}, "expected 400000 bytes, the server has 399999"),
        (redirect("http://localhost/file"), {}, "redirects to 'http://localhost/file'; if you trust that server"),
        (redirect("//other.example/file"), {}, "redirects to 'http://other.example/file'"),
        (redirect("file:///etc/passwd"), {}, "redirects to 'file:///etc/passwd'"),
        (redirect("ftp://127.0.0.1/file"), {}, "redirects to 'ftp://127.0.0.1/file'"),
        (redirect("http://[bad/"), {}, "redirects to 'an address that is none'"),
        (redirect("/file"), {}, "redirects more than 5 times"),
        (redirect("http://user:secret@other.example/file"), {}, "redirects to 'http://other.example/file'"),
    ],
)
def test_what_cannot_be_had_is_one_line_and_no_file(
    fault: Fault, known: dict[str, Any], message: str, server: FaultServer, path: Path
) -> None:
    server.always["/file"] = fault
    with pytest.raises(ModelError, match=message) as caught:
        get(server, path, **known)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert str(caught.value).startswith(server.url("/file"))
    assert not path.exists()


def test_redirects_stay_on_their_host_or_go_to_an_allowed_one(server: FaultServer, path: Path) -> None:
    server.files["/moved"] = DATA
    for location in ("/moved", "moved", server.url("/moved")):
        server.faults["/file"] = [redirect(location)]
        get(server, path)
        path.unlink()
    server.faults["/file"] = [redirect(server.url("/moved", host="localhost"))]
    get(server, path, hosts=frozenset({"localhost"}))
    assert_only(path)


def test_from_https_nothing_leads_to_http(path: Path) -> None:
    asked = Remote("https://host.example/file", hosts=frozenset({"host.example"}))
    tries = module._Download(asked, module._Part(path), QUICK, None, threading.Event())
    with pytest.raises(ModelError, match="redirects to 'http://host.example/file'"):
        tries._redirected(asked.url, "http://host.example/file")
    assert tries._redirected("http://host.example/a", "https://host.example/b") == "https://host.example/b"


def test_nobody_at_home_is_one_line(path: Path) -> None:
    with pytest.raises(ModelError, match="Connection refused; is there a network. --mirror names another place"):
        download(Remote("http://127.0.0.1:1/file"), path, patience=QUICK)


def test_a_password_in_an_address_is_never_shown() -> None:
    assert shown("https://user:secret@host.example:8/a/b") == "https://host.example:8/a/b"


def test_a_full_disk_is_one_line_and_what_has_come_is_kept(
    server: FaultServer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write: Callable[..., int] = os.write
    calls: list[int] = []

    def full(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        if sum(calls) > 200_000:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(module.os, "write", full)
    with pytest.raises(ModelError, match="cannot be written .No space left on device.; make room") as caught:
        get(server, path)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    get(server, path)
    assert_only(path)


def test_something_in_the_way_is_not_removed(server: FaultServer, path: Path) -> None:
    path.mkdir()
    with pytest.raises(ModelError, match="is in the way, and is not a file; move it"):
        get(server, path)
    path.rmdir()
    path.symlink_to("/etc/passwd")
    with pytest.raises(ModelError, match="is in the way"):
        get(server, path)


# --- interrupted again and again -----------------------------------------------------------------------------


def test_fifty_interruptions_fetch_nothing_twice(server: FaultServer, path: Path) -> None:
    """The same at 500 MB and with kills is in benchmarks/download.py; here the server counts."""
    rng = random.Random(3)
    data = rng.randbytes(20_000_000)
    server.files["/file"] = data
    sizes = [rng.randrange(100_000, 700_000) for _ in range(50)]
    server.faults["/file"] = [drop(after=size) for size in sizes]
    get(server, path, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    starts = [int((text or "bytes=0-")[6:-1]) for text in ranges(server)]
    sent = sum(min(size, len(data) - start) for start, size in zip(starts, [*sizes, len(data)], strict=False))
    assert_only(path, data)
    assert sent - len(data) < 0.01 * len(data)
