"""Files of prompts become requests, each checked against the model's context. prompts.py is what the program uses."""
