"""Damage a file of a model thousands of times: python -m tests.support.fuzz_formats [N] [KIND ...]; KIND as in KINDS.

After each mutation the model is either refused with a ModelError of one line, or loads bit for bit as before. A crash
ends the process, so run this in a process of its own; an alarm ends a hang.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from batchgen.errors import ModelError
from batchgen.gpt2.config import GPT2Config
from batchgen.models.convert import INDEX, read_tf_tensors
from batchgen.models.huggingface import hf_names, open_weights, read_hf_config
from batchgen.models.shards import load_manifest, load_params, load_tensors, read_json, verify_shards
from tests.support.hf_checkpoint import write_hf_model
from tests.support.models import BYTES, write_byte_model

SECONDS = 20  # for one load of a tiny model
TINY = {"n_vocab": 50, "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_layer": 2}
INTERESTING = [b"\0", b"\xff", b"\x80", b"9" * 30, b"-1", b"1e9", b'"', b"[", b"{" * 2000, b"\\u0000", b"\xff" * 8]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four edits: bits flipped, bytes set, inserted, cut out or copied, numbers changed."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, length = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 8, 40))
        kind = rng.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            out[at:at] = rng.choice(INTERESTING)
        elif kind == 3:
            del out[at : at + length]
        elif kind == 4:
            other = rng.randrange(len(out) + 1)
            out[at : at + length] = out[other : other + length]
        elif kind == 5:
            digits = [i for i in range(len(out)) if 48 <= out[i] < 58]
            if digits:
                out[rng.choice(digits)] = rng.randrange(48, 58)
        else:
            del out[at:]
    return bytes(out)


class Target:
    """A file to damage, except its tail, and how to load it."""

    file: Path
    tail: bytes = b""

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        return mutate(data, rng)

    def load(self) -> None:
        """Load it; raises ModelError if it is refused, AssertionError if it differs from before."""
        raise NotImplementedError


class Manifest(Target):
    """manifest.json: the loaded model is the one that its text describes, and all hashes match."""

    def __init__(self, directory: Path) -> None:
        self.model = write_byte_model(directory / "model")
        self.file = self.model / "manifest.json"
        self.shards = {name: shard.sha256 for name, shard in load_manifest(self.model).tensors.items()}

    def load(self) -> None:
        manifest = load_manifest(self.model)
        load_tensors(self.model, manifest)
        verify_shards(self.model)
        assert {name: shard.sha256 for name, shard in manifest.tensors.items()} == self.shards
        said: Any = read_json(self.file, 2**24)
        assert said["config"] == manifest.config.as_dict() | said["config"]
        assert manifest.config.tensor_shapes() == BYTES.tensor_shapes()


class Npy(Target):
    """The header of a shard."""

    def __init__(self, directory: Path) -> None:
        self.model = write_byte_model(directory / "model")
        self.file = self.model / "h1.mlp.c_fc.w.panels.npy"
        self.tail = self.file.read_bytes()[128:]
        self.expected = np.array(load_params(self.model)["blocks"][1]["mlp"]["c_fc"]["w"])

    def load(self) -> None:
        found = load_params(self.model)["blocks"][1]["mlp"]["c_fc"]["w"]
        np.testing.assert_array_equal(found, self.expected)


class Safetensors(Target):
    """The length and the header of a safetensors file."""

    def __init__(self, directory: Path) -> None:
        self.src = write_hf_model(directory / "src")
        self.file = self.src / "model.safetensors"
        data = self.file.read_bytes()
        self.tail = data[8 + int.from_bytes(data[:8], "little") :]
        self.expected = self._read()

    def _read(self) -> dict[str, Any]:
        with open_weights(self.src) as weights:
            weights.check(read_hf_config(self.src / "config.json"))
            return {name: weights.read(name) for name in hf_names(BYTES).values()}

    def load(self) -> None:
        for name, array in self._read().items():
            np.testing.assert_array_equal(array, self.expected[name])


class Bundle(Target):
    """The index of a TensorFlow checkpoint."""

    name = INDEX

    def __init__(self, directory: Path) -> None:
        for name, data in tf_checkpoint().items():
            (directory / name).write_bytes(data)
        self.prefix, self.config = directory / "model.ckpt", GPT2Config(**TINY)
        self.file = Path(f"{self.prefix}{self.name}")
        self.expected = dict(read_tf_tensors(self.prefix, self.config))

    def load(self) -> None:
        for name, array in read_tf_tensors(self.prefix, self.config):
            np.testing.assert_array_equal(array, self.expected[name])


@cache
def tf_checkpoint() -> dict[str, bytes]:
    """The files of a tiny checkpoint, written once by a separate process."""
    script = Path(__file__).with_name("write_tf_checkpoint.py")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        subprocess.run([sys.executable, str(script), directory, json.dumps(TINY), "1"], check=True, capture_output=True)
        return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


class BundleData(Bundle):
    """The data of a TensorFlow checkpoint."""

    name = ".data-00000-of-00001"


class BundleEntries(Bundle):
    """The entries in the index of a TensorFlow checkpoint, with a correct checksum of their block."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        data, crc = self.file.read_bytes(), 0xFFFFFFFF
        for i in range(len(data) - 5):  # the first block is the one whose checksum stands behind it
            crc = CRC32C[(crc ^ data[i]) & 0xFF] ^ crc >> 8
            if i and masked(crc) == data[i + 1 : i + 5]:
                self.length = i
                return
        raise AssertionError("no block found")

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        out, n = bytearray(data), self.length
        for _ in range(rng.choice((1, 1, 2, 4))):
            at, length = rng.randrange(n), rng.choice((1, 1, 1, 2, 8))
            length = min(length, n - at)
            other = rng.randrange(n - length + 1)
            kind = rng.randrange(3)
            if kind == 0:
                out[at] ^= 1 << rng.randrange(8)
            else:
                out[at : at + length] = rng.randbytes(length) if kind == 1 else out[other : other + length]
        crc = 0xFFFFFFFF
        for byte in out[: n + 1]:
            crc = CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
        out[n + 1 : n + 5] = masked(crc)
        return bytes(out)


