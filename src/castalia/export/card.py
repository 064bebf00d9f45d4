"""The card of an export, README.md: what it is, where it comes from, how it is run, and what it changes."""

from pathlib import Path

from castalia.checkpoint.saved_model import SavedModel
from castalia.export.quality import Quality, table
from castalia.models import parameter_counts
from castalia.monitor.display import size_text

USE = {
    "hf": 'transformers.AutoModelForCausalLM.from_pretrained("{folder}")',
    "ct2": 'castalia.load("{folder}", engine="ct2")',
    "native": 'castalia.load("{folder}", engine="native")',
    "gguf": 'castalia.load("{folder}", engine="llama.cpp")',
}
ENGINES = {
    "hf": "transformers",
    "ct2": "CTranslate2",
    "native": "Castalia's native engine",
    "gguf": "llama.cpp",
}


def write_card(
    folder: Path,
    source: SavedModel,
    *,
    name: str,
    to: str,
    numbers: str,
    notes: list[str],
    quality: Quality | None,
) -> None:
    """Write README.md into `folder`, which holds the whole export."""
    size = sum(file.stat().st_size for file in folder.iterdir())
    lines = [f"# {name}", "", f"For {ENGINES[to]}, weights in {numbers}, {size_text(size)}.", ""]
    lines += ["```python", "import castalia" if to != "hf" else "import transformers", ""]
    lines += [
        f"model = {USE[to].format(folder=name)}",
        "```",
        "",
        "## Model",
        "",
        *shape(source),
        "",
    ]
    lines += ["## Provenance", "", *provenance(source), "", "## Quality", ""]
    if quality is None:
        lines.append("Not measured: no held-out text was at hand.")
    else:
        lines += [
            f"On {quality.tokens} tokens of {quality.text}, each given those before it:",
            "",
            *table(quality),
        ]
    if notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def shape(source: SavedModel) -> list[str]:
    """The parameter table."""
    counts = parameter_counts(source.config)
    rows = {
        "parameters": f"{counts.total:,}",
        "without embeddings": f"{counts.non_embedding:,}",
        **source.config.facts(),
    }
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]


def provenance(source: SavedModel) -> list[str]:
    """The checkpoint and its hashes; the folder's place on this machine is not told."""
    step = "" if source.step is None else f", step {source.step}"
    lines = [f"Made from `{source.folder.name}`{step}. SHA-256 of what was read:", ""]
    return lines + [f"- `{name}` `{digest}`" for name, digest in source.hashes().items()]
