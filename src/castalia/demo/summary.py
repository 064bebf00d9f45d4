"""The demo in figures: `summary.json` for the report page, and one table for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from castalia.models.flops import parameter_counts
from castalia.monitor import duration, quantity, size_text
from castalia.runs.config import RunConfig

LEAD = (
    "A language model in the shape of Pythia, trained from random weights on this machine, on text"
    " that this Python"
    " installation has. Nothing was downloaded."
)


def summarize(
    config: RunConfig, record: Mapping[str, Any], corpus: Mapping[str, Any]
) -> dict[str, Any]:
    """The report without its curves and samples: title, lead, tiles and tables."""
    total, _ = parameter_counts(config.model)
    speed = record["training"]["tokens_per_second"]
    first = mean_bits(record["bits"][0]["sources"])
    last = mean_bits(record["bits"][-1]["sources"])
    tiles = {
        "parameters": quantity(total),
        "tokens read": quantity(config.train.steps * config.tokens_per_step),
        "steps": f"{config.train.steps:,}",
        "training": duration(record["stages"]["train"]),
        # None where the training had been finished by an earlier call, which took the time.
        "tokens/s": quantity(speed) if speed else "n/a",
        f"bits per byte, from {first:.2f}": f"{last:.2f}",
    }
    lead = LEAD
    if len(record["size"]["why"]) > 2:
        # Whoever reads the page must know that this is not the best that the demo shows.
        lead = f"{LEAD} It was made smaller to fit this machine: {record['size']['why'][1]}."
    tables = [
        sources_table(record, corpus),
        speech_table(record),
        texts_table(record),
        facts_table(config, record),
    ]
    return {"title": "The Castalia demo", "lead": lead, "tiles": tiles, "tables": tables}


def mean_bits(sources: Mapping[str, Mapping[str, float]]) -> float:
    """Unweighted mean of the sources' bits per byte."""
    return sum(bits["bits_per_byte"] for bits in sources.values()) / len(sources)


def sources_table(record: Mapping[str, Any], corpus: Mapping[str, Any]) -> dict[str, Any]:
    """A row for each source: its size, and its bits per byte at the first and last checkpoint."""
    first = record["bits"][0]
    last = record["bits"][-1]
    rows = []
    for name, facts in corpus["sources"].items():
        train = facts["train"]
        valid = facts["valid"]
        before = first["sources"][name]["bits_per_byte"]
        after = last["sources"][name]["bits_per_byte"]
        rows.append(
            [
                f"{name}: {facts['about']}",
                f"{train['documents']:,}",
                quantity(train["tokens"]),
                f"{valid['documents']:,}",
                " → ".join(f"{share:.1%}" for share in record["training"]["shares"][name][::2]),
                f"{before:.2f}",
                f"{after:.2f}",
                f"{valid['zlib_bits_per_byte']:.2f}",
            ]
        )
    header = [
        "source",
        "documents",
        "tokens",
        "held out",
        "share",
        f"step {first['step']}",
        f"step {last['step']}",
        "zlib",
    ]
    about = (
        "Bits per byte of held-out documents, up to"
        f" {record['size']['eval_tokens']:,} tokens of each source, at the first and last"
        " checkpoint. The yardstick is zlib -9 on every held-out document. Share is the part of the"
        " rows at the first and the last step, which online data mixing sets by the losses."
    )
    return {"title": "Sources", "about": about, "header": header, "rows": rows}


def speech_table(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row for each way to run the model."""
    rows = [
        [
            voice["name"],
            f"{voice['tokens_per_second']:,.0f}",
            size_text(voice["megabytes"] * 1e6),
            f"{voice['bits_per_token']:.3f}",
            f"{voice['same']:.0%}",
        ]
        for voice in record["speech"]["voices"]
    ]
    header = ["", "tokens/s", "weights", "bits per token", "same text"]
    about = (
        "Greedy text, one prompt at a time. Bits per token are measured on held-out text. Same text"
        " is the share of tokens before the first difference from Castalia in fp32."
    )
    return {"title": "fp32 and int8", "about": about, "header": header, "rows": rows}


def texts_table(record: Mapping[str, Any]) -> dict[str, Any]:
    """The continuation of each prompt by each way to run the model."""
    speech = record["speech"]
    rows = []
    for i, prompt in enumerate(speech["prompts"]):
        for voice in speech["voices"]:
            rows.append([voice["name"], prompt + voice["texts"][i]])
    return {"title": "Greedy text", "header": ["", ""], "rows": rows, "kind": "code"}


def facts_table(config: RunConfig, record: Mapping[str, Any]) -> dict[str, Any]:
    """Shape, batch, data and the time of each stage."""
    total, inner = parameter_counts(config.model)
    model = config.model
    names = {"build": "corpus", "evaluate": "bits per byte", "sample": "samples"}
    stages = ", ".join(
        f"{names.get(name, name)} {duration(s)}" for name, s in record["stages"].items()
    )
    rows = [
        ["parameters", f"{total:,}, of which {inner:,} are not embeddings"],
        [
            "shape",
            f"{model.num_layers} layers, width {model.hidden_size}, {model.facts()['heads']} heads",
        ],
        ["vocabulary", f"{model.vocab_size:,} tokens"],
        ["batch", f"{config.train.batch_size} rows of {config.data.seq_length} tokens"],
        ["precision", config.precision],
        ["size", "; ".join(record["size"]["why"]) or f"{config.train.steps:,} steps, as given"],
        ["data fingerprint", str(record["training"]["fingerprint"])],
        ["time", f"{stages}; {duration(sum(record['stages'].values()))} in all"],
    ]
    return {"title": "Facts", "header": ["", ""], "rows": rows, "kind": "words"}


def show_summary(summary: Mapping[str, Any]) -> None:
    """One table on the terminal: the main figures, the sources, and how the exports compare."""
    table = Table(title=summary["title"], show_header=False, title_justify="left")
    for name, value in summary["tiles"].items():
        table.add_row(name, str(value))
    sources, speech, _, facts = summary["tables"]
    table.add_section()
    for row in sources["rows"]:
        name = row[0].partition(":")[0]
        table.add_row(
            f"bits per byte, {name}", f"{row[5]} → {row[6]}   (zlib {row[7]}), share {row[4]}"
        )
    table.add_section()
    for name, speed, size, bits, same in speech["rows"]:
        table.add_row(name, f"{speed} tokens/s, {size}, {bits} bits per token, same text {same}")
    table.add_section()
    for name, text in facts["rows"]:
        if name in ("size", "time"):
            table.add_row(name, text)
    Console(highlight=False).print(table)
