"""The engine seam: an engine is one class, and refuses a model before a weight is read."""

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import castalia
from castalia.core.errors import ConfigError
from castalia.eval.likelihoods.scoring import Line, score_lines
from castalia.export import export
from castalia.export.formats import EXPORTS
from castalia.formats.saved_model import SavedModel
from castalia.inference import LanguageModel, loading
from castalia.inference.batching import Admission, Batcher
from castalia.inference.engine import Engine, Slots
from castalia.inference.engines import ENGINES
from castalia.inference.implements import NEOX
from castalia.inference.sampling import Sampling
from castalia.inference.speculative import speculative_complete
from castalia.models import ModelConfig, NeoxConfig


class ToySlots(Slots):
    """Counts tokens; its state is a sum, which cannot be taken apart again."""

    rewinds = False

    def __init__(self, engine: "Toy", count: int, length: int) -> None:
        super().__init__(count, length)
        self.engine = engine
        self.sums = [0] * count
        self.fed = 0

    def feed(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        for slot, ids in zip(slots, tokens, strict=True):
            self.sums[slot] += sum(ids)
            self.lengths[slot] += len(ids)
            self.fed += len(ids)
        return torch.stack([self.engine.after(self.sums[slot]) for slot in slots])

    def copy(self, origin: int, target: int, tokens: int) -> None:
        assert tokens in (0, self.lengths[origin]), "a sum has no prefix"
        self.sums[target] = self.sums[origin] if tokens else 0
        self.lengths[target] = tokens


class Toy(Engine):
    """The next token is the sum of all tokens so far, modulo 7."""

    name = "toy"
    implements = NEOX | {"parallel_residual": (True,)}
    reads_checkpoints = True
    dtypes = ("fp32",)
    batching = "continuous"
    scores = "in integers"

    @classmethod
    def from_checkpoint(cls, source: SavedModel, dtype: str, device: str) -> "Toy":
        return cls(source.config)

    @property
    def numbers(self) -> str:
        return "integers"

    def after(self, total: int) -> Tensor:
        return torch.nn.functional.one_hot(
            torch.tensor(total % 7), self.config.padded_vocab_size
        ).float()

    def slots(self, count: int, length: int) -> ToySlots:
        return ToySlots(self, count, length)

    def logits_in_parts(self, ids: Sequence[int]) -> Iterator[Tensor]:
        sums = torch.tensor(ids).cumsum(0).tolist()
        yield torch.stack([self.after(total) for total in sums])


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type[Toy]:
    """The toy engine, registered for one test."""
    monkeypatch.setattr(ENGINES, "items", dict(ENGINES.items))
    ENGINES.register(Toy.name)(Toy)
    return Toy


class Unread(Mapping[str, Tensor]):
    """Tensors of a checkpoint that nobody may read."""

    def __getitem__(self, name: str) -> Tensor:
        raise AssertionError(f"{name} was read before the engine was asked")

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("the weights were read before the engine was asked")

    def __len__(self) -> int:
        raise AssertionError("the weights were read before the engine was asked")


class Foreign(ModelConfig):
    """A family that no engine with an implementation of its own knows."""

    family: str = "foreign"


class Extended(NeoxConfig):
    """A known family with an option that was added after the engines were written."""

    rescaling: str = "none"


SIZES = {"num_layers": 1, "hidden_size": 64, "vocab_size": 257}
HEADS = SIZES | {"num_attention_heads": 2}


def opens(monkeypatch: pytest.MonkeyPatch, config: ModelConfig) -> None:
    """Make every path a checkpoint of `config` whose weights raise."""
    tokenizer = castalia.tokenizers.tokenizer.load_tokenizer("bytes")
    source = SavedModel(Path("checkpoint"), config, Unread(), tokenizer, 1)
    monkeypatch.setattr(loading, "open_model", lambda path, check: source)
    monkeypatch.setattr("castalia.export.exports.open_model", lambda path: source)
    monkeypatch.setattr("castalia.export.places.find_checkpoint", Path)


def test_an_engine_is_chosen_by_its_name(run_folder: Path, toy: type[Toy]) -> None:
    model = castalia.load(run_folder, engine="toy")
    assert isinstance(model.engine, Toy)
    assert model.generate_ids([[1, 2], [3]], 3) == [[3, 6, 5], [3, 6, 5]]
    assert model.logprobs([1, 2, 3]).tolist() == pytest.approx(
        model.logits([1, 2]).log_softmax(1)[[0, 1], [2, 3]].tolist()
    )
    lines = [Line((1, 2), (3, 3)), Line((1, 2), (3, 4)), Line((1,), (1,))]
    scored = score_lines(model.engine, lines)
    assert [one.greedy for one in scored] == [False, False, True]
    assert scored[0].logprob == pytest.approx(model.logprobs([1, 2, 3, 3])[1:].sum().item())
    with pytest.raises(
        ConfigError, match="unknown dtype 'int4' for engine=toy; choose one of fp32"
    ):
        castalia.load(run_folder, engine="toy", dtype="int4")


def test_an_engine_refuses_with_one_sentence(
    toy: type[Toy], monkeypatch: pytest.MonkeyPatch
) -> None:
    opens(monkeypatch, NeoxConfig(**HEADS, parallel_residual=False))
    with pytest.raises(
        ConfigError,
        match="engine=toy does not implement parallel_residual=False, only True; use engine=torch",
    ):
        castalia.load("run", engine="toy")


@pytest.mark.parametrize("engine", ["native", "ct2", "llama.cpp", "openvino"])
@pytest.mark.parametrize(
    ("config", "option"),
    [
        (Foreign(**SIZES), "family='foreign'"),
        (Extended(**HEADS, rescaling="all"), "rescaling='all'"),
    ],
)
def test_an_unknown_model_is_refused_before_a_weight_is_read(
    monkeypatch: pytest.MonkeyPatch, engine: str, config: ModelConfig, option: str
) -> None:
    opens(monkeypatch, config)
    with pytest.raises(ConfigError, match=f"engine={engine} does not implement {option}"):
        castalia.load("run", engine=engine)


@pytest.mark.parametrize("to", ["native", "ct2", "gguf"])
def test_an_export_asks_its_engine_before_a_weight_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, to: str
) -> None:
    opens(monkeypatch, Foreign(**SIZES))
    with pytest.raises(ConfigError, match="does not implement family='foreign'"):
        list(export("run", to=to, output=tmp_path / "out"))
    assert not list(tmp_path.iterdir())
    assert EXPORTS[to].engine() is not None


