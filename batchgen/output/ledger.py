"""The work directory beside the output: what is planned, what is done, and nothing else.

    OUT.parquet.batchgen/
        lock                    flock, held for life: a second run is refused and touches nothing; it may hold
                                this directory's name to an object store
        plan.json               written once: what is being made; a run that would make something else is refused
        published.json          the same, once the output is complete: there is only to clear up
        attempt-<uuid>/         workers write only here
        parts/00000042-<sha256[:16]>.parquet    one rename is the commit
        old/                    the dataset whose place parts/ takes; it comes back if a run dies in between
        overwrite               empty: this run may replace what has the output's name
        destination             the address of an output in an object store; a local one has none
        sent.jsonl              parts that are in the store already
        whole                   empty: all parts are committed, and only to be published

A part is a chunk's finished rows. Its receipt is in its own metadata, so that a resumed run can count it.
"""

import json
import logging
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa

from batchgen.errors import BusyError, OutputError, UsageError
from batchgen.files import (
    CARD,
    PART,
    SUCCESS,
    TEMPORARY_SUFFIX,
    WORK_SUFFIX,
    is_sealed_card,
    lock,
    parse_json,
    replace_file,
    sync_path,
)
from batchgen.limits import reached_limit, reason_of
from batchgen.options import say
from batchgen.output.parts import MADE_AGAIN, check_count, in_order, part_name, read_numbers, read_receipt
from batchgen.plan import Plan
from batchgen.types import STATUSES, TOTALS, Reason, Receipt, add_reasons

logger = logging.getLogger(__name__)

OWN = {"lock", "plan.json", "published.json", "parts", "old", "overwrite", "destination", "sent.jsonl", "whole"}
OF_A_STORE = ("run", "parts", "statuses")  # keys of a _SUCCESS in an object store; see upload.py
COUNTS = (
    *("input_rows", "rows", "ok", "rejected", "failed", "prompt_tokens", "completion_tokens"),
    *("space_ends", "special_texts", "dropped", "reused", "extended", *TOTALS),
)


# ---- files


def _own_files(folder: Path) -> list[Path]:
    """What batchgen has put into a dataset's folder, _SUCCESS last: no link, one part of each chunk, its own card."""
    found = sorted(folder.iterdir())
    paths = [path for path in found if path.name == SUCCESS or PART.fullmatch(path.name) or _is_card(path)]
    files = [path for path in paths if path.is_file() and not path.is_symlink()]
    return list({path.name.partition("-")[0]: path for path in files}.values())


def _is_card(path: Path) -> bool:
    return path.name == CARD and is_sealed_card(path)


def refuse_foreign(folder: Path, out: Path) -> None:
    """Raise OutputError unless the folder is an older dataset or empty, so that `out`, its name, may be replaced."""
    others = set(folder.iterdir()) - set(_own_files(folder) if is_dataset(folder) else ()) if folder.is_dir() else {out}
    if others:
        what = f"something other than a dataset of batchgen is there ({min(others).name})"
        raise OutputError(f"{out}: {what}; choose another name, or move it away")


def _remove_dataset(folder: Path) -> None:
    """Remove an older dataset, _SUCCESS first, and nothing else: OSError if there is something else."""
    for path in reversed(_own_files(folder)):
        path.unlink()
    folder.rmdir()


def _is_own(path: Path) -> bool:
    """Whether a path in the work directory is batchgen's; nothing else there is removed."""
    return path.name in OWN or path.name.startswith("attempt-") or path.name.endswith(TEMPORARY_SUFFIX)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_attempt(path: Path) -> None:
    """Remove what can be removed: a node of a cluster may still write there. It ends when its lease is gone."""
    (path / "lease").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


# ---- stored plans


def parse_plan(data: str | bytes) -> Plan:
    """A plan that was stored as JSON, in a store with its parts; ValueError says what is wrong with it."""
    try:
        values = parse_json(data)
        if not isinstance(values, dict):
            raise ValueError("it is not an object")
        return Plan.from_json({key: value for key, value in values.items() if key not in OF_A_STORE})
    except (TypeError, RecursionError, UsageError) as error:
        raise ValueError(str(error)) from error


def refuse_conflict(where: str, old: Plan, plan: Plan, automatic: Iterable[str], remedy: str) -> None:
    """Raise UsageError, naming what differs, unless a run with `plan` makes the same rows as one with `old`."""
    if difference := old.conflict(plan, automatic):
        raise UsageError(f"{where}: {difference}; {remedy}")


