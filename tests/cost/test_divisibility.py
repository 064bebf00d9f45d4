"""Layouts that a model does not divide over are refused with the config, each with its reason."""

import pytest

from castalia.core.errors import ConfigError
from castalia.recipes import load_config

REFUSED = {
    "model.num_attention_heads 4 is not divisible by parallel.tp=8: a head stays whole on a rank": (
        "parallel.tp=8",
    ),
    "model.intermediate_size 130 is not divisible by parallel.tp=4": (
        "parallel.tp=4",
        "model.intermediate_size=130",
    ),
    "data.seq_length 62 is not divisible by parallel.tp=4": (
        "parallel.tp=4",
        "data.seq_length=62",
    ),
    "data.seq_length 62 is not divisible by 2 * parallel.cp = 4": (
        "parallel.cp=2",
        "data.seq_length=62",
    ),
    "data.seq_length 60 is not divisible by parallel.cp=2 times parallel.tp=4": (
        "parallel.cp=2",
        "parallel.tp=4",
        "data.seq_length=60",
    ),
    "model.num_kv_heads 3 and parallel.tp=4: one must be a multiple of the other": (
        "parallel.tp=4",
        "model.num_attention_heads=12",
        "model.hidden_size=96",
        "model.num_kv_heads=3",
    ),
    "model.pos_emb=rpe has one table for all layers, and parallel.pp=2": (
        "parallel.pp=2",
        "model.pos_emb=rpe",
        "train.micro_batch_size=2",
    ),
    "the padded vocabulary 257 is not divisible by parallel.tp=2: each rank holds an equal part of"
    " it; model.make_vocab_size_divisible_by=2 pads it to fit": (
        "parallel.tp=2",
        "model.make_vocab_size_divisible_by=1",
    ),
    "parallel.ep=2 splits experts, and the model has none; set model.moe or ep=1": (
        "parallel.ep=2",
    ),
    "model.moe.experts 6 is not divisible by parallel.ep=4: each rank holds an equal part of the"
    " experts": ("parallel.ep=4", "model.moe.experts=6"),
    "the width 66 of an expert is not divisible by parallel.tp=4: with model.moe.split_over_tp": (
        "parallel.tp=4",
        "model.moe.experts=4",
        "model.moe.expert_size=66",
        "model.moe.split_over_tp=true",
    ),
    "parallel.ep=4 does not divide parallel.dp_shard=6 times parallel.cp=1: the ranks that split": (
        "parallel.ep=4",
        "parallel.dp_shard=6",
        "model.moe.experts=4",
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_with_the_reason(message):
    with pytest.raises(ConfigError) as caught:
        load_config(["debug", *REFUSED[message]])
    assert message in str(caught.value)


def test_all_reasons_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config(["debug", "parallel.tp=3"])
    text = str(caught.value)
    assert (
        "num_attention_heads 4" in text
        and "intermediate_size 512" in text
        and "seq_length 64" in text
    )


def test_what_divides_is_taken():
    assert load_config(["debug", "parallel.tp=4"]).parallel.tp == 4
