"""The fastest way to compute a run on one machine, measured; no choice makes another run of it."""
