"""Fine-tuning on a CPU against transformers and PEFT: tokens/s, memory and the loss of each step.

    python benchmarks/finetuning.py [--shape 70m] [--precision fp32,bf16] [--steps N] [--json FILE]

A model of a Pythia shape with random weights, in a folder that both sides read; conversations of 40
to 400 tokens, of which the first 40% are no targets; one a row, 8 rows a step, padded to the
longest of the step on both sides. Full fine-tuning and LoRA of rank 16 on every linear layer of the
blocks. Both sides clip gradients and use a fused AdamW; the matrices A of LoRA start equal. Every
engine has a process of its own, and all step in turn. `castalia lora packed` reads the same
conversations several to a row with the documents kept apart, as the recipes do by default; its
batches differ, so its losses are not compared.

Tokens are those of the conversations, without padding. Memory is the peak resident size above that
after the imports. The first two steps are not timed; the losses of all steps are compared.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe, ratio, summary
from worker import Worker

from castalia.checkpoint.hf import hf_config
from castalia.data import IndexedDatasetWriter
from castalia.models import build_model_config
from castalia.recipes.pythia import SIZES, TOKENIZER_IDS, model

HERE = Path(__file__).resolve().parent
ROWS = 8
LONGEST = 400
WARMUP = 2
RANK = 16
ALPHA = 32
LR = {"full": 2e-5, "lora": 2e-4}


def main() -> None:
    """Run every precision, print a table after each, write JSON at the end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="70m", choices=sorted(SIZES))
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "finetuning.json")
    options = parser.parse_args()
    machine = describe()
    print(json.dumps(machine))
    cases = []
    for precision in options.precision.split(","):
        with tempfile.TemporaryDirectory() as folder:
            cases.append(run_case(Path(folder), options.shape, precision, options.steps))
        print_case(cases[-1])
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"machine": machine, "cases": cases}, indent=1) + "\n")


def run_case(folder: Path, shape: str, precision: str, steps: int) -> dict[str, Any]:
    """All engines at one precision, step by step in turn."""
    write_base(folder / "base", shape)
    prefix = write_conversations(folder, ROWS * (steps + 4))
    engines = engines_of(folder, prefix, precision, steps)
    workers = {}
    for name, (library, case) in engines.items():
        if library == "transformers" and "rows" not in case:
            case["rows"] = str(write_batches(folder, engines["castalia full"][1]["words"], steps))
        workers[name] = Worker("finetuning_engines.py", {"engine": library, **case})
        workers[name].answer()
    records: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    names = list(workers)
    for step in range(steps):
        first = step % len(names)
        for name in names[first:] + names[:first]:
            records[name].append(workers[name].ask("step"))
    memory = {name: worker.ask("memory") for name, worker in workers.items()}
    for worker in workers.values():
        worker.tell("stop")
        worker.process.wait()
    return {"shape": shape, "precision": precision, **compared(records, memory)}


