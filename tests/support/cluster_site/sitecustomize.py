"""On the path of a test's cluster: its node processes obey the poison words of tests/support/poison.py.

BATCHGEN_MISSING makes the engine's workers such as have no batchgen.
"""

import os
import sys

if "batchgen.workers.cluster.node" in sys.orig_argv:
    from batchgen.workers import pool
    from tests.support import poison

    pool.run_chunk = poison.run_chunk

if os.environ.get("BATCHGEN_MISSING"):
    sys.modules["batchgen"] = None
