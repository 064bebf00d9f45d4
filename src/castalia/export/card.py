"""The card of an export, README.md: usage, the model's shape, provenance and quality."""

from pathlib import Path

from castalia.checkpoint.saved_model import SavedModel
from castalia.core.files import files_in
from castalia.export.formats import Format
from castalia.export.quality import Quality, table
from castalia.models.flops import active_parameters, parameter_counts
from castalia.monitor.display import size_text


def write_card(
    folder: Path,
    source: SavedModel,
    *,
    name: str,
    kind: type[Format],
    numbers: str,
    notes: list[str],
    quality: Quality | None,
) -> None:
    """Write README.md into `folder`, which holds the whole export."""
    size = sum(file.stat().st_size for file in files_in(folder))
    module = kind.use.partition(".")[0]
    lines = [
        f"# {name}",
        "",
        f"For {kind.program}, weights in {numbers}, {size_text(size)}.",
        "",
        "```python",
        f"import {module}",
        "",
        f"model = {kind.use.format(folder=name)}",
        "```",
        "",
        "## Model",
        "",
        *shape(source),
        "",
        "## Provenance",
        "",
        *provenance(source),
        "",
        "## Quality",
        "",
        *quality_lines(quality),
    ]
    if notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def quality_lines(quality: Quality | None) -> list[str]:
    """The table of what quantization changes."""
    if quality is None:
        return ["Not measured: no held-out text was at hand."]
    words = f"On {quality.tokens} tokens of {quality.text}, each given those before it:"
    return [words, "", *table(quality)]


def shape(source: SavedModel) -> list[str]:
    """The parameter table."""
    counts = parameter_counts(source.config)
    rows = {
        "parameters": f"{counts.total:,}",
        "active for a token": f"{active_parameters(source.config):,}",
        "without embeddings": f"{counts.non_embedding:,}",
        **source.config.facts(),
    }
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]


def provenance(source: SavedModel) -> list[str]:
    """The checkpoint and its hashes, without the folder's path on this machine."""
    step = "" if source.step is None else f", step {source.step}"
    lines = [f"Made from `{source.folder.name}`{step}. SHA-256 of what was read:", ""]
    return lines + [f"- `{name}` `{digest}`" for name, digest in source.hashes().items()]
