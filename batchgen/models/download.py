"""One file from one address over an unreliable network: resumed, checked, and renamed once it is complete.

NAME.part holds the bytes received so far. NAME.part.json holds the file's size and validator (ETag or Last-Modified),
by which the server recognizes it. A part is resumed only with `If-Range`, or if a known SHA-256 checks the result.
"""

import hashlib
import json
import logging
import os
import random
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urljoin, urlsplit, urlunsplit

import requests
from urllib3.exceptions import HTTPError

from batchgen import __version__
from batchgen.errors import ModelError
from batchgen.files import lock, parse_json, replace_file, sha256_of, sync_path

logger = logging.getLogger(__name__)

MIRROR_VARIABLE = "BATCHGEN_MIRROR"

OnBytes = Callable[[int, int | None], None]  # (bytes received, bytes in total if known)

_BLOCK = 2**18
_PROGRESS = 2**16  # a try makes progress if it gets this many bytes farther than all tries before it
_MAX_REDIRECTS = 5
_MISMATCHES = 2  # complete downloads with a wrong hash before giving up
_REDIRECTS = (301, 302, 303, 307, 308)
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_DENIED = {401: "requires a password", 403: "is refused", 404: "does not exist", 410: "no longer exists"}
OTHER_MIRROR = f"set {MIRROR_VARIABLE} to another mirror"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, in seconds, and how often to try without progress."""

    connect: float = 15.0
    read: float = 30.0
    tries: int = 8
    tries_unreached: int = 4  # if no answer ever came: there is no network, or no such server
    first_wait: float = 0.5
    longest_wait: float = 60.0
    longest_retry_after: float = 600.0
    slow_window: float = 60.0  # a connection that brings less than slow_bytes in this time is dropped
    slow_bytes: int = 2**14


@dataclass(frozen=True, slots=True)
class Remote:
    """A file to download: its address, and its size and SHA-256 if they are known."""

    url: str
    size: int | None = None
    sha256: str | None = None
    origin: str = "OpenAI's"  # of the sha256, for errors
    hosts: frozenset[str] = field(default_factory=frozenset)  # allowed for redirects, besides its own


class Stopped(Exception):
    """The download was stopped; the received bytes are kept."""


class _Retry(Exception):
    """A try failed in a way that the next one may not; wait: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason, wait)
        self.reason, self.wait = reason, wait


def redact(url: str) -> str:
    """An address without a user's name and password, for messages."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def _root_cause(error: BaseException) -> str:
    """The innermost of the errors that requests and urllib3 wrap, on one line."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200]


# ---- the bytes received so far


class _Part:
    """NAME.part with its running SHA-256, and NAME.part.json; locked while open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.state = path.with_name(path.name + ".part.json")
        self.length = 0
        self.total: int | None = None
        self.validator: str | None = None
        self.digest = hashlib.sha256()
        self._descriptor = -1

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ModelError(
                f"{self.path}: cannot be written ({error.strerror or error}); make room or use another folder, "
                "then run the same command to resume"
            ) from error

    def _open(self) -> int:
        """Open or create the part; one that is a link, another user's or writable by others is replaced."""
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        with suppress(OSError):
            descriptor = os.open(self.part, flags)
            found = os.fstat(descriptor)
            is_private = found.st_uid == os.geteuid() and found.st_nlink == 1 and not found.st_mode & 0o077
            if stat.S_ISREG(found.st_mode) and is_private:
                return descriptor
            os.close(descriptor)
        self.part.unlink(missing_ok=True)
        return os.open(self.part, flags | os.O_CREAT | os.O_EXCL, 0o600)

    def _read_state(self) -> None:
        """Read NAME.part.json if it is valid; without it, a known SHA-256 still allows the part to be resumed."""
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            with self.state.open("rb") as file:
                values = parse_json(file.read(2**16))
            total, validator = values["total"], values["validator"]
            is_valid = validator is None or (isinstance(validator, str) and validator.isprintable())
            if type(total) is int and total >= 0 and is_valid:
                self.total, self.validator = total, validator

    def __enter__(self) -> "_Part":
        with self._write_errors():
            self._descriptor = self._open()
            if not lock(self._descriptor):  # two writers would mix their bytes
                os.close(self._descriptor)
                raise ModelError(f"{self.path}: is being downloaded by another process; wait for it")
            self._read_state()
            while block := os.read(self._descriptor, 2**20):
                self.digest.update(block)
                self.length += len(block)
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)

    def write_state(self, total: int, validator: str | None) -> None:
        if (total, validator) != (self.total, self.validator):
            self.total, self.validator = total, validator
            with self._write_errors():
                values = {"total": total, "validator": validator}
                replace_file(self.state, json.dumps(values).encode(), durable=False)

    def append(self, data: bytes) -> None:
        with self._write_errors():
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]
        self.digest.update(data)
        self.length += len(data)

    def restart(self) -> None:
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self.digest = hashlib.sha256()
        self.length = 0

    def finish(self) -> None:
        with self._write_errors():
            os.fsync(self._descriptor)
            self.part.rename(self.path)
            self.state.unlink(missing_ok=True)
            sync_path(self.path.parent)