def _refuse_other_reuse(directory: Path, old: Plan, plan: Plan) -> None:
    """Raise UsageError unless a run that is resumed copies rows of the same older outputs: they decide its chunks."""
    if old.reuse != plan.reuse:
        had, has = (f"{say('reuse')} of {', '.join(one.reuse)}" if one.reuse else "none" for one in (old, plan))
        what = f"rows are copied from other outputs now: it had {had}, and this has {has} (by SHA-256)"
        remedy = f"give the same {say('reuse')}, or pass {say('restart', True)} to discard what it has done"
        raise UsageError(f"{directory}: {what}; {remedy}")


def is_dataset(folder: Path, plan: Plan | None = None) -> bool:
    """Whether a folder is a complete dataset; with a plan, one that this plan made."""
    try:
        values = parse_json((folder / SUCCESS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) if plan is None else bool(values == plan.to_json())


# ---- the work directory


def work_directory(out: Path) -> Path:
    return out.with_name(out.name + WORK_SUFFIX)


def old_dataset(out: Path) -> Path:
    """Where the dataset is whose place is being taken."""
    return work_directory(out) / "old"


def run_name(out: Path) -> str | None:
    """The name of the output's work directory in an object store, if it is there and has needed one."""
    try:
        return (work_directory(out) / "lock").read_text("ascii") or None
    except (OSError, ValueError):
        return None


class Ledger:
    """The work directory of one output, held by this process alone."""

    def __init__(self, out: Path, descriptor: int = -1, *, where: Path | str = "", overwrite: bool = False) -> None:
        """descriptor is the locked file's, without which this only says what is there; where may be an address."""
        self.out = out
        self.address = where if isinstance(where, str) else ""
        self.overwrite = overwrite  # what has the output's name may be replaced
        self.directory = work_directory(out)
        self.parts_directory = self.directory / "parts"
        self.attempt = self.directory / f"attempt-{uuid.uuid4().hex}"
        self.sent = self.directory / "sent.jsonl"
        self.committed: dict[int, str] = {}  # chunk -> start of its part's SHA-256
        self.counts: Counter[str] = Counter()  # COUNTS of the committed chunks
        self.reasons: dict[str, Reason] = {}  # why rows of them have no completion
        self.merged: Counter[str] = Counter()  # output rows of a merged file by status, with those that it leaves out
        self.made: os.stat_result | None = None  # of the file or folder that is about to get the output's name
        self.published = False  # the output is complete
        self._plan = self.directory / "plan.json"
        self._published = self.directory / "published.json"
        self._destination = self.directory / "destination"
        self._whole = self.directory / "whole"
        self._lock = descriptor

    # ---- the plan

    def refuse_other(self) -> None:
        """Raise OutputError for what is not batchgen's, BusyError if unfinished work here is for another output."""
        if others := [path for path in self.directory.glob("*") if not (_is_own(path) or path.name[0] == ".")]:
            what = "not batchgen's, in the folder that the run works in"
            raise OutputError(f"{min(others)}: {what}; move it away, or choose another name for the output")
        old = self._destination.read_text("utf-8") if self._destination.exists() else ""
        if self._plan.exists() and old != self.address:
            remedy = f"another {say('work_dir')}" if self.address else "another name for the output"
            what = f"the work there is for {old or self.out}"
            raise BusyError(f"{self.directory}: {what}; resume that run, or choose {remedy}")

    def adopt(self, plan: Plan, automatic: Iterable[str] = (), restart: bool = False) -> Plan:
        """Adopt the plan, or resume the run that is here if it makes the same rows; returns the plan that holds.

        automatic names the fields that nobody asked for: a resumed run keeps what it had.
        """
        old = self.find_resumed(plan, automatic, restart)
        if old is None:
            self._clear()
            if self.address:
                replace_file(self._destination, self.address.encode())
            self.parts_directory.mkdir()
            replace_file(self._plan, json.dumps(plan.to_json(), indent=1).encode())
        else:
            self._resume(old)
            plan = old
        if self.overwrite:
            (self.directory / "overwrite").touch()
        self.attempt.mkdir()
        return plan

    def begin(self) -> None:
        """Begin parts that no run resumes: there is no plan beside them, so the next holder removes them."""
        self._clear()
        self.parts_directory.mkdir()
        self.attempt.mkdir()

    def find_resumed(self, plan: Plan, automatic: Iterable[str], restart: bool) -> Plan | None:
        """The plan of the run that one with `plan` resumes, if there is one; UsageError if it is another job's."""
        if old := None if restart else self.unfinished():
            remedy = f"run it as before, or pass {say('restart', True)} to discard what it has done"
            refuse_conflict(str(self.directory), old, plan, automatic, remedy)
            _refuse_other_reuse(self.directory, old, plan)
        return old

    def read_plan(self) -> Plan | None:
        """The plan of an interrupted run, if there is one."""
        try:
            return parse_plan(self._plan.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            remedy = f"pass {say('restart', True)} to begin again"
            raise OutputError(f"{self._plan}: not a plan ({error}); {remedy}") from error

    def unfinished(self) -> Plan | None:
        """The plan of the run to resume; a retry has few rows: it is never resumed, and in no other run's way."""
        plan = self.read_plan()
        return None if plan is None or plan.retry else plan

    def read_published(self) -> Plan | None:
        """The plan of a run that has published the output, and died before it had cleared up; None if there is none."""
        plan = None if self.parts_directory.exists() else self.read_plan()
        if plan and is_dataset(self.out, plan):
            return plan
        try:
            return parse_plan(self._published.read_bytes())
        except (OSError, ValueError):
            return None

    def note_whole(self) -> None:
        """Note that all parts are committed."""
        self._whole.touch()

    def find_whole(self, restart: bool) -> Plan | None:
        """The plan of the run to resume, if there is only to publish it: no part was damaged or lost meanwhile."""
        plan = self.unfinished() if self._whole.exists() and not restart else None
        if plan is None:
            return None
        receipts = [receipt for path in self.parts_directory.glob("*") if (receipt := read_receipt(path))]
        rows = sum(receipt.input_rows for receipt in receipts if receipt.plan == plan.digest)
        return plan if rows == len(plan.selection) else None

    def statuses(self) -> Counter[str]:
        """Committed output rows by status."""
        return Counter({status: self.counts[status] for status in STATUSES})

    def may_replace(self) -> bool:
        """Whether this run, or the one that it resumes, was asked to replace the output."""
        return self.overwrite or (self.directory / "overwrite").exists()

    def _resume(self, plan: Plan) -> None:
        """Count the committed parts. One that is not whole, or another plan's, is deleted and will be made again."""
        self.parts_directory.mkdir(exist_ok=True)
        (self.parts_directory / SUCCESS).unlink(missing_ok=True)
        for path in self.directory.glob("attempt-*"):
            _remove_attempt(path)
        for path in sorted(self.parts_directory.iterdir()):
            receipt = read_receipt(path)
            if receipt is None or receipt.plan != plan.digest or receipt.chunk in self.committed:
                logger.warning("%s: not the part that was committed; it will be made again", path)
                _remove(path)
            else:
                self._count(receipt)

    # ---- parts

    def part(self, chunk: int) -> Path:
        return self.parts_directory / part_name(chunk, self.committed[chunk])

    def parts(self) -> Iterator[Path]:
        """Committed parts in the order of the input."""
        return map(self.part, sorted(self.committed))

    def commit(self, receipt: Receipt) -> None:
        """Make a worker's finished part one of the parts: one rename, on disk when this returns."""
        os.replace(receipt.path, self.parts_directory / part_name(receipt.chunk, receipt.sha256))
        sync_path(self.parts_directory)
        self._count(receipt)

    def _count(self, receipt: Receipt) -> None:
        self.committed[receipt.chunk] = receipt.sha256[:16]
        self.counts.update({name: getattr(receipt, name) for name in COUNTS})
        add_reasons(self.reasons, receipt.reasons)

    def check_parts(self, plan: Plan, rows: int) -> None:
        """Raise OutputError unless the parts are as committed, alone, and hold the rows of the plan, `rows` in all."""
        batches = in_order(
            read_numbers(self.parts()), plan.selection, self.out, f"run again with {say('restart', True)}"
        )
        check_count(self.out, sum(map(len, batches)), rows)
        others = set(self.parts_directory.iterdir()) - {part for part in self.parts() if not part.is_symlink()}
        if others:
            raise OutputError(f"{min(others)}: not a part that was committed; {MADE_AGAIN}")

    # ---- publishing

    def publish_dataset(self, plan: Plan, rows: int) -> None:
        """Make the folder of parts the output; its _SUCCESS, which holds the plan, comes last, then one rename."""
        self.check_parts(plan, rows)
        replace_file(self.parts_directory / SUCCESS, json.dumps(plan.to_json(), sort_keys=True).encode())
        if self.out.exists():
            self._set_aside()
        self.made = os.stat(self.parts_directory)
        os.rename(self.parts_directory, self.out)
        sync_path(self.out.parent)
        sync_path(self.directory)

    def _set_aside(self) -> None:
        """Take the older dataset's name away; it comes back if something came into it during the run."""
        old = old_dataset(self.out)
        if old.exists():  # of a run that died when it had only to clear up
            _remove_dataset(old)
        os.rename(self.out, old)
        try:
            refuse_foreign(old, self.out)
        except OutputError:
            os.rename(old, self.out)
            raise

    def put_back(self) -> None:
        """Give an older dataset its name again, after a run that died before the new one had it."""
        old = old_dataset(self.out)
        if self.parts_directory.exists() and is_dataset(old) and not self.out.exists():
            os.rename(old, self.out)

    def is_published(self) -> bool:
        """Whether the output is complete: a store has it all, or what this run has made has its name."""
        try:
            return self.published or (self.made is not None and os.path.samestat(self.made, os.stat(self.out)))
        except OSError:
            return False

    # ---- an output in an object store

    def run_name(self) -> str:
        """Names this work directory to an object store for as long as the lock file exists, so over restarts too."""
        if os.fstat(self._lock).st_size == 0:
            os.pwrite(self._lock, uuid.uuid4().hex.encode(), 0)
            os.fsync(self._lock)
        return os.pread(self._lock, 100, 0).decode("ascii")

    # ---- the end

    def close(self, *, finished: bool) -> None:
        """Release the lock; a finished run leaves nothing behind, nor does one that never began."""
        try:
            with suppress(OSError):  # the next run clears away what cannot be removed now
                if self._plan.exists() and (finished or self.published):
                    os.rename(self._plan, self._published)  # from here on, nothing is left to do but to clear up
                if finished or not (self._plan.exists() or self._published.exists()):
                    self._clear(self._published)
                    (self.directory / "lock").unlink()  # from here on the directory may be another run's
                    self._published.unlink(missing_ok=True)
                    self.directory.rmdir()
                else:
                    self.put_back()
                    _remove(self.attempt)
        finally:
            os.close(self._lock)

    def _clear(self, kept: Path | None = None) -> None:
        """Remove everything but the lock; the plan first, so that nothing resumes from a half-cleared directory."""
        self._plan.unlink(missing_ok=True)
        sync_path(self.directory)
        for path in filter(_is_own, self.directory.iterdir()):
            if path.name.startswith("attempt-"):
                _remove_attempt(path)
            elif path == old_dataset(self.out):
                _remove_dataset(path)
            elif path.name != "lock" and path != kept:
                _remove(path)


@contextmanager
def _named_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, pa.ArrowException) as error:
        if not isinstance(error, OSError) and reached_limit(error) is None:
            raise
        name = getattr(error, "filename", None)
        where = f"{name}: " if name else ""  # without a name it may be of anything
        kept = f"what is finished is kept in {directory}: " if directory.exists() else ""
        raise OutputError(f"{where}{reason_of(error)}; {kept}run again once that is fixed") from error


def _take_lock(directory: Path) -> int:
    """Lock the directory's lock file; a run that ends at this moment may delete it, so look again."""
    while True:
        with suppress(FileExistsError):  # not exist_ok, which raises if the directory is deleted at this moment
            directory.mkdir()
        try:
            descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            if directory.is_symlink():  # to nowhere
                raise
            continue
        if not lock(descriptor):
            os.close(descriptor)
            raise BusyError(f"{directory}: another run holds it; nothing was touched: wait for it to end")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(directory / "lock")):
                return descriptor
        os.close(descriptor)


def is_held(out: Path) -> bool:
    """Whether a run, which may be this process's, holds the output's work directory at this moment."""
    try:
        descriptor = os.open(work_directory(out) / "lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        return not lock(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def open_ledger(out: Path, where: Path | str = "", *, overwrite: bool = False) -> Iterator[Ledger]:
    """Hold the output's work directory, which is removed when the block ends well; BusyError if it is another's."""
    with _named_errors(work_directory(out)):
        ledger = Ledger(out, _take_lock(work_directory(out)), where=where, overwrite=overwrite)
        try:
            ledger.refuse_other()
            ledger.put_back()
            yield ledger
        except BaseException as error:
            ledger.published = not isinstance(error, Exception) and ledger.is_published()  # a signal that came too late
            ledger.close(finished=False)
            raise
        ledger.close(finished=True)
