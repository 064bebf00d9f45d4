"""`castalia prepare` against GPT-NeoX's `preprocess_data.py`: same corpus, tokenizer and workers.

    python benchmarks/prepare.py --peer GPT-NEOX [--megabytes 500] [--workers N] [--rounds 3]
                                 [--json FILE]

GPT-NEOX is a checkout or a git directory of github.com/EleutherAI/gpt-neox. Its script runs
unchanged; only the package around it is replaced by a few lines, because the real one imports
DeepSpeed. It needs lm_dataformat, ftfy, sentencepiece and transformers. Both are timed as whole
processes, in turn; outputs must be equal byte for byte.

The corpus is text from this machine: source code, documentation, manuals and headers, each file
once as one document, in JSON lines. If that is too little, files repeat, and the table says so.
"""

import argparse
import gzip
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
from machine import describe, in_turn, ratio, summary

from castalia.corpus.documents import orjson

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT.parent / "shared" / "data" / "20B_tokenizer.json"
PLACES = [
    sysconfig.get_paths()["purelib"],
    sysconfig.get_paths()["stdlib"],
    "/usr/share/doc",
    "/usr/share/man",
    "/usr/include",
    "/usr/lib",
    "/usr/share",
]
PEER_FILES = (
    "tools/datasets/preprocess_data.py",
    "megatron/tokenizer",
    "megatron/data/indexed_dataset.py",
)
PEER_NEEDS = ("lm_dataformat", "ftfy", "sentencepiece", "transformers", "tqdm")
STUB = "def print_rank_0(*message):\n    print(*message, flush=True)\n"
GOAL = 20


def main() -> None:
    """Write the corpora, run both programs, print tables, write JSON."""
    options = read_options()
    if (why := missing(options)) is not None:
        print(f"no comparison: {why}")
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(options, Path(folder))
        result = {
            "machine": describe(),
            "workers": options.workers,
            "kinds": bench.kinds(),
            "speed": bench.speed(),
        }
        result["growth"] = bench.growth()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="castalia prepare beside GPT-NeoX's preprocess_data.py."
    )
    parser.add_argument(
        "--peer", type=Path, required=True, help="checkout or git directory of GPT-NeoX"
    )
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER)
    parser.add_argument("--megabytes", type=int, default=500, help="size of the timed corpus")
    parser.add_argument(
        "--growth", type=int, nargs="*", default=[100, 500, 2000], help="megabytes for peak memory"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="folder for temporary corpora and outputs")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "prepare.json"
    )
    return parser.parse_args()


def missing(options: argparse.Namespace) -> str | None:
    """The reason why the two cannot be compared here, if any."""
    if not options.tokenizer.is_file():
        return f"{options.tokenizer} is missing; pass GPT-NeoX-20B's tokenizer with --tokenizer"
    if not options.peer.is_dir():
        return (
            f"{options.peer} is not a folder; pass a checkout or git directory of GPT-NeoX with"
            " --peer"
        )
    lacking = [name for name in PEER_NEEDS if find_spec(name) is None]
    if not lacking:
        return None
    return f"GPT-NeoX's script needs {', '.join(lacking)}: pip install {' '.join(lacking)}"


