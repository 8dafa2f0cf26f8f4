"""One file from one address, whatever the network does: resumed, checked, and given its name in one rename.

What has come so far is in NAME.part, and in NAME.part.json what says that the server still has the same file: its
size and a validator (ETag or Last-Modified). A part is gone on with only by `If-Range`, or where a known sha256
will tell in the end.
"""

import fcntl
import hashlib
import json
import logging
import os
import random
import stat
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NoReturn
from urllib.parse import urljoin, urlsplit, urlunsplit

import requests
from urllib3.exceptions import HTTPError

from batchgen import __version__
from batchgen.errors import ModelError
from batchgen.models.shards import file_sha256

logger = logging.getLogger(__name__)

OnBytes = Callable[[int, int | None], None]  # (bytes had, bytes in all if known)

_BLOCK = 2**18
_PROGRESS = 2**16  # bytes beyond what was ever had, from which on a try counts as progress
_MAX_REDIRECTS = 5
_MISMATCHES = 2  # downloads of a whole file with a wrong hash before giving up
_REDIRECTS = (301, 302, 303, 307, 308)
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_DENIED = {401: "wants a password", 403: "is refused", 404: "is not there", 410: "is gone"}


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for what, in seconds, and how often to try without any progress."""

    connect: float = 15.0
    read: float = 30.0
    tries: int = 8
    tries_unreached: int = 4  # where not one answer has come: there is no network, or no such server
    first_wait: float = 0.5
    longest_wait: float = 60.0
    longest_retry_after: float = 600.0
    slow_window: float = 60.0  # a connection that brings less than slow_bytes in it is dropped
    slow_bytes: int = 2**14


@dataclass(frozen=True, slots=True)
class Remote:
    """A file to have: its address, and what is known of it. origin: who says so, for the error."""

    url: str
    size: int | None = None
    sha256: str | None = None
    origin: str = "OpenAI's"
    hosts: frozenset[str] = field(default_factory=frozenset)  # where it may be redirected to, besides its own


class Stopped(Exception):
    """The download was told to stop; what has come is kept."""


class _TryAgain(Exception):
    """One try failed in a way that another may not."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason, wait)
        self.reason, self.wait = reason, wait


def download(
    remote: Remote,
    path: Path,
    *,
    patience: Patience | None = None,
    on_bytes: OnBytes | None = None,
    stop: threading.Event | None = None,
) -> str:
    """Have the file at path, whole and checked, and return its sha256; one that is there is checked and kept.

    path's folder must be the user's own: the parts are there, under names that can be foretold. Raises ModelError
    with the address and what to do; what has come by then is kept for the next time.
    """
    found = _present(remote, path)
    if found:
        return found
    with _Part(path) as part:
        return _Download(remote, part, patience or Patience(), on_bytes, stop or threading.Event()).run()


def _present(remote: Remote, path: Path) -> str | None:
    """The hash of a file that is there and is the one; any other is removed."""
    if not os.path.lexists(path):
        return None
    if path.is_symlink() or not path.is_file():
        raise ModelError(f"{path}: is in the way, and is not a file; move it")
    if remote.size in (None, path.stat().st_size):
        found = file_sha256(path)
        if remote.sha256 in (None, found):
            return found
    path.unlink()
    return None


