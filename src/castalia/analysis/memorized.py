"""Memorization scores stand in `castalia.memorization.recall`; this is their former place."""

from castalia.memorization.recall import Recall, memorization_score, memorized, recall

__all__ = ["Recall", "memorization_score", "memorized", "recall"]
