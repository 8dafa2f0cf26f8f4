"""Outputs in an object store: a file or a dataset of this machine, sent there.

A store has no renames. One object appears when its upload is completed, or not at all. A dataset is complete when
_SUCCESS is there, which is put last, and only if there is none; a run that replaces a dataset deletes it before:

    PREFIX/
        _RUN                    put first, and only if there is none: whose prefix this is while a run writes to it
        00000042-<sha256[:16]>.parquet
        _SUCCESS                the plan, rows by status, and each part's name, rows, bytes and SHA-256
"""

import json
import logging
import posixpath
import re
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import pyarrow as pa

from batchgen.errors import BusyError, InputError, OutputError, UsageError
from batchgen.files import PART, SUCCESS, read_object
from batchgen.input.prompts import Facts, Prompts
from batchgen.output.beside import read_note, write_note
from batchgen.output.dataset import Dataset
from batchgen.output.file import FileOutput
from batchgen.output.ledger import Ledger, is_held, parse_plan, run_name
from batchgen.output.parts import count_part
from batchgen.output.place import SUFFIXES, check_folder
from batchgen.output.rows import Rows, Stored
from batchgen.output.schema import Columns
from batchgen.output.store import Address, Store, in_thread, in_threads, is_address, open_store
from batchgen.plan import Plan
from batchgen.selection import Selection

logger = logging.getLogger(__name__)

CLAIM = "_RUN"
PROBE = "_batchgen-probe"
THREADS = 8  # uploads at once
CHECK_RETRIES = 2  # of a request before the run, when somebody waits for the answer
COMPLETED = "another run has completed a dataset there first; choose another prefix"
REMEDY = "run the same command again to resume"


# ---- before the run


def _refuse_claim(store: Store, data: bytes | None, run: str | None) -> None:
    claim = read_object(data)
    if run is None or claim.get("run") != run:
        who = f"another run writes there ({claim.get('directory')} on {claim.get('host')})"
        remedy = "resume that run, or, if it is gone for good, delete what is below the prefix"
        raise BusyError(f"{store.where}: {who}; {remedy}")


def _is_own(success: Mapping[str, object], run: str | None, plan: Plan) -> bool:
    """Whether a dataset's _SUCCESS is this run's."""
    return run is not None and success.get("run") == run and success == {**success, **plan.to_json()}


def _refuse_others(store: Store, run: str | None) -> None:
    """Raise for an incomplete dataset, or anything else, that the run of this name has not put there."""
    names = store.list().keys() - {PROBE}
    strange = sorted(name for name in names if name not in (CLAIM, SUCCESS) and not PART.fullmatch(name))
    if strange:
        what = f"something other than a dataset of batchgen is there ({strange[0]})"
        raise OutputError(f"{store.where}: {what}; choose another prefix, or move it away")
    if SUCCESS in names:  # complete: find_finished decides
        return
    if CLAIM in names:
        _refuse_claim(store, store.get(CLAIM), run)
    elif names:
        what = f"{len(names):,} parts of a run that did not end are there"
        raise OutputError(f"{store.where}: {what}; choose another prefix, or delete them first")


def _place(text: str) -> PurePosixPath:
    """An address without keys and options, in the one of its spellings that can be compared."""
    scheme, _, path = text.partition("?")[0].partition("://")
    path = posixpath.normpath(unquote(re.sub("^[^/@]*@", "", path)).strip("/"))
    return PurePosixPath(scheme.lower().replace("s3a", "s3"), path)


def check_address(address: Address, prompts: Prompts) -> None:
    """Raise an error for what an address alone shows to be wrong."""
    if address.name and Path(address.name).suffix.lower() not in SUFFIXES:
        remedy = f"a file ends in {' or '.join(SUFFIXES)}, and a dataset in /"
        raise UsageError(f"{address.where}: neither a file nor a dataset: {remedy}")
    inputs = {_place(source.where) for source in prompts.sources}
    if (place := _place(address.where)) in inputs:
        raise OutputError(f"{address.where}: this is the input; choose another name for the output")
    if any(place.is_relative_to(_place(name)) for name in prompts.options.names if is_address(name)):
        raise OutputError(f"{address.where}: it would be in the input and be read with it; choose another folder")


def check_store(address: Address, run: str | None) -> None:
    """Raise an error for a place that cannot be written, or that is another run's; `run` names ours."""
    store = open_store(address, retries=CHECK_RETRIES)
    if not address.name:
        _refuse_others(store, run)
    in_thread(lambda: store.put(PROBE, b""))
    store.delete([PROBE])


