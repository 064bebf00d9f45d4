"""Weights packed for this CPU, kernels of their products, and the compiled step; know no engine."""
