"""What a thousand workers would do with a billion rows: python -m benchmarks.simulation. See docs/scaling.md.

No cluster runs: a run is simulated from measured and assumed costs, each of which is an option, as --commit-s 0.02.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields

from benchmarks.simulation import check, tables
from benchmarks.simulation.model import Cluster

SIMULATED = (tables.run, tables.limits, tables.parent, tables.commits, tables.files, tables.end, tables.losses)
TABLES: dict[str, Callable[[Cluster], str]] = {make.__name__: make for make in (*SIMULATED, check.real)}


def parse_arguments(words: Sequence[str] | None = None) -> tuple[list[str], Cluster]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    only = "tables to print; `real` runs batchgen on this machine for some minutes, the others are printed by default"
    parser.add_argument("--only", nargs="+", choices=TABLES, default=[make.__name__ for make in SIMULATED], help=only)
    for f in (f for f in fields(Cluster) if f.metadata):
        meaning = f"{f.metadata['meaning']} ({f.default:g})"
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default, help=meaning)
    values = vars(parser.parse_args(words))
    return values.pop("only"), Cluster(**values)


def main() -> None:
    names, cluster = parse_arguments()
    for name in names:
        print(f"## {TABLES[name].__doc__}\n\n{TABLES[name](cluster)}\n", flush=True)


if __name__ == "__main__":
    main()
