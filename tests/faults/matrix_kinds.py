"""The rows of the table: kinds of files, and the commands that a user runs on them next."""

import hashlib
import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tests.faults.kill_jobs import UNCOMPARED, without_times
from tests.faults.world import LABELLED, REFERENCED, REPLAY, RESUMED, STEPS
from tests.fixtures.forked_rank import run_and_exit


@dataclass(frozen=True)
class Consumer:
    """A command that reads the file."""

    name: str
    words: tuple[str, ...]
    makes: tuple[str, ...] | None = None
    """Patterns of the files whose content is its result; None is what it prints."""

    def run(self) -> NoReturn:
        """In a fork: run the command and end the process."""
        run_and_exit(list(self.words))

    def digest(self, place: Path) -> str:
        """SHA-256 of the files that it made, without times."""
        digest = hashlib.sha256()
        for pattern in self.makes or ():
            for path in sorted(place.glob(pattern)):
                if path.is_file() and path.name not in UNCOMPARED:
                    digest.update(f"{path.relative_to(place)}\n".encode())
                    digest.update(without_times(path))
        return digest.hexdigest()


@dataclass(frozen=True)
class Library(Consumer):
    """Calls a function of a compiled library, from the cache in the current folder."""

    def run(self) -> NoReturn:
        """In a fork: print what the function returns."""
        from castalia.core.native_code import native_library

        os.environ["XDG_CACHE_HOME"] = os.path.abspath("cache")
        status = 0
        try:
            library = native_library(Path("tiny.cpp"), "the answer", "none is used")
            assert library is not None
            print(library.answer(), flush=True)
        except Exception:
            traceback.print_exc()
            status = 1
        os._exit(status)


@dataclass(frozen=True)
class Row:
    """One kind of file."""

    name: str
    files: str
    """Patterns of the files; the last match of each is damaged."""
    needs: str
    """What the consumers read, as paths."""
    consumers: tuple[Consumer, ...]
    harmless: str = ""
    """Why a fault may have no effect."""
    like: str = ""
    """Patterns of files of this kind that are not damaged, too."""
    only_by_check: bool = False
    """Whether only a check of the files notices it, as the page says of this kind."""

    def files_in(self, whole: Path, *, every: bool = False) -> list[str]:
        """The files to be damaged, or every file of the kind."""
        found: list[str] = []
        for pattern in (*self.files.split(), *(self.like.split() if every else ())):
            matches = sorted(path for path in whole.glob(pattern) if path.is_file())
            chosen = matches if every else matches[-1:]
            found += [path.relative_to(whole).as_posix() for path in chosen]
        return found


def command(name: str, words: str, *makes: str) -> Consumer:
    """A consumer by its command line, called `name` in the table."""
    return Consumer(f"`{name}`", tuple(words.split()), makes or None)


def verified(path: str) -> Consumer:
    """`castalia verify` of a path; what it says of good files is no result."""
    return Consumer("`verify`", ("verify", path), ())


def checked(words: str) -> Consumer:
    """`castalia data verify` and its like."""
    name = " ".join(word for word in words.split() if "/" not in word)
    return Consumer(f"`{name}`", tuple(words.split()), ())


def generating(path: str) -> Consumer:
    """`castalia generate` with a model."""
    return command("generate", f"generate {path} --prompt line --temperature 0 --max-new-tokens 12")


STEP = f"runs/one/checkpoints/step-{STEPS:08d}"
AFTER = f"runs/one/checkpoints/step-{STEPS + 4:08d}"
RUN_FILES = "runs/one data"
RESUME = Consumer("resume", RESUMED, (f"{AFTER}/*", "runs/one/*.jsonl"))
REPLAYED = Consumer("replay", REPLAY, ("runs/again/checkpoints/*8/*.safetensors",))
LABELS = Consumer("`train`", LABELLED, ("runs/labelled/checkpoints/*2/*.safetensors",))
REFERENCE = Consumer("`train`", REFERENCED, ("runs/doremi/checkpoints/*4/*.safetensors",))
ANEW = "read by people alone; the command writes it anew"


