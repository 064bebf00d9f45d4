"""Conversations to tokens, labels and rewards, against GPT-NeoX's script and transformers."""

import contextlib
import hashlib
import json
import os
import random
import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from castalia.core.errors import ConfigError, DataError
from castalia.corpus import ChatOptions, preflight, prepare
from castalia.corpus import chats as chats_module
from castalia.corpus.chat_template import ChatTemplate, read_chat_template
from castalia.corpus.provenance import read_provenance
from castalia.curate.verify import verify
from castalia.data import (
    DataConfig,
    IndexedDataset,
    build_rows,
    load_tokenizer,
    read_rewards,
    train_tokenizer,
)

pytest.importorskip("jinja2", reason="jinja2 is not installed: pip install 'castalia[chat]'")
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "chats"
PEER = json.loads((GOLDEN / "neox.json").read_text())
"""SHA-256 of the files that tools/datasets/preprocess_data_with_chat_template.py of GPT-NeoX
(ea7aefd8) wrote with transformers 5.23; tests/parity/test_chats_neox.py runs it again where it is
installed."""
OPTIONS = {"plain": {}, "only_last": {"only_last": True}, "for_rm": {"for_rm": True}}
OPTIONS["reward"] = {"reward": "reward", "binary": True}


def golden_lines():
    return [json.loads(line) for line in (GOLDEN / "chats.jsonl").read_text().splitlines()]


def run(inputs, output, tokenizer=GOLDEN, keys=("messages",), options=None, **more):
    more = {"keys": keys, "chat": options or ChatOptions(), "overwrite": True} | more
    return prepare(inputs, output, tokenizer, **more)


