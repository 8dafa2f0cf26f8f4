"""Outputs in an object store: a file or a dataset of this machine, sent there.

A store has no renames. One object appears when its upload is completed, or not at all. A dataset is complete when
_SUCCESS is there, which is put last, and only if there is none:

    PREFIX/
        _RUN                    put first, and only if there is none: whose prefix this is while a run writes to it
        00000042-<sha256[:16]>.parquet
        _SUCCESS                the plan, and each part's name, rows, bytes and SHA-256
"""

import json
import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import BusyError, OutputError, UsageError
from batchgen.files import PART, SUCCESS, parse_json, sha256_of
from batchgen.input.prompts import Facts, Prompts
from batchgen.output.dataset import Dataset
from batchgen.output.file import FileOutput
from batchgen.output.ledger import Ledger, run_name
from batchgen.output.place import SUFFIXES, check_folder
from batchgen.output.rows import Rows
from batchgen.output.schema import Columns
from batchgen.output.store import Address, Store, in_thread, in_threads, open_store
from batchgen.plan import Plan
from batchgen.types import SamplingParams

logger = logging.getLogger(__name__)

CLAIM = "_RUN"
PROBE = "_batchgen-probe"
THREADS = 8  # uploads at once
CHECK_RETRIES = 2  # of a request before the run, when somebody waits for the answer
REMEDY = "run the same command again to resume"


# ---- before the run