class Bench:
    """Corpora and runs in one temporary folder."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.peer = unpack_peer(options.peer, folder / "peer")
        self.runs: dict[str, list[dict[str, float]]] = {"castalia": [], "gpt-neox": []}

    def castalia(self, corpus: Path, **changed: Any) -> dict[str, float]:
        """One run of `castalia prepare`."""
        command = [
            sys.executable,
            "-m",
            "castalia",
            "prepare",
            str(corpus),
            "--tokenizer",
            str(self.options.tokenizer),
        ]
        command += ["--append-eod", "--output", str(self.folder / "ours")]
        return measured([*command, "--workers", str(changed.get("workers", self.options.workers))])

    def neox(self, corpus: Path) -> dict[str, float]:
        """One run of GPT-NeoX's script."""
        command = [
            sys.executable,
            str(self.peer / PEER_FILES[0]),
            "--input",
            str(corpus),
            "--append-eod",
        ]
        command += ["--tokenizer-type", "HFTokenizer", "--vocab-file", str(self.options.tokenizer)]
        return measured(
            [
                *command,
                "--output-prefix",
                str(self.folder / "theirs"),
                "--workers",
                str(self.options.workers),
            ]
        )

    def same(self) -> bool:
        """Whether both outputs are equal."""
        pairs = [(f"ours{suffix}", f"theirs_text_document{suffix}") for suffix in (".bin", ".idx")]
        return all(sha256(self.folder / a) == sha256(self.folder / b) for a, b in pairs)

    def kinds(self) -> dict[str, Any]:
        """Compare small corpora of every kind byte for byte."""
        print(f"{'corpus':<28}{'documents':>11}{'MB':>8}  same bytes")
        results = {}
        for name, texts in kinds().items():
            corpus = self.folder / "kind.jsonl"
            facts = write_corpus(corpus, texts)
            self.castalia(corpus)
            self.neox(corpus)
            results[name] = facts | {"same": self.same()}
            print(
                f"{name:<28}{facts['documents']:>11,}{facts['bytes'] / 1e6:>8.1f}"
                f"  {results[name]['same']}"
            )
        return results

    def speed(self) -> dict[str, Any]:
        """Time both in turn on the large corpus."""
        corpus = self.folder / "corpus.jsonl"
        facts = write_corpus(corpus, gathered(self.options.megabytes * 1_000_000))

        def ours() -> float:
            self.runs["castalia"].append(self.castalia(corpus))
            return self.runs["castalia"][-1]["seconds"]

        def theirs() -> float:
            self.runs["gpt-neox"].append(self.neox(corpus))
            return self.runs["gpt-neox"][-1]["seconds"]

        times = in_turn({"castalia": ours, "gpt-neox": theirs}, self.options.rounds)
        tokens = (self.folder / "ours.bin").stat().st_size // 2
        gain = ratio(times["gpt-neox"], times["castalia"])
        result = {**facts, "tokens": tokens, "same": self.same(), "ratio": gain, "runs": self.runs}
        result |= self.libraries()
        print(
            f"\n{facts['documents']:,} documents, {facts['bytes'] / 1e6:,.0f} MB of text,"
            f" {tokens:,} tokens, {self.options.workers} workers;"
            f" {facts['again'] / 1e6:,.0f} MB of it are repeated"
        )
        print(
            f"{'':<12}{'documents/s':>13}{'MB/s':>8}{'tokens/s/core':>15}{'GB a process':>14}"
            f"{'seconds':>9}"
        )
        for name, runs in self.runs.items():
            taken = summary(run["seconds"] for run in runs)["median"]
            cpu = summary(run["cpu"] for run in runs)["median"]
            peak = max(run["peak"] for run in runs)
            print(
                f"{name:<12}{facts['documents'] / taken:>13,.0f}"
                f"{facts['bytes'] / taken / 1e6:>8.1f}"
                f"{tokens / cpu:>15,.0f}{peak / 1e9:>14.2f}{taken:>9.1f}"
            )
        print(f"ratio {gain} (goal {GOAL}), same bytes: {result['same']}")
        print(f"castalia encoded by {result['by']}, parsed by {result['parsed_by']}")
        return result

    def libraries(self) -> dict[str, str]:
        """Who encoded the last output of Castalia, by its record, and who parses its lines here."""
        record = json.loads((self.folder / "ours.json").read_text(encoding="utf-8"))
        return {"by": record["by"], "parsed_by": "json" if orjson is None else "orjson"}

    def growth(self) -> dict[str, Any]:
        """Peak memory of Castalia's largest process as the corpus grows."""
        print(f"\n{'MB':>8}{'GB a process':>14}{'MB/s':>8}")
        results = {}
        for megabytes in self.options.growth:
            corpus = self.folder / "growth.jsonl"
            facts = write_corpus(corpus, gathered(megabytes * 1_000_000))
            run = self.castalia(corpus)
            results[str(megabytes)] = facts | run
            print(
                f"{megabytes:>8,}{run['peak'] / 1e9:>14.2f}"
                f"{facts['bytes'] / run['seconds'] / 1e6:>8.1f}",
                flush=True,
            )
        return results


