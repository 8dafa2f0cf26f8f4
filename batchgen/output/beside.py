"""The plan of an output that has no place for it: beside JSON lines (OUTPUT.plan.json), and in an object's metadata.

Beside JSON lines, it is written before they get their name, and holds their SHA-256: no other file passes for them.
"""

import json
import zlib
from base64 import b64decode, b64encode
from collections import Counter
from pathlib import Path
from typing import BinaryIO

from batchgen.errors import InputError
from batchgen.files import PLAN_SUFFIX, parse_json, replace_file, sha256_of
from batchgen.output.ledger import parse_plan
from batchgen.output.rows import Stored, read_counts

MAX_NOTE = 1_900  # S3 takes 2,048 bytes of metadata


def path_beside(out: Path) -> Path:
    return out.with_name(out.name + PLAN_SUFFIX)


def _to_json(stored: Stored, sha256: str) -> bytes:
    left_out = {"left_out": stored.left_out} if stored.left_out else {}
    values = {"sha256": sha256, "statuses": stored.statuses, **left_out, "plan": stored.plan.to_json()}
    return json.dumps(values, indent=1).encode()


def _parse(data: bytes) -> tuple[Stored, str]:
    """The reverse; ValueError, TypeError or KeyError if it is something else."""
    values = parse_json(data)
    plan = parse_plan(json.dumps(values["plan"]))
    left_out = read_counts(values.get("left_out", {}))
    return Stored(plan, Counter(values["statuses"]), left_out), values["sha256"]


def write_beside(out: Path, made: BinaryIO, stored: Stored) -> None:
    """Write what is known of the file `made`, which is about to take the name `out`."""
    made.flush()
    replace_file(path_beside(out), _to_json(stored, sha256_of(Path(made.name))))


def find_beside(out: Path) -> Stored:
    """What is known of JSON lines, unless they were changed: their hash is not compared."""
    return _read(out)[0]


def read_beside(out: Path) -> Stored:
    """What is known of JSON lines; InputError unless the plan beside them made just these lines."""
    stored, sha256 = _read(out)
    if sha256_of(out) != sha256:
        raise InputError(f"{out}: it is not the file that {path_beside(out).name} was written for")
    return stored


def _read(out: Path) -> tuple[Stored, str]:
    beside = path_beside(out)
    try:
        return _parse(beside.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{out}: {beside.name}, which would say how it was made, is not beside it") from error
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{out}: {beside.name} beside it is not a plan of this version ({error})") from error


def write_note(stored: Stored) -> str:
    """What is known of an object, for its metadata; nothing if it is too long for a store."""
    note = b64encode(zlib.compress(_to_json(stored, ""), 9)).decode()
    return note if len(note) <= MAX_NOTE else ""


def read_note(note: str, where: str) -> Stored:
    """The reverse of write_note; InputError if it is something else."""
    try:
        return _parse(zlib.decompress(b64decode(note, validate=True)))[0]
    except (ValueError, TypeError, KeyError, RecursionError, zlib.error) as error:
        raise InputError(f"{where}: its metadata does not say how it was made") from error
