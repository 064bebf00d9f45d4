"""Analysis of finished runs: report pages, and the rows that steps read."""

from castalia.analysis.report import write_report

__all__ = ["write_report"]
