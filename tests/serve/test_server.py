"""The server over a real socket: OpenAI's own client, limits, cancellation, models on demand."""

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from castalia.core.errors import ConfigError
from castalia.export import export
from castalia.inference import LanguageModel, load

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
from tests.fixtures.live_server import LiveServer

from castalia.serve.model_pool import ModelPool, ServeOptions

PROMPT = "The naïve café owner"


@pytest.fixture(scope="module")
def server(run_folder: Path) -> Iterator[LiveServer]:
    """A server of the tiny run."""
    running = LiveServer(
        ModelPool([str(run_folder)], ServeOptions(engine="torch", dtype="fp32", slots=4))
    )
    yield running
    running.stop()


@pytest.fixture
def start(run_folder: Path) -> Iterator[Callable[..., LiveServer]]:
    """Callable: a server with other limits or models."""
    started = []

    def make(*paths: str, options: ServeOptions | None = None, **limits: Any) -> LiveServer:
        options = options or ServeOptions(engine="torch", dtype="fp32", slots=2)
        started.append(LiveServer(ModelPool(list(paths) or [str(run_folder)], options), **limits))
        return started[-1]

    yield make
    for running in started:
        running.stop()


def until(condition: Callable[[], bool]) -> None:
    """Wait for it, 20 s at most."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_a_server_keeps_keys_and_values_in_the_cache_asked_for(
    start: Callable[..., LiveServer],
) -> None:
    exact = start(options=ServeOptions(engine="native", dtype="fp32", slots=2))
    if exact.pool.get(None).model.engine.compiled is None:
        pytest.skip("no C++ compiler here")
    small = start(options=ServeOptions(engine="native", dtype="fp32", cache="int8", slots=2))
    sizes = []
    for running in (exact, small):
        answer = running.complete(prompt=PROMPT, max_tokens=4)
        assert answer["usage"]["completion_tokens"] == 4
        sizes.append(running.counter("cache_bytes"))
    assert 0.25 * sizes[0] < sizes[1] < 0.4 * sizes[0]


def test_text_is_the_models_own(server: LiveServer, speaker: LanguageModel) -> None:
    prompts = [PROMPT, "def twice(", "A second guest, who came in late"]
    answer = server.complete(prompt=prompts, max_tokens=30)
    assert [choice["text"] for choice in answer["choices"]] == speaker.generate(prompts, 30)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    count = sum(len(prompt.encode()) for prompt in prompts)
    generated = sum(
        len(one.tokens) + (one.finish_reason == "eod") for one in speaker.complete(prompts, 30)
    )
    assert answer["usage"] == {
        "prompt_tokens": count,
        "completion_tokens": generated,
        "total_tokens": count + generated,
    }


def test_draws_are_the_models_own_and_repeat(server: LiveServer, speaker: LanguageModel) -> None:
    asked = {
        "prompt": PROMPT,
        "max_tokens": 20,
        "temperature": 1.5,
        "top_p": 0.9,
        "n": 3,
        "seed": 7,
    }
    texts = [choice["text"] for choice in server.complete(**asked)["choices"]]
    assert texts == speaker.generate([PROMPT] * 3, 20, temperature=1.5, top_p=0.9, seed=7)
    assert len(set(texts)) > 1
    assert [choice["text"] for choice in server.complete(**asked)["choices"]] == texts


def test_ids_stop_and_echo(server: LiveServer, speaker: LanguageModel) -> None:
    ids = speaker.encode(PROMPT)
    whole = speaker.generate(PROMPT, 40)
    (choice,) = server.complete(prompt=ids, max_tokens=40, stop="said")["choices"]
    assert choice["text"] == whole.split("said")[0] and choice["finish_reason"] == "stop"
    (choice,) = server.complete(prompt=[ids], max_tokens=40, echo=True)["choices"]
    assert choice["text"] == PROMPT + whole and choice["finish_reason"] == "length"


def test_a_stream_gives_the_same_text_in_pieces(server: LiveServer, speaker: LanguageModel) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 30, "temperature": 0, "stream": True, "n": 2}
    status, page, headers = server.ask(
        "/v1/completions", asked | {"stream_options": {"include_usage": True}}
    )
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    *events, last = [line.removeprefix("data: ") for line in page.split("\n\n") if line]
    assert last == "[DONE]"
    *chunks, usage = [json.loads(event) for event in events]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 60
    for index in (0, 1):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == speaker.generate(PROMPT, 30)
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["length"]


def test_an_echo_in_a_stream_comes_first(server: LiveServer, speaker: LanguageModel) -> None:
    asked = {
        "prompt": PROMPT,
        "max_tokens": 8,
        "temperature": 0,
        "stream": True,
        "echo": True,
        "logprobs": 0,
    }
    _, page, _ = server.ask("/v1/completions", asked)
    parts = [
        json.loads(line[6:])["choices"][0]
        for line in page.split("\n\n")
        if line.startswith("data: {")
    ]
    assert "".join(part["text"] for part in parts) == PROMPT + speaker.generate(PROMPT, 8)
    offsets = [offset for part in parts for offset in part["logprobs"]["text_offset"]]
    assert len(offsets) == len(PROMPT.encode()) + 8 and offsets[:3] == [0, 1, 2]


def test_echoed_logprobs_are_what_a_harness_sums(
    server: LiveServer, speaker: LanguageModel
) -> None:
    """Exactly one token beyond the prompt, null for the first, one tensor behind both numbers."""
    ids = speaker.encode(PROMPT)
    asked = {"prompt": [ids, ids[:7]], "max_tokens": 1, "logprobs": 1, "echo": True}
    for choice, given in zip(server.complete(**asked)["choices"], (ids, ids[:7]), strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(given) + 1 and logprobs["token_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:-1] == pytest.approx(
            speaker.logprobs(given).tolist(), abs=1e-5
        )
        logits = speaker.logits(given)[:-1, :257]
        both = zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True)
        best = [logprob == max(top.values()) for logprob, top in both]
        assert best[:-1] == (logits.argmax(-1) == torch.tensor(given[1:])).tolist() and best[-1]
        assert logprobs["text_offset"][:2] == [0, 1]
    (choice,) = server.complete(prompt=ids, max_tokens=0, logprobs=3, echo=True)["choices"]
    assert choice["text"] == PROMPT and len(choice["logprobs"]["tokens"]) == len(ids)
    assert len(choice["logprobs"]["top_logprobs"][3]) in (3, 4)


def test_an_end_of_document_token_is_reported_too(
    server: LiveServer, speaker: LanguageModel
) -> None:
    ids = speaker.encode("def twice(")
    output = speaker.complete([ids], 200)[0]
    assert output.finish_reason == "eod"
    (choice,) = server.complete(prompt=ids + output.tokens, max_tokens=1, logprobs=1, echo=True)[
        "choices"
    ]
    assert choice["logprobs"]["tokens"][-1] == "<|endoftext|>" and choice["finish_reason"] == "stop"
    (choice,) = server.complete(prompt=ids + output.tokens, max_tokens=5, ignore_eos=True)[
        "choices"
    ]
    assert choice["finish_reason"] == "length" and choice["text"].startswith("<|endoftext|>")


def test_the_official_client(server: LiveServer, speaker: LanguageModel) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0
    )
    name = server.pool.locations and next(iter(server.pool.locations))
    assert (
        name in [model.id for model in client.models.list()]
        and client.models.retrieve(name).id == name
    )
    whole = client.completions.create(
        model=name, prompt=PROMPT, max_tokens=20, temperature=0, logprobs=2
    )
    assert (
        whole.choices[0].text == speaker.generate(PROMPT, 20)
        and whole.usage.completion_tokens == 20
    )
    assert len(whole.choices[0].logprobs.tokens) == 20
    stream = client.completions.create(
        model=name, prompt=PROMPT, max_tokens=20, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    with pytest.raises(openai.NotFoundError, match=r"unknown model 'gpt-4'"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.NotFoundError, match="has no chat template"):
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "a"}])


def test_the_evaluation_harness(server: LiveServer, speaker: LanguageModel) -> None:
    """lm-evaluation-harness's local-completions, as it is, with the server's own tokenizer."""
    models = pytest.importorskip(
        "lm_eval.models.openai_completions", reason="lm-eval is not installed"
    )
    from lm_eval.api.instance import Instance

    where = f"http://127.0.0.1:{server.port}/v1/completions"
    name = next(iter(server.pool.locations))
    harness = models.LocalCompletionsAPI(
        base_url=where,
        model=name,
        tokenizer_backend="remote",
        tokenized_requests=True,
        max_length=256,
        batch_size=2,
    )
    pairs = [
        (PROMPT, " said: “¡Olé!”"),
        ("def twice(x):", " return 5"),
        ("A second guest", ", who came in late"),
    ]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (context, continuation), (total, greedy) in zip(
        pairs, harness.loglikelihood(requests), strict=True
    ):
        context_ids = speaker.encode(context)
        ids = speaker.encode(context + continuation)
        logprobs = speaker.logprobs(ids)[len(context_ids) - 1 :]
        assert total == pytest.approx(float(logprobs.sum()), abs=1e-4)
        best = speaker.logits(ids)[len(context_ids) - 1 : -1, :257].argmax(-1).tolist()
        assert greedy == (best == ids[len(context_ids) :])
    rolling = Instance("loglikelihood_rolling", {}, (PROMPT,), 0)
    eod = speaker.eod_id
    assert eod is not None
    (total,) = harness.loglikelihood_rolling([rolling])
    assert total == pytest.approx(
        float(speaker.logprobs([eod, *speaker.encode(PROMPT)]).sum()), abs=1e-4
    )
    until_said = Instance(
        "generate_until", {}, (PROMPT, {"until": ["poured"], "max_gen_toks": 40}), 0
    )
    assert harness.generate_until([until_said]) == [speaker.generate(PROMPT, 40).split("poured")[0]]


@pytest.mark.slow
def test_schemathesis_finds_nothing(server: LiveServer, tmp_path: Path) -> None:
    """Generated requests, right and wrong, against what the OpenAPI page promises."""
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        f"http://127.0.0.1:{server.port}/openapi.json",
    ]
    command += ["--max-examples=60", "--seed=1", "--workers=1", "--request-timeout=60"]
    # A schema cannot say which fields go together, what a regular expression is, or what the
    # model's template reads: requests that it allows may be refused.
    command += ["--exclude-checks=positive_data_acceptance"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    until(server.idle)


def test_chat_with_a_template(
    run_folder: Path, tmp_path: Path, start: Callable[..., LiveServer]
) -> None:
    (done,) = export(run_folder, to="hf", output=tmp_path / "talker")
    (Path(done.folder) / "export.json").unlink()  # the hashes would tell of the changes
    settings = Path(done.folder) / "tokenizer_config.json"
    template = (
        "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}"
        "{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    server = start(str(done.folder))
    asked = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 20, "temperature": 0}
    status, answer, _ = server.ask(
        "/v1/chat/completions", asked | {"logprobs": True, "top_logprobs": 2}
    )
    assert status == 200, answer
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": load(run_folder).generate(PROMPT, 20),
    }
    assert (
        len(choice["logprobs"]["content"]) == 20
        and len(choice["logprobs"]["content"][0]["top_logprobs"]) == 2
    )
    _, page, _ = server.ask("/v1/chat/completions", asked | {"stream": True})
    deltas = [
        json.loads(line[6:])["choices"][0]["delta"]
        for line in page.split("\n\n")
        if line.startswith("data: {")
    ]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == choice["message"]["content"]
    robot = [{"role": "robot", "content": "a"}]
    status, answer, _ = server.ask("/v1/chat/completions", {"messages": robot})
    assert status == 400 and "no robots" in answer["error"]["message"]


WRONG: list[tuple[Any, str]] = [
    (b"{", "not JSON"),
    (b"\xff\xfe", "not JSON"),
    (b"[]", "valid dictionary"),
    ({}, "prompt: Field required"),
    ({"prompt": 5}, "prompt: expected a string"),
    ({"prompt": []}, "prompt: expected a string"),
    ({"prompt": [1, "a"]}, "prompt: expected a string"),
    ({"prompt": "a", "max_tokens": "9"}, "max_tokens: Input should be a valid integer"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens: Input should be greater"),
    ({"prompt": "a", "temperature": -0.1}, "temperature: Input should be greater"),
    ({"prompt": "a", "top_p": 1.1}, "top_p: Input should be less"),
    ({"prompt": "a", "n": 1000}, "n: Input should be less"),
    ({"prompt": "a", "n": 3, "best_of": 2}, "best_of: must be at least n=3"),
    ({"prompt": "a", "best_of": 2, "stream": True}, "best_of: the best texts are known only at"),
    ({"prompt": "a", "suffix": "b"}, "suffix: not supported by this server"),
    ({"prompt": "a", "frequency_penalty": 3}, "frequency_penalty: Input should be less than"),
    ({"prompt": "a" * 300}, "the prompt has 300 tokens but the model reads at most 256"),
    ({"prompt": [9999]}, "id 9999 is outside the vocabulary of 257 tokens"),
]


@pytest.mark.parametrize(("body", "message"), WRONG)
def test_a_wrong_request_is_400_with_one_sentence(
    server: LiveServer, body: Any, message: str
) -> None:
    status, answer, _ = server.ask("/v1/completions", body)
    assert status == 400 and message in answer["error"]["message"], answer
    assert answer["error"]["type"] == "invalid_request_error"


def test_other_paths_and_methods(server: LiveServer) -> None:
    assert server.ask("/nothing")[0] == 404
    status, _, headers = server.ask("/v1/completions")
    assert status == 405 and headers["allow"] == "POST"
    assert server.ask("/v1/models/none")[0] == 404


def test_tokenizer_endpoints(server: LiveServer) -> None:
    _, tokens, _ = server.ask("/tokenize", {"prompt": "é"})
    assert tokens == {"tokens": [195, 169], "count": 2, "max_model_len": 256}
    assert server.ask("/detokenize", {"tokens": [195, 169]})[1] == {"prompt": "é"}
    assert server.ask("/tokenizer_info")[1]["eos_token"] == "<|endoftext|>"


def test_a_key_is_asked_for(start: Callable[..., LiveServer]) -> None:
    server = start(api_key="sesame")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}):
        status, answer, given = server.ask("/v1/models", **headers)
        assert (
            status == 401
            and "API key" in answer["error"]["message"]
            and given["www-authenticate"] == "Bearer"
        )
    assert server.ask("/v1/models", Authorization="Bearer sesame")[0] == 200
    assert server.ask("/health")[0] == 200


def test_more_texts_than_can_wait_are_refused_and_refusals_are_counted(
    start: Callable[..., LiveServer],
) -> None:
    server = start(
        options=ServeOptions(engine="torch", dtype="fp32", slots=1, most_waiting=2), most_bytes=1000
    )
    status, answer, _ = server.ask("/v1/completions", {"prompt": ["a"] * 3})
    assert (
        status == 400 and "asks for 3 texts, but at most 2 can wait" in answer["error"]["message"]
    )
    assert server.ask("/v1/completions", {"prompt": "a" * 2000})[0] == 413
    assert 'status="413"' in server.ask("/metrics")[1]


def test_the_page_promises_no_more_texts_than_can_wait(start: Callable[..., LiveServer]) -> None:
    server = start(options=ServeOptions(engine="torch", dtype="fp32", slots=1, most_waiting=3))
    fields = server.ask("/openapi.json")[1]["components"]["schemas"]["CompletionRequest"][
        "properties"
    ]
    assert [form.get("maxItems") for form in fields["prompt"]["anyOf"]] == [None, 3, 2**19, 3]
    assert fields["n"]["anyOf"][0]["maximum"] == 3
    assert len(server.complete(prompt=["a"] * 3, max_tokens=1)["choices"]) == 3
    until(server.idle)
    assert len(server.complete(prompt="a", n=3, max_tokens=1, temperature=1)["choices"]) == 3


def test_large_and_slow_requests(start: Callable[..., LiveServer]) -> None:
    server = start(most_bytes=1000, patience=0.5)
    status, answer, _ = server.ask("/v1/completions", {"prompt": "a" * 2000})
    assert status == 413 and "1,000 bytes" in answer["error"]["message"]
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{")
        assert b" 408 " in slow.recv(1000)
    chunked = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as endless:
        endless.sendall(
            chunked + b"3e8\r\n" + b"a" * 1000 + b"\r\n" + b"3e8\r\n" + b"a" * 1000 + b"\r\n"
        )
        assert b" 413 " in endless.recv(1000)
    assert server.complete(prompt="a", max_tokens=2)["choices"]


def test_a_full_queue_is_429_with_retry_after(start: Callable[..., LiveServer]) -> None:
    server = start(options=ServeOptions(engine="torch", dtype="fp32", slots=1, most_waiting=2))
    long = {"prompt": "a", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    threads = [
        threading.Thread(target=server.ask, args=("/v1/completions", long)) for _ in range(3)
    ]
    scheduler = server.pool.get(None).scheduler
    for thread in threads:
        before = server.pool.counts()
        thread.start()
        until(lambda before=before: server.pool.counts() != before)
    until(lambda: len(scheduler.waiting) == 2)
    status, answer, headers = server.ask("/v1/completions", long)
    assert (
        status == 429
        and int(headers["retry-after"]) >= 1
        and answer["error"]["type"] == "rate_limit_error"
    )
    for thread in threads:
        thread.join()
    until(server.idle)


def leave(port: int, stream: bool) -> None:
    """Ask for a long text, and close the connection at its first byte, or before any."""
    body = json.dumps(
        {"prompt": "a", "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": stream}
    )
    with socket.create_connection(("127.0.0.1", port)) as client:
        head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        if stream:
            client.recv(100)


def leave_often(server: LiveServer, times: int) -> None:
    """Many clients that leave; afterwards nothing is left of them."""
    before = server.counter("cancelled_total")
    threads = threading.active_count()
    for place in range(times):
        leave(server.port, stream=place % 2 == 0)
    scheduler = server.pool.get(None).scheduler
    # Some were done before they left.
    until(lambda: server.counter("cancelled_total") - before >= times // 4 and server.idle())
    until(lambda: not scheduler.running and not scheduler.batcher.running)
    assert threading.active_count() <= threads + 8
    assert server.complete(prompt=PROMPT, max_tokens=5)["choices"]


def test_clients_that_leave_free_their_slots(server: LiveServer) -> None:
    leave_often(server, 40)


def test_a_thousand_clients_that_leave(server: LiveServer) -> None:
    leave_often(server, 1000)


def test_models_come_and_go(
    run_folder: Path, start: Callable[..., LiveServer], speaker: LanguageModel
) -> None:
    server = start(str(run_folder))
    name = run_folder.name
    first = server.complete(model=f"{name}@step0", prompt=PROMPT, max_tokens=8)
    assert first["model"] == f"{name}@step0" and list(server.pool.loaded) == [f"{name}@step0"]
    again = server.complete(model=f"{name}@step220", prompt=PROMPT, max_tokens=8)["choices"][0][
        "text"
    ]
    assert again == speaker.generate(PROMPT, 8) != first["choices"][0]["text"]
    assert list(server.pool.loaded) == [f"{name}@step220"]
    _, listed, _ = server.ask("/v1/models")
    assert [model["id"] for model in listed["data"]] == [name, f"{name}@step0", f"{name}@step220"]


def test_a_failure_ends_its_own_request_only(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = server.pool.get(None).scheduler
    admit = scheduler.batcher.admit

    def fail_on_x(admissions: Any) -> Any:
        if admissions[0].text.ids == [ord("x")]:
            raise RuntimeError("a kernel failed")
        return admit(admissions)

    monkeypatch.setattr(scheduler.batcher, "admit", fail_on_x)
    status, answer, _ = server.ask("/v1/completions", {"prompt": "x"})
    assert status == 500 and answer["error"]["type"] == "server_error"
    # A stream has sent its status; the operator reads the reason in both cases.
    assert "a kernel failed" in caplog.text
    caplog.clear()
    status, page, _ = server.ask("/v1/completions", {"prompt": "x", "stream": True})
    assert status == 200 and '"type": "server_error"' in page and "[DONE]" not in page
    assert "a kernel failed" in caplog.text
    assert server.complete(prompt=PROMPT, max_tokens=3)["choices"]
    until(server.idle)


def test_stopping_finishes_what_runs(run_folder: Path) -> None:
    server = LiveServer(ModelPool([str(run_folder)], ServeOptions(engine="torch", dtype="fp32")))
    answers: list[Any] = []
    long = {"prompt": "a", "max_tokens": 150, "temperature": 0, "ignore_eos": True}
    thread = threading.Thread(target=lambda: answers.append(server.ask("/v1/completions", long)))
    thread.start()
    until(lambda: server.pool.counts()[0] == 1)
    server.stop()
    thread.join()
    assert answers[0][0] == 200 and answers[0][1]["usage"]["completion_tokens"] == 150
    until(lambda: not server.pool.get(None).scheduler.thread.is_alive())


def test_two_models_of_one_name_are_refused(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder, tmp_path / run_folder.name)
    with pytest.raises(ConfigError, match=f"two models share the name {run_folder.name}"):
        ModelPool(
            [str(run_folder), str(tmp_path / run_folder.name)],
            ServeOptions(engine="torch", dtype="fp32"),
        )


def test_many_streams_at_once(server: LiveServer, speaker: LanguageModel) -> None:
    """64 clients on 4 slots: every one gets the text that it would have got alone."""
    httpx = pytest.importorskip("httpx2")
    prompts = [PROMPT[: 5 + i % 12] for i in range(64)]

    async def one(client: Any, prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "stream": True}
        pieces = []
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    pieces.append(json.loads(line[6:])["choices"][0]["text"])
        return "".join(pieces)

    async def all_of_them() -> list[str]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{server.port}", limits=limits, timeout=120
        ) as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

    assert asyncio.run(all_of_them()) == speaker.generate(prompts, 12)
