"""The commands: parse, call, report. What they do is in `batchgen`."""