def checkpoint_rows() -> list[Row]:
    """Files of a checkpoint."""
    consumers = (RESUME, generating("runs/one"), verified("runs/one"))
    rows = {
        "weights": "model-*.safetensors",
        "optimizer": "optim-*.safetensors",
        "state.json": "state.json",
        "config.yaml": "*config.*",
        "tokenizer": "*token*.json",
        "manifest.json": "manifest.json",
        "COMPLETE": "COMPLETE",
    }
    places = ("runs/*/checkpoints/*/", "runs/suite/*/checkpoints/*/", "imported/checkpoints/*/")
    return [
        Row(
            f"checkpoint: {part}",
            f"{STEP}/{file}",
            RUN_FILES,
            consumers,
            like=" ".join(f"{place}{file}" for place in places),
        )
        for part, file in rows.items()
    ]


def run_rows() -> list[Row]:
    """Files of a run's folder beside its checkpoints."""
    consumers = (RESUME, verified("runs/one"))
    mixed = (RESUME, REPLAYED, verified("runs/one"))

    def row(file: str, readers: tuple[Consumer, ...], harmless: str = "", like: str = "") -> Row:
        likes = f"runs/**/{file} {like}"
        return Row(f"run: {file}", f"runs/one/{file}", RUN_FILES, readers, harmless, likes)

    locks = "runs/one/.claim runs/one/checkpoints/.lock"
    unread = "its content is not read"
    return [
        row("config.yaml", consumers),
        row("command.txt", consumers, "read by people alone", "runs/**/train.log"),
        row("env.json", consumers, "read by people alone"),
        row("metrics.jsonl", consumers),
        row("mixture.jsonl", mixed),
        Row("run: locks", locks, RUN_FILES, consumers, unread, "**/.claim **/.lock"),
    ]


def token_rows() -> list[Row]:
    """Token files and what stands beside them."""
    consumers = (
        RESUME,
        command("data inspect", "data inspect data/a --document 7"),
        checked("data verify data/a"),
        verified("data/a"),
    )
    labels = "data/chats_messages_label_document"
    mask = (LABELS, checked(f"data verify {labels}"), verified(labels))
    shards = (
        command("data unshard", "data unshard shards/a --output joined", "joined/*"),
        checked("data verify shards/a"),
    )
    trace = (
        command("trace", "trace runs/one fox --json"),
        checked("index --verify data/a"),
        verified("data/a"),
    )
    inspect = "data inspect data/bpe --document 7 --tokenizer tokenizer.json"

    def row(name: str, suffix: str) -> Row:
        files = f"data/a{suffix}"
        # Without the index `data inspect` says less, and nothing else reads it.
        by_check = "documents" in suffix
        return Row(f"tokens: {name}", files, RUN_FILES, consumers, "", f"data/*{suffix}", by_check)

    return [
        row(".bin", ".bin"),
        row(".idx", ".idx"),
        row("PREFIX.json", ".json"),
        row("documents.parquet", ".documents.parquet"),
        Row("tokens: labels", f"{labels}.bin {labels}.idx {labels}.json", "data", mask),
        Row("tokens: shards", "shards/*2-of*.bin shards/*.idx", "shards", shards, like="shards/*"),
        Row("tokens: index", "data/a.index/*", RUN_FILES, trace, like="data/*.index/*"),
        Row(
            "tokenizer.json",
            "tokenizer.json",
            "tokenizer.json data",
            (command("data inspect", inspect),),
        ),
    ]


WEIGHTS = {
    "hf": "model.safetensors",
    "native": "native.safetensors",
    "ct2": "model.bin",
    "gguf": "model.gguf",
    "neox": "*/layer_0[24]*.pt */mp*.pt",
    "rwkv": "model.pth",
    "peft": "adapter_model.safetensors",
}
CONFIGS = {
    "hf": "config.json generation_config.json",
    "native": "castalia.json",
    "ct2": "config.json vocabulary.json",
    "neox": "*/configs/model.yml latest",
    "peft": "adapter_config.json",
}


