"""Errors, registry, files: what every room stands on. Imports nothing of Castalia and no torch."""
