"""Helpers of the tests: models, servers, clusters, references; no test is here."""
