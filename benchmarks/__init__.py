"""How fast batchgen is, beside others: `python -m benchmarks.bench` from the repository's root."""