def engines_of(
    folder: Path, prefix: str, precision: str, steps: int
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> library and case; Castalia's first, because it writes what the others start from."""
    words = [
        "sft",
        f"model.start={folder / 'base'}",
        f"data.train={prefix}",
        f"data.labels={prefix}-labels",
        f"data.seq_length={LONGEST}",
        f"precision={precision}",
        f"train.batch_size={ROWS}",
        f"train.steps={steps}",
        "train.epochs=null",
        "train.eval_every=null",
        "schedule.name=constant",
        "schedule.warmup=0",
    ]
    one_a_row = ["data.packing=unpacked", "data.document_mask=null"]
    lora = ["adapter.kind=lora", f"adapter.rank={RANK}", f"adapter.alpha={ALPHA}"]
    lora += [f"optim.lr={LR['lora']}"]
    full = [f"optim.lr={LR['full']}"]
    start = str(folder / "lora_a.safetensors")
    theirs = {"base": str(folder / "base"), "precision": precision, "rank": RANK, "alpha": ALPHA}

    def ours(name: str, options: Sequence[str], start: str | None = None) -> dict[str, Any]:
        return {"words": [*words, f"output={folder / name}", *options], "start": start}

    return {
        "castalia full": ("castalia", ours("full", [*one_a_row, *full])),
        "transformers full": ("transformers", {**theirs, "start": None, "lr": LR["full"]}),
        "castalia lora": ("castalia", ours("lora", [*one_a_row, *lora], start)),
        "peft lora": ("transformers", {**theirs, "start": start, "lr": LR["lora"]}),
        "castalia lora packed": ("castalia", ours("packed", lora)),
    }


def write_base(folder: Path, shape: str) -> None:
    """A folder of transformers with a GPT-NeoX of a Pythia shape and random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = hf_config(build_model_config(model(SIZES[shape], "bf16"), "a benchmark"), end_ids=(0,))
    values |= {"torch_dtype": "float32"}
    torch.manual_seed(0)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def write_conversations(folder: Path, count: int) -> str:
    """Token and label files of conversations, each with a rule that can be learnt."""
    random = np.random.default_rng(0)
    prefix = folder / "chats"
    with (
        IndexedDatasetWriter(prefix, np.uint16) as tokens,
        IndexedDatasetWriter(f"{prefix}-labels", np.int32) as labels,
    ):
        for _ in range(count):
            length = int(np.exp(random.uniform(np.log(40), np.log(LONGEST))))
            prompt = int(0.4 * length)
            asked = random.integers(1, TOKENIZER_IDS, prompt)
            # The answer repeats tokens of the prompt: a loss that falls.
            said = np.resize(asked[: max(2, prompt // 8)], length - prompt)
            ids = np.concatenate([asked, said])
            tokens.add(ids)
            labels.add(np.concatenate([np.full(prompt, -100), said]))
    return str(prefix)


def write_batches(folder: Path, words: Sequence[str], steps: int) -> Path:
    """The rows of each step of Castalia's run, as a collator of transformers pads them."""
    import itertools

    from castalia.recipes import load_config
    from castalia.runs.named_corpus import ensure_corpus
    from castalia.train.build import rows_of_run

    config = ensure_corpus(load_config(list(words)))
    rows = rows_of_run(config)
    batches = []
    for step in range(steps):
        documents = []
        for place in range(step * ROWS, (step + 1) * ROWS):
            source, ((document, _, length),) = rows.train.documents_of(place)
            documents.append(
                [
                    files[source].get(document, 0, length)
                    for files in ([s.dataset for s in rows.train.row_sources], rows.train.labels)
                ]
            )
        batches.append(padded(documents))
    path = folder / "batches.pt"
    torch.save(batches, path)
    assert len(list(itertools.chain(batches))) == steps
    return path


def padded(documents: Sequence[Sequence[Any]]) -> dict[str, torch.Tensor]:
    """Documents with labels as one batch of transformers: its model shifts the labels itself."""
    longest = max(len(tokens) for tokens, _ in documents)
    shape = (len(documents), longest)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, -100),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
    }
    for row, (tokens, labels) in enumerate(documents):
        size = len(tokens)
        batch["input_ids"][row, :size] = torch.from_numpy(tokens.astype(np.int64))
        batch["labels"][row, :size] = torch.from_numpy(labels.astype(np.int64))
        batch["attention_mask"][row, :size] = 1
    return batch


def compared(
    records: dict[str, list[dict[str, float]]], memory: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """Tokens/s, memory, and the ratios of each pair of engines with their losses."""
    engines = {}
    rates = {}
    for name, steps in records.items():
        rates[name] = [step["tokens"] / step["seconds"] for step in steps[WARMUP:]]
        engines[name] = {
            "tokens_per_second": summary(rates[name]),
            "above_imports_gb": (memory[name]["peak"] - memory[name]["imported"]) / 1e9,
            "losses": [step["loss"] for step in steps],
        }
    pairs = {}
    for ours, theirs in (
        ("castalia full", "transformers full"),
        ("castalia lora", "peft lora"),
        ("castalia lora packed", "peft lora"),
        ("castalia lora", "castalia full"),
    ):
        pairs[f"{ours} / {theirs}"] = {
            "speed": ratio(rates[ours], rates[theirs]),
            "memory": engines[ours]["above_imports_gb"] / engines[theirs]["above_imports_gb"],
            "largest_loss_difference": max(
                abs(a - b)
                for a, b in zip(engines[ours]["losses"], engines[theirs]["losses"], strict=True)
            ),
        }
    return {"engines": engines, "pairs": pairs}


def print_case(case: dict[str, Any]) -> None:
    """The tables of one precision."""
    print(f"\nPythia-{case['shape']}, {case['precision']}")
    for name, engine in case["engines"].items():
        rate = engine["tokens_per_second"]
        losses = engine["losses"]
        print(
            f"  {name:22} {rate['median']:8.0f} tokens/s ({rate['low']:.0f}-{rate['high']:.0f})"
            f"  {engine['above_imports_gb']:.2f} GB above imports"
            f"  loss {losses[0]:.4f} -> {losses[-1]:.4f}"
        )
    for name, pair in case["pairs"].items():
        speed = pair["speed"]
        print(
            f"  {name:40} {speed['median']:.2f}x ({speed['low']:.2f}-{speed['high']:.2f}),"
            f" memory {pair['memory']:.2f}, losses within {pair['largest_loss_difference']:.1e}"
        )


if __name__ == "__main__":
    main()
