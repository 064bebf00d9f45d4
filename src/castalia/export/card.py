"""The card of an export, README.md: usage, the model's shape, provenance and quality."""

from collections.abc import Mapping
from pathlib import Path

from castalia.core.files import files_in
from castalia.export.certificate import FILE, Certificate
from castalia.export.format import Format
from castalia.export.quality import Quality, table
from castalia.export.written import AUTO_CLASSES
from castalia.formats.saved_model import SavedModel
from castalia.models.flops import active_parameters, parameter_counts
from castalia.models.model_config import ModelConfig
from castalia.monitor.display import size_text


def write_card(
    folder: Path,
    source: SavedModel,
    *,
    name: str,
    kind: type[Format],
    numbers: str,
    notes: list[str],
    hashes: Mapping[str, str],
    quality: Quality | None,
    certificate: Certificate | None,
) -> None:
    """Write README.md into `folder`, which holds the whole export.

    Takes   hashes: SHA-256 of the files of the source, by name.
    """
    size = sum(file.stat().st_size for file in files_in(folder))
    module = kind.use.partition(".")[0]
    lines = [
        *front_matter(kind, source),
        f"# {name}",
        "",
        f"For {kind.program}, weights in {numbers}, {size_text(size)}.",
        "",
        "```python",
        f"import {module}",
        "",
        f"model = {kind.use.format(folder=name, auto=AUTO_CLASSES[source.config.head])}",
        "```",
        "",
        "## Model",
        "",
        *shape(source.config),
        "",
        "## Provenance",
        "",
        *provenance(source, hashes),
        "",
        "## Certificate",
        "",
        *certificate_lines(certificate),
        "",
        "## Quality",
        "",
        *quality_lines(quality),
    ]
    if notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def front_matter(kind: type[Format], source: SavedModel) -> list[str]:
    """The metadata that the Hugging Face hub reads at the top of a card."""
    task = "text-generation"
    if source.config.head == "score":
        task = "text-classification"
    return [
        "---",
        f"library_name: {kind.library}",
        f"pipeline_tag: {task}",
        "tags:",
        "- castalia",
        "---",
        "",
    ]


def quality_lines(quality: Quality | None) -> list[str]:
    """The table of what quantization changes."""
    if quality is None:
        return ["Not measured: no held-out text was at hand."]
    words = f"On {quality.tokens} tokens of {quality.text}, each given those before it:"
    return [words, "", *table(quality)]


def shape(config: ModelConfig) -> list[str]:
    """The parameter table."""
    counts = parameter_counts(config)
    rows = {
        "parameters": f"{counts.total:,}",
        "active for a token": f"{active_parameters(config):,}",
        "without embeddings": f"{counts.non_embedding:,}",
        **config.facts(),
    }
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]


def certificate_lines(certificate: Certificate | None) -> list[str]:
    """The largest difference of a logit, and the hashes of what was written."""
    if certificate is None:
        return ["Left out."]
    line = certificate.line()
    lengths = ", ".join(str(length) for length in certificate.lengths)
    lines = [f"{line[0].upper()}{line[1:]}."]
    if certificate.unmeasured is None:
        lines += ["", f"Prompts of {lengths} fixed token ids; all numbers: `{FILE}`."]
    if "note" in certificate.target:
        lines += ["", f"Read by Castalia itself: {certificate.target['note']}."]
    lines += ["", "SHA-256 of what was written:", ""]
    written = certificate.target["sha256"].items()
    return lines + [f"- `{name}` `{digest}`" for name, digest in written]


def provenance(source: SavedModel, hashes: Mapping[str, str]) -> list[str]:
    """The checkpoint and its hashes, without the folder's path on this machine."""
    step = ""
    if source.step is not None:
        step = f", step {source.step}"
    lines = [f"Made from `{source.folder.name}`{step}. SHA-256 of what was read:", ""]
    return lines + [f"- `{name}` `{digest}`" for name, digest in hashes.items()]
