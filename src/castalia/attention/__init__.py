"""Attention of training on a CPU in compiled code."""
