"""A run on a simulated cluster: the model, the tables of docs/scaling.md, and a comparison with real runs."""
