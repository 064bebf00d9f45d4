import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from castalia.checkpoint.tiling import fault_of_tiling
from castalia.distributed.boxes import Box, pair_boxes, shard, whole


def elements(runs):
    return [index for low, high in runs for index in range(low, high)]


@given(size=st.integers(0, 40), count=st.integers(1, 6), pieces=st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_shard_follows_torch(size, count, pieces):
    placement = Shard(0) if pieces == 1 else _StridedShard(0, split_factor=pieces)
    parts = placement._split_tensor(torch.arange(size), count, with_padding=False)[0]
    assert [elements(shard([(0, size)], index, count, pieces)) for index in range(count)] == [
        p.tolist() for p in parts
    ]


@given(
    size=st.integers(0, 30),
    outer=st.integers(1, 4),
    inner=st.integers(1, 4),
    pieces=st.integers(1, 3),
)
@settings(max_examples=100, deadline=None)
def test_two_cuts_of_one_dimension_hold_each_element_once(size, outer, inner, pieces):
    held = []
    for a, b in itertools.product(range(outer), range(inner)):
        held += elements(shard(shard([(0, size)], a, outer, pieces), b, inner))
    assert sorted(held) == list(range(size))


def test_pair_boxes_places_interleaved_pieces():
    whole_tensor = torch.arange(48).view(8, 6)
    runs = [[(0, 2), (4, 6)], [(3, 6)]]
    local = torch.cat([whole_tensor[0:2], whole_tensor[4:6]])[:, 3:6]
    for box, place in pair_boxes(runs):
        there, here = whole_tensor[box.slices], local[place.slices]
        assert torch.equal(there, here)
    assert sum(box.volume for box, _ in pair_boxes(runs)) == local.numel()


def test_zero_dimensional_tensor_is_one_box_of_one_element():
    assert pair_boxes([]) == [(whole(()), whole(()))]
    assert whole(()).volume == 1
    assert fault_of_tiling((), [whole(())]) is None


@pytest.mark.parametrize(
    "boxes, fault",
    [
        ([Box((0, 0), (4, 6))], None),
        ([Box((2, 0), (2, 6)), Box((0, 0), (2, 6))], None),
        ([Box((0, 0), (2, 6)), Box((2, 0), (2, 3)), Box((2, 3), (2, 3))], None),
        ([Box((0, 0), (3, 6))], "18 elements, expected 24"),
        ([Box((0, 0), (3, 6)), Box((2, 0), (1, 6))], "overlap"),
        ([Box((0, 0), (2, 6)), Box((1, 0), (2, 3)), Box((2, 3), (2, 3))], "overlap"),
        ([Box((0, 0), (2, 6)), Box((0, 0), (2, 6))], "overlap"),
        ([Box((0, 0), (5, 6))], "outside"),
        ([Box((0,), (24,))], "dimensions"),
    ],
)
def test_tiling(boxes, fault):
    found = fault_of_tiling((4, 6), boxes)
    assert found is None if fault is None else fault in found
