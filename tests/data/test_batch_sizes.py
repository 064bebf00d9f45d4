"""Batches that grow: Megatron's rule, and where in the order each step begins."""

import pytest

from castalia.core.errors import ConfigError
from castalia.data.batch_sizes import BatchSizes, ramp_problem, require_constant


def test_a_ramp_is_megatrons():
    """Its calculator, written out: start + increment * floor(consumed / (samples / stages))."""
    ramp = BatchSizes(64, (16, 8, 1000))
    consumed = 0
    for step in range(60):
        stage = consumed // (1000 / 6)
        size = 64 if consumed >= 1000 else min(64, int(16 + 8 * stage))
        assert ramp.size(step) == size
        assert ramp.first(step) == consumed
        assert ramp.places(step) == range(consumed, consumed + size)
        for row in (0, size - 1):
            assert ramp.step_of(consumed + row) == (step, row)
        consumed += size
    assert ramp.distinct() == [16, 24, 32, 40, 48, 56, 64]


def test_a_constant_batch():
    sizes = BatchSizes(12)
    assert [sizes.first(step) for step in (0, 1, 5)] == [0, 12, 60]
    assert sizes.step_of(61) == (5, 1)
    assert sizes.distinct() == [12]
    assert require_constant(sizes, "a file") == 12
    with pytest.raises(ConfigError, match="a file needs batches of one size"):
        require_constant(BatchSizes(12, (4, 4, 10)), "a file")


def test_ramps_that_do_not_end_at_the_batch():
    assert ramp_problem(64, (16, 8, 100)) is None
    assert "starts with 64 rows, but train.batch_size is 64" in (ramp_problem(64, (64, 8, 1)) or "")
    assert "48 is not divisible by 10" in (ramp_problem(64, (16, 10, 100)) or "")
