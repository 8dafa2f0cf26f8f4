"""Every fault of the matrix made to happen, by the means that docs/faults.md names: python -m tests.faults."""