def test_an_option_at_its_old_meaning_is_no_reason_to_refuse() -> None:
    assert ENGINES["native"].refuses(Extended(**HEADS)) is None
    assert ENGINES["torch"].refuses(Foreign(**SIZES)) is None


def test_auto_falls_back_to_torch_with_one_sentence(
    run_folder: Path, speaker: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ENGINES["native"], "implements", NEOX | {"rotary_pct": (0.25,)})
    with pytest.warns(
        UserWarning, match=r"engine=native does not .* rotary_pct=0.5.*; engine=torch computes it"
    ) as caught:
        model = castalia.load(run_folder, dtype="auto")
    assert [w.category for w in caught].count(UserWarning) == 1
    assert (model.engine.name, model.engine.numbers) == ("torch", "fp32")
    assert model.generate("The naïve", 20) == speaker.generate("The naïve", 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        castalia.load(run_folder)


def test_a_state_that_cannot_rewind_is_continued_whole_or_not_at_all(
    run_folder: Path, toy: type[Toy]
) -> None:
    engine = castalia.load(run_folder, engine="toy").engine
    model = LanguageModel(engine)

    def read(batcher: Batcher, ids: list[int]) -> list[int]:
        text = model.continuation(ids, 1)
        batcher.admit([Admission(text, Sampling(), torch.Generator())])
        return text.tokens

    batcher = Batcher(engine, 2, 100)
    prompt = [1] * 20
    assert read(batcher, prompt) == [20 % 7]
    # The first 20 tokens lie whole in a slot: two more are read.
    assert read(batcher, [*prompt, 3, 5]) == [28 % 7]
    assert (batcher.prefix_tokens, batcher.slots.fed) == (20, 22)
    # The 20 are still whole in the first slot, which is continued in place.
    assert read(batcher, [*prompt, 3]) == [23 % 7]
    assert (batcher.prefix_tokens, batcher.slots.fed) == (40, 23)
    # Both slots begin with these 18, but a sum cannot be cut back to them.
    assert read(batcher, [*prompt[:18], 4]) == [22 % 7]
    assert (batcher.prefix_tokens, batcher.slots.fed) == (40, 42)


def test_a_beam_search_needs_no_state_that_rewinds(run_folder: Path, toy: type[Toy]) -> None:
    """Beams are copied whole: the scores are those of their texts."""
    model = LanguageModel(castalia.load(run_folder, engine="toy").engine)
    prompt = [1, 2, 5]
    found = model.complete([prompt], 4, num_beams=4, num_return_sequences=4, ignore_eos=True)
    assert found[0].tokens == model.generate_ids(prompt, 4)
    for one in found:
        logprobs = model.logprobs(prompt + one.tokens)[len(prompt) - 1 :]
        assert one.score == pytest.approx(logprobs.mean().item(), rel=1e-5)
    assert len({tuple(one.tokens) for one in found}) == 4


def test_speculative_decoding_refuses_a_state_that_cannot_rewind(
    run_folder: Path, toy: type[Toy], speaker: LanguageModel
) -> None:
    model = castalia.load(run_folder, engine="toy")
    with pytest.raises(ConfigError, match="the state of the model cannot be rewound"):
        speculative_complete(model, [[1, 2]], draft="lookup")
    with pytest.raises(ConfigError, match="the state of the draft cannot be rewound"):
        speculative_complete(speaker, ["a"], draft=model)


def test_the_kind_of_an_export_is_what_its_record_says(run_folder: Path, tmp_path: Path) -> None:
    (done,) = export(run_folder, to="native", output=tmp_path / "out")
    shutil.copy(Path(done.folder) / "native.safetensors", Path(done.folder) / "model.bin")
    assert castalia.load(done.folder).engine.name == "native"
