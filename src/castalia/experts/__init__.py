"""Mixture of experts: routers, balance, and MLPs of which each token uses a few.

A layer takes sizes and knows no model.
"""