def lines(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def content(prefix):
    """Every file of a job by its name's end, but for the records."""
    paths = Path(prefix).parent.glob(Path(prefix).name + "_*")
    return {
        p.name.removeprefix(Path(prefix).name): p.read_bytes() for p in paths if p.suffix != ".json"
    }


def pairs(prefix, key="messages"):
    """Tokens and labels of each conversation."""
    tokens, labels = (
        IndexedDataset(f"{prefix}_{key}_{end}") for end in ("document", "label_document")
    )
    return [(one.tolist(), its.tolist()) for one, its in zip(tokens[:], labels[:], strict=True)]


@pytest.mark.parametrize(
    ("mode", "workers", "part_bytes"),
    [*((mode, 1, 1 << 20) for mode in OPTIONS), ("plain", 1, 700), ("reward", 2, 700)],
)
def test_the_bytes_are_neox(tmp_path, mode, workers, part_bytes):
    options = ChatOptions(**OPTIONS[mode])
    done = run(
        [GOLDEN / "chats.jsonl"],
        tmp_path / "o",
        options=options,
        workers=workers,
        part_bytes=part_bytes,
    )
    assert done.documents == 16
    for name, digest in PEER[mode]["sha256"].items():
        if "reward" not in name:
            assert hashlib.sha256((tmp_path / f"o_{name}").read_bytes()).hexdigest() == digest, name
    if mode == "reward":
        rewards = IndexedDataset(tmp_path / "o_messages_reward_document")
        wanted = [1 if line["reward"] else -1 for line in golden_lines()]
        assert rewards.dtype == np.float32
        assert read_rewards(rewards.prefix, IndexedDataset(done.prefixes[0])).tolist() == wanted
    assert all(check.ok for check in verify(done.prefixes))
    origin = read_provenance(done.prefixes[0], 11)
    assert (origin["line"], origin["id"]) == (12, "11")


def test_stopped_and_taken_up(tmp_path):
    chats = golden_lines()
    path = lines(tmp_path / "c.jsonl", *chats * 4)
    options = ChatOptions(reward="reward", binary=True)
    run([path], tmp_path / "whole", options=options, part_bytes=900)
    for stop in (1, 12):
        renames = []

        def count(*_, renames=renames, stop=stop):
            renames.append(0)
            if len(renames) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run([path], tmp_path / "o", options=options, part_bytes=900, on_progress=count)
        run([path], tmp_path / "o", options=options, part_bytes=900, workers=1 + (stop == 12))
        assert content(tmp_path / "o") == content(tmp_path / "whole")
    run([path], tmp_path / "o", options=ChatOptions(reward="reward", binary=True, only_last=True))
    assert content(tmp_path / "o") != content(tmp_path / "whole")


def test_killed_between_any_two_files(tmp_path, monkeypatch):
    """Stopped at every rename in turn, of which each part and the end have several."""
    options, real, count = ChatOptions(reward="reward", binary=True), os.replace, 0
    run([GOLDEN / "chats.jsonl"], tmp_path / "whole", options=options, part_bytes=3000)

    def replace(*names, **more):
        nonlocal count
        count -= 1
        if count == 0:
            raise KeyboardInterrupt
        real(*names, **more)

    monkeypatch.setattr(os, "replace", replace)
    step, finished = 0, False
    while not finished:
        step += 3
        count = step
        with contextlib.suppress(KeyboardInterrupt):
            again = {"options": options, "part_bytes": 3000, "overwrite": False}
            run([GOLDEN / "chats.jsonl"], tmp_path / "o", **again)
            finished = True
    assert step > 9
    assert content(tmp_path / "o") == content(tmp_path / "whole")


def test_a_number_of_conversations(tmp_path):
    run([GOLDEN / "chats.jsonl"], tmp_path / "all")
    done = run([GOLDEN / "chats.jsonl"], tmp_path / "o", max_documents=5, part_bytes=1000)
    assert done.documents == 5 and pairs(tmp_path / "o") == pairs(tmp_path / "all")[:5]


def test_other_forms_of_the_same_chats(tmp_path):
    pyarrow = pytest.importorskip(
        "pyarrow", reason="pyarrow is not installed: pip install 'castalia[parquet]'"
    )
    chats = [line["messages"] for line in golden_lines()]
    other = {"user": "human", "assistant": "gpt"}
    shared = [
        [{"from": other.get(m["role"], m["role"]), "value": m["content"]} for m in chat]
        for chat in chats
    ]
    run(
        [lines(tmp_path / "a.jsonl", *({"messages": c} for c in chats))],
        tmp_path / "a",
        documents=False,
    )
    run(
        [lines(tmp_path / "b.jsonl", *({"messages": c} for c in shared))],
        tmp_path / "b",
        documents=False,
    )
    table = pyarrow.table({"messages": chats})
    pytest.importorskip("pyarrow.parquet").write_table(
        table, tmp_path / "c.parquet", row_group_size=5
    )
    run([tmp_path / "c.parquet"], tmp_path / "c", documents=False, part_bytes=1)
    assert content(tmp_path / "a") == content(tmp_path / "b") == content(tmp_path / "c")


CONTENTS = st.text(st.sampled_from("ab \n{}%<|>_é🙂"), max_size=12) | st.sampled_from(
    ["<|im_end|>", "<|endoftext|>", "\n\n"]
)
ROLES = st.sampled_from(["user", "assistant", "assistant", "system", "tool"])
CHATS = st.lists(
    st.builds(lambda r, c: {"role": r, "content": c}, ROLES, CONTENTS), min_size=1, max_size=6
)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(chats=st.lists(CHATS, min_size=1, max_size=4), only_last=st.booleans())
def test_targets_are_the_words_of_the_assistant(tmp_path, chats, only_last):
    path = lines(tmp_path / "c.jsonl", *({"messages": chat} for chat in chats))
    run([path], tmp_path / "o", options=ChatOptions(only_last=only_last), documents=False)
    tokenizer, template = load_tokenizer(GOLDEN), read_chat_template(GOLDEN)
    for (tokens, labels), chat in zip(pairs(tmp_path / "o"), chats, strict=True):
        assert tokenizer.decode(tokens) == template.render(chat) + "<|endoftext|>"
        assert all(label in (token, -100) for token, label in zip(tokens, labels, strict=True))
        said = []
        for i, message in enumerate(chat):
            if message["role"] == "assistant" and (i == len(chat) - 1 or not only_last):
                said.append(
                    ("" if i else "<|im_start|>assistant\n") + message["content"] + "<|im_end|>\n"
                )
                after = chat[i + 1]["role"] if i + 1 < len(chat) else None
                said[-1] += "<|im_start|>assistant\n" if after == "assistant" else ""
        said += ["<|endoftext|>"] * (chat[-1]["role"] == "assistant")
        assert tokenizer.decode([label for label in labels if label >= 0]) == "".join(said)


EACH = "{% for m in messages %}"
TEMPLATES = {
    "loops": EACH + "{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content | trim }}\n"
    "{% endfor %}",
    "tags": "{{ bos_token }}" + EACH + "{% generation %}{{ m['content'] }}{{ eos_token }}"
    "{% set word = 'lost' %}{% endgeneration %}{{ word }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ missing }}"
    "{{ pad_token }}{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}",
    "spaces": "{%- for m in messages %}\n    {%- if true %}\n  {{- '[' + m.role + ']' }} "
    "{{ m.content }}\n{%- endif %}\n{%- endfor %}\n",
    "namespace": "{% set n = namespace(i=0, self=dict(a=1)) %}" + EACH + "{% set n.i = n.i + 1 %}"
    "{{ n.i }}{{ n.self }}{{ dict.fromkeys('ab') }}{{ m.content }}{% endfor %}",
    "tools": "{% if tools is not none %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{% endif %}{{ tools is defined }}" + EACH + "{{ m.content }}{% for c in m.tool_calls %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{{ m.name }}"
    "{{ m.tool_call_id }}{% endfor %}",
    "documents": "{% if documents is not none %}{% for d in documents %}{{ d['title'] }}: "
    "{{ d['text'] }}{% endfor %}{% endif %}{{ documents is defined }}",
    "date": "{{ strftime_now is defined }}{{ strftime_now('%Y') }}",
    "thoughts": EACH + "{{ m.reasoning_content }}/{{ m.thinking }}/{{ m.content }}{% endfor %}",
    "nulls": EACH + "{{ 'content' in m }}{{ m.content is defined }}{{ m }}{% endfor %}",
    "own": "{{ enable_thinking }}{{ eos_token }}{{ messages | length }}",
    "parts": EACH + "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text | trim }}{% endfor %}{% endif %}{% endfor %}",
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells <b>the</b> weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALLS = [
    {"role": "user", "content": "Weather in Málaga?", "name": "anna"},
    {
        "role": "assistant",
        "content": None,
        "reasoning": "look it up",
        "tool_calls": [
            {
                "id": "call1",
                "type": "function",
                "function": {"name": "weather", "arguments": {"city": "Málaga"}},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call1", "content": "sunny"},
    {"role": "assistant", "content": " Sunny. "},
]
GIVEN = [
    {},
    {"tools": TOOLS},
    {"documents": [{"title": "Málaga", "text": "a city"}]},
    {"tools": [], "documents": [], "reply": True},
    {"variables": {"enable_thinking": False, "eos_token": "<own>"}},
    {"continue_last": True},
]


def test_templates_are_rendered_as_transformers_does(tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: castalia[hf]"
    )
    theirs = transformers.AutoTokenizer.from_pretrained(GOLDEN)
    folder = tmp_path / "t"
    shutil.copytree(GOLDEN, folder)
    chats = [*(line["messages"] for line in golden_lines()[:4]), CALLS]
    parted = [{"role": "user", "content": [{"type": "text", "text": t} for t in (" a", "b ")]}]
    for name, template in TEMPLATES.items():
        (folder / "chat_template.jinja").write_text(template)
        theirs.chat_template = template
        ours = read_chat_template(folder)
        for chat in [*chats, *[parted] * (name == "parts")]:
            for more in GIVEN:
                # The last message is continued where the template writes it.
                if more.get("continue_last") and name not in ("tags", "tools", "parts"):
                    continue
                wanted = theirs.apply_chat_template(
                    chat,
                    tokenize=False,
                    tools=more.get("tools"),
                    documents=more.get("documents"),
                    add_generation_prompt=more.get("reply", False),
                    continue_final_message=more.get("continue_last", False),
                    **more.get("variables", {}),
                )
                assert ours.render(chat, **more) == wanted, (name, more)


CHATML = json.loads((GOLDEN / "tokenizer_config.json").read_text())["chat_template"]


def test_contents_in_the_form_that_the_template_expects():
    """A template of strings gets parts joined; one of parts gets a string as a part."""
    parts = [{"type": "text", "text": "one"}, {"type": "output_text", "text": "two"}, "three"]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    strings = ChatTemplate(CHATML, "strings")
    assert strings.render(chat[:1]) == "<|im_start|>user\none\ntwo\nthree<|im_end|>\n"
    assert strings.render(chat).endswith("<|im_start|>assistant\n<|im_end|>\n")
    lists = EACH + "{% for p in m.content %}{% if p.type == 'text' %}[{{ p.text }}]{% endif %}"
    lists = ChatTemplate(lists + "{% endfor %}{% endfor %}", "lists")
    assert lists.render(chat[:1]) == "[one][two][three]"
    assert lists.render([{"role": "user", "content": "word"}]) == "[word]"
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(ConfigError, match="part 1 of the content has the type 'image_url'"):
        strings.render(image)
    with pytest.raises(ConfigError, match="part 1 of the content has no text"):
        strings.render([{"role": "user", "content": [{"type": "text"}]}])


def test_tools_may_have_a_template_of_their_own(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("plain")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | length }}")
    template = read_chat_template(tmp_path)
    assert (template.render([]), template.render([], tools=TOOLS)) == ("plain", "1")
    assert template.reads("tools") and not template.reads("documents")
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "used"}]
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = read_chat_template(tmp_path)
    assert (template.render([]), template.render([], tools=[])) == ("plain", "used")


def test_a_broken_template_is_found_when_it_is_loaded(tmp_path):
    broken = {
        "ok\n{% if %}": r"t\.jinja: line 2: invalid Jinja template",
        "{{ messages | nothing }}": r"t\.jinja: line 1: invalid Jinja template: No filter named",
        "{% break %}": r"t\.jinja: invalid Jinja template: 'break' outside loop",
        "{% generation %}": r"t\.jinja: line 1: invalid Jinja template: Unexpected end",
    }
    for text, message in broken.items():
        (tmp_path / "t.jinja").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_chat_template(None, tmp_path / "t.jinja")


def test_what_cannot_be_continued():
    template = ChatTemplate(CHATML, "t")
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}]
    assert template.render(said, continue_last=True).endswith("assistant\nWell,")
    with pytest.raises(ConfigError, match="give one of add_generation_prompt and continue_final"):
        template.render(said, reply=True, continue_last=True)
    with pytest.raises(ConfigError, match="there is no message with text to continue"):
        template.render([{"role": "assistant", "content": None}], continue_last=True)
    with pytest.raises(ConfigError, match="the chat template leaves a part of it out"):
        ChatTemplate("{{ messages[0].content }}", "t").render(said, continue_last=True)