# ---- the server


def _validator_of(response: requests.Response) -> str | None:
    """The value for `If-Range`: a strong ETag, else the date."""
    etag = response.headers.get("ETag", "")
    if etag.startswith('"') and etag.isascii() and etag.isprintable():
        return etag
    date = response.headers.get("Last-Modified", "")
    return date if date and date.isascii() and date.isprintable() else None


def _retry_after(response: requests.Response) -> float:
    """The Retry-After header, a number or a date, in seconds; 0 if it is absent or malformed."""
    text = response.headers.get("Retry-After", "").strip()
    if _is_number(text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


class _Session(requests.Session):
    """Follows no redirect: requests would read its whole body and prepare the next request in any case."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


class _Download:
    """The tries to download one file."""

    def __init__(
        self, remote: Remote, part: _Part, patience: Patience, on_bytes: OnBytes, stop: threading.Event
    ) -> None:
        self.remote, self.part, self.patience = remote, part, patience
        self.on_bytes, self.stop = on_bytes, stop
        self.session = _Session()
        self.is_reached = False  # whether any answer came

    def _error(self, reason: str) -> ModelError:
        return ModelError(f"{redact(self.remote.url)}: {reason}")

    def _resolve_redirect(self, url: str, location: str) -> str:
        """The address to which a redirect leads; ModelError unless it keeps https and an allowed host."""
        target = location
        try:
            target = urljoin(url, location)
            here, there = urlsplit(url), urlsplit(target)
            is_safe = there.scheme == "https" or (there.scheme == here.scheme == "http")
            host = there.hostname or ""
        except ValueError:
            is_safe, host, target = False, "", "an invalid address"
        if not is_safe or host not in self.remote.hosts | {urlsplit(self.remote.url).hostname}:
            remedy = f"if you trust that server, set {MIRROR_VARIABLE} to it"
            raise self._error(f"redirects to {redact(target)[:200]!a}; {remedy}")
        return target

    def _request(self) -> requests.Response:
        """Request the rest of the file and follow allowed redirects."""
        headers = {"Accept-Encoding": "identity", "User-Agent": f"batchgen/{__version__}"}
        if self.part.length:
            headers["Range"] = f"bytes={self.part.length}-"
            if self.part.validator:
                headers["If-Range"] = self.part.validator
        url, timeout = self.remote.url, (self.patience.connect, self.patience.read)
        for _ in range(_MAX_REDIRECTS + 1):
            response = self.session.get(url, headers=headers, stream=True, allow_redirects=False, timeout=timeout)
            self.is_reached = True
            if response.status_code not in _REDIRECTS:
                return response
            response.close()
            url = self._resolve_redirect(url, response.headers.get("Location", ""))
        raise self._error(f"redirects more than {_MAX_REDIRECTS} times; {OTHER_MIRROR}")

    def _restart(self, reason: str) -> _Retry:
        """Discard the part; returns the exception that begins again."""
        self.part.restart()
        return _Retry(reason)

    def _check_status(self, response: requests.Response) -> None:
        status = response.status_code
        if status in (200, 206):
            return
        answer = f"{status} {response.reason or ''}".strip()[:80]
        if status == 416:
            raise self._restart(f"answered {answer!a} to a request for the rest")
        if status in _TRANSIENT:
            raise _Retry(f"answered {answer!a}", _retry_after(response))
        denied = _DENIED.get(status, "cannot be downloaded")
        raise self._error(f"{denied} ({answer!a}); check the address, or {OTHER_MIRROR}")

    def _total_of_part(self, response: requests.Response) -> int:
        """The file's size from `Content-Range: bytes 100-999/1000`, which must begin at the end of our part."""
        text = response.headers.get("Content-Range", "")
        unit, _, rest = text.partition(" ")
        span, _, total = rest.partition("/")
        first, _, last = span.partition("-")
        if unit != "bytes" or not all(_is_number(number) for number in (first, last, total)):
            raise self._restart(f"sent a part without its range ({text[:80]!a})")
        if int(first) != self.part.length or not int(first) <= int(last) < int(total):
            raise self._restart(f"requested the bytes from {self.part.length} on, received {text[:80]!a}")
        ours = self.part.validator
        name = "ETag" if ours and ours.startswith('"') else "Last-Modified"
        has_changed = ours is not None and response.headers.get(name, ours) != ours  # a 206 may lack the header
        if has_changed or self.part.total not in (None, int(total)):
            raise self._restart("the file on the server has changed")
        return int(total)

    def _check_headers(self, response: requests.Response) -> int:
        """Check status and headers, prepare the part for the body, and return the file's size."""
        self._check_status(response)
        coding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            raise _Retry(f"sent the encoding {coding[:40]!a}, which was not requested")
        if response.status_code == 206:
            total, validator = self._total_of_part(response), self.part.validator
        else:
            self.part.restart()
            text = response.headers.get("Content-Length", "")
            length = int(text) if _is_number(text) else self.remote.size
            if length is None:
                raise _Retry("the server does not state the file's length")
            total, validator = length, _validator_of(response)
        if self.remote.size is not None and total != self.remote.size:
            raise self._restart(f"expected {self.remote.size} bytes, the server has {total}")
        self.part.write_state(total, validator)
        return total

    def _read_body(self, response: requests.Response, total: int) -> None:
        """Append the body to the part, up to `total` bytes; every block is kept if the connection breaks."""
        patience, since, before = self.patience, time.monotonic(), self.part.length
        self.on_bytes(self.part.length, total)
        while self.part.length < total:
            data = response.raw.read1(min(_BLOCK, total - self.part.length), decode_content=False)
            if not data:
                return
            self.part.append(data)
            self.on_bytes(self.part.length, total)
            if self.stop.is_set():
                raise Stopped
            if time.monotonic() - since > patience.slow_window:
                if self.part.length - before < patience.slow_bytes:
                    raise _Retry(f"received {self.part.length - before} bytes in {patience.slow_window:.0f} s")
                since, before = time.monotonic(), self.part.length

    def _try_once(self) -> None:
        """Request the missing bytes once and read the answer to its end."""
        part, size = self.part, self.remote.size or self.part.total
        is_provable = part.validator is not None or self.remote.sha256 is not None
        most = size if self.remote.sha256 or size is None else size - 1  # without a hash, a last answer must prove it
        if part.length and (not is_provable or most is None or part.length > most):
            part.restart()
        if part.length and part.length == size:
            return
        try:
            with closing(self._request()) as response:
                total = self._check_headers(response)
                self._read_body(response, total)
        except requests.exceptions.SSLError as error:
            remedy = "name the file of your certificate authority in REQUESTS_CA_BUNDLE"
            raise self._error(f"no secure connection ({_root_cause(error)}); {remedy}") from error
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            raise self._error(f"is not a valid address ({_root_cause(error)})") from error
        except (requests.RequestException, HTTPError, OSError) as error:
            raise _Retry(_root_cause(error)) from error
        if part.length < total:
            raise _Retry(f"the connection ended after {part.length} of {total} bytes")

    def _wait(self, failure: _Retry, failures: int) -> None:
        """Sleep before the next try: longer each time, never less than the server asks; a stop ends the sleep."""
        patience = self.patience
        if not self.is_reached and failures >= patience.tries_unreached:
            raise self._error(f"{failure.reason}; check the network, or {OTHER_MIRROR}")
        if failures >= patience.tries:
            raise self._error(f"{failure.reason}; gave up after {failures} tries; run the same command to resume")
        if failure.wait > patience.longest_retry_after:
            raise self._error(f"{failure.reason}; run the same command after {failure.wait:.0f} s, as the server asks")
        backoff = patience.first_wait * 2.0 ** max(failures - 1, 0) * random.uniform(0.75, 1.25)
        seconds = max(failure.wait, min(patience.longest_wait, backoff))
        level = logging.WARNING if failures > 2 else logging.INFO
        logger.log(level, "%s: %s; trying again in %.0f s", redact(self.remote.url), failure.reason, seconds)
        if self.stop.wait(seconds):
            raise Stopped

    def run(self) -> str:
        """Try until the file is complete and correct, and return its SHA-256; ModelError after too many failures."""
        farthest, failures, mismatches = self.part.length, 0, 0
        with self.session:
            while True:
                try:
                    self._try_once()
                except _Retry as failure:
                    failures = 0 if self.part.length >= farthest + _PROGRESS else failures + 1
                    farthest = max(farthest, self.part.length)
                    self._wait(failure, failures)
                    continue
                found = self.part.digest.hexdigest()
                if self.remote.sha256 in (None, found):
                    self.part.finish()
                    return found
                mismatches += 1
                if mismatches >= _MISMATCHES:
                    raise self._error(
                        f"expected sha256 {self.remote.sha256} ({self.remote.origin}), found {found}, {mismatches} "
                        f"times; the server has another file, or it changes on the way: {OTHER_MIRROR}"
                    )
                self.part.restart()


def _check_existing(remote: Remote, path: Path) -> str | None:
    """Return the SHA-256 of `path` if it is the file; remove another file there."""
    if not os.path.lexists(path):
        return None
    if path.is_symlink() or not path.is_file():
        raise ModelError(f"{path}: is in the way, and is not a file; move it")
    if remote.size in (None, path.stat().st_size):
        found = sha256_of(path)
        if remote.sha256 in (None, found):
            return found
    path.unlink()
    return None


def download(
    remote: Remote,
    path: Path,
    *,
    patience: Patience | None = None,
    on_bytes: OnBytes | None = None,
    stop: threading.Event | None = None,
) -> str:
    """Download a file to `path`, check it and return its SHA-256; a correct file that is already there is kept.

    Only this user may write to path's folder, because the names of the parts are predictable.
    """
    found = _check_existing(remote, path)
    if found:
        return found
    on_bytes = on_bytes or (lambda done, total: None)
    with _Part(path) as part:
        return _Download(remote, part, patience or Patience(), on_bytes, stop or threading.Event()).run()
