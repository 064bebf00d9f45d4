"""Generation and scoring on a GPU: the torch engine against transformers, both in bf16.

    python benchmarks/inference.py --gpu [--sizes 160m,410m] [--batches 1,8,64] [--rounds 5]
                                   [--output FILE]

Both sides read the same Hugging Face folder of a Pythia shape with random weights. A batch of
prompts of equal length is continued greedily, and nothing ends it; 2,048 tokens are scored in rows
of their own. Both run in one process, in turn, and a turn waits for the GPU at its ends.

The memory rate is that of a copy on the same GPU in the same run: a new token of a batch reads all
weights once, so that their bytes a token step are compared with it. MFU is the share of the peak
that the maker states for dense bf16, of 2 N + 4 L d T FLOPs a scored token, a third of what
training takes.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe, in_turn, matrix_rate, ratio, seconds, summary

import castalia
from castalia.inference import LanguageModel
from castalia.models.flops import flops_per_token
from castalia.monitor import peak_flops
from castalia.recipes.pythia import SIZES, model

RESULTS = Path(__file__).resolve().parent / "results"
GPU = torch.device("cuda", 0)
SCORED = 2048
"""Tokens of the text that is scored, as many as Pythia's positions."""
Work = Callable[[], float]


def copy_rate() -> float:
    """Bytes/s that a copy on the GPU reads and writes, the best of several."""
    source = torch.empty(2**28, dtype=torch.bfloat16, device=GPU)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), "cuda") for _ in range(5))


def write_folder(size: str, folder: Path) -> Path:
    """A Pythia shape with random weights, as transformers saves it."""
    import transformers

    values = model(SIZES[size])
    config = transformers.GPTNeoXConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        num_hidden_layers=values["num_layers"],
        num_attention_heads=values["num_attention_heads"],
        intermediate_size=4 * values["hidden_size"],
        max_position_embeddings=SCORED,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    made = transformers.GPTNeoXForCausalLM(config).to(torch.bfloat16)
    made.save_pretrained(folder / size)
    return folder / size


def generating(ours: LanguageModel, theirs: Any, batch: int, options: Any) -> dict[str, Work]:
    """Seconds of a batch of continuations, prompts included."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(10, 50000, (batch, options.prompt), generator=generator)

    def castalia_work() -> None:
        made = ours.generate_ids(prompts.tolist(), options.new, ignore_eos=True)
        assert all(len(row) == options.new for row in made)

    def transformers_work() -> None:
        made = theirs.generate(
            prompts.to(GPU),
            attention_mask=torch.ones_like(prompts).to(GPU),
            max_new_tokens=options.new,
            min_new_tokens=options.new,
            do_sample=False,
            pad_token_id=0,
        )
        assert made.shape[1] == options.prompt + options.new

    return {
        "castalia": lambda: seconds(castalia_work, "cuda"),
        "transformers": lambda: seconds(transformers_work, "cuda"),
    }


def scoring(ours: LanguageModel, theirs: Any) -> dict[str, Work]:
    """Seconds of the log-probabilities of a text."""
    ids = torch.randint(10, 50000, (SCORED,), generator=torch.Generator().manual_seed(2))

    @torch.inference_mode()
    def transformers_work() -> None:
        logits = theirs(ids[None].to(GPU)).logits[0, :-1].float()
        logits.log_softmax(-1).gather(1, ids[1:, None].to(GPU)).cpu()

    return {
        "castalia": lambda: seconds(lambda: ours.engine.logprobs(ids.tolist()).cpu(), "cuda"),
        "transformers": lambda: seconds(transformers_work, "cuda"),
    }


def timed(works: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    """All works in turn, after one turn that does not count."""
    in_turn(works, 1)
    return in_turn(works, rounds)


def run_size(size: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One shape: decoding at each batch, and scoring."""
    import transformers

    place = write_folder(size, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
    theirs = theirs.to(GPU).eval()
    ours = castalia.load(place, engine="torch", dtype="bf16", device="cuda")
    weights = sum(p.nbytes for p in ours.model.parameters())
    record: dict[str, Any] = {"weight_bytes": weights, "decoding": {}}
    for batch in options.batches:
        times = timed(generating(ours, theirs, batch, options), options.rounds)
        steps = options.new
        cell: dict[str, Any] = {"ratio": ratio(times["transformers"], times["castalia"])}
        for name, took in times.items():
            speed = summary(batch * steps / t for t in took)
            read = summary(weights * steps / t / options.copy_rate for t in took)
            cell[name] = {"tokens_per_second": speed, "of_memory_rate": read["median"]}
        record["decoding"][str(batch)] = cell
        show(f"{size} batch {batch}", cell, "of_memory_rate", "memory rate")
    times = timed(scoring(ours, theirs), options.rounds)
    work = SCORED * flops_per_token(ours.config, SCORED) / 3
    cell = {"ratio": ratio(times["transformers"], times["castalia"])}
    for name, took in times.items():
        mfu = summary(work / t / (options.peak or math.nan) for t in took)["median"]
        cell[name] = {"tokens_per_second": summary(SCORED / t for t in took), "mfu": mfu}
    record["scoring"] = cell
    show(f"{size} scoring {SCORED}", cell, "mfu", "MFU")
    return record


def show(name: str, cell: dict[str, Any], share: str, meaning: str) -> None:
    """A line for each side, and the ratio."""
    for side in ("castalia", "transformers"):
        speed = cell[side]["tokens_per_second"]
        print(
            f"{name:<22}{side:<14}{speed['median']:>12,.0f} tokens/s"
            f" ({speed['low']:,.0f}..{speed['high']:,.0f}), {cell[side][share]:.1%} {meaning}"
        )
    r = cell["ratio"]
    print(f"{name:<22}{r['median']:.2f} ({r['low']:.2f}..{r['high']:.2f}) times as fast")


def main(words: list[str]) -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="160m,410m")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default=str(RESULTS / "inference-gpu.json"))
    options = parser.parse_args(words)
    options.batches = [int(batch) for batch in options.batches.split(",")]
    if not torch.cuda.is_available():
        parser.error("--gpu needs a CUDA device, and torch sees none")
    options.copy_rate = copy_rate()
    options.peak = peak_flops(GPU)
    machine = describe("cuda") | {
        "copy_gb_per_second": round(options.copy_rate / 1e9),
        "matrix_gflops": round(matrix_rate(torch.bfloat16, "cuda") / 1e9),
    }
    print(json.dumps(machine))
    record: dict[str, Any] = {"machine": machine, "sizes": {}}
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes.split(","):
            record["sizes"][size] = run_size(size, Path(folder), options)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps(record, indent=1) + "\n")