def said(output, key="messages"):
    """The text of the targets of each conversation."""
    tokenizer = load_tokenizer(GOLDEN)
    return [
        tokenizer.decode([label for label in labels if label >= 0])
        for _, labels in pairs(output, key)
    ]


def test_messages_that_say_they_are_no_targets(tmp_path):
    """OpenAI's weight, and the flags of other trainers; null and 1 mean nothing."""
    marks = [
        {"weight": 0},
        {"weight": 0.0},
        {"weight": False},
        {"train": False},
        {"training": False},
        {"loss": False},
        {"weight": 1, "train": False},
        {"weight": 1},
        {"weight": None, "train": True},
        {},
    ]
    chats = []
    for mark in marks:
        words = [("user", "q", {}), ("assistant", "first", mark), ("user", "q", {})]
        chat = [{"role": r, "content": c, **more} for r, c, more in words]
        chats.append({"messages": [*chat, {"role": "assistant", "content": "second"}]})
    path = lines(tmp_path / "c.jsonl", *chats)
    run([path], tmp_path / "o")
    second = "second<|im_end|>\n<|endoftext|>"
    assert said(tmp_path / "o") == [second] * 7 + ["first<|im_end|>\n" + second] * 3
    # The end of text is a target only if the last message is one.
    unwanted = [{"role": "assistant", "content": "no", "weight": 0}]
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "no", "train": False}]
    path = lines(tmp_path / "d.jsonl", {"messages": unwanted}, {"messages": sharegpt})
    run([path], tmp_path / "p")
    assert said(tmp_path / "p") == ["", ""]
    # In a prompt, and under --only-last, a mark changes nothing.
    line = {"prompt": [{"role": "assistant", "content": "a", "weight": 7}], "messages": "second"}
    run([lines(tmp_path / "e.jsonl", line)], tmp_path / "q", options=ChatOptions(prompt="prompt"))
    assert said(tmp_path / "q") == [second]


