"""The CPU engine of our own: quantized weights, static cache, compiled steps; see engine.py and step.cpp."""
