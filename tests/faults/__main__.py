"""Cause the faults of the matrix and print the outcome of each: make faults.

python -m tests.faults [--quick] [--list] [NAME ...] runs all cases, or those that match a name such as '*killed*'.
"""

import argparse
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

from tests.faults.bench import Bench, Skipped
from tests.faults.matrix import CASES, Case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only these cases; shell patterns such as '*killed*'")
    parser.add_argument("--quick", action="store_true", help="few repetitions, and no limits on time")
    parser.add_argument("--list", action="store_true", help="list the cases, and run none")
    options = parser.parse_args()
    # In the background of a shell this process ignores Ctrl-C, and so would every run that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cases = [case for case in CASES if any(fnmatch(case.name, name) for name in options.names or ["*"])]
    if options.list or not cases:
        print("\n".join(f"{case.name:<28}{case.fault}" for case in CASES))
        return 0 if options.list else 2
    results: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="batchgen-faults-") as folder:
        bench = Bench(Path(folder), full=not options.quick)
        for case in cases:
            results[case.name] = _run(case, bench)
    print("\n| fault | caused by | how often, and the outcome |\n|---|---|---|")
    for case in cases:
        print(f"| {case.fault} | {case.how} | {results[case.name]} |")
    counts = Counter(result.partition(":")[0] for result in results.values())
    failed, skipped = counts["FAILED"], counts["skipped"]
    print(f"\n{len(cases) - failed - skipped} held, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


def _run(case: Case, bench: Bench) -> str:
    """The outcome, on one line."""
    started = time.monotonic()
    try:
        result = case.cause(bench)
    except Skipped as reason:
        result = f"skipped: {reason}"
    except Exception as error:
        traceback.print_exc()
        result = f"FAILED: {' '.join(str(error).split())[:300]}"
    print(f"{case.name:<28}{time.monotonic() - started:6.1f} s  {result}", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main())
