"""The card of a branch: what the model is, how it was trained, on what, and how it scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from castalia.core.hub import is_hub_id
from castalia.export.card import shape
from castalia.export.written import AUTO_CLASSES
from castalia.models.flops import parameter_counts
from castalia.monitor.display import quantity
from castalia.publish.evaluations import line_of, spread
from castalia.publish.run_facts import RunFacts, order_line
from castalia.train.startup import short_hash

MAIN = "main"
LISTED = 24
"""Branches of which the card of main names every one; of more the first and the last."""
ENDS = 8


@dataclass(frozen=True)
class CardPlan:
    """What the cards of a repository have in common."""

    facts: RunFacts
    repo: str
    address: str
    """Page of the repository, without a slash at the end."""
    steps: list[int]
    """Steps with a branch, ascending."""
    license: str | None
    siblings: Mapping[str, str]
    """Name -> page of the other members of its suite."""

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.repo.partition("/")[2]


def run_card(plan: CardPlan, step: int, revision: str, record: Mapping[str, Any]) -> str:
    """README.md of a revision.

    Takes   record: export.json of what it holds. Nothing else of the export enters, and no time:
            equal cards mean that nothing is to be sent.
    """
    facts = plan.facts
    lines = [
        *front_matter(plan, step, revision),
        f"# {plan.name}",
        "",
        *opening(plan, step, revision, record),
        "",
        "## Use",
        "",
        *usage(plan, revision),
        "",
        "## Model",
        "",
        *shape(facts.config.model),
        "",
        "## Training",
        "",
        *table(training(facts, step)),
        "",
        "## Data",
        "",
        *data_lines(facts),
        "",
        "## Evaluation",
        "",
        *evaluation_lines(facts, step, revision),
        "",
        "## Files",
        "",
        *file_lines(step, record),
    ]
    if plan.siblings:
        lines += ["", "## The suite", ""]
        lines += [f"- [{name}]({page})" for name, page in plan.siblings.items()]
    return "\n".join(lines) + "\n"


def front_matter(plan: CardPlan, step: int, revision: str) -> list[str]:
    """The metadata that the hub reads at the top of a card."""
    config = plan.facts.config
    task = "text-generation"
    if config.model.head == "score":
        task = "text-classification"
    values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task}
    if plan.license is not None:
        values["license"] = plan.license
    start = config.model.start
    if start is not None and is_hub_id(start):
        values["base_model"] = start.removeprefix("hf://").partition("@")[0]
    values["tags"] = ["castalia", config.model.family]
    rows = plan.facts.evaluations.of_step(step)
    if revision == MAIN and rows:
        values["model-index"] = [{"name": plan.name, "results": [index_entry(row) for row in rows]}]
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return ["---", *text.splitlines(), "---", ""]


def index_entry(row: Mapping[str, Any]) -> dict[str, Any]:
    """One number in the form of the hub's model-index."""
    task = row["task"]
    metric = {"type": row["metric"], "value": row["value"], "name": row["metric"]}
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": task, "type": task},
        "metrics": [metric],
    }


def opening(plan: CardPlan, step: int, revision: str, record: Mapping[str, Any]) -> list[str]:
    """Which checkpoint this is, and where the others are."""
    facts = plan.facts
    total = parameter_counts(facts.config.model).total
    lines = [
        f"A {facts.config.model.family} model of {quantity(total)} parameters at step {step:,} of"
        f" {facts.config.train.steps:,}, trained with Castalia; weights in {record['numbers']}.",
        "",
    ]
    if revision != MAIN:
        main = f"[main]({plan.address})"
        return [*lines, f"This is the branch `{revision}`; {main} holds step {facts.last:,}."]
    names = [f"step{number}" for number in plan.steps]
    if len(names) > LISTED:
        names = [*names[:ENDS], "…", *names[-ENDS:]]
    links = [name if name == "…" else f"[{name}]({plan.address}/tree/{name})" for name in names]
    count = len(plan.steps)
    noun = "checkpoints are branches"
    if count == 1:
        noun = "checkpoint is a branch"
    return [*lines, f"{count} {noun} of this repository: {', '.join(links)}."]


def usage(plan: CardPlan, revision: str) -> list[str]:
    """How it is loaded."""
    kind = AUTO_CLASSES[plan.facts.config.model.head]
    name = f'"{plan.repo}", revision="{revision}"'
    return [
        "```python",
        f"from transformers import AutoTokenizer, {kind}",
        "",
        f"model = {kind}.from_pretrained({name})",
        f"tokenizer = AutoTokenizer.from_pretrained({name})",
        "```",
        "",
        f"`castalia generate hf://{plan.repo}@{revision}` is the same model in Castalia.",
    ]