def _read_object(data: bytes | None) -> Mapping[str, object]:
    """A JSON object, or an empty one if the data is not one."""
    try:
        value = parse_json(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _refuse_claim(store: Store, data: bytes | None, run: str | None) -> None:
    claim = _read_object(data)
    if run is None or claim.get("run") != run:
        who = f"another run writes there ({claim.get('directory')} on {claim.get('host')})"
        remedy = "resume that run, or, if it is gone for good, delete what is below the prefix"
        raise BusyError(f"{store.where}: {who}; {remedy}")


def _refuse_others(store: Store, run: str | None, plan: Plan | None) -> None:
    """Raise if the prefix holds anything that the run of this name has not put there (None: it has put nothing)."""
    names = store.list().keys() - {PROBE}
    strange = sorted(name for name in names if name not in (CLAIM, SUCCESS) and not PART.fullmatch(name))
    if strange:
        what = f"something other than a dataset of batchgen is there ({strange[0]})"
        raise OutputError(f"{store.where}: {what}; choose another prefix")
    if SUCCESS in names:
        old = _read_object(store.get(SUCCESS))
        same = plan is None or old == {**old, **plan.to_json()}
        if run is None or old.get("run") != run or not same:
            what = "a complete dataset is there, which is never replaced"
            raise OutputError(f"{store.where}: {what}; choose another prefix, or delete it first")
    elif CLAIM in names:
        _refuse_claim(store, store.get(CLAIM), run)
    elif names:
        what = f"{len(names):,} parts of a run that did not end are there"
        raise OutputError(f"{store.where}: {what}; choose another prefix, or delete them first")


def check_address(address: Address, prompts: Prompts) -> None:
    """Raise an error for what an address alone shows to be wrong."""
    if address.name and Path(address.name).suffix.lower() not in SUFFIXES:
        remedy = f"a file ends in {' or '.join(SUFFIXES)}, and a dataset in /"
        raise UsageError(f"{address.where}: neither a file nor a dataset: {remedy}")
    if address.where in [source.where for source in prompts.sources]:
        raise OutputError(f"{address.where}: this is the input; choose another name for the output")


def check_store(address: Address, run: str | None) -> None:
    """Raise an error for a place that cannot be written, or that is another run's; `run` names ours.

    The check puts an object, below a name that readers skip, and deletes it again.
    """
    store = open_store(address, retries=CHECK_RETRIES)
    if not address.name:
        _refuse_others(store, run, None)
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
        values = _read_object(line)
        if values.keys() == SentPart.__dataclass_fields__.keys():
            part = SentPart(**values)  # type: ignore[arg-type]
            sent[part.name] = part
    return sent


def _is_there(sent: SentPart | None, found: tuple[int, str] | None) -> bool:
    return sent is not None and found == (sent.bytes, sent.tag)


def _send(store: Store, part: Path) -> SentPart:
    sha256 = sha256_of(part)
    if sha256[:16] not in part.name:
        raise OutputError(f"{part}: the part is damaged; it will be made again")
    with open(part, "rb") as file:
        rows = pq.read_metadata(file).num_rows
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
    parts = _read_object(success).get("parts", [])
    return {part["name"] for part in parts} if isinstance(parts, list) else set()


def claim_prefix(store: Store, run: str, directory: Path, plan: Plan) -> None:
    """Make the prefix this run's own until its dataset is complete; BusyError if it is another run's."""
    _refuse_others(store, run, plan)
    if store.get(SUCCESS) is not None:  # a run was killed when it had only to clear up
        return
    claim = json.dumps({"run": run, "host": socket.gethostname(), "directory": str(directory.resolve())}).encode()
    _refuse_claim(store, store.create(CLAIM, claim), run)
    if store.conditional:
        store.conditional = not store.put_if_absent(CLAIM, claim)  # some stores accept the condition and ignore it
    if not store.conditional:
        logger.warning("%s: this store has no conditional put: no other run may write there meanwhile", store.where)


def publish_dataset(store: Store, parts: Sequence[Path], plan: Plan, run: str, record: Path) -> None:
    """Upload the parts that are not there yet, and make them a dataset; the prefix is claimed.

    record is a local file that lists uploaded parts, for the next run if this one does not end. Raises OutputError if
    the store fails for good, or another run's _SUCCESS is there.
    """
    if store.get(SUCCESS) is None:
        sent = send_parts(store, parts, record)
        listed = [{key: value for key, value in asdict(one).items() if key != "tag"} for one in sent]
        success = json.dumps(plan.to_json() | {"run": run, "parts": listed}, sort_keys=True).encode()
        there = store.create(SUCCESS, success)
        if there != success:
            store.delete([one.name for one in sent if one.name not in _part_names(there)])
            raise OutputError(f"{store.where}: another run has completed a dataset there first; choose another prefix")
    try:
        store.delete([CLAIM])
    except OutputError as error:  # the dataset is complete all the same
        logger.warning("%s; %s can be deleted", error, CLAIM)


# ---- one object


def publish_file(store: Store, path: Path) -> None:
    """Upload a file as the one object of the address, whose previous version stays until the upload is complete."""
    in_thread(lambda: store.put(store.name, path))


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

    def columns(self, facts: Facts, sampling: SamplingParams) -> Columns:
        return self.local.columns(facts, sampling)

    def rows_to_do(self, facts: Facts) -> Rows:
        return self.local.rows_to_do(facts)

    def claim(self, ledger: Ledger, plan: Plan, automatic: frozenset[str], restart: bool) -> Plan:
        plan = self.local.claim(ledger, plan, automatic, restart)
        ledger.claim_destination(self.where)
        return plan


@dataclass(frozen=True)
class FileUpload(Upload):
    """One object, which an upload replaces at once."""

    local: FileOutput

    def publish(self, ledger: Ledger, plan: Plan, schema: pa.Schema, rows: int) -> None:
        merged = replace(self.local, path=ledger.attempt / self.path.name)
        merged.publish(ledger, plan, schema, rows)
        with add_remedy(ledger):
            publish_file(self.store, merged.path)


@dataclass(frozen=True)
class DatasetUpload(Upload):
    """A prefix, which belongs to this run until its dataset is complete."""

    local: Dataset

    def claim(self, ledger: Ledger, plan: Plan, automatic: frozenset[str], restart: bool) -> Plan:
        plan = super().claim(ledger, plan, automatic, restart)
        claim_prefix(self.store, ledger.run_name(), ledger.directory, plan)
        return plan

    def publish(self, ledger: Ledger, plan: Plan, schema: pa.Schema, rows: int) -> None:
        with add_remedy(ledger):
            publish_dataset(self.store, list(ledger.parts()), plan, ledger.run_name(), ledger.sent)
