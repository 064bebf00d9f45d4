"""GPT-NeoX's chat script beside `castalia prepare --chat`; GPT_NEOX names its git directory."""

import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from castalia.corpus import ChatOptions, prepare

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "chats"
SCRIPT = "tools/datasets/preprocess_data_with_chat_template.py"
NEEDS = ("lm_dataformat", "jsonlines", "tqdm", "transformers", "jinja2")
LACKING = [name for name in NEEDS if importlib.util.find_spec(name) is None]
PEER = os.environ.get("GPT_NEOX", "")
pytestmark = [
    pytest.mark.skipif(
        not PEER, reason="GPT_NEOX does not name a git directory of github.com/EleutherAI/gpt-neox"
    ),
    pytest.mark.skipif(bool(LACKING), reason=f"GPT-NeoX's script needs {', '.join(LACKING)}"),
]
AS_LISTS = """
import runpy, sys, transformers
real = transformers.AutoTokenizer.from_pretrained
class Auto:
    def from_pretrained(path):
        tokenizer = real(path)
        inner = tokenizer.apply_chat_template
        tokenizer.apply_chat_template = lambda *a, **k: list(inner(*a, return_dict=False, **k))
        return tokenizer
transformers.AutoTokenizer = Auto
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""The tokenizer returns lists of ids, as in the transformers that the script was written for."""
MODES = {"plain": {}, "only_last": {"only_last": True}, "for_rm": {"for_rm": True}}


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """The script and what it reads, under a package that imports nothing else."""
    folder = tmp_path_factory.mktemp("peer")
    files = [SCRIPT, "megatron/data/indexed_dataset.py"]
    archive = subprocess.run(
        ["git", f"--git-dir={PEER}", "archive", "HEAD", *files], capture_output=True, check=True
    )
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as opened:
        opened.extractall(folder, filter="data")
    (folder / "megatron" / "__init__.py").write_text(
        "def print_rank_0(*message):\n    print(*message)\n"
    )
    (folder / "megatron" / "data" / "__init__.py").write_text("")
    (folder / "as_lists.py").write_text(AS_LISTS)

    def run(chats, prefix, *arguments):
        command = [
            sys.executable,
            str(folder / "as_lists.py"),
            str(folder / SCRIPT),
            "--input",
            str(chats),
        ]
        command += [
            "--jsonl-keys",
            "messages",
            "--output-prefix",
            str(prefix),
            "--tokenizer-path",
            str(GOLDEN),
        ]
        subprocess.run([*command, *arguments], check=True, capture_output=True)
        return {
            p.name.removeprefix(prefix.name): p.read_bytes()
            for p in prefix.parent.glob(f"{prefix.name}_*")
        }

    return run


def test_the_golden_hashes_are_its(peer, tmp_path):
    for mode, facts in json.loads((GOLDEN / "neox.json").read_text()).items():
        found = peer(GOLDEN / "chats.jsonl", tmp_path / mode, *facts["arguments"])
        assert {
            name[1:]: hashlib.sha256(data).hexdigest() for name, data in found.items()
        } == facts["sha256"]


@pytest.mark.parametrize("mode", MODES)
def test_the_same_bytes_for_other_chats(peer, tmp_path, mode):
    draw = random.Random(mode)
    words = [
        "the",
        "row",
        "of tokens",
        "数学",
        "🙂",
        "42",
        "it's",
        "<|im_end|>",
        "x = 1\n",
        "\t",
        "é",
    ]

    def said():
        return "".join(draw.choices(words, k=draw.randrange(0, 20)))

    with open(tmp_path / "c.jsonl", "w") as file:
        for _ in range(200):
            chat = [
                {"role": draw.choice(["user", "assistant", "system"]), "content": said()}
                for _ in range(4)
            ]
            file.write(json.dumps({"messages": chat}) + "\n")
    theirs = peer(
        tmp_path / "c.jsonl",
        tmp_path / "theirs",
        *[f"--{mode.replace('_', '-')}"] * (mode != "plain"),
    )
    options = ChatOptions(**MODES[mode])
    prepare(
        [tmp_path / "c.jsonl"],
        tmp_path / "ours",
        GOLDEN,
        keys=("messages",),
        chat=options,
        part_bytes=5000,
    )
    assert len(theirs) == 4
    assert {name: (tmp_path / f"ours{name}").read_bytes() for name in theirs} == theirs
