"""Suites: several models on one stream of data, declared in one file, trained and compared."""

from castalia.suites.members import Member, Suite, open_suite

__all__ = ["Member", "Suite", "open_suite"]
