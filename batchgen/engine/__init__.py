"""Token ids in, token ids out: continuous batching over gpt2/, without text, files or processes."""
