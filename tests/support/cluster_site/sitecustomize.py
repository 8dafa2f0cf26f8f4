"""On the path of a test's cluster: the poison of tests/support/poison.py works in its node processes.

With BATCHGEN_MISSING the engine's workers cannot import batchgen.
"""

import os
import sys

if "batchgen.workers.cluster.node" in sys.orig_argv:
    from batchgen.workers import blame, pool
    from tests.support import poison

    pool.run_chunk = poison.run_chunk
    blame.SAME_STEP = 2  # each worker that a row ends costs a second

if os.environ.get("BATCHGEN_MISSING"):
    sys.modules["batchgen"] = None
