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
from batchgen.models.download import Patience, Remote, Stopped, download, redact
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


# --- successful downloads ------------------------------------------------------------------------------------------


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
def test_the_file_is_complete_despite_any_fault_of_the_server(
    faults: list[Fault], known: dict[str, Any], server: FaultServer, path: Path
) -> None:
    server.faults["/file"] = list(faults)
    assert get(server, path, **known) == SHA256
    assert_only(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_received_bytes_are_not_requested_again(server: FaultServer, path: Path) -> None:
    server.faults["/file"] = [drop(after=100_000)] * 3
    get(server, path)
    assert ranges(server) == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]
    assert [asked.headers.get("if-range") for asked in server.requests["/file"]] == [None] + [etag(DATA)] * 3
    assert {asked.headers["accept-encoding"] for asked in server.requests["/file"]} == {"identity"}


def test_without_validator_and_hash_a_part_is_not_resumed(server: FaultServer, path: Path) -> None:
    server.faults["/file"] = [both(CUT, without("ETag")), good]
    get(server, path, sha256=None)
    assert ranges(server) == [None, None]
    assert_only(path)


def test_a_whole_part_that_no_hash_proves_is_not_taken_for_the_file(server: FaultServer, path: Path) -> None:
    """It may be of a file that the server no longer has: it was killed before the part had the file's name."""
    path.with_name(path.name + ".part").write_bytes(b"x" * len(DATA))
    path.with_name(path.name + ".part").chmod(0o600)
    state = {"total": len(DATA), "validator": etag(b"x" * len(DATA))}
    path.with_name(path.name + ".part.json").write_text(json.dumps(state))
    get(server, path, sha256=None)
    assert path.read_bytes() == DATA


def test_a_file_that_changes_during_the_download_is_restarted(server: FaultServer, path: Path) -> None:
    server.faults["/file"] = [CUT]
    server.always["/file"] = other_file(OTHER)
    assert get(server, path, sha256=None) == hashlib.sha256(OTHER).hexdigest()
    assert_only(path, OTHER)


def test_a_wrong_hash_restarts_the_download_once(server: FaultServer, path: Path) -> None:
    server.faults["/file"] = [both(CUT, without("ETag")), other_part(OTHER), good]
    assert get(server, path) == SHA256
    assert ranges(server) == [None, "bytes=150000-", None]


@pytest.mark.parametrize("extra", [b"", b"x" * 100_000])
def test_a_chunked_body_is_read_up_to_the_expected_size(extra: bytes, server: FaultServer, path: Path) -> None:
    server.always["/file"] = chunked(extra)
    assert get(server, path) == SHA256
    assert_only(path)


def test_an_empty_file_is_downloaded(server: FaultServer, path: Path) -> None:
    download(Remote(server.url("/empty")), path, patience=QUICK)
    assert_only(path, b"")


def test_a_stopped_download_resumes(server: FaultServer, path: Path) -> None:
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


def test_a_complete_part_is_only_checked(server: FaultServer, path: Path) -> None:
    _part(path, DATA)
    get(server, path)
    assert ranges(server) == []
    assert_only(path)


def test_an_existing_correct_file_is_kept_and_a_wrong_one_replaced(server: FaultServer, path: Path) -> None:
    path.write_bytes(DATA)
    get(server, path)
    assert ranges(server) == []
    for wrong in (OTHER, b"short"):
        path.write_bytes(wrong)
        get(server, path)
        assert_only(path)
    assert ranges(server) == [None, None]


def _part(path: Path, data: bytes, state: object = None) -> Path:
    part = path.with_name(NAME + ".part")
    part.touch(mode=0o600)
    part.write_bytes(data)
    if state is not None:
        path.with_name(NAME + ".part.json").write_text(state if isinstance(state, str) else json.dumps(state))
    return part


