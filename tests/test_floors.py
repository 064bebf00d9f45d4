"""A room imports only from floors below its own; imports hidden in functions count."""

import ast
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "castalia"
FLOORS = {
    "core": 0,
    "config": 1,
    "machine": 1,  # measured once, and read by whatever chooses by speed
    "products": 2,  # linear layers by another library; under `models`, which recompute them
    "storage": 1,  # object stores by URL; under `data`, which reads ranges, and `checkpoint`
    "tokenizers": 1,  # read by `data` and by whatever has text
    "attention": 2,  # compiled kernels; take tensors of heads, know no model
    "data": 2,
    "mixing": 2,
    "experts": 2,  # one layer and its routing; takes sizes, knows no model
    "recurrent": 2,  # mixers with a state; take sizes, know no model
    "launch": 2,
    "monitor": 2,
    "results": 2,  # one table, written by `eval` and read by `analysis`
    "distributed": 3,  # takes the tokens of `experts` to the ranks that hold these
    "models": 3,
    "checkpoint": 4,
    "corpus": 4,
    "cost": 4,
    "losses": 4,  # sums over a batch; know the model, not the loop
    "optim": 4,  # optimizers and schedules; know parameters by name, not the loop
    "telemetry": 5,  # measures models, optimizers and passes; knows no loop
    "adapters": 4,  # modules over a model; under `formats`, which merges them into its weights
    "corpora": 5,  # built with `corpus.prepare`, and by `train` for a config that names one
    "formats": 5,  # other programs' files; `checkpoint` is our own store
    "interventions": 5,  # changes rows of `data`, by the document index of `corpus`
    "curate": 5,  # reads documents with the readers of `corpus`
    "native": 5,  # packed weights, their kernels and the compiled step; know no engine
    "inference": 6,
    "eval": 7,  # below `train`, whose hook evaluates while it trains
    "export": 7,
    "rollouts": 7,  # texts that the model in training writes, and their rewards; below `train`
    "runs": 8,  # what a run is before and after the loop: config, folder, rows
    "train": 9,
    "serve": 10,
    "recipes": 10,  # presets as data; the demo starts from one
    "stream": 11,  # the rows that steps read, by words of a user, which `recipes` resolves
    "weights": 11,
    "memorization": 12,  # completes rows of the stream
    "analysis": 13,  # pages that show what the rooms below measure
    "suites": 14,
    "tuning": 14,  # short runs of `analysis`, each in a process of its own
    "publish": 15,  # a run or a suite on the hub: exports, a card of its facts, its results
    "integrity": 15,  # asks every room whose files may be damaged
    "studies": 15,  # whole experiments, often over a suite: runs, measurements, a picture
    "demo": 15,
    "pages": 16,  # pages of the documentation, from the docstrings of every room
    "terminal": 16,  # options, hints and progress, which the verbs share
    "cli": 17,
}
DOORS = {"__init__.py", "__main__.py"}
"""Files at the top of the package: they lead into rooms and nothing imports them but the
version."""


def imported_rooms(path: Path) -> set[str]:
    """Rooms of Castalia that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            module = node.module or ""
            names |= (
                {f"{module}.{alias.name}" for alias in node.names}
                if module == "castalia"
                else {module}
            )
    return {name.split(".")[1] for name in names if name.startswith("castalia.")} - {"__version__"}


def test_every_folder_stands_on_a_floor():
    rooms = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= set(FLOORS), (
        f"no floor for {sorted(rooms - set(FLOORS))}: add it to the table with the reason"
    )
    strays = {path.name for path in SOURCE.glob("*.py")} - DOORS
    assert not strays, f"{sorted(strays)} belong in a room"


def test_rooms_import_only_from_below():
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        room = path.relative_to(SOURCE).parts[0]
        if room in DOORS:
            continue
        for other in sorted(imported_rooms(path) - {room}):
            if FLOORS[other] >= FLOORS[room]:
                where = path.relative_to(SOURCE)
                wrong.append(
                    f"{where} (floor {FLOORS[room]}) imports {other} (floor {FLOORS[other]})"
                )
    assert not wrong, "\n".join(wrong)


def test_the_rule_sees_imports_in_functions(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "def f():\n    from castalia.cli import app\n    import castalia.train.trainer\n"
    )
    assert imported_rooms(path) == {"cli", "train"}


def test_mixing_is_usable_without_torch():
    files = (SOURCE / "mixing").rglob("*.py") if (SOURCE / "mixing").exists() else []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "torch"], (
                f"{path} imports torch"
            )
