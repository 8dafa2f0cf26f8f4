"""A script for each system, which runs in the system's own environment; see protocol.py."""
