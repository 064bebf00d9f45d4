"""The results of evaluations: one table, and DuckDB over it."""

from castalia.results.importing import Imported, import_results
from castalia.results.schema import COLUMNS, CONDITIONS, EVALS, KEY, Labels, Result, is_installed
from castalia.results.store import ResultsStore, find_stores, query_stores, read_stores

__all__ = [
    "COLUMNS",
    "CONDITIONS",
    "EVALS",
    "KEY",
    "Imported",
    "Labels",
    "Result",
    "ResultsStore",
    "find_stores",
    "import_results",
    "is_installed",
    "query_stores",
    "read_stores",
]