def shown(url: str) -> str:
    """An address as it may be printed: without a user's name and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


# --- what has come so far ------------------------------------------------------------------------------------


class _Part:
    """The bytes that have come, their running hash, and the server's word on which file they are of."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.note = path.with_name(path.name + ".part.json")
        self.length = 0
        self.total: int | None = None
        self.validator: str | None = None
        self._sha256 = hashlib.sha256()
        self._descriptor = -1

    def __enter__(self) -> "_Part":
        try:
            self._descriptor = self._open()
            self._lock()
            self._read_note()
            while block := os.read(self._descriptor, 2**20):
                self._sha256.update(block)
                self.length += len(block)
        except OSError as error:
            self._fail(error)
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)

    def _open(self) -> int:
        """Open the part, or make it: never through a link, never one of another user or that others may write."""
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        with suppress(OSError):
            descriptor = os.open(self.part, flags)
            found = os.fstat(descriptor)
            own = found.st_uid == os.geteuid() and found.st_nlink == 1 and not found.st_mode & 0o077
            if stat.S_ISREG(found.st_mode) and own:
                return descriptor
            os.close(descriptor)
        self.part.unlink(missing_ok=True)
        return os.open(self.part, flags | os.O_CREAT | os.O_EXCL, 0o600)

    def _lock(self) -> None:
        """Hold the part until it is closed: two writers would spoil it."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise ModelError(f"{self.part}: is being downloaded by another process; wait for it") from None

    def _read_note(self) -> None:
        """Take what the note says if it is a note; without it the part may still be of use (see _Download)."""
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            with self.note.open("rb") as file:
                values = json.loads(file.read(2**16))
            total, validator = values["total"], values["validator"]
            known = validator is None or (isinstance(validator, str) and validator.isprintable())
            if type(total) is int and total >= 0 and known:
                self.total, self.validator = total, validator

    def remember(self, total: int, validator: str | None) -> None:
        if (total, validator) == (self.total, self.validator):
            return
        self.total, self.validator = total, validator
        try:
            temporary = self.note.with_name(self.note.name + ".new")
            temporary.unlink(missing_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump({"total": total, "validator": validator}, file)
            temporary.rename(self.note)
        except OSError as error:
            self._fail(error)

    def append(self, data: bytes) -> None:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            self._fail(error)
        self._sha256.update(data)
        self.length += len(data)

    def restart(self) -> None:
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self._sha256 = hashlib.sha256()
        self.length = 0

    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def finish(self) -> None:
        try:
            os.fsync(self._descriptor)
            self.part.rename(self.path)
            self.note.unlink(missing_ok=True)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> NoReturn:
        raise ModelError(
            f"{self.part}: cannot be written ({error.strerror or error}); make room or use another folder, "
            "then run the same command again: it goes on from here"
        ) from error


# --- the server ----------------------------------------------------------------------------------------------


class _Session(requests.Session):
    """requests would read a redirect's whole body and prepare to follow it, even when told not to."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


