"""Object stores: addresses (s3://, gs://, abfs:// and the like), and a client of one place in a store, by obstore.

pyarrow's own filesystems are not used to write: they can neither put conditionally nor abort an upload, and complete
one with what it has so far when an exception closes it.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from batchgen.errors import OutputError, UsageError

logger = logging.getLogger(__name__)

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss")
PIECE_BYTES = 8 * 2**20  # of an upload in several pieces; what is not larger goes in one request
MAX_PIECES = 9_000  # S3 takes 10,000
NOTE = "batchgen"  # key in an object's metadata
MAX_RETRIES = 10  # of a request, after 0.1 s, 0.2 s, ... 15 s: about a minute
CLIENT = {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(minutes=5)}

T = TypeVar("T")
R = TypeVar("R")


# ---- addresses


@dataclass(frozen=True, slots=True)
class Address:
    """An output's place in a store: the prefix `url` for a dataset, or the object `name` below it."""

    where: str  # as it may be shown: without keys
    url: str  # a prefix
    name: str  # "" for a dataset
    last: str  # last component of the path, or the bucket
    config: dict[str, str] = field(repr=False)  # keys, region and endpoint, in obstore's words


def is_address(text: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE) is not None


def _parse_config(where: str, keys: str, query: str) -> dict[str, str]:
    """pyarrow's words for S3 in those of obstore."""
    given = dict(parse_qsl(query))
    if unknown := given.keys() - {"region", "endpoint_override", "scheme"}:
        raise UsageError(f"{where}: {min(unknown)!r} is not an option of an address; use region or endpoint_override")
    config: dict[str, str] = {}
    if keys:
        key, _, secret = keys.partition(":")
        config |= {"access_key_id": unquote(key), "secret_access_key": unquote(secret)}
    if "region" in given:
        config["region"] = given["region"]
    if "endpoint_override" in given:
        config["endpoint"] = f"{given.get('scheme', 'https')}://{given['endpoint_override']}"
    return config


def parse_address(text: str, *, dataset: bool = False) -> Address:
    """`s3://KEY:SECRET@bucket/path?region=...`, as pyarrow takes it; a dataset is a prefix, which ends in a slash."""
    try:
        parts = urlsplit(text)
    except ValueError as error:
        scheme = text.partition("://")[0]
        raise UsageError(f"{scheme}://...: not an address ({error}); write it as s3://bucket/folder/") from error
    scheme, netloc, path = parts.scheme.lower(), parts.netloc, unquote(parts.path)
    keys, _, bucket = netloc.rpartition("@") if scheme in ("s3", "s3a") else ("", "", netloc)
    where = f"{scheme}://{bucket}{path}"
    if scheme not in SCHEMES or not bucket:
        raise UsageError(f"{where}: not an address that can be written; use s3://bucket/, gs://, abfs:// or a path")
    folder, _, name = path.strip("/").rpartition("/")
    if dataset or path.endswith("/") or not name:
        folder, name = path.strip("/"), ""
    last = Path(path.strip("/")).name or bucket
    return Address(where, f"{scheme}://{bucket}/{folder}", name, last, _parse_config(where, keys, parts.query))


def refuse_address(text: str, what: str) -> None:
    """Raise UsageError for an address if only a local file will do."""
    if is_address(text):
        raise UsageError(f"{parse_address(text).where}: {what} is of a local file; download it first")


# ---- one place in a store


