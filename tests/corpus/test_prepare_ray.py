"""`prepare` on a local Ray cluster of two nodes, with a killed worker and a lost node."""

import json
import os
import random
import threading
import time
from pathlib import Path

import psutil
import pytest

from castalia.core.errors import DataError
from castalia.corpus import prepare
from castalia.corpus.chats import ChatOptions
from castalia.data import train_tokenizer

ray = pytest.importorskip("ray", reason="needs pip install 'castalia[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SUFFIXES = (".bin", ".idx", ".documents.parquet")
PART = 100_000


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes of a core each."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    limits = {"num_cpus": 1, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**limits, "include_dashboard": False})
    cluster.second = cluster.add_node(**limits)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def corpus(tmp_path):
    """4 MB of JSON lines, and a small tokenizer."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefg", k=draw.randrange(1, 9))) for _ in range(2000)]
    with open(tmp_path / "a.jsonl", "w") as file:
        for i in range(1500):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=500)), "id": i}) + "\n")
    train_tokenizer([" ".join(words)] * 3, 600, tmp_path / "t.json")
    return tmp_path / "a.jsonl"


def kill_one_worker(done, killed):
    """On a thread: end the first Ray worker that works on a part."""
    while not done.is_set() and not killed:
        for process in psutil.process_iter(["cmdline"]):
            if "ray::ray_part" in " ".join(process.info["cmdline"] or []):
                process.kill()
                killed.append(process.pid)
                return
        time.sleep(0.01)


def test_two_nodes_write_what_one_process_writes(cluster, corpus, tmp_path):
    options = {"append_eod": True, "part_bytes": PART, "fast": False}
    prepare([corpus], tmp_path / "alone", tmp_path / "t.json", **options)
    done, killed, lost = threading.Event(), [], []
    thread = threading.Thread(target=kill_one_worker, args=(done, killed))

    def lose_a_node(*_):
        lost.append(1)
        if len(lost) == 10:
            cluster.remove_node(cluster.second)

    thread.start()
    ray_options = {**options, "engine": "ray", "address": cluster.address, "workers": 2}
    prepare([corpus], tmp_path / "ray", tmp_path / "t.json", on_progress=lose_a_node, **ray_options)
    done.set()
    thread.join()
    assert killed and len(lost) > 10
    for suffix in SUFFIXES:
        assert (tmp_path / f"ray{suffix}").read_bytes() == (
            tmp_path / f"alone{suffix}"
        ).read_bytes()
    assert not os.path.exists(tmp_path / "ray.parts")
    with open(corpus, "a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match=r"a\.jsonl:1501: invalid JSON"):
        prepare([corpus], tmp_path / "bad", tmp_path / "t.json", **ray_options)


def test_conversations_on_the_cluster(cluster, tmp_path):
    """Each task is given a job with a chat template in it."""
    messages = [
        {"role": "user", "content": "Two and two?"},
        {"role": "assistant", "content": "Four, I think."},
    ]
    lines = [
        json.dumps({"talk": messages[: 1 + i % 2] * (1 + i % 3), "good": i % 2}) + "\n"
        for i in range(200)
    ]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    chat = ChatOptions(template=str(tmp_path / "t.jinja"), reward="good")
    options = {"keys": ("talk",), "chat": chat, "part_bytes": 4000}
    alone = prepare(tmp_path / "a.jsonl", tmp_path / "alone", "bytes", **options)
    prepare(
        tmp_path / "a.jsonl",
        tmp_path / "ray",
        "bytes",
        engine="ray",
        address=cluster.address,
        **options,
    )
    assert len(alone.prefixes) == 3
    for prefix in alone.prefixes:
        for one in (Path(prefix + ".bin"), Path(prefix + ".idx")):
            there = one.with_name(one.name.replace("alone", "ray"))
            assert there.read_bytes() == one.read_bytes()
