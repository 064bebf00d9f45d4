"""Program for test_no_pickle.py: reads good and hostile checkpoints under an audit hook; prints
what it saw."""

import hashlib
import json
import pickle
import sys
from pathlib import Path

import torch

from castalia.checkpoint import (
    Store,
    find_checkpoint,
    load_into,
    read,
    read_config,
    read_model,
    read_state,
    verify,
)
from castalia.core.errors import CheckpointError

MARKER = "unpickled"


class Trap:
    """Leaves a file when it is unpickled."""

    def __reduce__(self):
        return open, (MARKER, "w")


def disguise(folder, name):
    """Replace a file by a pickle and forge the hashes, so that nothing but its content is wrong."""
    torch.save({"model.a": Trap()}, folder / name)
    data = (folder / name).read_bytes()
    table = json.loads((folder / "manifest.json").read_text())
    table["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(table).encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "COMPLETE").write_text(hashlib.sha256(text).hexdigest() + "\n")


def add_traps(folder):
    """The names under which other programs look for pickles."""
    for name in (
        ".metadata",
        "data.pkl",
        "mp_rank_00_model_states.pt",
        "pytorch_model.bin",
        "metadata.pkl",
    ):
        with open(folder / name, "wb") as file:
            pickle.dump(Trap(), file)


def tensors():
    return {"model.a": torch.ones(4, 3), "optim.exp_avg.a": torch.zeros(4, 3)}


def refused(action, *arguments):
    """Whether the action ends in our error."""
    try:
        action(*arguments)
    except CheckpointError:
        return True
    return False


def main(root):
    store = Store(root / "checkpoints")
    for step in (1, 2, 3, 4):
        store.save(step, tensors(), {"step": step}, {"config.yaml": "a: 1\n"}, asynchronous=False)
    for step in (1, 2, 3, 4):
        add_traps(store.folder_of(step))
    disguise(store.folder_of(2), "model-00000.safetensors")
    disguise(store.folder_of(3), "state.json")
    (store.folder_of(4) / "manifest.json").write_bytes(pickle.dumps(Trap()))
    events = []
    sys.addaudithook(
        lambda event, _: events.append(event) if event == "pickle.find_class" else None
    )

    assert store.load(1, tensors()) == {"step": 1}
    assert store.load_latest(tensors()) == (1, {"step": 1})
    folder = find_checkpoint(root / "step1")
    assert read(folder)["a"].sum() == 12
    assert read_model(folder)[1:] == (read_config(folder), read_state(folder))
    assert len(verify(folder)) == 5
    hostile = {step: refused(load_into, store.folder_of(step), tensors()) for step in (2, 3, 4)}
    hostile |= {f"read {step}": refused(read_model, store.folder_of(step)) for step in (2, 3, 4)}
    seen = len(events)
    pickle.loads(pickle.dumps(Path("a")))  # the hook does see unpickling
    print(
        json.dumps(
            {
                "seen": seen,
                "control": len(events) - seen,
                "refused": hostile,
                "sprung": Path(MARKER).exists(),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