def test_contents_that_are_parts_or_null(tmp_path):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    parts = [{"type": "text", "text": "schÃ¶n"}, {"type": "text", "text": "two"}]
    chats = [
        [{"role": "user", "content": parts}, {"role": "assistant", "content": "ok"}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}],
    ]
    path = lines(tmp_path / "c.jsonl", *({"messages": chat} for chat in chats))
    run([path], tmp_path / "o", ftfy=True)
    tokenizer = load_tokenizer(GOLDEN)
    texts = [tokenizer.decode(tokens) for tokens, _ in pairs(tmp_path / "o")]
    assert texts[0].startswith("<|im_start|>user\nschön\ntwo<|im_end|>")
    assert said(tmp_path / "o")[1:] == ["<|im_end|>\n<|endoftext|>"] * 2


def test_tools_and_documents_of_a_line_reach_the_template(tmp_path):
    """From JSON lines, as lists or as JSON in a string, and from columns; others are ignored."""
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% if tools is not none %}<{{ tools[0].function.name }}>{% endif %}"
        "{% if documents is not none %}<{{ documents[0].title }}>{% endif %}"
        "{{ unread is defined }}" + CHATML
    )
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [
        {"messages": chat, "tools": TOOLS, "documents": None},
        {"messages": chat, "tools": json.dumps(TOOLS), "documents": [{"title": "T"}]},
        {"messages": chat, "tools": None, "unread": 5},
    ]
    options = ChatOptions(template=str(template))
    run([lines(tmp_path / "c.jsonl", *rows)], tmp_path / "o", options=options)
    texts = [load_tokenizer(GOLDEN).decode(tokens) for tokens, _ in pairs(tmp_path / "o")]
    assert [text.split("<|im_start|>")[0] for text in texts] == [
        "<weather>False",
        "<weather><T>False",
        "False",
    ]
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    table = pyarrow.Table.from_pylist([row | {"tools": json.dumps(TOOLS)} for row in rows[:2]])
    parquet.write_table(table, tmp_path / "c.parquet")
    run([tmp_path / "c.parquet"], tmp_path / "p", options=options)
    assert pairs(tmp_path / "p") == pairs(tmp_path / "o")[:2]
    for name, wrong in (("tools", {"a": 1}), ("documents", ["a"]), ("tools", "none")):
        with pytest.raises(DataError, match=f"c.jsonl:1: '{name}' must be a list of objects, got"):
            path = lines(tmp_path / "c.jsonl", {"messages": chat, name: wrong})
            run([path], tmp_path / "o", options=options)


