"""Text and tokens: the byte-level BPE, and the end of a completion's text."""
