"""GPT-2 in NumPy: its configuration, its parameters, its forward pass."""
