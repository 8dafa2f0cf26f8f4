"""GPT-2 in NumPy: the whole model on one page (pico.py), its configuration, its parameters, the fast forward pass."""
