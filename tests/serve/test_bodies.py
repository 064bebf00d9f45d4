"""Bodies made to stop the server: bounded before they are parsed, encoded, rendered or scored."""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from castalia.core.errors import ConfigError
from castalia.corpus.chat_template import ChatTemplate
from castalia.inference import LanguageModel

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
from tests.fixtures.live_server import LiveServer

from castalia.serve import preparation
from castalia.serve.answer_json import COMPACT, json_pieces
from castalia.serve.body_reading import InvalidRequestError, json_value, parsed
from castalia.serve.body_scan import SLICE, BodyScan, ScanLimits, require_few_values
from castalia.serve.encoding import PIECE, SEAM, all_ids, some_ids
from castalia.serve.model_pool import ModelPool, ServeOptions
from castalia.serve.requests import ChatRequest, CompletionRequest
from castalia.serve.template_text import Conversation
from castalia.serve.template_worker import TemplateWorker

COMPLETE = "/v1/completions"
MIB = 1 << 20


@pytest.fixture(scope="module")
def server(run_folder: Path) -> Iterator[LiveServer]:
    """A server of the tiny run."""
    running = LiveServer(ModelPool([str(run_folder)], ServeOptions(engine="torch", dtype="fp32")))
    yield running
    running.stop()


def value_of(draw: random.Random, depth: int) -> Any:
    """A random JSON value with awkward strings."""
    kind = draw.randrange(6 if depth else 4)
    if kind == 4:
        return [value_of(draw, depth - 1) for _ in range(draw.randrange(1, 4))]
    if kind == 5:
        return {str(i): value_of(draw, depth - 1) for i in range(draw.randrange(1, 4))}
    return draw.choice([7, -1.5, None, True, "", '"', "\\", '\\"', "[{,", "é\U0001f375"])


def counted(value: Any) -> tuple[int, int]:
    """Values and containers of a JSON value."""
    inner = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(inner, list):
        return 1, 0
    parts = [counted(each) for each in inner]
    return 1 + sum(count for count, _ in parts), 1 + sum(count for _, count in parts)


def test_values_are_counted_in_the_bytes() -> None:
    """Whatever strings hold, and wherever the bytes are cut."""
    draw = random.Random(3)
    for _ in range(200):
        value = value_of(draw, 4)
        data = json.dumps(value, ensure_ascii=draw.random() < 0.5).encode()
        scan = BodyScan()
        place = 0
        while place < len(data):
            width = draw.randrange(1, 9)
            scan.take(data[place : place + width])
            place += width
        assert (scan.values, scan.containers) == counted(value), value
        assert scan.depth == 0 and not scan.in_string
        assert json_value([data]) == value
    # A backslash at the end of a slice escapes the first byte of the next.
    text = "a" * (SLICE - 2)
    require_few_values(f'"{text}\\",,,,,,,"'.encode(), ScanLimits(values=1))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[" + b"0," * (4 * MIB - 2) + b"0]", "more than 1,048,576 values"),
        (b"[" + b'"",' * MIB + b"0]", "more than 131,072 strings"),
        (b"[" + b"[]," * MIB + b"0]", "more than 16,384 lists and objects;"),
        (b"[" * 101 + b"]" * 101, "more than 100 lists and objects inside one another"),
        (b"]" * MIB, "not JSON: character 0"),
        (b'"\xff"', "not JSON: byte 1 is not UTF-8"),
        (b"1" * MIB, "a number of too many digits"),
        (b'{"prompt":"a","' + b"stop_" * MIB + b'":1}', "unknown field 'stop_"),
    ],
)
def test_a_body_beyond_the_limits_is_refused_in_a_short_sentence(body: bytes, message: str) -> None:
    began = time.process_time()
    with pytest.raises(InvalidRequestError) as refused:
        parsed([body], CompletionRequest)
    assert message in str(refused.value) and len(str(refused.value)) < 250
    # Seconds of the processor where it took minutes.
    assert time.process_time() - began < 20


def test_the_first_error_alone_is_told_and_plain_ids_are_not_copied() -> None:
    for fields, message in (
        ({"logit_bias": {f"a{i}": 1 for i in range(9000)}}, "logit_bias: String should match"),
        ({"logit_bias": {str(i): "a" for i in range(9000)}}, "logit_bias.0: Input should be"),
        ({"stop_token_ids": [-1] * 9000}, "stop_token_ids.0: Input should be greater"),
        ({"guided_choice": [0] * 9000}, "guided_choice.0: Input should be a valid string"),
        ({"response_format": {f"a{i}": 1 for i in range(9000)}}, "response_format"),
        ({f"a{i}": 1 for i in range(9000)}, "unknown field 'a0'"),
        ({"stop": "a" * 1025}, "stop: String should have at most 1024 characters"),
        ({"stop": ["a"] * 17}, "stop"),
    ):
        with pytest.raises(InvalidRequestError, match=message) as refused:
            parsed([json.dumps({"prompt": "a", **fields}).encode()], CompletionRequest)
        assert len(str(refused.value)) < 250
    turns = {"messages": [{"role": "user"}] * 9000}
    with pytest.raises(InvalidRequestError, match="messages: List should have at most 8192"):
        parsed([json.dumps(turns).encode()], ChatRequest)
    ids = [[300 + i for i in range(2000)] for _ in range(9)]
    data = json.dumps({"prompt": ids, "stop_token_ids": [1.0, 2]}).encode()
    assert len(data) > SLICE
    body = parsed([data], CompletionRequest)
    assert body.prompts == ids and body.stop_token_ids == [1, 2] and body.weight == len(data)
    # Numbers of up to four digits exist once.
    first, second = json_value([data])["prompt"][:2]
    assert first[700] is second[700]


