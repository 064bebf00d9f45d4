"""Time of a training step with a mirror of the run, by that of a step without one.

    python benchmarks/mirror.py [--rounds 5] [--steps 60] [--every 10] [--json FILE]
    python benchmarks/mirror.py --quick

Each round trains one run of each kind in a process of its own, in turn:

none       without a mirror, saving as often as the others
mirror     to a server of the S3 protocol on this machine (moto), as fast as it goes
throttled  to the same server, 5 MiB a second
hanging    to a server that takes connections and never answers, from the first checkpoint on

A step's time is the mean over the run without its first 5 steps, saves included. The server shares
the cores with the training, which a bucket elsewhere does not: `mirror` is the worst case.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine

SKIPPED = 5
"""First steps of a run, which allocate."""
OPTIONS = {
    "none": None,
    "mirror": "",
    "throttled": ", rate: 5",
    "hanging": ", retries: 0",
}
"""Kind of run -> further options of its mirror."""
KEYS = {
    "AWS_ACCESS_KEY_ID": "account",
    "AWS_SECRET_ACCESS_KEY": "word",
    "AWS_DEFAULT_REGION": "us-east-1",
}
BUCKET = "copies"
HANG = """
import os, sys
import castalia.checkpoint.mirroring as mirroring
silent = sys.argv.pop() if sys.argv[-1].startswith("http:") else None
def start(self, begin=mirroring.Mirroring.start):
    if silent:
        os.environ["AWS_ENDPOINT_URL"] = silent
        self.mirror.store.opened = None
    begin(self)
mirroring.Mirroring.start = start
from castalia.cli import main
main()
"""
"""The command, whose thread of the mirror may talk to another server than the start did."""


def main() -> None:
    """Train every kind in turn, print a table, write JSON."""
    options = read_options()
    rounds = 2 if options.quick else options.rounds
    steps = 20 if options.quick else options.steps
    described = machine.describe()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port := free_port())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.environ.update(KEYS, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    silent = hanging_server()
    try:
        wait_for(port)
        make_bucket()
        with tempfile.TemporaryDirectory(prefix="mirror-benchmark-") as folder:
            prepare(folder)
            one_run = partial(step_seconds, Path(folder), steps, options.every, silent)
            times = machine.in_turn({kind: partial(one_run, kind) for kind in OPTIONS}, rounds)
    finally:
        server.kill()
    record = {
        "machine": described,
        "steps": steps,
        "every": options.every,
        "step_seconds": {kind: machine.summary(each) for kind, each in times.items()},
        "ratio": {kind: machine.ratio(times[kind], times["none"]) for kind in OPTIONS},
    }
    for kind in OPTIONS:
        step = record["step_seconds"][kind]
        by = record["ratio"][kind]
        spread = f"{by['median']:.3f} ({by['low']:.3f} to {by['high']:.3f})"
        print(f"{kind:10} {1000 * step['median']:8.1f} ms a step   by none {spread}")
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")


def step_seconds(folder: Path, steps: int, every: int, silent: str, kind: str) -> float:
    """Mean seconds of a step of one run."""
    output = folder / f"{kind}-{time.monotonic_ns():x}"
    words = [
        *("train", "debug", f"data.train={folder}/text", f"output={output}"),
        *("checkpoint.steps=[]", f"checkpoint.every={every}", f"train.steps={steps}"),
    ]
    further = OPTIONS[kind]
    if further is not None:
        place = f"s3://{BUCKET}/{output.name}"
        words.append(f"checkpoint.mirror={{url: {place}, wait: 0.1{further}}}")
    if kind == "hanging":
        words.append(silent)
    command = [sys.executable, "-c", HANG, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind}: {done.stdout}{done.stderr}")
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return statistics.fmean(json.loads(line)["step_seconds"] for line in lines[SKIPPED:])


def prepare(folder: str) -> None:
    """A token file of random bytes."""
    import numpy as np

    from castalia.data import IndexedDatasetWriter

    random = np.random.default_rng(0)
    with IndexedDatasetWriter(f"{folder}/text", "uint16") as writer:
        for size in random.integers(100, 2000, 2000):
            writer.add(random.integers(97, 123, size))


def make_bucket() -> None:
    """The bucket that every run has a prefix in."""
    from castalia.storage.urls import file_system

    file_system("s3").mkdir(BUCKET)


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


def wait_for(port: int) -> None:
    """Return when somebody listens at a port."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.1)
    raise SystemExit("the server of S3 did not start; pip install 'moto[s3]' flask flask-cors")


def hanging_server() -> str:
    """The URL of a server that reads and never answers."""
    listener = socket.create_server(("127.0.0.1", 0))

    def swallow(client: socket.socket) -> None:
        with suppress(OSError):
            while client.recv(1 << 16):
                pass

    def accept() -> None:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=swallow, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--quick", action="store_true", help="two short rounds, to try it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