def test_the_day_of_a_job(tmp_path, monkeypatch):
    """A template is told one day, however long the job takes; the record tells which."""
    template = tmp_path / "t.jinja"
    template.write_text("{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    chat = {"messages": [{"role": "user", "content": "x" * 200}]}
    path = lines(tmp_path / "c.jsonl", *[chat] * 20)
    options = ChatOptions(template=str(template))
    more = {"options": options, "overwrite": False, "part_bytes": 600}

    class Clock(datetime):
        day = 1

        @classmethod
        def now(cls, zone=None):
            return datetime(2026, 2, cls.day)

    monkeypatch.setattr(preflight, "datetime", Clock)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([path], tmp_path / "o", on_progress=stop, **more)
    Clock.day = 2
    run([path], tmp_path / "o", **more)
    tokenizer = load_tokenizer(GOLDEN)
    texts = {tokenizer.decode(tokens)[:10] for tokens, _ in pairs(tmp_path / "o")}
    assert texts == {"2026-02-01"}
    record = json.loads((tmp_path / "o_messages_document.json").read_text())
    assert record["chat"]["moment"] == "2026-02-01T00:00:00"
    Clock.day = 3
    assert run([path], tmp_path / "o", **more).done_before
    given = ChatOptions(template=str(template), date="2020-05-06")
    run([path], tmp_path / "p", options=given)
    assert tokenizer.decode(pairs(tmp_path / "p")[0][0]).startswith("2020-05-06")
    with pytest.raises(ConfigError, match="--chat-date tomorrow: expected a day such as 2026-01"):
        run([path], tmp_path / "p", options=ChatOptions(date="tomorrow"))


def test_prompts_and_pairs(tmp_path):
    """Texts and messages alike: the prompt is no target, and both sides have the same lines."""
    path = lines(
        tmp_path / "p.jsonl",
        {"prompt": "2+2?", "chosen": "4", "rejected": "five"},
        {
            "prompt": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
            ],
            "chosen": [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "I go"}],
            "rejected": [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "No"}],
        },
    )
    done = run(
        [path], tmp_path / "o", keys=("chosen", "rejected"), options=ChatOptions(prompt="prompt")
    )
    assert [Path(p).name for p in done.prefixes] == [
        "o_chosen_document",
        "o_chosen_label_document",
        "o_rejected_document",
        "o_rejected_label_document",
    ]
    tokenizer = load_tokenizer(GOLDEN)
    for key, said in (("chosen", ["4", "I go"]), ("rejected", ["five", "No"])):
        rendered = [
            tokenizer.decode([label for label in labels if label >= 0])
            for _, labels in pairs(tmp_path / "o", key)
        ]
        assert rendered == [f"{text}<|im_end|>\n<|endoftext|>" for text in said]


