"""Suites: several models on one stream of data, declared in one file, trained and compared."""
