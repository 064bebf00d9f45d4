"""The tables of docs/performance.md that compare levels of instructions, from results/*.json.

    python benchmarks/tables.py

Prints Markdown: of training, of decoding, first tokens and scoring by levels of instructions, and
the same of other machines, each as it is. A level or machine whose file is absent has no rows.
"""

import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from inference_levels import AUTO
from levels import LEVELS, results_file

RESULTS = Path(__file__).resolve().parent / "results"
PEERS = ("transformers", "litgpt", "torchtitan's loss")
MACHINES = ("zen3",)
"""Endings of files that `--json` and `--output` named."""
NAMES = {"ct2": "CTranslate2", "openvino": "OpenVINO", "Q4_0": "Q4", "Q8_0": "Q8"}
"""Names of engines as they are printed."""


def records(name: str, levels: Iterable[str] = LEVELS) -> Iterator[tuple[str, dict[str, Any]]]:
    """Level, or machine, and contents of each file of a benchmark."""
    for level in levels:
        path = results_file(RESULTS, name, level)
        if path.is_file():
            yield level, json.loads(path.read_text())


def training_rows(level: str, record: dict[str, Any]) -> Iterator[list[str]]:
    """One row of the training table for each case."""
    rates = record["machine"]["matrix_gflops"]
    for case in record["cases"]:
        ours = case["engines"][case["ours"]]
        ratios = {name.rsplit(" ", 1)[0]: value for name, value in case["ratios"].items()}
        # Eager and compiled engines do not stand in one record unless they were asked for.
        theirs = [name for name in case["engines"] if name.startswith("transformers")]
        peak = case["engines"][theirs[-1]]["peak_gb"] if theirs else float("nan")
        attention = case["parts"]["attention"]
        share = attention["flops"] / attention["seconds"] / 1e9 / rates[case["dtype"]]
        yield [
            f"{level}: {case['shape']}, {case['rows']} × {case['seq']}, {case['dtype']}",
            f"{ours['tokens_per_second']['median']:,.0f}",
            *(spread(ratios[peer]) if peer in ratios else "" for peer in PEERS),
            f"{share:.0%}",
            f"{ours['peak_gb']:.2f} and {peak:.2f} GB",
        ]


def spread(value: dict[str, float]) -> str:
    """Median and quartiles."""
    return f"{value['median']:.2f} ({value['low']:.2f}–{value['high']:.2f})"


def inference_columns(record: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Row of the table -> the best peer, and `auto`, at one level."""
    size = record["sizes"]["70m"]
    columns = {}
    for batch, rows in size["decoding"].items():
        name = f"decoding, batch {batch}, tokens/s"
        columns[name] = best_and_auto(rows)
    for prompt, rows in size["prefill"].items():
        columns[f"first token, {prompt}, ms"] = best_and_auto(rows)
    columns["scoring 2,048 tokens, ms"] = best_and_auto(size["scoring"])
    return columns


def best_and_auto(rows: dict[str, Any]) -> tuple[str, str]:
    """The peer with the smallest median, by name, and `auto`; speeds where the rows have them."""
    peers = [name for name in rows if not name.startswith("native")]
    peer = min(peers, key=lambda name: statistics.median(rows[name]["rounds"]))
    numbers = []
    for name in (peer, AUTO):
        row = rows[name]
        if "tokens_per_second" in row:
            value = row["tokens_per_second"]["median"]
        else:
            value = 1000 * statistics.median(row["rounds"])
        numbers.append(f"{value:,.0f}")
    words = " ".join(NAMES.get(word, word) for word in peer.split())
    return f"{numbers[0]} ({words})", numbers[1]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def print_tables(levels: Iterable[str]) -> None:
    """Both tables of some levels or machines."""
    training = records("training", levels)
    rows = [row for level, record in training for row in training_rows(level, record)]
    head = ["level: shape, rows × tokens, dtype", "tokens/s", *(f"/ {peer}" for peer in PEERS)]
    print(table([*head, "attention, of the matrix rate", "peak memory, ours and theirs"], rows))
    columns = {level: inference_columns(record) for level, record in records("inference", levels)}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    head = ["row", *(f"{level}: {word}" for level in columns for word in ("best peer", "auto"))]
    body = [
        [name, *(text for column in columns.values() for text in column.get(name, ("", "")))]
        for name in names
    ]
    print()
    print(table(head, body))


def main() -> None:
    """Print all tables."""
    print_tables(LEVELS)
    for machine in MACHINES:
        print()
        print_tables((machine,))


if __name__ == "__main__":
    main()