def test_no_mask_writes_no_labels_and_training_reads_the_others(tmp_path):
    done = run([GOLDEN / "chats.jsonl"], tmp_path / "n", options=ChatOptions(mask=False))
    assert [Path(p).name for p in done.prefixes] == ["n_messages_document"]
    tokenizer, template = load_tokenizer(GOLDEN), read_chat_template(GOLDEN)
    chats = [line["messages"] for line in golden_lines()]
    assert [t.tolist() for t in IndexedDataset(done.prefixes[0])[:]] == [
        tokenizer.encode(template.render(chat)) for chat in chats
    ]
    tokens, labels = run([GOLDEN / "chats.jsonl"], tmp_path / "o").prefixes
    config = DataConfig(seq_length=32, train=[tokens], labels=[labels], packing="best_fit")
    sizes = {"seed": 1, "batch_size": 4, "steps": 2, "eval_every": None, "eval_batches": 1}
    assert build_rows(config, **sizes).train.labels is not None


MESSAGES = [
    (5, "'messages' must be a list of messages, got int"),
    (None, "'messages' must be a list of messages, got null"),
    ("text", "'messages' must be a list of messages, got str"),
    ([], "'messages' is an empty list of messages"),
    (["hi"], "message 1 of 'messages' must be an object with role and content, got str"),
    ([{"content": "a"}], "message 1 of 'messages' lacks the key 'role'; keys: content"),
    ([{"role": "user"}], "message 1 of 'messages' lacks the key 'content'; keys: role"),
    ([{"from": "human"}], "message 1 of 'messages' lacks the key 'value'; keys: from"),
    ([{"role": 5, "content": "a"}], "message 1 of 'messages': 'role' must be a string, got int"),
    (
        [{"role": "asistant", "content": "a"}],
        "message 1 of 'messages': unknown role 'asistant'; choose one of system, developer, user",
    ),
    (
        [{"role": "user", "content": 5}],
        "message 1 of 'messages': 'content' must be a string, null or a list of parts, got int",
    ),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        "message 1 of 'messages': 'content': part 1 of the content has the type 'image_url'",
    ),
    (
        [{"role": "assistant", "content": "a", "weight": 0.5}],
        "message 1: 'weight' must be 0 or 1, got 0.5; no message is a target in part",
    ),
    (
        [{"role": "assistant", "content": "a", "train": "no"}],
        "message 1: 'train' must be true or false, got 'no'",
    ),
    (
        [{"role": "assistant", "content": "a", "train_detail": [{"train": False}]}],
        "message 1: 'train_detail' is not supported; a message is a target as a whole or not",
    ),
    ([{"role": "user", "content": "\ud800"}], "the conversation contains a lone surrogate"),
]


@pytest.mark.parametrize(("value", "message"), MESSAGES)
def test_wrong_messages_name_file_and_line(tmp_path, value, message):
    good = {"messages": [{"role": "user", "content": "a"}]}
    path = lines(tmp_path / "c.jsonl", good, {"messages": value}, good)
    with pytest.raises(DataError) as caught:
        run([path], tmp_path / "o")
    assert str(caught.value).startswith(f"{path}:2: {message}")
    done = run([path], tmp_path / "r", reject=True)
    assert (done.documents, done.rejected) == (2, 1)
    reject = json.loads((tmp_path / "r.rejects.jsonl").read_text())
    assert reject["line"] == 2 and reject["reason"].startswith(message)


REWARDS = [
    ({}, "the document lacks the key 'r'; keys: messages; choose one with --reward-key"),
    ({"r": None}, "'r' must be a number, got null"),
    ({"r": "good"}, "'r' must be a number, got str"),
    ({"r": float("nan")}, "'r' must be a finite 32-bit number, got nan"),
    ({"r": 1e39}, "'r' must be a finite 32-bit number, got 1e+39"),
    ({"r": True}, "'r' must be a number, got true; --binary-reward turns it into 1 or -1"),
]


