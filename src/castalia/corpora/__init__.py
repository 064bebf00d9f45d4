"""Corpora built from text that every Python installation has: `python` for the demo, `tiny` for
`debug`, `mini` for the miniature suite."""

from castalia.corpora.build import CORPORA, CorpusPaths, build_corpus

__all__ = ["CORPORA", "CorpusPaths", "build_corpus"]