def in_threads(call: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Results as they come. After an error, or if it is closed before its end, no more calls begin."""
    pool = ThreadPoolExecutor(threads)
    try:
        for future in as_completed([pool.submit(call, item) for item in items]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def in_thread(call: Callable[[], R]) -> R:
    """The result of a call in a thread, so that a signal does not wait for the end of a request and its retries."""
    return next(in_threads(lambda _: call(), [None], 1))


def _tag(meta: Mapping[str, object]) -> str:
    return str(meta["e_tag"] or "").strip('"')  # Azure quotes it in one answer, and not in another


def _reason(error: Exception) -> str:
    """What a store says is wrong, and the remedy, in one line."""
    text = " ".join(str(error).split("\n\nDebug source")[0].split())
    code, message = (re.search(f"<{tag}>(.*?)</{tag}>", text) for tag in ("Code", "Message"))
    said = f"{message[1]} ({code[1]})" if code and message else text[:400]
    if code and code[1] == "NoSuchBucket":
        return "there is no such bucket; create it or check its name"
    if type(error).__name__ == "UnauthenticatedError" or re.search(r"/latest/(api|meta-data)|CredentialProvider", text):
        return (
            "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what the store's own "
            "tools have (~/.aws is read if boto3 is installed)"
        )
    if "403 Forbidden" in text:
        return f"not permitted: {said}; batchgen needs to list, get, put and delete there"
    if "error sending request" in text or "timed out" in text:
        return "the store does not answer; check AWS_ENDPOINT_URL and the network"
    return said


def _keys_of_a_profile() -> object:
    """Keys from ~/.aws, which obstore leaves to boto3; None if the environment has them or there are none."""
    files = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
    there = any(Path(os.environ.get(name, usual)).expanduser().exists() for name, usual in files.items())
    if "AWS_ACCESS_KEY_ID" in os.environ or not there:
        return None
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return None
    try:
        return Boto3CredentialProvider(boto3.Session())
    except (BotoCoreError, ValueError):  # no such profile, or it is empty: the store's own error will say so
        return None


def _connect(address: Address, retries: int) -> tuple[ModuleType, object]:
    """obstore, and its own object for the place."""
    try:
        import obstore
        import obstore.store
    except ImportError as error:
        remedy = "install it with: pip install obstore"
        raise OutputError(f"{address.where}: to write there needs obstore, which is not installed; {remedy}") from error
    named = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    endpoint = address.config.get("endpoint") or next((os.environ[name] for name in named if name in os.environ), "")
    client: dict[str, object] = dict(CLIENT)
    if endpoint.startswith("http://"):
        client["allow_http"] = True
    options: dict[str, object] = {"retry_config": {"max_retries": retries}, "client_options": client}
    if address.url.startswith("s3") and "access_key_id" not in address.config:
        options["credential_provider"] = _keys_of_a_profile()
    api: ModuleType = obstore  # its types want each store's own options
    try:
        return api, api.store.from_url(address.url, config=address.config, **options)
    except (obstore.exceptions.BaseError, ValueError) as error:
        raise OutputError(f"{address.where}: {_reason(error)}; check the address") from error


class Store:
    """The objects below an address, by their names; every error is an OutputError for the user."""

    def __init__(self, address: Address, retries: int) -> None:
        self.where, self.name = address.where, address.name
        self.api, self.place = _connect(address, retries)
        self.conditional = True  # until the store turns out to ignore conditions

    def put(self, name: str, data: bytes | Path, note: str = "") -> str:
        """Put an object, with a note in its metadata, which is replaced at once or not at all; returns its tag."""
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        options: dict[str, object] = {"chunk_size": max(PIECE_BYTES, -(-size // MAX_PIECES)), "max_concurrency": 2}
        if note:
            options["attributes"] = {NOTE: note}
        with self._named_errors():
            return _tag(self.api.put(self.place, name, data, **options))

    def create(self, name: str, data: bytes) -> bytes:
        """Put an object if there is none; returns what is there then: `data`, or what another run put first."""
        there = self.get(name)
        if there is None and self.put_if_absent(name, data):
            return data
        return self.get(name) or b"" if there is None else there  # an answer that was lost: it may be ours

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Whether it was put; always, if the store has no conditions."""
        if not self.conditional:
            in_thread(lambda: self.put(name, data))
            return True
        try:
            with self._named_errors():
                in_thread(lambda: self.api.put(self.place, name, data, mode="create"))
        except OutputError as error:
            cause = error.__cause__
            if isinstance(cause, self.api.exceptions.AlreadyExistsError):
                return False
            if isinstance(cause, NotImplementedError) or "501 Not Implemented" in str(cause):
                self.conditional = False
                return self.put_if_absent(name, data)
            raise
        return True

    def get(self, name: str) -> bytes | None:
        """An object's bytes, or None if it is not there."""
        return self._find(lambda: bytes(self.api.get(self.place, name).bytes()))

    def find_note(self, name: str) -> str | None:
        """The note in an object's metadata, "" if it has none; None if there is no such object."""
        found = self._find(lambda: self.api.get(self.place, name, options={"head": True}))
        return None if found is None else str(found.attributes.get(NOTE, ""))

    def _find(self, get: Callable[[], T]) -> T | None:
        try:
            with self._named_errors():
                return in_thread(get)
        except OutputError as error:
            if isinstance(error.__cause__, FileNotFoundError) and "NoSuchBucket" not in str(error.__cause__):
                return None
            raise

    def list(self) -> dict[str, tuple[int, str]]:
        """Every object's size and tag."""
        with self._named_errors():
            found = in_thread(lambda: self.api.list(self.place).collect())
        return {item["path"]: (item["size"], _tag(item)) for item in found if item["path"]}

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects, if they are there."""
        try:
            with self._named_errors():
                in_thread(lambda: self.api.delete(self.place, list(names)))
        except OutputError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (self.api.exceptions.BaseError, NotImplementedError, OSError, ValueError) as error:
            raise OutputError(f"{self.where}: {_reason(error)}") from error


def open_store(address: Address, *, retries: int = MAX_RETRIES) -> Store:
    """A client that has asked nothing of the store yet; OutputError without obstore, or for an address it refuses."""
    return Store(address, retries)
