"""What a run did, as pages to read."""

from castalia.analysis.report import write_report

__all__ = ["write_report"]