@pytest.mark.parametrize(("more", "message"), REWARDS)
def test_wrong_rewards_name_file_and_line(tmp_path, more, message):
    good = {"messages": [{"role": "user", "content": "a"}], "r": 0.5}
    bad = {"messages": good["messages"]} | more
    with pytest.raises(DataError) as caught:
        run(
            [lines(tmp_path / "c.jsonl", good, bad)],
            tmp_path / "o",
            options=ChatOptions(reward="r"),
        )
    assert str(caught.value) == f"{tmp_path}/c.jsonl:2: {message}"
    done = run(
        [lines(tmp_path / "d.jsonl", good, good | {"r": 3})],
        tmp_path / "d",
        options=ChatOptions(reward="r"),
    )
    rewards = read_rewards(done.prefixes[2], IndexedDataset(done.prefixes[0]))
    assert rewards.tolist() == [0.5, 3.0]


def test_templates_that_refuse_or_rewrite(tmp_path):
    chat = {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant", "user")]}
    path = lines(tmp_path / "c.jsonl", chat)
    rejects = "the chat template rejects this conversation"
    rewrites = "the chat template rewrites earlier messages when message 2 follows"
    refusals = {
        "{{ raise_exception('no chats today') }}": f"{rejects}: no chats today",
        "{{ messages[7].content }}": f"{rejects}: list object has no element 7",
        "{{ 1 / 0 }}": f"{rejects}: division by zero",
        "{{ ''.__class__.__mro__ }}": f"{rejects}: access to attribute '__class__'",
        "{% set n = namespace() %}{% set n.__class__ = dict %}": f"{rejects}: a namespace cannot",
        # Through a type of Python's, the messages could be changed.
        "{{ dict.update(messages[0], {'content': 'y'}) }}{{ messages }}": f"{rejects}: 'castalia.",
        " ": "the chat template renders these messages as an empty text",
        "{{ messages | length }}": rewrites,
    }
    for text, message in refusals.items():
        (tmp_path / "t.jinja").write_text(text)
        with pytest.raises(DataError) as caught:
            run([path], tmp_path / "o", options=ChatOptions(template=str(tmp_path / "t.jinja")))
        assert str(caught.value).startswith(f"{path}:1: {message}"), text
    with pytest.raises(DataError, match=r"none\.jinja: cannot read the chat template"):
        run([path], tmp_path / "o", options=ChatOptions(template=str(tmp_path / "none.jinja")))


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        (
            {"only_last": True, "for_rm": True},
            {},
            "--only-last and --for-rm each choose the targets",
        ),
        (
            {"binary": True},
            {},
            "--binary-reward needs --reward-key, the key of the reward",
        ),
        ({"roles": ()}, {}, "--generation-role: name the role whose messages are targets"),
        (
            {},
            {"append_eod": True},
            "--append-eod and --chat exclude each other: the tokenizer's eos_token ends each",
        ),
        ({}, {"tokenizer": "bytes"}, "bytes has no chat template beside it"),
        (
            {},
            {"train_vocab": 300, "tokenizer": "new.json"},
            "--train-tokenizer learns from texts and cannot read --chat",
        ),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, more, message):
    with pytest.raises(ConfigError, match=message):
        run([GOLDEN / "chats.jsonl"], tmp_path / "o", options=ChatOptions(**options), **more)
    assert not os.listdir(tmp_path)


def test_the_end_of_a_conversation(tmp_path):
    """eos_token of the settings, else the end of document; a name without an id is an error."""
    folder = tmp_path / "t"
    shutil.copytree(GOLDEN, folder)
    settings_ = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").write_text(settings_.pop("chat_template"))
    path = lines(tmp_path / "c.jsonl", {"messages": [{"role": "user", "content": "a"}]})
    ends = {}
    for name, eos in (("named", "<|im_end|>"), ("none", None)):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings_ | {"eos_token": eos}))
        run([path], tmp_path / name, folder)
        ends[name] = pairs(tmp_path / name)[0][0]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_ | {"eos_token": "<end>"}))
    with pytest.raises(
        ConfigError, match=r"lacks the token '<end>', which tokenizer_config\.json beside it names"
    ):
        run([path], tmp_path / "wrong", folder)
    (folder / "tokenizer_config.json").unlink()
    run([path], tmp_path / "bare", folder)
    ids = load_tokenizer(GOLDEN).ids
    assert ends["named"] == [*ends["none"], ids["<|im_end|>"]]
    assert pairs(tmp_path / "bare")[0][0] == [*ends["none"], ids["<|endoftext|>"]]


def test_a_plain_text_is_no_conversation(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match=r"a\.txt: a plain text has no keys; give JSON lines"):
        run([tmp_path / "a.txt"], tmp_path / "o")


