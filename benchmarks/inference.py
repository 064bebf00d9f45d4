"""Decoding and scoring of Pythia's shapes on a CPU: native beside transformers, CTranslate2, llama.cpp and OpenVINO.

    python benchmarks/inference.py                       # 70M and 160M, batch 1 and 8; run it alone on the machine
    python benchmarks/inference.py --sizes tiny --rounds 2 --new 8

Weights are random and the same for all. Every engine lives in a process of its own, which stays; in each round all
engines take their turn. Decoding: prompts of 32 random tokens, 128 new ones, greedy, no end of document. Memory is the
highest resident set minus that after the imports. The share of the memory limit is bytes of weights that a token reads
times tokens a second of one row, over the bandwidth measured in the same round at that working set. CTranslate2 and
llama.cpp get the number of threads that is fastest for them. Goals are ratios of medians, printed at the end.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from machine import describe, in_turn, ratio, resident_bytes, seconds, summary

SHAPES = {"70m": (6, 512, 8), "160m": (12, 768, 12), "410m": (24, 1024, 16), "tiny": (2, 64, 4)}
"""Layers, width, heads of Biderman et al. 2023, arXiv:2304.01373, table 1."""
VOCABULARY, TINY_VOCABULARY = 50277, 1000
SCORED = 2048
RESULTS = Path(__file__).parent / "results"
EXPORTS = {
    "transformers fp32": ("hf", "fp32"),
    "transformers bf16": ("hf", "fp32"),
    "ct2 float32": ("ct2", "float32"),
    "ct2 int8": ("ct2", "int8"),
    "llama.cpp Q8_0": ("gguf", "Q8_0"),
    "llama.cpp Q4_0": ("gguf", "Q4_0"),
    "openvino int8": ("hf", "int8"),
    "native fp32": ("native", "fp32"),
    "native bf16": ("native", "bf16"),
    "native int8": ("native", "int8"),
    "native int4": ("native", "int4"),
}
"""Engines, and the export that each reads."""
NEEDS = {
    "ct2": "ctranslate2",
    "openvino": "openvino",
    "llama.cpp": "llama_cpp",
    "transformers": "transformers",
}
BITS = {"fp32": 32, "bf16": 16, "float32": 32, "int8": 8, "Q8_0": 8.5, "Q4_0": 4.5, "int4": 4.5}
SCORERS = (
    "transformers fp32",
    "transformers bf16",
    "ct2 float32",
    "ct2 int8",
    "openvino int8",
    "native fp32",
    "native int8",
)
"""Engines that score; `native int8` is dtype=auto, which scores in bf16."""
GOALS = [
    ("native int8", "ct2 int8", 1, 3.5),
    ("native int8", "llama.cpp Q8_0", 1, 1.2),
    ("native int8", "ct2 int8", 8, 3.0),
    ("native int4", "llama.cpp Q4_0", 1, 1.0),
    ("native int4", "llama.cpp Q4_0", 8, 1.0),
]
"""Ours, theirs, batch, the ratio of tokens a second that is wanted."""


# ------------------------------------------------------------------------------------------- the process of one engine


class Transformers:
    """Hugging Face transformers as it generates out of the box."""

    def __init__(self, folder: str, numbers: str) -> None:
        import transformers

        self.ready = resident_bytes()
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[numbers]
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], new: int) -> None:
        """`new` tokens for each prompt."""
        ids = torch.tensor(prompts)
        options = {
            "max_new_tokens": new,
            "min_new_tokens": new,
            "do_sample": False,
            "pad_token_id": 0,
        }
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert out.shape[1] == ids.shape[1] + new

    @torch.inference_mode()
    def score(self, ids: list[int]) -> float:
        """Sum of log-probabilities, as lm-evaluation-harness computes it."""
        tokens = torch.tensor([ids])
        logprobs = self.model(tokens).logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(1, tokens[0, 1:, None]).sum().item()


class Ct2:
    """CTranslate2 with the fastest number of threads."""

    def __init__(self, folder: str, numbers: str) -> None:
        import ctranslate2

        self.ready = resident_bytes()
        self.names = json.loads((Path(folder) / "vocabulary.json").read_text())
        cores = torch.get_num_threads()
        found = {}
        for threads in sorted({1, cores}):
            self.model = ctranslate2.Generator(
                folder, device="cpu", compute_type=numbers, intra_threads=threads
            )
            self.decode([[5] * 32], 4)
            found[threads] = min(seconds(lambda: self.decode([[5] * 32], 16)) for _ in range(3))
        self.threads = min(found, key=lambda threads: found[threads])
        self.model = ctranslate2.Generator(
            folder, device="cpu", compute_type=numbers, intra_threads=self.threads
        )

    def decode(self, prompts: list[list[int]], new: int) -> None:
        """`new` tokens for each prompt."""
        made = self.model.generate_batch(
            [[self.names[i] for i in ids] for ids in prompts],
            max_length=new,
            min_length=new,
            include_prompt_in_result=False,
            sampling_topk=1,
        )
        assert all(len(row.sequences_ids[0]) == new for row in made)

    def score(self, ids: list[int]) -> float:
        """Sum of log-probabilities."""
        (found,) = self.model.score_batch([[self.names[i] for i in ids]], max_input_length=0)
        return float(sum(found.log_probs))


class OpenVino:
    """OpenVINO over our graph, all rows in one request; what a row gives is chosen here."""

    def __init__(self, folder: str, numbers: str) -> None:
        import openvino.op.util

        import castalia
        from castalia.inference import loading, openvino_engine

        self.ready = resident_bytes()
        assert loading and openvino.op.util
        self.engine = castalia.load(folder, engine="openvino", dtype=numbers).engine
        self.read = openvino_engine.read

    def decode(self, prompts: list[list[int]], new: int) -> None:
        """`new` tokens for each prompt."""
        request, rows, known = self.engine.compiled.create_infer_request(), prompts, 0
        for _ in range(new):
            logits = self.read(request, rows, known, [len(rows[0]) - 1])[
                :, 0, : self.engine.config.vocab_size
            ]
            known += len(rows[0])
            rows = logits.numpy().argmax(1)[:, None].tolist()

    def score(self, ids: list[int]) -> float:
        """Sum of log-probabilities."""
        return float(self.engine.logprobs(ids).sum())


class Ours:
    """An engine of ours: native, or llama.cpp through our adapter, which calls its C functions directly."""

    def __init__(self, folder: str, numbers: str) -> None:
        import castalia
        from castalia.inference import loading

        if "gguf" in folder:
            from castalia.inference.llama_cpp import llama

            llama()
        self.ready = resident_bytes()
        assert loading
        self.model = castalia.load(folder)
        self.engine = self.model.engine
        self.threads = torch.get_num_threads()
        if "gguf" in folder:
            self.choose_threads()

    def choose_threads(self) -> None:
        """The fastest number for llama.cpp."""
        found = {}
        for threads in sorted({1, self.threads}):
            torch.set_num_threads(threads)
            self.decode([[5] * 32], 4)
            found[threads] = min(seconds(lambda: self.decode([[5] * 32], 16)) for _ in range(3))
        self.threads = min(found, key=lambda threads: found[threads])
        torch.set_num_threads(self.threads)

    def decode(self, prompts: list[list[int]], new: int) -> None:
        """`new` tokens for each prompt."""
        from castalia.inference.batching import decode_texts
        from castalia.inference.decoding import begin
        from castalia.inference.sampling import Sampling

        options = {"max_new_tokens": new, "limit": 2048, "eod_id": None, "decode": lambda ids: ""}
        rows = [begin(ids, **options) for ids in prompts]
        for _ in decode_texts(self.engine, rows, Sampling()):
            pass
        assert all(len(row.tokens) == new for row in rows)

    def score(self, ids: list[int]) -> float:
        """Sum of log-probabilities."""
        return float(self.engine.logprobs(ids).sum())


def serve(engine: str, folder: str, threads: int) -> None:
    """Answer the requests of the parent, one JSON object a line."""
    torch.set_num_threads(threads)
    family, numbers = engine.split()
    made: Any = {"transformers": Transformers, "ct2": Ct2, "openvino": OpenVino}.get(family, Ours)(
        folder, numbers
    )
    print(
        json.dumps(
            {"loaded": resident_bytes() - made.ready, "threads": getattr(made, "threads", threads)}
        ),
        flush=True,
    )
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, Any] = {}
        if "prompts" in asked:
            answer["seconds"] = seconds(
                lambda asked=asked: made.decode(asked["prompts"], asked["new"])
            )
        else:
            start = time.perf_counter()
            answer["sum"] = made.score(asked["ids"])
            answer["seconds"] = time.perf_counter() - start
        answer["peak"] = resident_bytes("VmHWM") - made.ready
        print(json.dumps(answer), flush=True)


class Worker:
    """The process of one engine, seen from the parent."""

    def __init__(self, engine: str, folder: Path, threads: int) -> None:
        command = [
            sys.executable,
            __file__,
            "--worker",
            engine,
            "--folder",
            str(folder),
            "--threads",
            str(threads),
        ]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.engine, self.peak = engine, 0
        self.hello = self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line of JSON; libraries may print others."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError(f"the process of {self.engine} ended")

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        found = self.answer()
        self.peak = max(self.peak, found["peak"])
        return found

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


# ----------------------------------------------------------------------------------------------------------- the parent


def write_models(size: str, folder: Path, engines: list[str]) -> dict[str, Path]:
    """Random weights of a shape as a Hugging Face folder, and every export that the engines read."""
    from tokenizers import Tokenizer, models

    from castalia.checkpoint.hf import write_hf
    from castalia.distributed import initialize
    from castalia.export import export
    from castalia.models import Decoder, NeoxConfig
    from castalia.models.init import start_weights

    layers, width, heads = SHAPES[size]
    tokens = TINY_VOCABULARY if size == "tiny" else VOCABULARY
    config = NeoxConfig(
        num_layers=layers, hidden_size=width, num_attention_heads=heads, vocab_size=tokens
    )
    model = Decoder(config)
    initialize(model, start_weights(model.config, 1234))
    hf = folder / size / "hf"
    hf.mkdir(parents=True)
    write_hf(hf, model.state_dict(), config, eod_id=0, dtype="fp32")
    vocabulary = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, tokens)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    words.add_special_tokens(["<|endoftext|>"])
    words.save(str(hf / "tokenizer.json"))
    places = {}
    for engine in engines:
        to, numbers = EXPORTS[engine]
        places[engine] = hf if to == "hf" else folder / size / f"{to}-{numbers}"
        if not places[engine].exists():
            list(export(hf, to=to, quantization=numbers, output=places[engine]))
    return places


def weight_bytes(folder: Path) -> int:
    """Size of an export's weights on the disk."""
    endings = (".safetensors", ".bin", ".gguf")
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in endings)


