"""A tiny byte-level model that learnt a short text by heart, as a run folder with two checkpoints."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from castalia.checkpoint import Store
from castalia.config import dump_yaml
from castalia.data.tokenizer import load_tokenizer
from castalia.inference import LanguageModel, load
from castalia.models import Decoder, ModelConfig
from castalia.train.config import RunConfig

TEXT = (
    "The naïve café owner said: “¡Olé!” and poured 🍵 for two.\n"
    "A second guest, who came in late, asked for the same 🍵 twice.\n"
    "def twice(x):\n    return x + x\n"
)
CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    vocab_size=257,
    max_position_embeddings=256,
    rotary_pct=0.5,
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only make threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def learn(model: Decoder, ids: list[int], steps: int = 250) -> None:
    """A second of AdamW on windows of one text."""
    generator = torch.Generator().manual_seed(0)
    data = torch.tensor(ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - 64, (8, 1), generator=generator)
        rows = data[starts + torch.arange(65)]
        logits = model.head(model(rows[:, :-1]))
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.1:
            break
    assert loss.item() < 0.5


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN with checkpoints of step 0 (start weights) and step 220."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    torch.manual_seed(0)
    tokenizer, model = load_tokenizer("bytes"), Decoder(CONFIG)
    model.init_weights(1)
    tokenizer.save(folder / "tokenizer.json")
    run = RunConfig(model=CONFIG, output=str(folder), data={"seq_length": 64, "tokenizer": "bytes"})
    files = {
        "config.yaml": dump_yaml(run),
        "tokenizer.json": (folder / "tokenizer.json").read_text("utf-8"),
    }
    store = Store(folder / "checkpoints")
    for step in (0, 220):
        if step:
            learn(model, [*tokenizer.encode(TEXT), tokenizer.eod_id, *tokenizer.encode(TEXT)[:70]])
        tensors = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
        store.save(step, tensors, {"step": step}, files, asynchronous=False)
    return folder


@pytest.fixture(scope="session")
def speaker(run_folder: Path) -> LanguageModel:
    """The newest checkpoint, loaded."""
    return load(run_folder)


@pytest.fixture(scope="session")
def known_text() -> str:
    """What the model learnt."""
    return TEXT
