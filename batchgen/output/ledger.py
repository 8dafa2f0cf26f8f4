"""The work directory beside the output: what is planned, what is done, and nothing else.

    OUT.parquet.batchgen/
        lock                    flock, held for life: a second run finds it taken and touches nothing; it may hold
                                this directory's name to an object store
        plan.json               written once: what is being made; a run that would make something else is refused
        attempt-<uuid>/         workers write only here
        parts/00000042-<sha256[:16]>.parquet    one rename is the commit
        old/                    the dataset that parts/ has just taken the place of
        destination             the address of an output in an object store
        sent.jsonl              parts that are there already

A part is a chunk's finished rows. Its receipt travels in its own metadata, so that a resumed run can count it.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import BusyError, OutputError, UsageError
from batchgen.files import PART, SUCCESS, WORK_SUFFIX, sync_path
from batchgen.output.dataset import dataset_plan
from batchgen.types import Receipt

logger = logging.getLogger(__name__)

RECEIPT_KEY = "batchgen_receipt"
COUNTS = ("input_rows", "rows", "ok", "rejected", "failed", "prompt_tokens", "completion_tokens", "space_ends")


def work_directory(out: Path) -> Path:
    return out.with_name(out.name + WORK_SUFFIX)


def run_name(out: Path) -> str | None:
    """What the output's work directory is called in an object store, if there is one and it was needed."""
    try:
        return (work_directory(out) / "lock").read_text("ascii") or None
    except (OSError, ValueError):
        return None


class Ledger:
    """The work directory of one output, held by this process alone."""

    def __init__(self, out: Path, lock: int) -> None:
        self.out = out
        self.directory = work_directory(out)
        self.parts_directory = self.directory / "parts"
        self.attempt = self.directory / f"attempt-{uuid.uuid4().hex}"
        self.committed: dict[int, str] = {}  # chunk -> start of its part's SHA-256
        self.counts: Counter[str] = Counter()  # COUNTS of the committed chunks
        self._lock = lock

    @property
    def sent(self) -> Path:
        return self.directory / "sent.jsonl"

    def run_name(self) -> str:
        """Names this work directory to an object store, as long as it is there: --restart too leaves the lock."""
        if os.fstat(self._lock).st_size == 0:
            os.pwrite(self._lock, uuid.uuid4().hex.encode(), 0)
            os.fsync(self._lock)
        return os.pread(self._lock, 100, 0).decode("ascii")

    def keep_to(self, where: str) -> None:
        """Hold this work to one place in an object store; UsageError where it is for another of the same last name."""
        path = self.directory / "destination"
        old = path.read_text("utf-8") if path.exists() else where
        if old != where:
            raise UsageError(f"{self.directory}: the work there is for {old}; go on with that, or choose a --work-dir")
        _write_durably(path, where.encode())

    def part(self, chunk: int) -> Path:
        return self.parts_directory / _part_name(chunk, self.committed[chunk])

    def parts(self) -> Iterator[Path]:
        """Committed parts in the order of the input."""
        return map(self.part, sorted(self.committed))

    def settle(self, plan: dict[str, Any], automatic: dict[str, Any], *, restart: bool) -> dict[str, Any]:
        """Adopt the plan, or go on with the one that is there if it says the same; returns the plan that holds.

        Where `plan` says None, a new run takes the value from `automatic`, and a resumed one what it had.
        Raises UsageError naming what differs.
        """
        path = self.directory / "plan.json"
        plan = json.loads(json.dumps(plan))  # as it will be read back: tuples are lists
        if restart:
            self._clear()
        old = self.read_plan()
        if old is None:
            self._clear()
            self.parts_directory.mkdir()
            plan |= {key: value for key, value in automatic.items() if plan[key] is None}
            _write_durably(path, json.dumps(plan, indent=1).encode())
        else:
            refuse_changes(
                str(self.directory), old, plan, "run it as before, or pass --restart to discard what it has done"
            )
            if not self.parts_directory.exists() and dataset_plan(self.out) == old:
                os.rename(self.out, self.parts_directory)  # a run was killed when it had only to clear up
            self.parts_directory.mkdir(exist_ok=True)
            (self.parts_directory / SUCCESS).unlink(missing_ok=True)
            self._collect_parts()
        self.attempt.mkdir()
        return old or plan

    def commit(self, receipt: Receipt) -> None:
        """Make a worker's finished part one of the parts: one rename, on disk when this returns."""
        os.replace(receipt.path, self.parts_directory / _part_name(receipt.chunk, receipt.sha256[:16]))
        sync_path(self.parts_directory)
        self._count(receipt)

    def publish_dataset(self, plan: dict[str, Any]) -> None:
        """Make the folder of parts the output; its _SUCCESS, which holds the plan, comes last, then one rename."""
        _write_durably(self.parts_directory / SUCCESS, json.dumps(plan, sort_keys=True).encode())
        if self.out.exists():
            os.rename(self.out, self.directory / "old")
        os.rename(self.parts_directory, self.out)
        sync_path(self.out.parent)
        sync_path(self.directory)

    def _count(self, receipt: Receipt) -> None:
        self.committed[receipt.chunk] = receipt.sha256[:16]
        self.counts.update({name: getattr(receipt, name) for name in COUNTS})

    def read_plan(self) -> dict[str, Any] | None:
        """The plan of an interrupted run, if there is one."""
        path = self.directory / "plan.json"
        try:
            plan = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise OutputError(f"{path}: not a plan ({error}); pass --restart to begin again") from error
        if not isinstance(plan, dict):
            raise OutputError(f"{path}: not a plan; pass --restart to begin again")
        return plan

    def _clear(self) -> None:
        """Everything but the lock; the plan first, so that a clearing that is cut short is not resumed from."""
        (self.directory / "plan.json").unlink(missing_ok=True)
        sync_path(self.directory)
        self._remove_all_but_lock()

    def _remove_all_but_lock(self) -> None:
        for path in self.directory.iterdir():
            if path.name.startswith("attempt-"):
                _remove_attempt(path)
            elif path.name != "lock":
                _remove(path)

    def _collect_parts(self) -> None:
        """Take stock of committed parts; what is not whole is deleted and will be made again."""
        for path in self.directory.glob("attempt-*"):
            _remove_attempt(path)
        for path in sorted(self.parts_directory.iterdir()):
            receipt = _read_receipt(path)
            if receipt is None:
                logger.warning("%s: not the part that was committed; it will be made again", path)
                _remove(path)
            else:
                self._count(receipt)

    def close(self, *, finished: bool) -> None:
        """Let go of the lock; a finished run leaves nothing behind, nor does one that never began."""
        with suppress(OSError):  # the next run clears away what cannot be removed now
            if finished or not (self.directory / "plan.json").exists():
                self._clear()
                (self.directory / "lock").unlink()  # last: from here on the directory may be another run's
                self.directory.rmdir()
            else:
                _remove(self.attempt)
        os.close(self._lock)


