"""A script for each system that is measured, run in the system's own environment; see protocol.py."""
