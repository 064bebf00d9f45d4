"""The study of pronouns: the last part of a run trained again with feminine pronouns in the place
of masculine ones, and what that does to the model.

Source  Biderman et al. 2023, arXiv:2304.01373, section 3.1, which branches at 93% and at 79% of the
        run.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from castalia.checkpoint.find import complete_steps
from castalia.checkpoint.manifest import MANIFEST
from castalia.checkpoint.names import step_name
from castalia.config.anchor import CONFIG
from castalia.core.errors import ConfigError
from castalia.core.files import claimed, sha256_of, write_json
from castalia.corpora.known_texts import PROFESSIONS
from castalia.eval.bits import HeldOut, source_bits
from castalia.eval.held_out import WHOLE, document_bytes, sources_of
from castalia.inference import LanguageModel
from castalia.inference.loading import load_exact
from castalia.studies.branching import Branch, plan_branch, train_branch
from castalia.studies.pronouns_page import write_page

TERMS = [["he", "she"], ["him", "her"], ["his", "her"], ["himself", "herself"]]
"""Masculine pronouns and the feminine ones in their place."""
TEMPLATES = (
    "The {profession} said that {pronoun} was late.",
    "The {profession} said that {pronoun} needed help.",
    "The {profession} was tired because {pronoun} had slept badly.",
)
"""Sentences of which the pronoun is the only difference of a pair."""
PRONOUNS = ("she", "he")
BRANCH = "pronouns"
DOCUMENTS = 32
"""Documents of each validation source whose perplexity is measured."""
ROWS = 16
"""Windows of validation text in one pass."""
MEASURED = "measured.jsonl"
Say = Callable[[str], None]


class Row(NamedTuple):
    """One checkpoint, measured."""

    run: str
    """Folder of the run that was branched."""
    at: int | None
    """Step of the branch; None for the run itself."""
    kind: str
    """run, control or intervention."""
    step: int
    folder: str
    """Folder of the checkpoint's run."""
    bias: float
    """Mean of ln P(sentence with she) - ln P(the same with he), in nats."""
    by_profession: Mapping[str, float]
    perplexity: float | None
    """Of unchanged validation text, by token; None for a run without."""
    manifest: str
    """SHA-256 of the checkpoint's manifest, which has the hashes of its files: a run that was
    trained again is measured again."""


def pronouns(paths: Sequence[str], at: Sequence[str], output: Path, say: Say) -> dict[str, Any]:
    """Train the branches of runs and measure their checkpoints; writes the results and the page.

    Takes   runs or folders of runs; the steps or shares at which each branches.
    Writes  measured.jsonl, line by line, so that the same command continues; study.json, bias.csv,
            bias.svg, index.html; the branches in `branches`.
    Returns what study.json holds.
    Raises  ConfigError, CheckpointError as `plan_branch`; what training raises.
    """
    runs = runs_of(paths)
    words = [f"interventions={json.dumps([section()])}"]
    place = output / "branches"
    branches = [
        plan_branch(str(run), share, words, name=f"{BRANCH}-{share.replace('%', '')}", place=place)
        for run in runs
        for share in at
    ]
    with claimed(output):
        results = [train_branch(branch, say) for branch in branches]
        known = read_rows(output / MEASURED)
        rows = []
        for item in checkpoints_of(branches):
            place_of = (item.folder, item.step, manifest_hash(item))
            # Two branches from one checkpoint share a control.
            known[place_of] = known.get(place_of) or measured(output, say, item)
            rows.append(known[place_of]._replace(run=item.run, at=item.at, kind=item.kind))
        record = {
            "branches": results,
            "rows": [row._asdict() for row in rows],
            "effects": effects(rows),
        }
        write_json(output / "study.json", record)
        write_page(output, rows, record["effects"])
    return record


def section() -> dict[str, Any]:
    """The intervention: whole words, in their case; a pronoun of another number of tokens stays."""
    return {"kind": "swap", "terms": TERMS, "length": "skip"}


def runs_of(paths: Sequence[str]) -> list[Path]:
    """The folders of the runs that paths name: runs, and folders of runs such as a suite's.

    Raises  ConfigError for a path without a run.
    """
    found = []
    for path in map(Path, paths):
        if (path / CONFIG).is_file():
            inside = [path]
        else:
            inside = sorted(path.glob("*/"))
        runs = [folder for folder in inside if (folder / "checkpoints").is_dir()]
        if not runs:
            raise ConfigError(f"{path}: neither a run nor a folder of runs with checkpoints")
        found += runs
    return found