# ---- a dataset: its parts, then _SUCCESS


@dataclass(frozen=True, slots=True)
class SentPart:
    """A part that was uploaded: what _SUCCESS says of it, and the tag that the store gave it."""

    name: str
    rows: int
    bytes: int
    sha256: str
    tag: str


def _read_record(path: Path) -> dict[str, SentPart]:
    """Uploaded parts by name, without a line that a kill cut short."""
    sent = {}
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        values = read_object(line)
        if values.keys() == SentPart.__dataclass_fields__.keys():
            part = SentPart(**values)
            sent[part.name] = part
    return sent


def _is_there(sent: SentPart | None, found: tuple[int, str] | None) -> bool:
    return sent is not None and found == (sent.bytes, sent.tag)


def _send(store: Store, part: Path) -> SentPart:
    rows, sha256 = count_part(part)
    return SentPart(part.name, rows, part.stat().st_size, sha256, store.put(part.name, part))


def send_parts(store: Store, parts: Sequence[Path], record: Path) -> list[SentPart]:
    """Upload until the parts are there as they were sent, and no others; OutputError if they do not stay so."""
    sent = _read_record(record)
    names = {part.name for part in parts}
    for trial in range(3):
        there = store.list()
        if others := [name for name in there if PART.fullmatch(name) and name not in names]:
            store.delete(others)  # of a run that a restart discarded
        missing = [part for part in parts if not _is_there(sent.get(part.name), there.get(part.name))]
        if not missing:
            return [sent[part.name] for part in parts]
        if trial:
            logger.warning("%s: %d parts are not as they were sent; they are sent again", store.where, len(missing))
        with open(record, "a", encoding="utf-8") as file:
            for one in in_threads(lambda part: _send(store, part), missing, THREADS):
                sent[one.name] = one
                file.write(json.dumps(asdict(one)) + "\n")
                file.flush()
    raise OutputError(f"{store.where}: something else changes the parts there ({missing[0].name}); stop it")


def _part_names(success: bytes) -> set[object]:
    """The parts of a complete dataset."""
    parts = read_object(success).get("parts", [])
    return {part["name"] for part in parts} if isinstance(parts, list) else set()


def read_dataset(store: Store) -> Stored | None:
    """What is known of a complete dataset; InputError if it is not as its _SUCCESS says."""
    if (data := store.get(SUCCESS)) is None:
        return None
    success = read_object(data)
    try:
        plan = parse_plan(data)
        stored = Stored(plan, Counter(success["statuses"]))
        parts = {part["name"]: part["bytes"] for part in success["parts"]}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{store.where}: {SUCCESS} is not that of this version ({error})") from error
    there = store.list()
    if wrong := [name for name, size in parts.items() if name not in there or there[name][0] != size]:
        raise InputError(f"{store.where}: {len(wrong)} of its {len(parts)} parts are not as it says ({wrong[0]})")
    return stored


def _find_other(store: Store, ledger: Ledger, plan: Plan) -> Mapping[str, object] | None:
    """The _SUCCESS of another run, which this one is to replace; OutputError if it may not."""
    if (data := store.get(SUCCESS)) is None or _is_own(read_object(data), ledger.run_name(), plan):
        return None
    if not ledger.may_replace():
        raise OutputError(f"{store.where}: {COMPLETED}")
    return read_object(data)


def claim_prefix(store: Store, ledger: Ledger, plan: Plan) -> None:
    """Make the prefix this run's own until its dataset is complete; BusyError if it is another run's."""
    run = ledger.run_name()
    _refuse_others(store, run)
    old = _find_other(store, ledger, plan)
    if old is None and store.get(SUCCESS) is not None:  # it was killed when it had only to clear up
        return
    if old and read_object(store.get(CLAIM)).get("run") == old.get("run"):
        store.delete([CLAIM])  # what the complete dataset's run has left
    directory = str(ledger.directory.resolve())
    claim = json.dumps({"run": run, "host": socket.gethostname(), "directory": directory}).encode()
    _refuse_claim(store, store.create(CLAIM, claim), run)
    if store.conditional:
        store.conditional = not store.put_if_absent(CLAIM, claim)  # some stores accept the condition and ignore it
    if not store.conditional:
        logger.warning("%s: this store has no conditional put: no other run may write there meanwhile", store.where)


