"""The fault suite: causes every fault of docs/faults.md, by the means that it names; `python -m tests.faults`."""