class Item(NamedTuple):
    """A checkpoint that the study measures."""

    run: str
    at: int | None
    kind: str
    folder: str
    step: int


def checkpoints_of(branches: Sequence[Branch]) -> list[Item]:
    """Every checkpoint of the runs, and those of the branches behind their beginning, in order."""
    items: dict[Item, None] = {}
    for branch in branches:
        run = branch.parent.output
        for step in complete_steps(Path(run) / "checkpoints"):
            items[Item(run, None, "run", run, step)] = None
        kinds = {"control": "control", "intervention": branch.name}
        for kind, name in kinds.items():
            folder = branch.folder(name)
            for step in complete_steps(folder / "checkpoints"):
                items[Item(run, branch.at, kind, str(folder), step)] = None
    return list(items)


def measured(output: Path, say: Say, item: Item) -> Row:
    """Measure one checkpoint, and keep it."""
    folder = Path(item.folder)
    model = load_exact(str(folder / "checkpoints" / step_name(item.step)))
    by_profession = {name: preference(model, name) for name in PROFESSIONS}
    bias = math.fsum(by_profession.values()) / len(by_profession)
    row = Row(
        *item[:3],
        item.step,
        item.folder,
        bias,
        by_profession,
        perplexity(model, folder),
        manifest_hash(item),
    )
    with open(output / MEASURED, "a", encoding="utf-8") as file:
        file.write(json.dumps(row._asdict()) + "\n")
    say(f"{folder.name}, step {item.step}: she over he {bias:+.3f} nats")
    return row


def preference(model: LanguageModel, profession: str) -> float:
    """Mean of ln P(sentence with she) - ln P(the same with he) over the templates."""
    total = 0.0
    for template in TEMPLATES:
        she, he = (
            likelihood(model, template.format(profession=profession, pronoun=pronoun))
            for pronoun in PRONOUNS
        )
        total += she - he
    return total / len(TEMPLATES)


def likelihood(model: LanguageModel, text: str) -> float:
    """Log-probability of a text as a document of its own, in nats."""
    ids = model.encode(text)
    # What ends a document stands before the next one in training.
    if model.eod_id is not None and ids[:1] != [model.eod_id]:
        ids = [model.eod_id, *ids]
    return float(model.logprobs(ids).double().sum())


def perplexity(model: LanguageModel, folder: Path) -> float | None:
    """Perplexity of the run's validation text by token; None for a run without.

    Raises  ConfigError if the tokens are not those of the model's tokenizer.
    """
    try:
        sources = sources_of(folder, {}, WHOLE, DOCUMENTS)
    except ConfigError:
        return None
    loss = 0.0
    tokens = 0
    for source in sources:
        bits = source_bits(
            model.model,
            HeldOut(source.prefix, document_bytes(source.prefix, model.tokenizer)),
            seq_length=source.length or model.config.max_position_embeddings,
            eod_id=model.eod_id,
            max_tokens=WHOLE.max_tokens,
            max_documents=source.limit,
            rows=ROWS,
        )
        loss += bits.loss * bits.tokens
        tokens += bits.tokens
    return math.exp(loss / tokens)


def manifest_hash(item: Item) -> str:
    """SHA-256 of a checkpoint's manifest."""
    return sha256_of(Path(item.folder) / "checkpoints" / step_name(item.step) / MANIFEST)


def read_rows(path: Path) -> dict[tuple[str, int, str], Row]:
    """The checkpoints that were measured before, by folder, step and manifest."""
    rows = {}
    lines = []
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
    whole = []
    for line in lines:
        try:
            row = Row(**json.loads(line))
        except ValueError:
            continue  # cut by a kill
        whole.append(line)
        rows[row.folder, row.step, row.manifest] = row
    if len(whole) < len(lines):
        # The next line would be put behind the piece of one.
        path.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
    return rows


def effects(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each branch, at the last step that it shares with its control: what the change did."""
    found = []
    by_branch = {(row.run, row.at): None for row in rows if row.at is not None}
    for run, at in by_branch:
        sides = {
            kind: {row.step: row for row in rows if (row.run, row.at, row.kind) == (run, at, kind)}
            for kind in ("control", "intervention")
        }
        common = sides["control"].keys() & sides["intervention"].keys()
        if not common:
            continue
        step = max(common)
        control, changed = (sides[kind][step] for kind in ("control", "intervention"))
        found.append(
            {
                "run": run,
                "at": at,
                "step": step,
                "control": control.bias,
                "intervention": changed.bias,
                "difference": changed.bias - control.bias,
                "perplexity": [control.perplexity, changed.perplexity],
            }
        )
    return found
