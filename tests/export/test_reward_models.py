"""Reward models between Castalia and transformers: the same scores, both ways."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import castalia
from castalia.checkpoint import Store
from castalia.checkpoint.hf import write_hf
from castalia.core.errors import ConfigError
from castalia.export import export
from castalia.formats.saved_model import open_model
from castalia.models import Decoder, ModelConfig
from castalia.models.families import FAMILIES
from castalia.models.init import init_parameter
from castalia.tokenizers.tokenizer import load_tokenizer

IDS = [[5, 9, 200, 31], [7], [3, 3, 8]]
PAD = 256
SIZES = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 257}


def config_of(family: str) -> ModelConfig:
    """A tiny reward model of a family."""
    return FAMILIES[family].Config(**SIZES, head="score")


def weights_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Large start weights, so that scores differ."""
    with torch.device("meta"):
        names = dict(Decoder(config).named_parameters())
    return {name: 10 * init_parameter(name, p.shape, config, 1) for name, p in names.items()}


@pytest.mark.parametrize("family", ["neox", "llama", "mistral", "qwen2", "gpt2", "falcon"])
def test_transformers_gives_the_same_scores(family, tmp_path):
    config = config_of(family)
    write_hf(tmp_path, weights_of(config), config, end_ids=[0], pad_id=PAD)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__.endswith("ForSequenceClassification")
    assert theirs.config.num_labels == 1
    ours = castalia.load(tmp_path)
    assert ours.config.head == "score" and ours.config.family == family
    scores = torch.tensor(ours.scores(IDS))
    rows = torch.full((3, 4), PAD)
    for row, ids in zip(rows, IDS, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    with torch.no_grad():
        exact = theirs(rows).logits[:, 0]
    assert scores.std() > 0.1
    assert torch.allclose(scores, exact, atol=1e-5, rtol=1e-5)
    # And what transformers wrote.
    theirs.save_pretrained(tmp_path / "again")
    assert castalia.load(tmp_path / "again").scores(IDS) == pytest.approx(scores.tolist(), rel=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run with a reward model."""
    folder = tmp_path_factory.mktemp("runs") / "reward"
    config = config_of("neox")
    tokenizer = load_tokenizer("bytes")
    text = yaml.safe_dump({"model": config.model_dump(mode="json")})
    tensors = {f"model.{name}": tensor for name, tensor in weights_of(config).items()}
    files = {"config.yaml": text, "tokenizer.json": tokenizer.text}
    Store(folder / "checkpoints").save(3, tensors, {"step": 3}, files, asynchronous=False)
    return folder


def test_an_export_says_what_it_is(run, tmp_path):
    (done,) = export(run, output=tmp_path / "hf")
    assert done.certificate["largest_difference"] < 1e-5
    assert done.certificate["same_greedy"] is None
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    assert "pipeline_tag: text-classification" in card
    assert "the largest difference of a score between" in card.replace("The", "the")
    assert "transformers scores one text at a time" in card
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert values["architectures"] == ["GPTNeoXForSequenceClassification"]
    text = "some text"
    # A text ends as texts of training do.
    ids = [*AutoTokenizer.from_pretrained(tmp_path / "hf")(text)["input_ids"], 256]
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        exact = theirs(torch.tensor([ids])).logits.item()
    model = castalia.load(run)
    assert model.scores(text) == pytest.approx([exact], rel=1e-5)
    assert model.scores([text], end=False) != model.scores([text])
    assert model.scores([]) == []
    assert open_model(tmp_path / "hf").config.head == "score"


def test_what_a_reward_model_cannot_do_is_refused(run, tmp_path, run_folder):
    model = castalia.load(run)
    for call in (
        lambda: model.generate("a"),
        lambda: model.logprobs("ab"),
        lambda: next(model.stream("a")),
    ):
        with pytest.raises(ConfigError, match="which scores texts and predicts no tokens"):
            call()
    for engine in ("native", "ct2", "llama.cpp", "openvino"):
        with pytest.raises(ConfigError, match="use engine=torch"):
            castalia.load(run, engine=engine)
    for kind in ("native", "ct2", "gguf", "neox"):
        with pytest.raises(ConfigError, match=r"head"):
            list(export(run, to=kind, output=tmp_path / kind))
    with pytest.raises(ConfigError, match="no score head; load a reward model"):
        castalia.load(run_folder).scores(["a"])
    with pytest.raises(ConfigError, match="the text has 0 tokens"):
        model.scores([""], end=False)
