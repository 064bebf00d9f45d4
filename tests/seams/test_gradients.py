"""Gradients are sums over the ranks, and no gradient is outside the norm, whatever its kind of
tensor."""

import math

import pytest


def test_a_plain_gradient_counts_beside_sharded_ones(on_ranks):
    for result in on_ranks("gradients.py", 2):
        whole, split = result["whole"], result["split"]
        assert split["norm"] == pytest.approx(whole["norm"], rel=1e-6)
        for name, expected in whole["gradients"].items():
            assert split["gradients"][name] == pytest.approx(expected, rel=1e-5), name
        # Clipped to a norm of 0.5, most of it in the plain vector: leaving that out would show.
        assert math.hypot(*whole["gradients"]["scale"]) > 0.3
