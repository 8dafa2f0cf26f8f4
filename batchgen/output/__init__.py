"""Where rows go: parts and their ledger, files, datasets, object stores, and outputs that are read again."""