def export_rows() -> list[Row]:
    """Files of exports, by format and by their part in it."""
    rows: list[Row] = []
    for kind, weights in WEIGHTS.items():
        parts = {"weights": weights}
        if kind in CONFIGS:
            parts["config"] = CONFIGS[kind]
        parts["tokenizer"] = "tokenizer.json tokenizer_config.json special_tokens_map.json"
        parts["export.json"] = "export.json"
        parts["card, certificate"] = "README.md certificate.json"
        path = f"exports/{kind}"
        # An adapter is nothing without its base.
        needs = f"{path} runs/one" if kind == "peft" else path
        consumers = (generating(path), verified(path))
        for part, files in parts.items():
            patterns = " ".join(f"{path}/{file}" for file in files.split())
            like = f"{path}/*/*.pt"
            rows.append(Row(f"{kind} export: {part}", patterns, needs, consumers, like=like))
    imported = "imported/import.json imported/README.md imported/certificate.json"
    readers = (generating("imported"), verified("imported"))
    rows.append(Row("import: record, card, certificate", imported, "imported", readers))
    adapted = (generating("runs/lora"), verified("runs/lora"))
    adapter = "runs/lora/checkpoints/*2/model-*.safetensors"
    rows.append(Row("adapter: weights", adapter, "runs", adapted))
    rows.append(Row("adapter: weights of its base", f"{STEP}/model-*.safetensors", "runs", adapted))
    return rows


def result_rows() -> list[Row]:
    """What the tools write about models and data."""
    scores = "memorize runs/one --output scores.parquet --prompt 4 --continuation 4"
    compared = "memorization scores.parquet --output compared"
    counted = "count runs/one --terms words.txt --jobs 1"
    saved = "batches runs/one --steps 0:4 --mode save --output batches"
    page = "suite runs/suite --page suite.html"
    memorized = (
        command("memorize", scores, "scores.parquet"),
        command("memorization", compared, "compared/*.csv"),
    )
    weighed = command("weights", "weights runs/one --output weights.parquet", "weights.parquet")
    suite = (
        command("suite --run", "suite mine.yaml --run", "runs/suite/*/checkpoints/*/*.safetensors"),
        command("suite --status", "suite runs/suite --status"),
    )
    one = "runs/one data"
    counts = "runs/one/counts/*/counts.json runs/one/counts/*/*.npz"
    results = (command("results", "results --store evals --csv"),)
    return [
        Row(
            "compiled library",
            "cache/castalia/native/*",
            "cache tiny.cpp",
            (Library("the next call", ()),),
            "compiled anew",
            like="cache/**/*",
        ),
        Row("memorization scores", "scores.parquet", f"{one} scores.parquet", memorized),
        Row(
            "counts of a run", counts, f"{one} words.txt", (command("count", f"{counted} --json"),)
        ),
        Row("reference losses", "reference.json", "data reference.json", (REFERENCE,)),
        Row("results of evaluations", "evals/*.parquet", "evals", results, like="**/evals/*"),
        Row(
            "rows of steps",
            "batches/batch2*.npy batches/_batches.json",
            f"{one} batches",
            (Consumer("`batches`", tuple(saved.split()), ()),),
            "read by people and other programs alone; --overwrite writes them anew",
            like="batches/*",
        ),
        Row("suite.yaml of a suite", "runs/suite/suite.yaml", "runs/suite mine.yaml data", suite),
        Row(
            "report.html",
            "runs/one/report.html",
            one,
            (command("report", "report runs/one", "runs/one/report.html"),),
            ANEW,
        ),
        Row(
            "page of a suite",
            "suite.html",
            "runs/suite suite.html",
            (command("suite --page", page, "suite.html"),),
            ANEW,
        ),
        Row("weights.parquet", "weights.parquet", f"{one} weights.parquet", (weighed,), ANEW),
        Row(
            "counts.json of --output",
            "counts.json",
            f"{one} words.txt counts.json",
            (command("count --output", f"{counted} --output counts.json", "counts.json"),),
            ANEW,
        ),
    ]


GIVEN = ("*.jsonl", "template.jinja", "words.txt", "mine.yaml", "tiny.cpp")
"""What the user brought."""
ROWS = [*checkpoint_rows(), *run_rows(), *token_rows(), *export_rows(), *result_rows()]
