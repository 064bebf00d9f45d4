"""Log-likelihoods of many lines, on every engine: what lines share is read once."""
