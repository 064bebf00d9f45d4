"""Statistics of memorization: what the scores of several models and checkpoints say."""