def unpack_peer(source: Path, target: Path) -> Path:
    """Unpack GPT-NeoX's script and its modules under a package without other imports."""
    git = ["git", f"--git-dir={source / '.git' if (source / '.git').exists() else source}"]
    archive = subprocess.run(
        [*git, "archive", "HEAD", *PEER_FILES], capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as opened:
        opened.extractall(target, filter="data")
    (target / "megatron" / "__init__.py").write_text(STUB)
    (target / "megatron" / "data" / "__init__.py").write_text("")
    return target


def measured(command: list[str]) -> dict[str, float]:
    """Run a command; return wall seconds, CPU seconds and the largest process's peak memory."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    job = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    memory = PeakMemory(job)
    output, _ = job.communicate()
    taken = time.perf_counter() - start
    peak = memory.close()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if job.returncode:
        raise SystemExit(f"{' '.join(command)}\n{output}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": taken, "cpu": cpu, "peak": peak}


class PeakMemory:
    """Peak resident memory of any single process of a job, sampled twenty times a second."""

    def __init__(self, job: psutil.Popen) -> None:
        self.job = job
        self.peak = 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()

    def sample(self) -> None:
        """Sample on a thread until closed."""
        while not self.over.wait(0.05):
            try:
                for process in (self.job, *self.job.children(recursive=True)):
                    self.peak = max(self.peak, process.memory_info().rss)
            except psutil.Error:
                continue

    def close(self) -> int:
        """Stop sampling; return the peak in bytes."""
        self.over.set()
        self.thread.join()
        return self.peak


def write_corpus(path: Path, texts: Iterator[tuple[str, bool]]) -> dict[str, int]:
    """Write (text, whether repeated) as JSON lines; return counts of documents and bytes."""
    facts = {"documents": 0, "bytes": 0, "again": 0}
    with open(path, "w", encoding="utf-8") as file:
        for text, again in texts:
            size = len(text.encode("utf-8"))
            facts["documents"] += 1
            facts["bytes"] += size
            facts["again"] += size * again
            file.write(json.dumps({"text": text}) + "\n")
    return facts


def gathered(size: int) -> Iterator[tuple[str, bool]]:
    """Texts of this machine up to `size` bytes, each with whether it is a repetition."""
    given = 0
    again = False
    while given < size:
        before = given
        for text in machine_texts():
            if given >= size:
                return
            given += len(text.encode("utf-8"))
            yield text, again
        if given == before:
            raise SystemExit("found no text on this machine")
        again = True


def machine_texts() -> Iterator[str]:
    """The text files of this machine, without duplicates."""
    hashes: set[bytes] = set()
    for place in PLACES:
        for folder, inner, names in os.walk(place):
            inner.sort()
            for name in sorted(names):
                text = text_of(Path(folder) / name)
                if text and (mark := hashlib.md5(text.encode("utf-8")).digest()) not in hashes:
                    hashes.add(mark)
                    yield text


def text_of(path: Path) -> str | None:
    """The text of a regular UTF-8 file without zero bytes and up to 20 MB, else None."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 20_000_000:
            return None
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        if b"\x00" in data:
            return None
        return data.decode("utf-8")
    except (OSError, EOFError, ValueError):
        return None


def kinds() -> dict[str, Iterator[tuple[str, bool]]]:
    """Small corpora on which tokenizers and readers are likely to differ."""
    draw = random.Random(0)
    texts = [text for text, _ in gathered(30_000_000)]
    ascii_only = [text for text in texts if text.isascii()][:600]
    unicode = [text for text in texts if not text.isascii()][:600]
    empty = [draw.choice(["", "", text]) for text in ascii_only[:300]] + [""] * 50
    joined = "\n".join(texts)
    long = [joined[i * 10_000_000 : (i + 1) * 10_000_000] for i in range(2)]
    names = [
        "<|endoftext|>",
        "<|padding|>",
        "  ",
        " <|endoftext|> ",
        "<|endoftext|><|endoftext|>",
        "<|end",
    ]
    special = [
        "".join(draw.choice(names) + word + " " for word in text[:3000].split(" "))
        for text in unicode[:200]
    ]
    corpora = {
        "ASCII": ascii_only,
        "Unicode": unicode,
        "empty documents": empty,
        "documents of 10 MB": long,
        "special tokens in the text": special,
    }
    return {name: ((text, False) for text in texts) for name, texts in corpora.items()}


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