def token_bytes(size: str, engine: str) -> float:
    """Bytes of weights that one token reads: all matrices but the input embedding."""
    layers, width, _ = SHAPES[size]
    rows = 1024 if size == "tiny" else 50304
    return (
        (12 * layers * width * width + rows * width)
        * BITS[EXPORTS[engine][1] if "bf16" not in engine else "bf16"]
        / 8
    )


def bandwidth(size: float) -> float:
    """Bytes a second that all threads together read out of a buffer of this size; best of 10."""
    data = torch.ones(max(1, int(size / 4)))
    return data.nbytes / min(seconds(data.sum) for _ in range(10))


def prompts_of(batch: int, tokens: int, size: str) -> list[list[int]]:
    """Random prompts."""
    high = TINY_VOCABULARY if size == "tiny" else 50000
    return torch.randint(
        1, high, (batch, tokens), generator=torch.Generator().manual_seed(batch)
    ).tolist()


def measure_decoding(
    workers: Mapping[str, Worker], size: str, batch: int, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Tokens a second, time to the first token and share of the memory limit of every engine."""
    prompts = prompts_of(batch, options.prompt, size)
    works: dict[str, Callable[[], float]] = {}
    for name, worker in workers.items():
        worker.ask(prompts=prompts, new=options.new)
        works[name] = lambda worker=worker: worker.ask(prompts=prompts, new=options.new)["seconds"]
        works[f"{name} first"] = lambda worker=worker: worker.ask(prompts=prompts, new=1)["seconds"]
        works[f"{name} bandwidth"] = lambda name=name: bandwidth(token_bytes(size, name))
    found = in_turn(works, options.rounds)
    out = {}
    for name in workers:
        whole, first = found[name], found[f"{name} first"]
        steps = [(a - b) / (options.new - 1) for a, b in zip(whole, first, strict=True)]
        limit = [token_bytes(size, name) / rate for rate in found[f"{name} bandwidth"]]
        out[name] = {
            "tokens_per_second": summary(batch * options.new / t for t in whole),
            "first_token_seconds": summary(first),
            "step_seconds": summary(steps),
            "share_of_memory_limit": summary(a / b for a, b in zip(limit, steps, strict=True)),
            "rounds": whole,
        }
    return out


def measure_scoring(
    workers: Mapping[str, Worker], size: str, rounds: int
) -> dict[str, dict[str, Any]]:
    """Seconds for SCORED tokens, and the sum of their log-probabilities."""
    (ids,) = prompts_of(1, SCORED, size)
    sums = {name: worker.ask(ids=ids)["sum"] for name, worker in workers.items()}
    works = {
        name: lambda worker=worker: worker.ask(ids=ids)["seconds"]
        for name, worker in workers.items()
    }
    found = in_turn(works, rounds)
    return {
        name: {
            "seconds": summary(times),
            "sum": sums[name],
            "peak": workers[name].peak,
            "rounds": times,
        }
        for name, times in found.items()
    }


def show_decoding(found: Mapping[str, Any], size: str, batch: int) -> None:
    """A table."""
    print(f"\n{size}, batch {batch}")
    print(f"{'engine':<20}{'tok/s':>9}{'spread':>16}{'first ms':>10}{'ms/step':>9}{'of limit':>10}")
    for name, row in found.items():
        rate = row["tokens_per_second"]
        first, step = (
            1e3 * row["first_token_seconds"]["median"],
            1e3 * row["step_seconds"]["median"],
        )
        spread = f"{rate['low']:.0f}-{rate['high']:.0f}"
        share = row["share_of_memory_limit"]["median"]
        print(
            f"{name:<20}{rate['median']:>9.1f}{spread:>16}{first:>10.2f}{step:>9.3f}{share:>10.0%}"
        )


def show_scoring(found: Mapping[str, Any], size: str) -> None:
    """A table."""
    print(f"\n{size}, scoring {SCORED} tokens")
    base = found.get("transformers fp32")
    for name, row in found.items():
        times = f"{ratio(base['rounds'], row['rounds'])['median']:.2f}x" if base else ""
        milliseconds, megabytes = 1e3 * row["seconds"]["median"], row["peak"] / 1e6
        print(
            f"{name:<20}{milliseconds:>9.0f} ms {times:>8}  {megabytes:>6.0f} MB  {row['sum']:.2f}"
        )


def goals(record: Mapping[str, Any], size: str) -> list[dict[str, Any]]:
    """What was wanted and what was found."""
    found = []
    for ours, theirs, batch, wanted in GOALS:
        rows = record["decoding"].get(str(batch), {})
        if ours in rows and theirs in rows:
            got = ratio(rows[theirs]["rounds"], rows[ours]["rounds"])
            found.append(
                {"what": f"{size} batch {batch}: {ours} / {theirs}", "wanted": wanted, **got}
            )
    scoring = record.get("scoring", {})
    if "native int8" in scoring and "transformers fp32" in scoring:
        got = ratio(scoring["transformers fp32"]["rounds"], scoring["native int8"]["rounds"])
        found.append(
            {"what": f"{size} scoring: native auto / transformers fp32", "wanted": 2.3, **got}
        )
        if size == "70m":
            share = 0.5e9 / scoring["native int8"]["peak"]
            found.append(
                {
                    "what": "70m scoring: 0.5 GB / native auto's memory",
                    "wanted": 1.0,
                    "median": share,
                }
            )
    memory = record["memory"]
    if "native int8" in memory and "ct2 int8" in memory:
        for kind in memory["ct2 int8"]:
            share = memory["ct2 int8"][kind] * 1.2 / memory["native int8"][kind]
            found.append(
                {
                    "what": f"{size} {kind}: 1.2 x ct2 int8 / native int8, memory",
                    "wanted": 1.0,
                    "median": share,
                }
            )
    return found


def show_goals(found: list[dict[str, Any]]) -> None:
    """One line a goal."""
    print("\ngoals")
    for goal in found:
        state = "reached" if goal["median"] >= goal["wanted"] else "NOT reached"
        spread = f" ({goal['low']:.2f}-{goal['high']:.2f})" if "low" in goal else ""
        print(f"  {goal['what']}: {goal['median']:.2f}{spread}, wanted {goal['wanted']:g}: {state}")


def run_size(size: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All measurements of one shape."""
    places = write_models(size, folder, options.engines)
    workers = {name: Worker(name, place, options.threads) for name, place in places.items()}
    record: dict[str, Any] = {
        "disk_bytes": {name: weight_bytes(place) for name, place in places.items()},
        "threads": {name: worker.hello["threads"] for name, worker in workers.items()},
        "decoding": {},
        "memory": {name: {} for name in workers},
    }
    try:
        for batch in options.batches:
            found = measure_decoding(workers, size, batch, options)
            record["decoding"][str(batch)] = found
            for name, worker in workers.items():
                record["memory"][name][f"batch {batch}"] = worker.peak
            show_decoding(found, size, batch)
    finally:
        for worker in workers.values():
            worker.close()
    print(
        f"\n{'engine':<20}{'disk MB':>9}"
        + "".join(f"{f'MB batch {batch}':>13}" for batch in options.batches)
    )
    for name in workers:
        cells = "".join(f"{peak / 1e6:>13.0f}" for peak in record["memory"][name].values())
        print(f"{name:<20}{record['disk_bytes'][name] / 1e6:>9.1f}{cells}")
    scorers = {
        name: Worker(name, places[name], options.threads)
        for name in options.engines
        if name in SCORERS
    }
    try:
        record["scoring"] = measure_scoring(scorers, size, options.rounds)
    finally:
        for worker in scorers.values():
            worker.close()
    show_scoring(record["scoring"], size)
    record["goals"] = goals(record, size)
    show_goals(record["goals"])
    return record


def available(engine: str) -> bool:
    """Whether the engine's package is installed."""
    module = NEEDS.get(engine.split()[0])
    return module is None or importlib.util.find_spec(module) is not None


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="70m,160m", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--engines", default=",".join(EXPORTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", default=str(RESULTS / "inference.json"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.batches = [int(batch) for batch in options.batches.split(",")]
    wanted = options.engines.split(",")
    options.engines = [name for name in wanted if available(name)]
    options.missing = [name for name in wanted if not available(name)]
    return options


def main() -> None:
    """Measure, print, write."""
    options = parse()
    if options.worker:
        serve(options.worker, options.folder, options.threads)
        return
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {"machine": describe(), "missing": options.missing, "sizes": {}}
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes.split(","):
            record["sizes"][size] = run_size(size, Path(folder), options)
    if options.missing:
        print(f"\nnot installed: {', '.join(options.missing)}")
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
