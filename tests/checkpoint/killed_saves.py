"""Program for test_kill.py: saves step 2 in child processes, the n-th of them killed at its n-th
file operation.

After each death the parent finds step 1 or step 2 whole, and can save. Prints JSON: deaths and
what was found.
"""

import json
import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import torch

from castalia.checkpoint import Store, verify
from castalia.core.hashed_file import HashedFile

WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fcntl.flock"}
armed_at: int | None = None
count = 0


def operation(*_):
    """Count one operation of the armed process; die at the chosen one."""
    global count
    if armed_at is not None:
        count += 1
        if count > armed_at:
            os.kill(os.getpid(), signal.SIGKILL)


def watch():
    """See every file operation: what Python audits, and each write and sync, torn in the middle."""
    write, fsync = HashedFile.write, os.fsync

    def torn_write(self, data):
        half = len(data) // 2
        write(self, data[:half])
        self.flush()
        operation()
        write(self, data[half:])

    def watched_sync(descriptor):
        operation()
        fsync(descriptor)

    HashedFile.write, os.fsync = torn_write, watched_sync
    sys.addaudithook(lambda event, args: operation() if event in WATCHED else None)


def values(step):
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(5, 3, generator=generator) for name in ("model.a", "optim.exp_avg.a")}


def prepare(folder, damaged):
    """Step 1, what killed saves leave, and perhaps a damaged step 2 that is to be replaced."""
    store = Store(folder)
    store.save(1, values(1), {"step": 1}, asynchronous=False)
    if damaged:
        store.save(2, values(5), {"step": 2}, asynchronous=False)
        (store.folder_of(2) / "model-00000.safetensors").write_bytes(b"damaged")
    for name in (".step-00000002.tmp", ".step-00000007.tmp", ".trash-step-00000000-1"):
        (folder / name).mkdir()
        (folder / name / "model-00000.safetensors").write_bytes(b"left")
        (folder / name / "model-00005.safetensors").write_bytes(b"left")


def save_and_die(folder, nth):
    """In a child: save step 2 and delete step 1, killed at operation nth; returns whether it was
    killed."""
    global armed_at
    child = os.fork()
    if child == 0:
        armed_at = nth
        store = Store(folder, expired=lambda steps: steps[:-1])
        store.save(2, values(2), {"step": 2}, {"config.yaml": "a: 1\n"})
        store.wait()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return True
    assert os.WEXITSTATUS(status) == 0, status
    return False


def found_after(folder):
    """The step that is found: everything in it must be right, and so must a new save."""
    store = Store(folder)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in values(1).items()}
    step, state = store.load_latest(tensors)
    assert state == {"step": step}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in values(step).items())
    assert verify(store.folder_of(step)) == []
    store.save(3, values(3), {"step": 3}, asynchronous=False)
    left = {item.name for item in folder.iterdir() if item.name.startswith(".")}
    assert left == {".lock"}, left
    return step


def main(root, damaged):
    """One save a number, until a save has fewer operations than that."""
    watch()
    found = Counter()
    killed, nth = True, 0
    while killed:
        folder = root / str(nth)
        prepare(folder, damaged)
        killed = save_and_die(folder, nth)
        found[found_after(folder)] += 1
        shutil.rmtree(folder)
        nth += 1
    print(json.dumps({"deaths": nth - 1, "found": found}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2] == "damaged")
