"""Token ids in, token ids out: continuous batching over `gpt2`. Sees no text, no files, no processes."""
