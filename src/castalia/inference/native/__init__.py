"""Castalia's own CPU engine: quantized weights, a static cache, compiled steps; see engine.py."""
