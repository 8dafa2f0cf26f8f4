"""Checkpoints of OpenAI's true shapes, made by TensorFlow and converted: python -m benchmarks.convert_tf [SIZE ...].

The weights are random. Prints how long the conversion takes and its peak memory, how long mapping the shards takes,
and whether every weight is the same bit for bit. 1558M needs 13 GB of disk in --dir, and 14 GB of memory to make the
checkpoint.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from batchgen.gpt2.config import GPT2Config
from batchgen.models.model import Model
from batchgen.models.openai import CONFIGS, DATA, INDEX, known_file
from batchgen.models.shards import load_tensors
from tests.support.tensors import random_tensors

ROOT = Path(__file__).parents[1]
CONVERT = """
import pathlib, sys, time
from batchgen.models.convert import convert_tf_checkpoint
started = time.monotonic()
convert_tf_checkpoint(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), name=sys.argv[3])
peak = pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
print(time.monotonic() - started, peak)
"""


def measure(size: str, folder: Path) -> bool:
    """Print one line on a size; whether the checkpoint's files are as large as OpenAI's and all weights are equal."""
    config = CONFIGS[size]
    src, dst = folder / "src", folder / size
    src.mkdir()
    command = [
        sys.executable,
        "-m",
        "tests.support.write_tf_checkpoint",
        str(src.absolute()),
        json.dumps(config.as_dict()),
        "7",
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    sizes = {name: (src / name).stat().st_size for name in (DATA, INDEX)}
    same_sizes = all(known_file(size, name)[0] in (None, found) for name, found in sizes.items())
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, str(src), str(dst), size], check=True, capture_output=True, text=True
    )
    seconds, peak = map(float, done.stdout.split())
    shutil.rmtree(src)
    Model.load(dst).load_weights()  # once, so that the disk is not timed
    started = time.perf_counter()
    Model.load(dst).load_weights()
    load = time.perf_counter() - started
    equal = has_weights(dst, config)
    print(
        f"{size}: data {sizes[DATA]:,} and index {sizes[INDEX]:,} bytes ({'as' if same_sizes else 'UNLIKE'} OpenAI's); "
        f"converted in {seconds:.1f} s, {peak / 2**20:.2f} GB at most; mapped in {1000 * load:.1f} ms; "
        f"weights {'equal' if equal else 'DIFFERENT'}",
        flush=True,
    )
    return same_sizes and equal


def has_weights(model: Path, config: GPT2Config) -> bool:
    """Whether the shards hold the checkpoint's weights, bit for bit."""
    expected = random_tensors(config, 7)
    return all(
        np.array_equal(found.view("u4"), expected.pop(name).view("u4")) for name, found in load_tensors(model).items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=", ".join(CONFIGS))
    parser.add_argument("--dir", type=Path, help="folder for the temporary files")
    options = parser.parse_args()
    right = True
    for size in options.sizes or ["124M"]:
        with tempfile.TemporaryDirectory(dir=options.dir, prefix="convert-") as folder:
            right &= measure(size, Path(folder))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