def test_a_prompt_is_read_as_far_as_the_model_can(speaker: LanguageModel) -> None:
    limit = speaker.config.max_position_embeddings
    text = "".join(random.Random(1).choices("abcé ", k=4 * PIECE))
    with pytest.raises(ConfigError, match="characters, over 256 tokens but the model reads at"):
        all_ids(speaker, "a" * (9 * MIB), limit)
    with pytest.raises(ConfigError, match="has more than 30,000 tokens"):
        all_ids(speaker, text, 30_000)
    assert all_ids(speaker, text, 10**6) == speaker.encode(text)
    whole = speaker.encode(text)
    for most in (5, PIECE + SEAM):
        for from_end, want in ((True, whole[-most:]), (False, whole[:most])):
            assert some_ids(speaker, text, most, from_end=from_end) == (want, True)
    assert some_ids(speaker, "abc", 5, from_end=True) == ([97, 98, 99], False)
    assert some_ids(speaker, [1, 2, 3], 2, from_end=True) == ([2, 3], True)


def test_a_template_has_a_limit_of_time_and_one_of_memory() -> None:
    worker = TemplateWorker(seconds=1)

    def write(source: str, **variables: Any) -> str:
        messages = [{"role": "user", "content": "é"}]
        asked = Conversation(messages, None, None, None, variables, True, False, {})
        return worker.write(ChatTemplate(source, "here"), asked)

    try:
        assert write("{{ messages[0].content }}") == "é"
        process = worker.process
        for source in ("{{ 'a' * 10**10 }}", "{{ 'a'|center(10**10) }}", "{{ a * 10**9 }}"):
            with pytest.raises(ConfigError, match="takes too much memory"):
                write(source, a="abcd")
        with pytest.raises(ConfigError, match="rejects this conversation: no"):
            write("{{ raise_exception('no' * 1) }}")
        assert worker.process is process
        loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
        with pytest.raises(ConfigError, match="took longer than 1 s"):
            write(loop)
        assert write("{{ b }}", b="again") == "again"
    finally:
        worker.close()


def test_answers_in_pieces_are_json() -> None:
    value = {"a": [], "b": {}, "é": [{"x": [{"y": 1}] * 700, "z": None}], "n": [1.5] * 1000}
    text = "".join(json_pieces(value, COMPACT))
    assert text == json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def test_the_server_refuses_what_would_stop_it(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = server.pool.locations and next(iter(server.pool.locations))
    long = "a" * (7 * MIB)
    for path, body, status, message in (
        (COMPLETE, {"prompt": "a", "model": name + long}, 404, "unknown model"),
        ("/tokenize", {"prompt": "a", "model": long}, 404, "unknown model"),
        ("/tokenize", {"prompt": long}, 400, "; split it"),
        (COMPLETE, {"prompt": long}, 400, "the model reads at most 256"),
        (COMPLETE, {"prompt": [7] * 99_999}, 400, "the prompt has 99999 tokens but the model"),
        ("/detokenize", {"tokens": [7] * 140_000}, 400, "at most 131072 items"),
        (COMPLETE, {"prompt": "a", "guided_regex": long}, 400, "at most 65536 characters"),
        ("/v1/chat/completions", {"messages": [0] * 99_999}, 400, "messages.0: Input should be"),
    ):
        got, answer, _ = server.ask(path, body)
        assert got == status and message in answer["error"]["message"], answer
        assert len(answer["error"]["message"]) < 300 and answer["error"]["type"]
    cut = server.complete(prompt="xyz" * 99_999 + "w", truncate_prompt_tokens=2, max_tokens=1)
    assert cut["usage"]["prompt_tokens"] == 2
    assert server.ask("/detokenize", {"tokens": [97] * 9_000})[1] == {"prompt": "a" * 9_000}
    status, answer, _ = server.ask(COMPLETE, {"prompt": "a"}, **{"Content-Type": "text/plain"})
    assert status == 400 and "expected application/json" in answer["error"]["message"]
    status, answer, _ = server.ask("/" + "a" * 9_000)
    assert status == 404 and len(answer["error"]["message"]) < 200
    monkeypatch.setattr(preparation, "MOST_SCORES", 20)
    asked = {"prompt": "abcdef", "echo": True, "logprobs": 3, "max_tokens": 0}
    status, answer, _ = server.ask(COMPLETE, asked)
    assert status == 400 and "6 tokens of prompts with 4 log-prob" in answer["error"]["message"]
    assert server.complete(**asked | {"logprobs": 2})["choices"][0]["text"] == "abcdef"
