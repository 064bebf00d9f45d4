"""Errors, registries, files and processes: the ground floor. Imports no torch, nothing of
Castalia."""