def test_special_tokens_may_stand_with_their_flags(tmp_path):
    flags = {
        "eos_token": {"content": "<e>", "lstrip": False},
        "bos_token": None,
        "add_bos_token": True,
    }
    named = {
        "chat_template": [
            {"name": "tool_use", "template": "x"},
            {"name": "default", "template": "{{ eos_token }}"},
        ]
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(flags | named))
    assert read_chat_template(tmp_path).render([]) == "<e>"
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match="expected a JSON object, got list"):
        read_chat_template(tmp_path)
    assert read_chat_template(tmp_path / "none") is None
    assert ChatTemplate("{{ bos_token }}", "t").render([], defaults={"bos_token": "<b>"}) == "<b>"


def test_mutated_lines_are_errors_or_aligned_files(tmp_path):
    """A wrong byte gives an error with the file's name, or tokens and labels that fit."""
    draw, tokenizer = random.Random(5), load_tokenizer(GOLDEN)
    good = "".join(json.dumps(line) + "\n" for line in golden_lines()[:6]).encode()
    done = 0
    for _ in range(60):
        data = bytearray(good)
        for _ in range(draw.choice([1, 1, 3])):
            place = draw.randrange(len(data))
            data[place : place + draw.randrange(0, 9)] = draw.choice(
                [b"", b'"', b"null", b"{}", b"[", b"role", b"\xff"]
            )
        (tmp_path / "c.jsonl").write_bytes(data)
        try:
            run(
                [tmp_path / "c.jsonl"],
                tmp_path / "o",
                tokenizer,
                fast=False,
                documents=False,
                reject=True,
            )
        except DataError as error:
            assert str(tmp_path / "c.jsonl") in str(error)
            continue
        done += 1
        for tokens, labels in pairs(tmp_path / "o"):
            assert len(tokens) == len(labels) > 0
    assert done > 30


def test_long_conversations_are_encoded_a_few_at_a_time(tmp_path, monkeypatch):
    whole = run([GOLDEN / "chats.jsonl"], tmp_path / "a", documents=False)
    monkeypatch.setattr(chats_module, "PREFIX_BYTES", 50)
    run([GOLDEN / "chats.jsonl"], tmp_path / "b", documents=False)
    assert whole.documents == 16 and content(tmp_path / "a") == content(tmp_path / "b")


def test_a_message_that_joins_the_text_before_it(tmp_path):
    """Line breaks on both sides of a border merge into one token; none is lost."""
    tokenizer = train_tokenizer(["x\n\n\ny"] * 50, 262, tmp_path / "tokenizer.json")
    body = "{% for m in messages %}{{ m.role }}\n{{ m.content }}{% endfor %}"
    template = ChatTemplate(body + "{% if add_generation_prompt %}assistant\n{% endif %}", "")
    (tmp_path / "chat_template.jinja").write_text(template.text)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\nb"}]
    run(
        [lines(tmp_path / "c.jsonl", {"messages": chat})],
        tmp_path / "o",
        tmp_path / "tokenizer.json",
    )
    ((tokens, labels),) = pairs(tmp_path / "o")
    assert tokens == tokenizer.encode("user\naassistant\n") + tokenizer.encode("\n\nb") + [
        tokenizer.eod_id
    ]
    assert labels == [-100] * (len(tokens) - 4) + tokens[-4:]
    assert (
        tokenizer.ids["ĊĊ"] in tokenizer.encode(template.render(chat))
        and tokenizer.ids["ĊĊ"] not in tokens
    )


def test_ftfy_mends_the_messages(tmp_path):
    pytest.importorskip("ftfy", reason="ftfy is not installed: pip install 'castalia[ftfy]'")
    chat = [{"role": "user", "content": "schÃ¶n"}]
    run([lines(tmp_path / "c.jsonl", {"messages": chat})], tmp_path / "o", ftfy=True)
    assert "schön" in load_tokenizer(GOLDEN).decode(pairs(tmp_path / "o")[0][0])


def test_tokens_that_only_the_settings_know_are_an_error(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "t")
    known = json.loads((GOLDEN / "tokenizer_config.json").read_text())
    (tmp_path / "t" / "tokenizer_config.json").write_text(
        json.dumps(known | {"added_tokens_decoder": {"900": {"content": "<tool>"}}})
    )
    with pytest.raises(
        ConfigError,
        match=r"lacks the token '<tool>', which tokenizer_config\.json beside it names; save",
    ):
        run([GOLDEN / "chats.jsonl"], tmp_path / "o", tmp_path / "t")
