"""Supervised fine-tuning against TRL: files as TRL's users have them, the loss of a batch and every
gradient."""

import json
import os

import pytest
import torch
from tests.parity.test_neox_transformers import reference, small_config, their_name
from torch import nn

from castalia.data import load_tokenizer
from castalia.losses import Scored
from castalia.recipes import load_config
from castalia.train.trainer import Trainer

transformers = pytest.importorskip("transformers", reason="needs castalia[hf]")
trl = pytest.importorskip("trl", reason="the oracle of fine-tuning")
datasets = pytest.importorskip("datasets")

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SAID = [("hi", "hello"), ("two plus two?", "four, I think"), ("x", "y"), ("name a bird", "crow")]
STRINGS = [{"prompt": f"Q: {asked} A:", "completion": f" {said}"} for asked, said in SAID]
MESSAGES = [
    {
        "prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": asked}],
        "completion": [{"role": "assistant", "content": said}],
    }
    for asked, said in SAID
]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    """A folder of transformers: a small Pythia over bytes, with a tokenizer and a template."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    config = small_config(num_layers=2, hidden_size=32, vocab_size=257, max_position_embeddings=96)
    model: nn.Module = reference(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    model.save_pretrained(folder)
    load_tokenizer("bytes").save(folder / "bytes.json")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "bytes.json"),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    os.remove(folder / "bytes.json")
    return str(folder)


def theirs(start: str, records: list[dict[str, object]], folder: str) -> tuple[float, dict]:
    """Loss of one batch with all records, and the gradients by parameter, of TRL's trainer."""
    trainer = trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
        args=trl.SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=len(records),
            use_cpu=True,
            bf16=False,
            report_to=[],
            gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=transformers.AutoTokenizer.from_pretrained(start),
    )
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), dict(trainer.model.named_parameters())


def ours(start: str, records: list[dict[str, object]], folder: str, packing: str) -> Trainer:
    """A trainer whose first batch has every record, and whose model has its gradients."""
    path = f"{folder}/data.jsonl"
    with open(path, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    # Packed, the strings fill one row and the messages two.
    packed = 1 if isinstance(records[0]["prompt"], str) else 2
    rows = len(records) if packing == "unpacked" else packed
    words = [f"model.start={start}", f"data.chat={path}", f"output={folder}/run"]
    words += [f"data.packing={packing}", f"train.batch_size={rows}", "data.seq_length=96"]
    return Trainer(load_config(["sft", *words, "precision=fp32", "device=cpu"]))


@pytest.mark.parametrize("packing", ["unpacked", "best_fit"])
@pytest.mark.parametrize("form", ["strings", "messages"])
def test_loss_and_gradients_of_a_batch(start, tmp_path, form, packing):
    """TRL pads each record to a row of its own; packed rows, kept apart, give the same numbers."""
    records = {"strings": STRINGS, "messages": MESSAGES}[form]
    expected, their_parameters = theirs(start, records, f"{tmp_path}/trl")
    trainer = ours(start, records, str(tmp_path), packing)
    (batch,) = next(trainer.batches(trainer.rows.train, 0))
    out = trainer.loss(Scored.by(trainer.model, batch), batch)
    loss = out.total / out.weight
    loss.backward()
    # Every record once, its completion and the end of the text.
    assert batch.targets == sum(len(said) + 1 + (form == "strings") for _, said in SAID)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    worst = {
        name: (parameter.grad - their_parameters[their_name(name)].grad).abs().max().item()
        for name, parameter in trainer.model.named_parameters()
    }
    assert max(worst.values()) <= 1e-5, worst
    largest = max(parameter.grad.abs().max() for parameter in trainer.model.parameters())
    assert largest > 1e-2