@pytest.mark.parametrize(
    "state",
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
def test_the_file_is_complete_despite_any_state_file(
    known: dict[str, Any], state: object, server: FaultServer, path: Path
) -> None:
    _part(path, OTHER[:1000], state)
    assert get(server, path, **known) == SHA256
    assert_only(path)


def test_a_part_that_is_a_link_or_writable_by_others_is_replaced(server: FaultServer, path: Path) -> None:
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


def test_a_second_writer_of_a_part_is_refused(server: FaultServer, path: Path) -> None:
    seen: list[str] = []

    def second(*_: object) -> None:
        if not seen:
            with pytest.raises(ModelError, match="is being downloaded by another process; wait for it") as caught:
                get(server, path)
            seen.append(str(caught.value))

    download(remote(server), path, patience=QUICK, on_bytes=second)
    assert seen[0].startswith(f"{path}: ")  # and names no temporary file
    assert_only(path)


def test_progress_starts_at_the_length_of_the_part_and_ends_at_the_size(server: FaultServer, path: Path) -> None:
    _part(path, DATA[:100_000], {"total": len(DATA), "validator": etag(DATA)})
    calls: list[tuple[int, int | None]] = []
    download(remote(server), path, patience=QUICK, on_bytes=lambda *call: calls.append(call))
    assert calls[0] == (100_000, len(DATA))
    assert calls[-1] == (len(DATA), len(DATA))
    assert calls == sorted(calls)


# --- waiting -------------------------------------------------------------------------------------------------


class Waits(threading.Event):
    """Replaces sleeping, and records the seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.found.append(timeout or 0)
        return False


def test_waits_grow_up_to_a_limit(server: FaultServer, path: Path) -> None:
    waits = Waits()
    server.faults["/file"] = [status(503)] * 7
    download(remote(server), path, patience=replace(QUICK, tries=9, first_wait=1, longest_wait=10), stop=waits)
    assert waits.found == sorted(waits.found)
    assert 0.75 <= waits.found[0] <= 1.25
    assert waits.found[-1] == 10


def test_retry_after_is_obeyed_in_seconds_and_as_a_date(
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


def test_a_server_that_asks_for_an_hour_ends_the_download(server: FaultServer, path: Path) -> None:
    server.faults["/file"] = [status(429, Retry_After="3600")]
    with pytest.raises(ModelError, match="run the same command after 3600 s, as the server asks"):
        get(server, path)


def test_only_tries_without_progress_count(server: FaultServer, path: Path) -> None:
    tries = 30  # of 70 kB each, with a failure between: far more than QUICK.tries
    data = random.Random(2).randbytes(70_000 * tries)
    server.files["/file"] = data
    server.faults["/file"] = [drop(after=70_000), status(500)] * (tries - 1)
    get(server, path, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    assert_only(path, data)


def test_tries_that_end_at_the_same_place_are_not_progress(server: FaultServer, path: Path) -> None:
    server.always["/file"] = both(ignore_range, drop(after=200_000))
    with pytest.raises(ModelError, match="gave up after 4 tries; run the same command to resume"):
        get(server, path)
    assert len(ranges(server)) == 5


def test_a_slow_connection_is_dropped(server: FaultServer, path: Path) -> None:
    server.always["/file"] = drip(0.02)
    slow = replace(QUICK, slow_window=0.1, slow_bytes=10_000, tries=1)
    with pytest.raises(ModelError, match=r"received \d+ bytes in 0 s; gave up after 1 tries"):
        download(remote(server), path, patience=slow)


# --- failed downloads -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "known", "message"),
    [
        (status(401), {}, "requires a password \\('401 Unauthorized'\\); check the address, or set BATCHGEN_MIRROR"),
        (status(403), {}, "is refused \\('403 Forbidden'\\)"),
        (status(404), {}, "does not exist \\('404 Not Found'\\)"),
        (status(410), {}, "no longer exists"),
        (status(204), {}, "cannot be downloaded \\('204 No Content'\\)"),
        (status(500), {}, "answered '500 Internal Server Error'; gave up after 4 tries"),
        (drop(after=0), {}, "gave up after 4 tries"),
        (stall(after=0), {}, "timed out; gave up after 4 tries"),
        (header(Content_Encoding="gzip"), {}, "sent the encoding 'gzip', which was not requested; gave up"),
        (claim(300_000), {}, "expected 400000 bytes, the server has 300000; gave up"),
        (claim(500_000), {}, "expected 400000 bytes, the server has 500000; gave up"),
        (claim(500_000), {"size": None}, "gave up after"),
        (both(without("Content-Length"), drop(after=5)), {"size": None}, "does not state the file's length"),
        (
            other_file(OTHER),
            {},
            f"expected sha256 {SHA256} \\(OpenAI's\\), found .*, 2 times; the server has another file",
        ),
        (other_file(OTHER[:-1]), {}, "expected 400000 bytes, the server has 399999"),
        (redirect("http://localhost/file"), {}, "redirects to 'http://localhost/file'; if you trust that server"),
        (redirect("//other.example/file"), {}, "redirects to 'http://other.example/file'"),
        (redirect("file:///etc/passwd"), {}, "redirects to 'file:///etc/passwd'"),
        (redirect("ftp://127.0.0.1/file"), {}, "redirects to 'ftp://127.0.0.1/file'"),
        (redirect("http://[bad/"), {}, "redirects to 'an invalid address'"),
        (redirect("/file"), {}, "redirects more than 5 times"),
        (redirect("http://user:secret@other.example/file"), {}, "redirects to 'http://other.example/file'"),
    ],
)
def test_a_failed_download_gives_one_line_and_no_file(
    fault: Fault, known: dict[str, Any], message: str, server: FaultServer, path: Path
) -> None:
    server.always["/file"] = fault
    with pytest.raises(ModelError, match=message) as caught:
        get(server, path, **known)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert str(caught.value).startswith(server.url("/file"))
    assert not path.exists()


def test_redirects_stay_on_their_host_or_lead_to_an_allowed_one(server: FaultServer, path: Path) -> None:
    server.files["/moved"] = DATA
    for location in ("/moved", "moved", server.url("/moved")):
        server.faults["/file"] = [redirect(location)]
        get(server, path)
        path.unlink()
    server.faults["/file"] = [redirect(server.url("/moved", host="localhost"))]
    get(server, path, hosts=frozenset({"localhost"}))
    assert_only(path)


def test_a_redirect_from_https_to_http_is_refused(path: Path) -> None:
    asked = Remote("https://host.example/file", hosts=frozenset({"host.example"}))
    tries = module._Download(asked, module._Part(path), QUICK, lambda *_: None, threading.Event())
    with pytest.raises(ModelError, match="redirects to 'http://host.example/file'"):
        tries._resolve_redirect(asked.url, "http://host.example/file")
    assert tries._resolve_redirect("http://host.example/a", "https://host.example/b") == "https://host.example/b"


def test_a_refused_connection_gives_one_line(path: Path) -> None:
    with pytest.raises(ModelError, match="Connection refused; check the network, or set BATCHGEN_MIRROR"):
        download(Remote("http://127.0.0.1:1/file"), path, patience=QUICK)


def test_a_password_is_removed_from_an_address() -> None:
    assert redact("https://user:secret@host.example:8/a/b") == "https://host.example:8/a/b"


def test_a_full_disk_gives_one_line_and_keeps_the_received_bytes(
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


def test_a_directory_or_a_link_at_the_path_is_not_removed(server: FaultServer, path: Path) -> None:
    path.mkdir()
    with pytest.raises(ModelError, match="is in the way, and is not a file; move it"):
        get(server, path)
    path.rmdir()
    path.symlink_to("/etc/passwd")
    with pytest.raises(ModelError, match="is in the way"):
        get(server, path)


# --- many interruptions -----------------------------------------------------------------------------


def test_fifty_interruptions_download_nothing_twice(server: FaultServer, path: Path) -> None:
    """The server counts the bytes; benchmarks/download.py does the same with 500 MB and with killed processes."""
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
