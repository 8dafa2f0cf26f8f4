"""An output in object storage: s3://, gs://, abfs:// and the like, through obstore.

There are no renames there. One object appears when its upload is completed, or not at all. A dataset is complete when
_SUCCESS is there, which is put last, and only where there is none:

    PREFIX/
        _RUN                    put first, and only where there is none: whose prefix this is while a run writes to it
        00000042-<sha256[:16]>.parquet
        _SUCCESS                the plan, and each part's name, rows, bytes and SHA-256

pyarrow's own filesystems are not used for this: they can neither put conditionally nor give an upload up, and complete
one with what it has so far when an exception closes it.
"""

import hashlib
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow.parquet as pq

from batchgen.errors import BusyError, OutputError, UsageError
from batchgen.files import PART, SUCCESS

logger = logging.getLogger(__name__)

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss")
CLAIM = "_RUN"
PROBE = "_batchgen-probe"
THREADS = 8  # uploads at once
PIECE_BYTES = 8 * 2**20  # of an upload in several pieces; what is not larger goes in one request
MAX_PIECES = 9_000  # S3 takes 10,000
MAX_RETRIES = 10  # of a request, after 0.1 s, 0.2 s, ... 15 s: about a minute
CHECK_RETRIES = 2  # before the run, where somebody waits for the answer
CLIENT = {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(minutes=5)}
REMEDY = "run the same command again to go on"

T = TypeVar("T")
R = TypeVar("R")


# ---- addresses


@dataclass(frozen=True, slots=True)
class Address:
    """Where an output goes: the place in it that is written to is url for a dataset, and name in url for one object."""

    where: str  # as it may be shown: without keys
    url: str  # a prefix
    name: str  # "" for a dataset
    last: str  # last component of the path, or the bucket
    config: dict[str, Any]  # what the address says besides, in obstore's words


def is_address(text: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE) is not None


def refuse_address(text: str, what: str) -> None:
    """Raise UsageError for an address where only a local file will do."""
    if is_address(text):
        raise UsageError(f"{parse_address(text).where}: {what} is of a local file; download it first")


def stand_in(text: str, work_dir: Path) -> Path:
    """The path here beside which the work of an output in an object store is kept: s3://b/x/y/ -> ./y"""
    return work_dir / parse_address(text).last


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
    return Address(where, f"{scheme}://{bucket}/{folder}", name, last, _config(where, keys, parts.query))


def _config(where: str, keys: str, query: str) -> dict[str, Any]:
    """pyarrow's words for S3 in those of obstore."""
    given = dict(parse_qsl(query))
    if unknown := given.keys() - {"region", "endpoint_override", "scheme"}:
        raise UsageError(f"{where}: {min(unknown)!r} is no option of an address; region and endpoint_override are")
    config: dict[str, Any] = {}
    if keys:
        key, _, secret = keys.partition(":")
        config |= {"access_key_id": unquote(key), "secret_access_key": unquote(secret)}
    if "region" in given:
        config["region"] = given["region"]
    if "endpoint_override" in given:
        config["endpoint"] = f"{given.get('scheme', 'https')}://{given['endpoint_override']}"
    return config


# ---- one place in a store


