"""Held-out loss by source put together, against numbers worked out by hand."""

import math

import pytest

from castalia.core.errors import ConfigError
from castalia.mixing import scores


def test_every_number_of_a_small_table():
    found = scores(
        ["a", "b", "c"],
        [20.0, 6.0, 0.0],
        [10, 2, 0],
        natural=[1, 3, 96],
        bytes_per_token={"a": 4.0},
    )
    assert found["token_weighted"] == pytest.approx(26 / 12)
    assert found["natural"] == pytest.approx((2 * 1 + 3 * 3) / 4)
    assert found["mean"] == pytest.approx(2.5)
    assert (found["worst"], found["worst_source"]) == (3.0, "b")
    assert found["perplexity"] == pytest.approx((math.exp(2) + math.exp(3)) / 2)
    assert found["sources"] == {
        "a": {"loss": 2.0, "tokens": 10, "bits_per_byte": pytest.approx(2 / math.log(2) / 4)},
        "b": {"loss": 3.0, "tokens": 2},
    }
    assert found["bits_per_byte"] == found["sources"]["a"]["bits_per_byte"]


def test_what_is_not_known_is_left_out():
    found = scores(["a", "b"], [1.0, 2.0], [1, 1])
    assert found.keys() == {
        "token_weighted",
        "mean",
        "worst",
        "worst_source",
        "perplexity",
        "sources",
    }


@pytest.mark.parametrize(("sums", "tokens"), [([1.0], [1]), ([0.0, 0.0], [0, 0])])
def test_nothing_to_put_together(sums, tokens):
    with pytest.raises(ConfigError, match="expected sums and tokens of 2 sources"):
        scores(["a", "b"], sums, tokens)
