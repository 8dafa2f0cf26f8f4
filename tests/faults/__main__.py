"""make faults: every fault of the matrix, made to happen, and what came of it.

python -m tests.faults [--quick] [--list] [NAME ...]: all cases, or those named; `*killed*` is a name too.
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
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell, and so by runs
    cases = [case for case in CASES if any(fnmatch(case.name, name) for name in options.names or ["*"])]
    if options.list or not cases:
        print("\n".join(f"{case.name:<28}{case.fault}" for case in CASES))
        return 0 if options.list else 2
    results: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="batchgen-faults-") as folder:
        bench = Bench(Path(folder), full=not options.quick)
        for case in cases:
            results[case.name] = _result(case, bench)
    print("\n| fault | made to happen by | how often, and the result |\n|---|---|---|")
    for case in cases:
        print(f"| {case.fault} | {case.how} | {results[case.name]} |")
    counts = Counter(result.partition(":")[0] for result in results.values())
    failed, skipped = counts["FAILED"], counts["skipped"]
    print(f"\n{len(cases) - failed - skipped} held, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


def _result(case: Case, bench: Bench) -> str:
    started = time.monotonic()
    try:
        result = case.make_happen(bench)
    except Skipped as reason:
        result = f"skipped: {reason}"
    except Exception as error:
        traceback.print_exc()
        result = f"FAILED: {' '.join(str(error).split())[:300]}"
    print(f"{case.name:<28}{time.monotonic() - started:6.1f} s  {result}", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main())
