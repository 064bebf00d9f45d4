"""Changes of the rows of some steps: the same run with other text, all else equal."""
