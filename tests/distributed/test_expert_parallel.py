"""Tokens that travel to the ranks of their experts, and checkpoints that move over ep."""

import json
from pathlib import Path

import pytest
import torch
from tests.distributed.expert_ranks import CHAIN, COUNTS, RANKS, rows_of

from castalia.checkpoint import read
from castalia.checkpoint.names import step_name


@pytest.fixture(scope="module")
def folder(program, tmp_path_factory) -> Path:
    """What four ranks left."""
    folder = tmp_path_factory.mktemp("experts")
    done = program(Path(__file__).with_name("expert_ranks.py"), folder)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_go_to_their_experts_and_back(folder, dtype):
    found = [
        json.loads((folder / f"exchange-{rank}.json").read_text())[str(dtype)]
        for rank in range(RANKS)
    ]
    of_experts = torch.zeros(RANKS)
    for rank, mine in enumerate(found):
        rows = rows_of(rank).to(dtype)
        experts = torch.arange(RANKS).repeat_interleave(torch.tensor(COUNTS[rank]))
        out = rows * (experts + 1)[:, None]
        assert torch.equal(torch.tensor(mine["out"], dtype=dtype).view_as(out), out)
        gradient = 2 * out * (experts + 1)[:, None]
        torch.testing.assert_close(
            torch.tensor(mine["gradient"], dtype=dtype).view_as(out), gradient
        )
        of_experts.index_add_(0, experts, (2 * out * rows).float().sum(1))
        # Expert r is on rank r alone, and gets the rows of all ranks.
        assert mine["given"] == [sum(counts[rank] for counts in COUNTS)]
    torch.testing.assert_close(
        torch.tensor([mine["of the expert"] for mine in found]), of_experts, rtol=0.02, atol=0.02
    )


def test_biases_of_the_balance_stay_fp32_where_weights_are_gathered_in_bf16(folder):
    for rank in range(RANKS):
        found = json.loads((folder / f"exchange-{rank}.json").read_text())["dtypes"]
        assert found == {"weight": "torch.bfloat16", "bias": "torch.float32"}


def test_checkpoints_move_over_ep_bit_for_bit(folder):
    first, *others = (
        read(folder / f"ep-{number}" / step_name(0), prefix="") for number in range(len(CHAIN))
    )
    stacks = [name for name in first if ".mlp.experts." in name]
    assert len(stacks) == 2 * 3 * 3, "three stacks of two layers, and two moments of each"
    assert all(first[name].any() for name in first)
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], first[name]) for name in first)