class Store:
    """The objects below an address, by their names; every error is an OutputError for the user."""

    def __init__(self, address: Address, retries: int) -> None:
        self.where, self.name = address.where, address.name
        self.api, self.place = _open(address, retries)
        self.conditional = True  # until the store turns out not to heed conditions

    def put(self, name: str, data: bytes | Path) -> str:
        """Put an object, which is replaced at once or not at all; returns its tag."""
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        options = {"chunk_size": max(PIECE_BYTES, -(-size // MAX_PIECES)), "max_concurrency": 2}
        with self._told():
            return _tag(self.api.put(self.place, name, data, **options))

    def create(self, name: str, data: bytes) -> bytes:
        """Put an object where there is none; returns what is there then: `data`, or what another run put first."""
        there = self.get(name)
        if there is None and self.put_if_absent(name, data):
            return data
        return self.get(name) or b"" if there is None else there  # an answer that was lost: it may be ours

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Whether it was put; without conditions in the store, always."""
        if not self.conditional:
            _in_thread(lambda: self.put(name, data))
            return True
        try:
            with self._told():
                _in_thread(lambda: self.api.put(self.place, name, data, mode="create"))
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
        try:
            with self._told():
                return bytes(_in_thread(lambda: self.api.get(self.place, name).bytes()))
        except OutputError as error:
            if isinstance(error.__cause__, FileNotFoundError) and "NoSuchBucket" not in str(error.__cause__):
                return None
            raise

    def list(self) -> dict[str, tuple[int, str]]:
        """Every object's size and tag."""
        with self._told():
            found = _in_thread(lambda: self.api.list(self.place).collect())
        return {item["path"]: (item["size"], _tag(item)) for item in found if item["path"]}

    def delete(self, names: Sequence[str]) -> None:
        """What is not there need not be deleted."""
        try:
            with self._told():
                _in_thread(lambda: self.api.delete(self.place, list(names)))
        except OutputError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (self.api.exceptions.BaseError, NotImplementedError, OSError, ValueError) as error:
            raise OutputError(f"{self.where}: {_reason(error)}") from error


def open_store(address: Address, *, retries: int = MAX_RETRIES) -> Store:
    """Raises OutputError where obstore is not installed or the address is not one of its; asks nothing of the store."""
    return Store(address, retries)


def _open(address: Address, retries: int) -> tuple[Any, Any]:
    """obstore, and its own idea of the place."""
    try:
        import obstore
        import obstore.store
    except ImportError as error:
        remedy = "install it with: pip install 'batchgen[store]'"
        raise OutputError(f"{address.where}: to write there needs obstore, which is not installed; {remedy}") from error
    named = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    endpoint = address.config.get("endpoint") or next((os.environ[name] for name in named if name in os.environ), "")
    options: dict[str, Any] = {"retry_config": {"max_retries": retries}, "client_options": dict(CLIENT)}
    if endpoint.startswith("http://"):
        options["client_options"]["allow_http"] = True
    if address.url.startswith("s3") and "access_key_id" not in address.config:
        options["credential_provider"] = _keys_of_a_profile()
    try:
        from_url: Any = obstore.store.from_url  # whose overloads want each store's own options
        return obstore, from_url(address.url, config=address.config, **options)
    except (obstore.exceptions.BaseError, ValueError) as error:
        raise OutputError(f"{address.where}: {_reason(error)}; check the address") from error


def _keys_of_a_profile() -> Any:
    """Keys from ~/.aws, which obstore leaves to boto3; None where the environment says them or there are none."""
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
    except (BotoCoreError, ValueError):  # no such profile, or nothing in it: what the store says then is told
        return None


def _in_thread(call: Callable[[], R]) -> R:
    """In a thread, so that a signal does not wait for the end of a request and its retries."""
    return next(_in_threads(lambda _: call(), [None], 1))


def _in_threads(call: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Results as they come. After an error, or where it is closed before its end, no more are begun."""
    pool = ThreadPoolExecutor(threads)
    try:
        for future in as_completed([pool.submit(call, item) for item in items]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _tag(meta: Any) -> str:
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
            "tools have (~/.aws is read where boto3 is installed)"
        )
    if "403 Forbidden" in text:
        return f"not permitted: {said}; to list, get, put and delete there is needed"
    if "error sending request" in text or "timed out" in text:
        return "the store does not answer; check AWS_ENDPOINT_URL and the network"
    return said


# ---- before the run


def check_store(address: Address, run: str | None) -> None:
    """Refuse, before any work, a place that cannot be written, or that is another's; `run` names what goes on.

    An object is really put, below a name that readers skip, and deleted again.
    """
    store = open_store(address, retries=CHECK_RETRIES)
    if not address.name:
        _refuse_others(store, run, None)
    _in_thread(lambda: store.put(PROBE, b""))
    store.delete([PROBE])


def _refuse_others(store: Store, run: str | None, plan: dict[str, Any] | None) -> None:
    """Raise where the prefix holds anything but what the run of this name has put there (None: nothing yet)."""
    names = store.list().keys() - {PROBE}
    strange = sorted(name for name in names if name not in (CLAIM, SUCCESS) and not PART.fullmatch(name))
    if strange:
        what = f"something else than a dataset of batchgen is there ({strange[0]})"
        raise OutputError(f"{store.where}: {what}; choose another prefix")
    if SUCCESS in names:
        old = _read_json(store.get(SUCCESS))
        same = plan is None or {key: old.get(key) for key in plan} == plan
        if run is None or old.get("run") != run or not same:
            what = "a complete dataset is there, which is never replaced"
            raise OutputError(f"{store.where}: {what}; choose another prefix, or delete it first")
    elif CLAIM in names:
        _refuse_claim(store, store.get(CLAIM), run)
    elif names:
        what = f"{len(names):,} parts of a run that did not end are there"
        raise OutputError(f"{store.where}: {what}; choose another prefix, or delete them first")


def _refuse_claim(store: Store, claim: bytes | None, run: str | None) -> None:
    claimed = _read_json(claim)
    if run is None or claimed.get("run") != run:
        who = f"another run writes there ({claimed.get('directory')} on {claimed.get('host')})"
        raise BusyError(
            f"{store.where}: {who}; go on with that one, or, if it is gone for good, delete what is below the prefix"
        )


def _read_json(data: bytes | None) -> dict[str, Any]:
    try:
        value = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# ---- a dataset


def claim_prefix(store: Store, run: str, directory: Path, plan: dict[str, Any]) -> None:
    """Make the prefix this run's own until its dataset is complete; raises BusyError where it is another's."""
    _refuse_others(store, run, plan)
    if store.get(SUCCESS) is not None:  # a run was killed when it had only to clear up
        return
    claim = json.dumps({"run": run, "host": socket.gethostname(), "directory": str(directory.resolve())}).encode()
    _refuse_claim(store, store.create(CLAIM, claim), run)
    if store.conditional:
        store.conditional = not store.put_if_absent(CLAIM, claim)  # some stores take the condition and do not heed it
    if not store.conditional:
        logger.warning("%s: this store has no conditional put: no other run may write there meanwhile", store.where)


@dataclass(frozen=True, slots=True)
class Sent:
    """A part that was uploaded: what _SUCCESS says of it, and the tag that the store gave it."""

    name: str
    rows: int
    bytes: int
    sha256: str
    tag: str


def publish_dataset(store: Store, parts: Sequence[Path], plan: dict[str, Any], run: str, record: Path) -> None:
    """Upload the parts that are not there yet, and make them a dataset; the prefix is claimed.

    record is a local file of what was uploaded, for the next run if this one does not end. Raises OutputError where
    the store fails for good, or another run's _SUCCESS is there.
    """
    if store.get(SUCCESS) is None:
        sent = send_parts(store, parts, record)
        listed = [{key: value for key, value in asdict(one).items() if key != "tag"} for one in sent]
        success = json.dumps(plan | {"run": run, "parts": listed}, sort_keys=True).encode()
        there = store.create(SUCCESS, success)
        if there != success:
            theirs = {part["name"] for part in _read_json(there).get("parts", [])}
            store.delete([one.name for one in sent if one.name not in theirs])
            raise OutputError(f"{store.where}: another run has completed a dataset there first; choose another prefix")
    try:
        store.delete([CLAIM])
    except OutputError as error:  # the dataset is complete all the same
        logger.warning("%s; %s can be deleted", error, CLAIM)


def send_parts(store: Store, parts: Sequence[Path], record: Path) -> list[Sent]:
    """Upload until every part is there as it was sent, and no other; raises OutputError where it does not stay so."""
    sent = _read_record(record)
    names = {part.name for part in parts}
    for trial in range(3):
        there = store.list()
        if others := [name for name in there if PART.fullmatch(name) and name not in names]:
            store.delete(others)  # of a run that --restart discarded
        missing = [part for part in parts if not _is_there(sent.get(part.name), there.get(part.name))]
        if not missing:
            return [sent[part.name] for part in parts]
        if trial:
            logger.warning("%s: %d parts are not as they were sent; they are sent again", store.where, len(missing))
        with open(record, "a", encoding="utf-8") as file:
            for one in _in_threads(lambda part: _send(store, part), missing, THREADS):
                sent[one.name] = one
                file.write(json.dumps(asdict(one)) + "\n")
                file.flush()
    raise OutputError(f"{store.where}: something else changes the parts there ({missing[0].name}); have it stop")


def _send(store: Store, part: Path) -> Sent:
    with open(part, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256[:16] not in part.name:
        raise OutputError(f"{part}: the part is damaged; it will be made again")
    return Sent(part.name, pq.read_metadata(part).num_rows, part.stat().st_size, sha256, store.put(part.name, part))


def _is_there(sent: Sent | None, found: tuple[int, str] | None) -> bool:
    return sent is not None and found == (sent.bytes, sent.tag)


def _read_record(path: Path) -> dict[str, Sent]:
    """By name; a line that a kill cut short is none."""
    sent = {}
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        values = _read_json(line)
        if values.keys() == Sent.__dataclass_fields__.keys():
            sent[values["name"]] = Sent(**values)
    return sent


# ---- one object


def publish_file(store: Store, path: Path) -> None:
    """Upload a file as the one object of the address; until it is whole there, what had the name before stays."""
    _in_thread(lambda: store.put(store.name, path))