def _crc32c_of_byte(crc: int) -> int:
    for _ in range(8):
        crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


CRC32C = [_crc32c_of_byte(byte) for byte in range(256)]


def masked(crc: int) -> bytes:
    """A checksum as a table file stores it: rotated, plus a constant."""
    crc ^= 0xFFFFFFFF
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


KINDS: dict[str, Callable[[Path], Target]] = {
    "manifest": Manifest,
    "npy": Npy,
    "safetensors": Safetensors,
    "bundle": Bundle,
    "bundle-data": BundleData,
    "bundle-entries": BundleEntries,
}


def fuzz(kind: str, n: int, seed: int = 0) -> tuple[int, int]:
    """Returns how many mutations were refused and how many loaded as before; anything else raises."""
    directory = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        target = KINDS[kind](directory)
        whole = target.file.read_bytes()
        head = whole[: len(whole) - len(target.tail)]
        refused = 0
        for i in range(n):
            data = target.mutate(head, random.Random(f"{kind} {seed} {i}")) + target.tail
            target.file.unlink()  # never in place: an earlier load may have it mapped
            target.file.write_bytes(data)
            signal.alarm(SECONDS)
            message = ""
            try:
                target.load()
            except ModelError as error:
                message = str(error)
            except BaseException:
                print(f"{kind}: mutation {i} of seed {seed}", file=sys.stderr)  # noqa: T201
                raise
            finally:
                signal.alarm(0)
            assert "\n" not in message, (i, message)
            assert len(message) < 2000, (i, message)
            refused += bool(message)
        return refused, n - refused
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    count = int((sys.argv[1:] or ["10000"])[0])
    for asked in sys.argv[2:] or KINDS:
        print(asked, "refused {}, loaded as before {}".format(*fuzz(asked, count)), flush=True)  # noqa: T201