class _Download:
    """The tries at one file."""

    def __init__(
        self, remote: Remote, part: _Part, patience: Patience, on_bytes: OnBytes | None, stop: threading.Event
    ) -> None:
        self.remote, self.part, self.patience = remote, part, patience
        self.on_bytes, self.stop = on_bytes, stop
        self.session = _Session()
        self.reached = False

    def run(self) -> str:
        """Try until the file is whole and right, or until too many tries in a row brought nothing new."""
        farthest, failures, mismatches = self.part.length, 0, 0
        with self.session:
            while True:
                try:
                    self._try_once()
                    if self._is_right():
                        self.part.finish()
                        return self.part.sha256()
                    mismatches += 1
                    self._check_mismatches(mismatches)
                    self.part.restart()
                except _TryAgain as failure:
                    failures = 0 if self.part.length >= farthest + _PROGRESS else failures + 1
                    farthest = max(farthest, self.part.length)
                    self._wait(failure, failures)

    def _is_right(self) -> bool:
        return self.remote.sha256 in (None, self.part.sha256())

    def _check_mismatches(self, mismatches: int) -> None:
        if mismatches >= _MISMATCHES:
            raise self._refusal(
                f"expected sha256 {self.remote.sha256} ({self.remote.origin}), found {self.part.sha256()}, "
                f"{_MISMATCHES} times; the file there is another one, or it is changed on the way: use another --mirror"
            )

    def _wait(self, failure: _TryAgain, failures: int) -> None:
        """Sleep before the next try: longer each time, never less than the server asks, shorter when stopped."""
        patience = self.patience
        if not self.reached and failures >= patience.tries_unreached:
            raise self._refusal(f"{failure.reason}; is there a network? --mirror names another place")
        if failures >= patience.tries:
            raise self._refusal(
                f"{failure.reason}; gave up after {failures} tries; run the same command again to go on"
            )
        if failure.wait > patience.longest_retry_after:
            raise self._refusal(
                f"{failure.reason}; it asks to wait {failure.wait:.0f} s: run the same command again then"
            )
        backoff = patience.first_wait * 2.0 ** max(failures - 1, 0) * random.uniform(0.75, 1.25)
        seconds = max(failure.wait, min(patience.longest_wait, backoff))
        level = logging.WARNING if failures > 2 else logging.INFO
        logger.log(level, "%s: %s; trying again in %.0f s", shown(self.remote.url), failure.reason, seconds)
        if self.stop.wait(seconds):
            raise Stopped

    def _refusal(self, reason: str) -> ModelError:
        return ModelError(f"{shown(self.remote.url)}: {reason}")

    def _try_once(self) -> None:
        """Make one request for what is missing and read it to its end."""
        self._check_part()
        if self.part.length and self.part.length == (self.remote.size or self.part.total):
            return
        try:
            with closing(self._request()) as response:
                total = self._begin(response)
                self._read(response, total)
        except requests.exceptions.SSLError as error:
            raise self._refusal(
                f"no safe connection ({_reason(error)}); name your authority's file in REQUESTS_CA_BUNDLE"
            ) from error
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            raise self._refusal(f"is no address ({_reason(error)})") from error
        except (requests.RequestException, HTTPError, OSError) as error:
            raise _TryAgain(_reason(error)) from error
        if self.part.length < total:
            raise _TryAgain(f"the connection ended after {self.part.length} of {total} bytes")

    def _check_part(self) -> None:
        """Begin again unless the part can be gone on with: nothing less than a validator or a hash proves it."""
        part, limit = self.part, self.remote.size or self.part.total
        provable = part.validator is not None or self.remote.sha256 is not None
        if part.length and (not provable or limit is None or part.length > limit):
            part.restart()

    def _request(self) -> requests.Response:
        """Ask for the rest of the file, following redirects to where they may lead."""
        headers = {"Accept-Encoding": "identity", "User-Agent": f"batchgen/{__version__}"}
        if self.part.length:
            headers["Range"] = f"bytes={self.part.length}-"
            if self.part.validator:
                headers["If-Range"] = self.part.validator
        url, timeout = self.remote.url, (self.patience.connect, self.patience.read)
        for _ in range(_MAX_REDIRECTS + 1):
            response = self.session.get(url, headers=headers, stream=True, allow_redirects=False, timeout=timeout)
            self.reached = True
            if response.status_code not in _REDIRECTS:
                return response
            response.close()
            url = self._redirected(url, response.headers.get("Location", ""))
        raise self._refusal(f"redirects more than {_MAX_REDIRECTS} times; use another --mirror")

    def _redirected(self, url: str, location: str) -> str:
        target = location
        try:
            target = urljoin(url, location)
            here, there = urlsplit(url), urlsplit(target)
            safe = there.scheme == "https" or (there.scheme == here.scheme == "http")
            host = there.hostname or ""
        except ValueError:
            safe, host = False, ""
            target = "an address that is none"
        if not safe or host not in self.remote.hosts | {urlsplit(self.remote.url).hostname}:
            raise self._refusal(
                f"redirects to {shown(target)[:200]!a}; if you trust that server, name it with --mirror"
            )
        return target

    def _begin(self, response: requests.Response) -> int:
        """Check status and headers and make the part ready for the body; returns the whole file's size."""
        self._check_status(response)
        coding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            raise _TryAgain(f"sent {coding[:40]!a} though asked not to")
        if response.status_code == 206:
            total, validator = self._check_range(response), self.part.validator
        else:
            self.part.restart()
            total, validator = self._length(response), _validator(response)
        if self.remote.size is not None and total != self.remote.size:
            self.part.restart()
            raise _TryAgain(f"expected {self.remote.size} bytes, the server has {total}")
        self.part.remember(total, validator)
        return total

    def _check_status(self, response: requests.Response) -> None:
        status = response.status_code
        if status in (200, 206):
            return
        said = f"{status} {response.reason or ''}".strip()[:80]
        if status == 416:
            self.part.restart()
            raise _TryAgain(f"answered {said!a} to a request for the rest")
        if status in _TRANSIENT:
            raise _TryAgain(f"answered {said!a}", _retry_after(response))
        raise self._refusal(
            f"{_DENIED.get(status, 'cannot be had')} ({said!a}); check the address, or use another --mirror"
        )

    def _check_range(self, response: requests.Response) -> int:
        """The whole size out of `Content-Range: bytes 100-999/1000`, which must begin where the part ends."""
        text = response.headers.get("Content-Range", "")
        unit, _, rest = text.partition(" ")
        span, _, total = rest.partition("/")
        first, _, last = span.partition("-")
        if unit != "bytes" or not all(_is_number(number) for number in (first, last, total)):
            self.part.restart()
            raise _TryAgain(f"sent a part without saying which ({text[:80]!a})")
        if int(first) != self.part.length or not int(first) <= int(last) < int(total):
            length = self.part.length
            self.part.restart()
            raise _TryAgain(f"asked for what follows {length} bytes, got {text[:80]!a}")
        if _contradicts(response, self.part.validator) or self.part.total not in (None, int(total)):
            self.part.restart()
            raise _TryAgain("the file on the server was changed meanwhile")
        return int(total)

    def _length(self, response: requests.Response) -> int:
        text = response.headers.get("Content-Length", "")
        if _is_number(text):
            return int(text)
        if self.remote.size is None:
            raise _TryAgain("the server does not say how long the file is")
        return self.remote.size

    def _read(self, response: requests.Response, total: int) -> None:
        """Read the body up to total bytes; what is read is kept at once, however the connection ends."""
        patience, since, before = self.patience, time.monotonic(), self.part.length
        self._tell(total)
        while self.part.length < total:
            data = response.raw.read1(min(_BLOCK, total - self.part.length), decode_content=False)
            if not data:
                return
            self.part.append(data)
            self._tell(total)
            if self.stop.is_set():
                raise Stopped
            if time.monotonic() - since > patience.slow_window:
                if self.part.length - before < patience.slow_bytes:
                    raise _TryAgain(f"{self.part.length - before} bytes came in {patience.slow_window:.0f} s")
                since, before = time.monotonic(), self.part.length

    def _tell(self, total: int) -> None:
        if self.on_bytes:
            self.on_bytes(self.part.length, total)


def _validator(response: requests.Response) -> str | None:
    """What `If-Range` takes: a strong ETag, else the date."""
    etag = response.headers.get("ETag", "")
    if etag.startswith('"') and etag.isascii() and etag.isprintable():
        return etag
    date = response.headers.get("Last-Modified", "")
    return date if date and date.isascii() and date.isprintable() else None


def _contradicts(response: requests.Response, validator: str | None) -> bool:
    """Whether a part is said to be of another file than the one begun; a 206 need not say anything."""
    name = "ETag" if validator and validator.startswith('"') else "Last-Modified"
    return validator is not None and response.headers.get(name, validator) != validator


def _retry_after(response: requests.Response) -> float:
    """Seconds, given as a number or as a date; nothing that can be read is no time at all."""
    text = response.headers.get("Retry-After", "").strip()
    if _is_number(text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def _reason(error: BaseException) -> str:
    """What went wrong at the bottom of requests' and urllib3's layers, on one line."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200]
