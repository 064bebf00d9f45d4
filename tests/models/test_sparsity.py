"""Patterns of sparse attention: written down, and beside DeepSpeed's code.

DEEPSPEED names a git directory of github.com/deepspeedai/DeepSpeed; without it its code is skipped.
"""

import os
import subprocess
import types
from typing import Any

import pytest
import torch

from castalia.core.errors import ConfigError
from castalia.models import build_model_config
from castalia.models.context import Context, HeadShare
from castalia.models.parts.masks import mask_of_kind
from castalia.models.parts.sparsity import block_layout, drawn
from castalia.models.sparsity import SparsityConfig

PEER = os.environ.get("DEEPSPEED", "")
CLASSES = {
    "local": "LocalSlidingWindowSparsityConfig",
    "sparse_fixed": "FixedSparsityConfig",
    "sparse_variable": "VariableSparsityConfig",
    "bigbird": "BigBirdSparsityConfig",
    "bslongformer": "BSLongformerSparsityConfig",
}
CASES: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
    ("local", 7, {}, {"num_sliding_window_blocks": 4}),
    ("local", 9, {"num_local_blocks": 7}, {"num_sliding_window_blocks": 7}),
    ("sparse_fixed", 8, {}, {}),
    ("sparse_fixed", 11, {"num_local_blocks": 4, "num_global_blocks": 2}, {}),
    (
        "sparse_fixed",
        10,
        {
            "different_layout_per_head": True,
            "num_local_blocks": 4,
            "num_different_global_patterns": 3,
        },
        {},
    ),
    ("sparse_variable", 12, {"local_window_blocks": (1, 2, 4)}, {}),
    ("sparse_variable", 9, {"num_random_blocks": 2, "global_block_indices": (1, 4)}, {}),
    (
        "sparse_variable",
        9,
        {
            "different_layout_per_head": True,
            "num_random_blocks": 1,
            "global_block_indices": (0, 5),
            "global_block_end_indices": (2, 20),
        },
        {},
    ),
    ("bigbird", 9, {}, {}),
    ("bigbird", 9, {"different_layout_per_head": True, "num_global_blocks": 2}, {}),
    ("bigbird", 9, {"num_random_blocks": 0, "num_sliding_window_blocks": 5}, {}),
    ("bslongformer", 9, {}, {}),
    (
        "bslongformer",
        9,
        {"global_block_indices": (0, 4), "global_block_end_indices": (1, 6)},
        {},
    ),
]
"""Kind, blocks, our options, and those of DeepSpeed that have another name there."""
GOLDEN = {
    "local": ["x", "xx", "xxx", ".xxx", "..xxx", "...xxx"],
    "sparse_fixed": ["x", "xx", "xxx", "xxxx", "...xx", "...xxx", "...xxxx"],
    "sparse_variable": ["x", "xx", "xxx", "xxxx", "x...x", "x...xx"],
    "bslongformer": ["x", "xx", "xxx", "x.xx", "x..xx"],
}
"""Rows of the patterns with the defaults of GPT-NeoX, up to the diagonal."""


def peer_layout(kind: str, blocks: int, options: dict[str, Any]) -> torch.Tensor:
    """The pattern of 4 heads by DeepSpeed's own code, its draws replaced by ours."""
    path = "HEAD:deepspeed/ops/sparse_attention/sparsity_config.py"
    text = subprocess.run(
        ["git", f"--git-dir={PEER}", "show", path], capture_output=True, text=True, check=True
    ).stdout
    module = types.ModuleType("sparsity_config")
    exec(compile(text, path, "exec"), module.__dict__)
    unlike = {"num_heads": 4, "block": 16, "attention": "unidirectional"}
    peer = getattr(module, CLASSES[kind])(**unlike, **options)
    place = {"number": 0}
    sparsity = SparsityConfig(different_layout_per_head=peer.different_layout_per_head)

    def sample(among, count):
        head, row = divmod(place["number"], blocks)
        place["number"] += 1
        return drawn(sparsity, count, head, row, len(among))

    module.random = types.SimpleNamespace(sample=sample)
    layout: torch.Tensor = peer.make_layout(16 * blocks).bool()
    return layout.tril()


