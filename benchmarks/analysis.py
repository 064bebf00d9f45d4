"""The suite's tools in one run: traces, batches, counts and memorization, each against its peer.

    python benchmarks/analysis.py [--parts trace batches count memorize] [--peer CHECKOUT]
                                  [--json FILE]

trace     building the index of a token file and asking it, at 1, 10 and 100 million tokens, and the
          scan without an index.
batches   the rows of steps as arrays, numpy files and lines, against GPT-NeoX's data set in torch's
          loader, where --peer names a checkout of GPT-NeoX.
count     counts of terms, patterns and pairs against a plain loop over decoded rows.
memorize  rows a second against transformers' `generate`, on a model of Pythia's shape that is
          trained first, and on one of the miniature suite's.

Each part is a script of its own, `analysis_<part>.py`, which says what it measures; its process
ends before the next one begins. The JSON has the records of all parts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine

HERE = Path(__file__).resolve().parent
PARTS: dict[str, list[list[str]]] = {
    "trace": [[]],
    "batches": [[]],
    "count": [[]],
    "memorize": [["--shape", "pythia-14m"], ["--shape", "mini", "--steps", "200"]],
}
"""Part -> the options of each run of its script."""


def main() -> None:
    """Run the parts in turn and write their records as one file."""
    options = read_options()
    record: dict[str, Any] = {"machine": machine.describe()}
    for part in options.parts:
        for words in PARTS[part]:
            name = " ".join([part, *words[1:2]])
            print(f"\n== {name}", flush=True)
            more = ["--peer", str(options.peer)] if part == "batches" and options.peer else []
            record[name] = run(part, [*words, *more])
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{options.json}")


def run(part: str, words: list[str]) -> Any:
    """The record of one script's run; what it prints goes to the screen."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        script = HERE / f"analysis_{part}.py"
        subprocess.run([sys.executable, str(script), *words, "--json", str(path)], check=True)
        return json.loads(path.read_text())


def read_options() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--peer", type=Path, help="checkout of GPT-NeoX")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "analysis.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
