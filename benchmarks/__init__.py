"""The speed of batchgen and of other systems: `python -m benchmarks.bench` in the repository's root."""