def table(rows: Mapping[str, str]) -> list[str]:
    """Names and values as a Markdown table without a head."""
    return ["| | |", "|---|---|", *(line_of([name, value]) for name, value in rows.items())]


def training(facts: RunFacts, step: int) -> dict[str, str]:
    """How it was trained."""
    config = facts.config
    counts = parameter_counts(config.model)
    tokens = facts.tokens(step)
    optim = config.optim
    rows = {
        "parameters, total": f"{counts.total:,}",
        "parameters, non-embedding": f"{counts.non_embedding:,}",
        "step": f"{step:,} of {config.train.steps:,}",
        "tokens": "unknown" if tokens is None else f"{tokens:,}",
        "batch": f"{config.train.batch_size:,} rows of {config.data.seq_length:,} tokens"
        f" = {config.tokens_per_step:,} tokens",
        "optimizer": optim.kind,
        "peak learning rate": f"{optim.lr:g}",
        "schedule": schedule_text(facts),
        "weight decay": f"{optim.weight_decay:g}",
        "gradient clipping": "none" if optim.clip is None else f"{optim.clip:g}",
        "precision": config.precision,
        "loss": config.loss.kind,
        "seeds": f"{config.order_seed} of the data order, {config.start_seed} of the start weights",
        "recipe": config.recipe or "none",
    }
    if config.model.start is not None:
        rows["start weights"] = start_text(config.model.start)
    for name, version in facts.versions().items():
        rows[f"{name} version"] = version
    return rows


def start_text(start: str) -> str:
    """A model of the hub, or the name of a path of this machine."""
    # A folder of this machine says nothing to others, its last part may.
    if is_hub_id(start):
        return start
    return Path(start).name


def schedule_text(facts: RunFacts) -> str:
    """The schedule in a few words."""
    schedule = facts.config.schedule
    warmup = f"{schedule.warmup:g} of the horizon"
    if schedule.warmup_steps is not None:
        warmup = f"{schedule.warmup_steps:,} steps"
    horizon = schedule.decay_steps or facts.config.train.steps
    return f"{schedule.name}, warmup {warmup}, horizon {horizon:,} steps, floor {schedule.min_lr:g}"


def data_lines(facts: RunFacts) -> list[str]:
    """The sources, and what makes their order the same again."""
    found = facts.fingerprint
    if not found:
        return ["The checkpoint has no fingerprint of its data."]
    weights = found.get("order", {}).get("weights") or []
    mixing = facts.config.mixing
    head = ["source", "weight", "tokens", "documents", "SHA-256 of the token file"]
    lines = [line_of(head), line_of(["---"] * len(head))]
    for number, source in enumerate(found.get("train", [])):
        weight = ""
        if number < len(weights):
            weight = f"{weights[number]:.4g}"
        digest = f"`{source['bin_sha256']}` ({source['bin_hashed']})"
        counts = [f"{source['tokens']:,}", f"{source['documents']:,}"]
        lines.append(line_of([source["name"], weight, *counts, digest]))
    lines.append("")
    if mixing.plans:
        lines.append(f"The weights are those of the start; mixing.kind={mixing.kind} moved them.")
    lines.append(f"Fingerprint of the data and of its order: `{short_hash(found)}`.")
    lines.append(f"The order of the rows follows from `{order_line(found)}`.")
    if facts.mixture is not None:
        lines.append(f"The mixture of each step is recorded, SHA-256 `{facts.mixture}`.")
    if "interventions" in found:
        lines.append(f"The rows were changed by interventions, `{found['interventions']}`.")
    return lines


def evaluation_lines(facts: RunFacts, step: int, revision: str) -> list[str]:
    """The numbers of this step; on main also those of a few earlier ones."""
    found = facts.evaluations
    steps = [step]
    if revision == MAIN:
        # The newest one may not be evaluated yet; those that are stand there all the same.
        steps = spread([number for number in found.steps() if number <= step])
    lines = found.table(steps)
    return lines or ["Not evaluated."]


def file_lines(step: int, record: Mapping[str, Any]) -> list[str]:
    """The checkpoint behind the files, and how close they are to it."""
    lines = ["`export.json` has the SHA-256 of every file. Made from the checkpoint with"]
    digests = [f"`{name}` `{digest}`" for name, digest in record["source_sha256"].items()]
    lines += [*(f"- {digest}" for digest in digests), ""]
    certificate = record.get("certificate")
    if certificate is None or certificate["unmeasured"] is not None:
        lines.append("Its logits were not compared with those of the checkpoint.")
    else:
        largest = certificate["largest_difference"]
        lines.append(
            f"On fixed prompts no logit differs by more than {largest:.3g} from the checkpoint in"
            " fp32 (`certificate.json`)."
        )
    notes = record.get("notes", [])
    return lines + [f"- {note}" for note in notes]
