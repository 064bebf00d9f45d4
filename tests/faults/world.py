"""A small example of every kind of file that Castalia writes, for tests/faults/matrix.py."""

import json
from collections.abc import Callable
from pathlib import Path

SMALL = (
    *("model.num_layers=1", "model.hidden_size=32", "train.batch_size=8", "data.seq_length=16"),
    *("train.log_every=4", "data.tokenizer=bytes", "checkpoint.steps=[]"),
)
DATA = "data.train=[data/a, data/b]"
STEPS = 8
MIXED = (
    *("train", "debug", DATA, "data.valid=[data/b]", "train.eval_every=4", *SMALL),
    *("mixing.kind=odm", "mixing.warmup_steps=2", "checkpoint.every=4"),
)
RUN = (*MIXED, f"train.steps={STEPS}", "output=runs/one")
RESUMED = (*MIXED, f"train.steps={STEPS + 4}", "output=runs/one")
"""The run goes on for four steps."""
REPLAY = (
    *("train", "debug", DATA, *SMALL, "mixing.kind=replay", "output=runs/again"),
    *("mixing.record=runs/one/mixture.jsonl", f"train.steps={STEPS}", "checkpoint.every=8"),
)
REFERENCED = (
    *("train", "debug", DATA, *SMALL, "mixing.kind=doremi", "output=runs/doremi"),
    *("mixing.reference=reference.json", "train.steps=4", "checkpoint.every=4"),
)
ADAPTED = (
    *("train", "debug", DATA, *SMALL, "train.steps=2", "checkpoint.every=2"),
    *("model.start=runs/one", "adapter.kind=lora", "adapter.rank=2", "output=runs/lora"),
)
RECURRENT = (
    *("train", "debug-rwkv", DATA, "data.tokenizer=bytes", "train.steps=2", "checkpoint.every=2"),
    *("model.num_layers=1", "model.rwkv7={head_size: 16}", "data.seq_length=16"),
    *("train.batch_size=4", "output=runs/rwkv"),
)
LABELLED = (
    *("train", "debug", "data.train=data/chats_messages_document", "output=runs/labelled"),
    *("data.labels=data/chats_messages_label_document", *SMALL, "train.steps=2"),
    "checkpoint.every=2",
)
SUITE = """
base: debug
output: runs/suite
set: {train.steps: 2, model.hidden_size: 32, data.seq_length: 16,
  train.batch_size: 8, data.train: [data/a, data/b], data.tokenizer: bytes, checkpoint.steps: []}
sizes:
  tiny: {model.num_layers: 1}
"""
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
EXPORTS = ("hf", "native", "ct2", "gguf", "neox")
LIBRARY = 'extern "C" int answer() { return 42; }\n'


def write_texts(folder: Path) -> None:
    """What a user brings."""
    lines = [f"line {n}: the quick brown fox jumps over {n * 7} lazy dogs" for n in range(300)]
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"text": line}) + "\n" for line in lines[:200])
    )
    (folder / "b.jsonl").write_text(
        "".join(json.dumps({"text": line}) + "\n" for line in lines[200:])
    )
    chats = [
        {"messages": [{"role": "user", "content": line}, {"role": "assistant", "content": "yes"}]}
        for line in lines[:40]
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "template.jinja").write_text(TEMPLATE)
    (folder / "words.txt").write_text("fox\ndogs\n")
    (folder / "tiny.cpp").write_text(LIBRARY)
    (folder / "mine.yaml").write_text(SUITE)


def prepared() -> list[tuple[str, ...]]:
    """The commands that make token files, runs and exports, in their order."""
    tokens = ("--tokenizer", "bytes", "--append-eod", "--output")
    chat = ("--chat", "messages", "--chat-template", "template.jinja", "--tokenizer", "bytes")
    bpe = ("--train-tokenizer", "300", "--tokenizer", "tokenizer.json", "--output", "data/bpe")
    return [
        ("prepare", "a.jsonl", *tokens, "data/a"),
        ("prepare", "b.jsonl", *tokens, "data/b"),
        ("prepare", "a.jsonl", *bpe),
        ("prepare", "chats.jsonl", *chat, "--output", "data/chats"),
        ("data", "shard", "data/a", "--bytes", "4000", "--output", "shards"),
        ("index", "data/a", "data/b"),
        RUN,
        ADAPTED,
        RECURRENT,
        *[("export", "runs/one", "--to", kind, "--output", f"exports/{kind}") for kind in EXPORTS],
        ("export", "runs/lora", "--to", "peft", "--output", "exports/peft"),
        ("export", "runs/rwkv", "--to", "rwkv", "--output", "exports/rwkv"),
        ("import", "exports/hf", "--output", "imported"),
        (
            "memorize",
            "runs/one",
            "--output",
            "scores.parquet",
            "--prompt",
            "4",
            "--continuation",
            "4",
        ),
        ("count", "runs/one", "--terms", "words.txt", "--jobs", "1", "--output", "counts.json"),
        ("mixing", "reference", "runs/one", "--rows", "8", "--output", "reference.json"),
        ("eval", "runs/one", "--tasks", "bits_per_byte", "--store", "evals"),
        ("report", "runs/one"),
        ("weights", "runs/one", "--output", "weights.parquet"),
        ("batches", "runs/one", "--steps", "0:4", "--mode", "save", "--output", "batches"),
        ("suite", "mine.yaml", "--run"),
        ("suite", "runs/suite", "--page", "suite.html"),
    ]


def build(folder: Path, run: Callable[[tuple[str, ...]], None]) -> None:
    """Make everything in `folder`; `run` runs a command there and refuses an error."""
    write_texts(folder)
    for words in prepared():
        run(words)
