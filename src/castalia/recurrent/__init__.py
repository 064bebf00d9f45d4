"""Mixers that sum up what came before: selective state spaces (Mamba) and RWKV.

A mixer takes sizes and tensors and knows no model. Each has a form in chunks, for whole rows, and
one token at a time; both compute the same recurrence.
"""