def publish_dataset(store: Store, ledger: Ledger, plan: Plan, rows: int) -> None:
    """Upload the parts that are not there yet, and make them a dataset of `rows` rows; the prefix is claimed."""
    claim_prefix(store, ledger, plan)  # again: it may be another's by now, or have something else in it
    ledger.check_parts(plan, rows)  # damage must not cost an older dataset
    if _find_other(store, ledger, plan) is not None:
        store.delete([SUCCESS])  # before the first part changes: readers wait for the new one
    if store.get(SUCCESS) is None:
        sent = send_parts(store, list(ledger.parts()), ledger.sent)
        listed = [{key: value for key, value in asdict(one).items() if key != "tag"} for one in sent]
        more = {"run": ledger.run_name(), "statuses": ledger.statuses(), "parts": listed}
        success = json.dumps(plan.to_json() | more, sort_keys=True).encode()
        there = store.create(SUCCESS, success)
        if there != success:
            store.delete([one.name for one in sent if one.name not in _part_names(there)])
            raise OutputError(f"{store.where}: {COMPLETED}")
    ledger.published = True
    try:
        store.delete([CLAIM])
    except OutputError as error:  # the dataset is complete all the same
        logger.warning("%s; %s can be deleted", error, CLAIM)


def publish_file(store: Store, path: Path, note: str = "") -> None:
    """Upload a file as the one object of the address, whose previous version stays until the upload is complete."""
    in_thread(lambda: store.put(store.name, path, note))


# ---- the outputs


@contextmanager
def add_remedy(ledger: Ledger) -> Iterator[None]:
    """Add to a store's error that finished chunks are kept."""
    try:
        yield
    except OutputError as error:
        raise OutputError(f"{error}; what is finished is kept in {ledger.directory}: {REMEDY}") from error


@dataclass(frozen=True)
class Upload:
    """An output of this machine that is sent to a store; the work is kept beside a stand-in for it here."""

    local: FileOutput | Dataset
    address: Address
    store: Store

    @property
    def where(self) -> str:
        return self.address.where

    @property
    def path(self) -> Path:
        return self.local.path

    @property
    def format(self) -> str:
        return self.local.format

    def check(self) -> None:
        """Raise an error if the place cannot be written or another run has it; BusyError in the latter case."""
        check_address(self.address, self.local.prompts)
        check_folder(self.path, self.local.prompts.local_paths)
        check_store(self.address, run_name(self.path))

    def columns(self, facts: Facts, plan: Plan, n_embd: int = 0) -> Columns:
        return self.local.columns(facts, plan, n_embd)

    def rows_to_do(self, selection: Selection) -> Rows:
        return self.local.rows_to_do(selection)

    def claim(self, ledger: Ledger, plan: Plan, automatic: frozenset[str], restart: bool) -> Plan:
        return self.local.claim(ledger, plan, automatic, restart)


@dataclass(frozen=True)
class FileUpload(Upload):
    """One object, which an upload replaces at once."""

    local: FileOutput

    def stored(self) -> Stored | None:
        note = self.store.find_note(self.store.name)
        return None if note is None else read_note(note, self.where)

    def publish(self, ledger: Ledger, plan: Plan, schema: pa.Schema, rows: int) -> None:
        merged = replace(self.local, path=ledger.attempt / self.path.name)
        merged.publish(ledger, plan, schema, rows)
        stored = merged.stored()
        with add_remedy(ledger):
            publish_file(self.store, merged.path, write_note(stored) if stored else "")


@dataclass(frozen=True)
class DatasetUpload(Upload):
    """A prefix, which belongs to this run until its dataset is complete."""

    local: Dataset

    def check(self) -> None:
        """See Upload; a claim that this work directory's last run has left beside its _SUCCESS is removed."""
        super().check()
        run = None if is_held(self.path) else run_name(self.path)
        if run and all(read_object(self.store.get(name)).get("run") == run for name in (SUCCESS, CLAIM)):
            self.store.delete([CLAIM])

    def stored(self) -> Stored | None:
        return read_dataset(self.store)

    def claim(self, ledger: Ledger, plan: Plan, automatic: frozenset[str], restart: bool) -> Plan:
        plan = super().claim(ledger, plan, automatic, restart)
        claim_prefix(self.store, ledger, plan)
        return plan

    def publish(self, ledger: Ledger, plan: Plan, schema: pa.Schema, rows: int) -> None:
        with add_remedy(ledger):
            publish_dataset(self.store, ledger, plan, rows)
