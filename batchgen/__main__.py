"""python -m batchgen: the command `batchgen`."""

from batchgen.jobs.entry import main

if __name__ == "__main__":
    main()
