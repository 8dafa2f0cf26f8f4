"""Where rows go: parts and their ledger, files, datasets, object stores, and outputs read again."""