@contextmanager
def open_ledger(out: Path) -> Iterator[Ledger]:
    """Hold the output's work directory; BusyError where another run does. It goes when the block ends well."""
    with _named_errors(work_directory(out)):
        ledger = Ledger(out, _take_lock(work_directory(out)))
        try:
            yield ledger
        except BaseException:
            ledger.close(finished=False)
            raise
        ledger.close(finished=True)


@contextmanager
def _named_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or directory
        kept = f"what is finished is kept in {directory}: " if directory.exists() else ""
        raise OutputError(f"{where}: {error.strerror or error}; {kept}run again when that is mended") from error


def _take_lock(directory: Path) -> int:
    """Lock the directory's lock file; it may be deleted by a run that ends at this moment, so look again."""
    while True:
        with suppress(FileExistsError):  # not exist_ok, which raises where the directory goes again at this moment
            directory.mkdir()
        try:
            lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            if directory.is_symlink():  # to nowhere
                raise
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise BusyError(f"{directory}: another run holds it; nothing was touched: wait for it to end") from None
        try:
            if os.path.samestat(os.fstat(lock), os.stat(directory / "lock")):
                return lock
        except FileNotFoundError:
            pass
        os.close(lock)


def _part_name(chunk: int, sha256: str) -> str:
    return f"{chunk:08d}-{sha256}.parquet"


def refuse_changes(where: str, old: dict[str, Any], new: dict[str, Any], remedy: str) -> None:
    """Raise UsageError, naming what differs, unless the run that made `old` and the one that would make `new` agree.

    None in `new` agrees with anything: it is automatic.
    """
    for key in sorted(old.keys() | new.keys()):
        if key not in old or key not in new or new[key] not in (None, old[key]):
            raise UsageError(
                f"{where}: the run to go on with had {key} {old.get(key)!r}, this one has {new.get(key)!r}; {remedy}"
            )


def _read_receipt(path: Path) -> Receipt | None:
    """The receipt of a committed part, or None where the file is not what its name says."""
    match = PART.fullmatch(path.name)
    if not match or not path.is_file():
        return None
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256[:16] != match[2]:
            return None
        try:
            values = json.loads(pq.read_schema(file).metadata[RECEIPT_KEY.encode()])
            receipt = Receipt(**values, path=path.name, sha256=sha256)
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
            return None
    return receipt if receipt.chunk == int(match[1]) else None


def with_receipt(schema: pa.Schema, receipt: Receipt) -> pa.Schema:
    """The schema of a part that carries its receipt (without what is only known of the finished file)."""
    values = {key: value for key, value in asdict(receipt).items() if key not in ("path", "sha256")}
    return schema.with_metadata({RECEIPT_KEY: json.dumps(values)})


def _remove_attempt(path: Path) -> None:
    """As far as it goes: a node of a cluster may still be writing there. Without the lease it ends."""
    (path / "lease").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_durably(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_path(path.parent)
