"""Pictures of a study of memorization."""

from castalia.studies.memorization.page import write_study

__all__ = ["write_study"]
