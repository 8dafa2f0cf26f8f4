"""On the path of a test's cluster: node processes there obey the poison words of tests/poison.py, and no others do.

BATCHGEN_MISSING makes the engine's workers such as have no batchgen.
"""

import os
import sys

if "batchgen.cluster.node" in sys.orig_argv:
    from batchgen import pool
    from tests import poison

    pool.run_chunk = poison.run_chunk

if os.environ.get("BATCHGEN_MISSING"):
    sys.modules["batchgen"] = None
