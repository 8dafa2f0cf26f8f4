"""Text and tokens: the byte-level BPE, and where a completion's text ends."""
