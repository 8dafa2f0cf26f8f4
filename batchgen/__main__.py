"""python -m batchgen: the command `batchgen`."""

import os
import sys

# -m looks for modules in the current folder first, and a user's random.py is not the library of that name.
if not sys.flags.safe_path and not os.path.samefile(sys.path[0], os.path.dirname(os.path.dirname(__file__))):
    del sys.path[0]

from batchgen.jobs.entry import main  # noqa: E402  # after that

if __name__ == "__main__":
    main()
