"""Models: found, downloaded, converted to shards, checked."""
