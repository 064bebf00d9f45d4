"""Counts over the training stream: terms, matches of a pattern, n-grams and pairs, by step."""