@pytest.mark.skipif(not PEER, reason="DEEPSPEED does not name a git directory of DeepSpeed")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_a_pattern_is_deepspeeds(case):
    kind, blocks, options, renamed = case
    theirs = peer_layout(kind, blocks, renamed or options)
    ours = block_layout(kind, SparsityConfig(**options), 4, blocks)
    assert torch.equal(ours.expand_as(theirs), theirs)


@pytest.mark.parametrize("kind", GOLDEN)
def test_a_pattern_is_the_one_written_down(kind):
    rows = GOLDEN[kind]
    layout = block_layout(kind, SparsityConfig(), 4, len(rows))
    assert layout.shape == (1, len(rows), len(rows))
    shown = ["".join(".x"[int(seen)] for seen in row[: i + 1]) for i, row in enumerate(layout[0])]
    assert shown == rows
    assert not layout[0].triu(1).any()


def test_heads_take_summaries_in_turn():
    sparsity = SparsityConfig(different_layout_per_head=True, num_different_global_patterns=2)
    layout = block_layout("sparse_fixed", sparsity, 4, 8)
    assert (
        layout[:, 7, :4].tolist()
        == [
            [False, False, False, True],
            [False, False, True, False],
        ]
        * 2
    )


def test_drawn_blocks_are_the_same_everywhere_and_differ_by_head_and_seed():
    sparsity = SparsityConfig(different_layout_per_head=True, num_random_blocks=2)
    layout = block_layout("bigbird", sparsity, 4, 32)
    again = block_layout.__wrapped__("bigbird", sparsity, 4, 32)
    assert torch.equal(layout, again)
    assert not torch.equal(layout[0], layout[1])
    other = block_layout("bigbird", sparsity.model_copy(update={"seed": 7}), 4, 32)
    assert not torch.equal(layout, other)
    # Window of two, one summary, two drawn: at most five blocks, and often all five.
    counts = layout.sum(-1)[:, 8:]
    assert int(counts.max()) == 5 and int(counts.min()) >= 3
    # The pattern of a longer row begins with that of a shorter one.
    longer = block_layout("bigbird", sparsity, 4, 40)
    assert torch.equal(longer[:, :32, :32], layout)


def test_a_mask_is_the_pattern_in_tokens_for_the_heads_held_here():
    shape = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 61}
    options = {
        "block": 2,
        "different_layout_per_head": True,
        "num_local_blocks": 2,
        "num_different_global_patterns": 2,
    }
    values = {"attention_config": ["sparse_fixed"], "sparsity_config": options}
    config = build_model_config(shape | values | {"max_position_embeddings": 8}, "a test")
    context = Context(torch.arange(7)[None], heads=HeadShare(rank=1, size=2))
    mask = mask_of_kind("sparse_fixed", config, context, None, None)
    assert mask.shape == (1, 2, 7, 7)
    shown = ["".join(".x"[int(seen)] for seen in row) for row in mask[0, 1]]
    # Head 3 has its summary in the first block of each window.
    assert shown == [
        "x......",
        "xx.....",
        "xxx....",
        "xxxx...",
        "xx..x..",
        "xx..xx.",
        "xx..xxx",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_different_global_patterns": 2}, "needs different_layout_per_head=true"),
        (
            {"num_different_global_patterns": 5, "different_layout_per_head": True},
            "do not fit a window of 4 blocks",
        ),
        ({"global_block_end_indices": [3, 4]}, "each range needs both"),
        ({"local_window_blocks": []}, "local_window_blocks is empty"),
    ],
)
def test_options_that_exclude_each_other(values, message):
    shape = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 61}
    with pytest.raises(ConfigError, match=message):
        build_model_config(shape | {"sparsity_config": values}, "a test")
