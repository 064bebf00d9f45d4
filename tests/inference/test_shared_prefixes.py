"""Prompts that begin like kept sequences: read in few passes, with the logits of whole texts."""

from typing import Any

import pytest
import torch

from castalia.inference import passes
from castalia.inference.batching import Admission, Batcher
from castalia.inference.decoding import begin
from castalia.inference.passes import NewRow, grouped
from castalia.inference.prompt_scoring import Stem, stems_of
from castalia.inference.sampling import Sampling
from castalia.inference.torch_engine import TorchEngine
from castalia.inference.torch_slots import TorchSlots
from castalia.models import Decoder, build_model_config
from castalia.models.init import start_weights
from castalia.tokenizers.special_ids import SpecialIds

LENGTH = 64
VOCABULARY = 61
SHAPE = {"num_layers": 2, "hidden_size": 32, "vocab_size": VOCABULARY}
SHAPE |= {"max_position_embeddings": LENGTH}
WITHOUT_HEADS = ("gmlp", "mamba", "rwkv6")
MODELS: dict[str, dict[str, Any]] = {
    "rotary": {"family": "neox"},
    "grouped": {"family": "llama", "num_kv_heads": 2},
    "dynamic": {
        "family": "llama",
        "max_position_embeddings": 16,
        "rope_scaling": {"kind": "dynamic", "factor": 4},
    },
    "alibi": {"family": "neox", "pos_emb": "alibi"},
    "learned": {"family": "gpt2"},
    "rpe": {"family": "neox", "pos_emb": "rpe", "rpe_num_buckets": 8, "rpe_max_distance": 10},
    "window": {"family": "mistral", "sliding_window": 5},
    "pattern": {
        "family": "neox",
        "sliding_window": 5,
        "attention_config": ["global", "sliding"],
    },
    "sparse": {
        "family": "neox",
        "attention_config": ["sparse_fixed", "local"],
        "sparsity_config": {"block": 2, "num_local_blocks": 2},
    },
    "positions": {"family": "gmlp"},
    "mamba": {"family": "mamba"},
    "hybrid": {"family": "neox", "pattern": ["mamba", "attention"]},
    "rwkv": {"family": "rwkv6", "rwkv6": {"head_size": 8}},
}
IDS = torch.randint(1, 61, (5, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()


def make(values: dict[str, Any]) -> Decoder:
    heads = {} if values["family"] in WITHOUT_HEADS else {"num_attention_heads": 4}
    config = build_model_config(SHAPE | heads | values, "a test")
    model = Decoder(config)
    weights = start_weights(config, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than start weights, so that what is read from a wrong place shows.
            parameter.copy_(weights(name, parameter.shape) * 3)
    return model.eval()


def count_passes(model: Decoder) -> list[tuple[int, ...]]:
    """The list to which each pass adds the shape of its tokens."""
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    return shapes


@pytest.mark.parametrize("case", MODELS)
def test_parts_of_any_lengths_behind_any_prefixes(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TorchEngine(make(MODELS[case]))
    slots = engine.slots(5, LENGTH)
    read = count_passes(engine.model)
    # Slot, and the end of what it reads in this step.
    for turn, step in enumerate(
        (
            {3: 40, 0: 2, 1: 17},
            {1: 21, 4: 60, 2: 9, 3: 41},
            {0: 61},
            {0: LENGTH, 1: 30, 2: 29},
            {2: 30, 4: 61},
        )
    ):
        if turn == 3:
            # Long rows are read in parts, and copies of many keys in passes of their own.
            monkeypatch.setitem(passes.PASS_TOKENS, "cpu", 8)
            monkeypatch.setattr(passes, "COPIED_KEYS", 30)
        before = len(read)
        tokens = [IDS[slot][slots.lengths[slot] : end] for slot, end in step.items()]
        logits = slots.feed(list(step), tokens)
        used = len(read) - before
        for row, (slot, end) in enumerate(step.items()):
            expected = alone(engine, IDS[slot][:end], case == "dynamic")
            assert (logits[row] - expected).abs().max() < 2e-4, (turn, slot)
        # A model this small takes longer for a pass than for the padding.
        assert used == 1 if slots.rewinds and turn < 2 else used <= 40
    parts = slots.feed_all(1, IDS[1][30:])
    assert (parts[-1] - alone(engine, IDS[1], case == "dynamic")).abs().max() < 2e-4
    if case != "dynamic":
        assert (parts - engine.logits(IDS[1])[30:]).abs().max() < 2e-4


def alone(engine: TorchEngine, ids: list[int], one_by_one: bool) -> torch.Tensor:
    """Logits after a text that is read whole, or token by token: a token's own length counts."""
    if not one_by_one:
        return engine.logits(ids)[-1]
    slots = engine.slots(1, LENGTH)
    for token in ids:
        logits = slots.feed([0], [[token]])
    return logits[0]


def test_a_prompt_that_shares_its_beginning_is_read_with_the_others() -> None:
    engine = TorchEngine(make(MODELS["rotary"]))
    read = count_passes(engine.model)
    batcher = Batcher(engine, 8, LENGTH)

    def admit(prompts: list[list[int]]) -> list[list[int]]:
        texts = [
            begin(
                ids,
                max_new_tokens=3,
                limit=LENGTH,
                special=SpecialIds(),
                decode=str,
            )
            for ids in prompts
        ]
        batcher.admit([Admission(text, Sampling(), torch.Generator()) for text in texts])
        while batcher.running:
            batcher.step()
        return [text.tokens for text in texts]

    first = [*IDS[0][:30], 5]
    # Fresh ones, one that shares a part of a slot, and a chat's next turn: all of a slot and more.
    admit([first])
    turn = [*first, *admit([first])[0], 7, 8]
    news = [IDS[1][:40], [*IDS[0][:20], *IDS[2][:9]], turn, IDS[3][:22]]
    read.clear()
    found = admit(news)
    assert batcher.prefix_tokens >= 20 + 31
    # Each token of the prompts is read once, in at most two passes; then two steps of a token.
    assert 1 <= len([shape for shape in read if shape[1] > 1]) <= 2
    assert len(read) <= 4
    for ids, tokens in zip(news, found, strict=True):
        assert tokens == TorchSlotsAlone(engine).greedy(ids, 3)


class TorchSlotsAlone:
    """A text in fresh slots of its own."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine = engine

    def greedy(self, ids: list[int], count: int) -> list[int]:
        slots = self.engine.slots(1, LENGTH)
        assert isinstance(slots, TorchSlots)
        made: list[int] = []
        while len(made) < count:
            logits = slots.feed([0], [made[-1:] or ids])[0]
            made.append(int(logits[:VOCABULARY].argmax()))
        return made


def test_rows_share_a_pass_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = [NewRow(0, count) for count in (290, 280, 20, 300, 285)]
    # Padding 20 tokens to 300 would cost more than a pass.
    assert sorted(grouped(fresh, 512, "cpu")) == [[0, 1, 4], [2], [3]]
    assert grouped([*fresh[:2], NewRow(200, 90)], 512, "cpu") == [[0, 1], [2]]
    # On a GPU a pass costs more than the padding.
    assert grouped([*fresh, NewRow(200, 90)], 512, "cuda") == [[0, 1, 2, 3, 4, 5]]
    monkeypatch.setitem(passes.PASS_TOKENS, "cpu", 400)
    assert grouped(fresh, 512, "cpu") == [[2], [1], [4], [0], [3]]
    # Every row once, whatever the numbers.
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        numbers = torch.randint(1, 600, (9, 2), generator=generator).tolist()
        rows = [NewRow(start, count) for start, count in numbers]
        groups = grouped(rows, 64, "cpu")
        assert sorted(i for group in groups for i in group) == list(range(9))
        for group in groups:
            tokens = len(group) * max(rows[i].new for i in group)
            assert len(group) == 1 or tokens <= passes.PASS_TOKENS["cpu"]


@pytest.mark.parametrize("case", ["rotary", "window", "hybrid", "rwkv"])
def test_scored_prompts_are_read_once_and_their_stem_once_for_all(case: str) -> None:
    engine = TorchEngine(make(MODELS[case]))
    stem = IDS[0][:30]
    prompts = [
        [*stem, *IDS[1][:4]],
        IDS[2][:40],
        [*stem, *IDS[3][:9]],
        IDS[2][:40],
        stem,
        [7],
    ]
    heard: list[list[torch.Tensor]] = [[] for _ in prompts]
    news = []
    for ids, parts in zip(prompts, heard, strict=True):
        text = begin(ids, max_new_tokens=1, limit=LENGTH, special=SpecialIds(), decode=str)
        admission = Admission(text, Sampling(), torch.Generator())

        def hear(logits: torch.Tensor, start: int, parts: list[torch.Tensor] = parts) -> None:
            assert start == sum(len(part) for part in parts)
            parts.append(logits.clone())

        admission.score = hear
        news.append(admission)
    news[1].continues = False
    read = count_passes(engine.model)
    # One of another kind beside them, which may begin like one of theirs.
    other = begin(
        [*prompts[0], 3], max_new_tokens=1, limit=LENGTH, special=SpecialIds(), decode=str
    )
    batcher = Batcher(engine, 8, LENGTH)
    pieces = batcher.admit([*news, Admission(other, Sampling(), torch.Generator())])
    positions = sum(shape[0] * shape[1] for shape in read)
    needed = 29 + 5 + 10 + 1 + 40 + 1
    # The other one continues from a slot: of it one token is new.
    assert needed + 1 <= positions <= 2 * needed
    assert not batcher.running and batcher.free == 8
    for row, (ids, parts, new) in enumerate(zip(prompts, heard, news, strict=True)):
        expected = engine.logits(ids)
        assert (torch.cat(parts) - expected).abs().max() < 2e-4
        best = int(expected[-1, :VOCABULARY].argmax())
        assert new.text.tokens == ([best] if new.continues else []), row
        assert bool(pieces[row]) == new.continues
    best = int(engine.logits(other.ids)[-1, :VOCABULARY].argmax())
    assert other.tokens == [best]


def test_prompts_that_begin_alike_are_grouped_where_it_saves_most() -> None:
    one = list(range(100))
    prompts = [[*one[:50], 7], [*one[:50], 8, 9], [*one[:20], 5], [3, *one], one[:50]]
    stems = stems_of(prompts)
    assert sorted(place for stem in stems for place in stem.prompts) == [0, 1, 2, 3, 4]
    assert Stem([4, 0, 1], 49) in [Stem(sorted_last(stem.prompts), stem.length) for stem in stems]
    assert Stem([2], 21) in stems and Stem([3], 101) in stems
    assert stems_of([[1] * 15 + [2], [1] * 15 + [3]]) == [Stem([0], 16), Stem([1], 16)]


def sorted_last(places: list[int]) -> list[int]:
    """The first place, then the others in order."""
    return [places[0], *sorted(places[1:])]
