"""The results of evaluations: one table, and DuckDB over it."""

from castalia.results.schema import COLUMNS, CONDITIONS, KEY, Result
from castalia.results.store import ResultsStore

__all__ = ["COLUMNS", "CONDITIONS", "KEY", "Result", "ResultsStore"]
