"""Offline batch completions with GPT-2 in NumPy."""

__version__ = "0.1.0"
