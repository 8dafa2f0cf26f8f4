"""What is asked for: files of prompts become requests, checked against the model's context."""
