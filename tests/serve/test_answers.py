"""Answers as clients read them: nulls, chunks equal to the whole, scores to the last position."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from castalia.export import export
from castalia.inference import LanguageModel

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
from tests.fixtures.live_server import LiveServer

from castalia.serve.model_pool import ModelPool, ServeOptions

PROMPT = "The naïve café owner said: “¡Olé!” and poured"
TEMPLATE = "{% for m in messages %}{{ m.content or '' }}{% endfor %}"
CHAT = "/v1/chat/completions"
END = ord("w")
"""The end of this model's turns."""


@pytest.fixture(scope="module")
def server(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server of a chat model, a run's export with a template and an end of its own."""
    folder = tmp_path_factory.mktemp("talker") / "talker"
    list(export(run_folder, to="hf", output=folder))
    (folder / "export.json").unlink()  # the hashes would tell of the changes
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    ends = {"eos_token_id": [END, 256], "bos_token_id": 256}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    running = LiveServer(ModelPool([str(folder)], ServeOptions(engine="torch", dtype="fp32")))
    yield running
    running.stop()


def chunks_of(server: LiveServer, path: str, body: dict[str, Any]) -> list[Any]:
    """The JSON of every event of a stream."""
    status, page, _ = server.ask(path, body | {"stream": True})
    assert status == 200, page
    return [json.loads(line[6:]) for line in page.split("\n\n") if line.startswith("data: {")]


def test_chunks_of_a_chat_say_null(server: LiveServer) -> None:
    asked = {"messages": [{"role": "user", "content": "The naïve"}], "temperature": 0}
    asked |= {"stream_options": {"include_usage": True}}
    *chunks, last, usage = chunks_of(server, CHAT, asked)
    for chunk in chunks:
        (choice,) = chunk["choices"]
        assert list(choice) == ["index", "delta", "logprobs", "finish_reason"]
        assert choice["logprobs"] is None and choice["finish_reason"] is None
        assert chunk["usage"] is None
    assert last["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == [] and usage["usage"]["prompt_tokens"] == 10
    # The model's own end, one of two, ended the turn.
    written = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert written == " café o"
    without = chunks_of(server, CHAT, {**asked, "stream_options": None})
    assert all("usage" not in chunk for chunk in without)
    del asked["stream_options"]
    _, scored, _ = server.ask(CHAT, asked | {"logprobs": True})
    content = scored["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == written
    _, whole, _ = server.ask(CHAT, asked)
    (choice,) = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": written}
    assert list(choice) == ["index", "message", "logprobs", "finish_reason"]
    assert choice["logprobs"] is None and choice["finish_reason"] == "stop"


def test_parts_and_null_of_a_message(server: LiveServer) -> None:
    text = [{"type": "text", "text": "The naïve"}]
    for messages in (
        [{"role": "user", "content": text}],
        [{"role": "assistant", "content": None}, {"role": "user", "content": "The naïve"}],
    ):
        status, answer, _ = server.ask(CHAT, {"messages": messages, "temperature": 0})
        assert status == 200, answer
        assert answer["choices"][0]["message"]["content"] == " café o"
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    status, answer, _ = server.ask(CHAT, {"messages": [{"role": "user", "content": image}]})
    assert status == 400 and "image_url" in answer["error"]["message"]


@pytest.mark.parametrize("stop", [None, "two", "\n"])
def test_a_stream_of_completions_is_the_whole_answer(server: LiveServer, stop: str | None) -> None:
    asked = {
        "prompt": [PROMPT, "def "],
        "max_tokens": 24,
        "temperature": 0,
        "logprobs": 3,
        "stop": stop,
        "ignore_eos": True,
        "n": 2,
    }
    for echo in (False, True):
        whole = server.complete(**asked, echo=echo)["choices"]
        chunks = chunks_of(server, "/v1/completions", {**asked, "echo": echo})
        for choice in whole:
            parts = [
                chunk["choices"][0]
                for chunk in chunks
                if chunk["choices"][0]["index"] == choice["index"]
            ]
            assert "".join(part["text"] for part in parts) == choice["text"]
            assert parts[-1]["finish_reason"] == choice["finish_reason"]
            assert choice["logprobs"]["tokens"]
            for name in ("tokens", "text_offset", "token_logprobs"):
                joined = [value for part in parts for value in part["logprobs"][name]]
                values = choice["logprobs"][name]
                # Sums of another batch differ in their last bits.
                if name == "token_logprobs":
                    values = pytest.approx(values, abs=1e-4)
                assert joined == values, name
            raw = b"".join(map(bytes_of, choice["logprobs"]["tokens"]))
            given = choice["text"] if stop is None else raw.decode()[: len(choice["text"])]
            assert raw.decode().startswith(choice["text"]) and given == choice["text"]


def bytes_of(token: str) -> bytes:
    r"""The bytes behind a token's text, `bytes:\xf0` or plain."""
    if token.startswith("bytes:"):
        return token[6:].encode().decode("unicode_escape").encode("latin-1")
    return token.encode()


def test_a_stream_of_a_chat_is_the_whole_answer(server: LiveServer) -> None:
    asked = {
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
        "ignore_eos": True,
    }
    _, whole, _ = server.ask(CHAT, asked)
    (choice,) = whole["choices"]
    content = choice["logprobs"]["content"]
    text = choice["message"]["content"]
    assert "🍵" in text
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == text
    cup = [entry["token"] for entry in content if entry["bytes"][0] >= 0x80]
    assert cup == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x8d", "bytes:\\xb5"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    chunks = chunks_of(server, CHAT, asked)
    parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert [entry for part in parts for entry in part["logprobs"]["content"]] == content
    for part in parts:
        raw = bytes(byte for entry in part["logprobs"]["content"] for byte in entry["bytes"])
        assert raw.decode() == part["delta"].get("content", "")


def test_a_prompt_that_fills_the_context_is_scored(
    server: LiveServer, speaker: LanguageModel
) -> None:
    ids = [*speaker.encode(PROMPT * 9)[:256]]
    assert len(ids) == speaker.config.max_position_embeddings
    asked = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = server.complete(**asked)
    (choice,) = answer["choices"]
    assert answer["usage"] == {"prompt_tokens": 256, "completion_tokens": 0, "total_tokens": 256}
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(
        speaker.logprobs(ids).tolist(), abs=1e-4
    )
    for body, expected in (
        (asked | {"max_tokens": 1}, "has 256 tokens but the model reads at most 256"),
        (asked | {"prompt": [*ids, 1]}, "has 257 tokens but the model reads at most 256"),
    ):
        status, answer, _ = server.ask("/v1/completions", body)
        assert status == 400 and expected in answer["error"]["message"]
    assert server.complete(prompt=ids, max_tokens=0)["choices"][0]["text"] == ""
    # The token that an empty prompt starts from is no part of the echo.
    (choice,) = server.complete(prompt="", max_tokens=3, echo=True, logprobs=1)["choices"]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"] == "The"


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        ("/v1/completions", {"prompt": "a\ud800b"}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "\udc00"]}, "prompt.1"),
        ("/v1/completions", {"prompt": "a", "stop": ["\ud83c"]}, "stop.0"),
        ("/v1/completions", {"prompt": "a", "model": "\ud83c"}, "model"),
        ("/v1/completions", {"prompt": "a", "\ud83c": 1}, "a key of the request"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud83c"}]}, "messages.0.content"),
        (CHAT, {"messages": [{"role": "\ud83c", "content": "a"}]}, "messages.0.role"),
        ("/tokenize", {"prompt": "\ud83c"}, "prompt"),
    ],
)
def test_half_a_surrogate_pair_is_400(
    server: LiveServer, path: str, body: dict[str, Any], where: str
) -> None:
    status, answer, _ = server.ask(path, json.dumps(body).encode())
    assert status == 400, answer
    message = answer["error"]["message"]
    assert where in message and "is not valid Unicode: character" in message


def test_an_unexpected_error_is_json(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: LanguageModel, prompt: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(LanguageModel, "encode", fail)
    status, answer, _ = server.ask("/v1/completions", {"prompt": "a"})
    assert status == 500 and answer["error"]["message"] == "internal error: ZeroDivisionError"


def test_the_tokenizer_is_described_by_the_model(server: LiveServer) -> None:
    _, info, _ = server.ask("/tokenizer_info")
    assert (info["eos_token"], info["bos_token"]) == ("w", "<|endoftext|>")
