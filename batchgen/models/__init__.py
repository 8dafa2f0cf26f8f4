"""Models: find by name (registry), fetch, convert to a directory of shards, map the weights, verify."""
