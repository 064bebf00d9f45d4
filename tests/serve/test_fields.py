"""Every field of OpenAI's and vLLM's requests: honoured, or refused by name unless neutral."""

import json
import threading
import time
import typing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from castalia.export import export
from castalia.inference import LanguageModel, load
from castalia.inference.beams import Search
from castalia.inference.grammar import GrammarError
from castalia.inference.sampling import Sampling

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
from tests.fixtures.live_server import LiveServer

from castalia.core.errors import ConfigError
from castalia.corpus import ChatOptions, prepare
from castalia.corpus.chat_template import ChatTemplate, read_chat_template
from castalia.data import IndexedDataset, load_tokenizer
from castalia.serve.conversation import chat_prompt
from castalia.serve.fields import Only
from castalia.serve.model_pool import ModelPool, ServeOptions
from castalia.serve.requests import ChatRequest, CompletionRequest
from castalia.serve.scheduler import Scheduler, ServedSearch, ServedText, StreamEvent

PROMPT = "The naïve"
TEMPLATE = """\
{%- if tools %}[{% for tool in tools %}{{ tool.function.name }} {% endfor %}]{% endif -%}
{%- for m in messages -%}
<{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}>{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}
{%- endfor %}{% if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %}</s>
{%- endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
CALL = {"id": "7", "type": "function", "function": {"name": "find", "arguments": '{"what": "é"}'}}
CALLING: list[dict[str, Any]] = [
    {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "find it"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "7", "content": "here"},
]


@pytest.fixture(scope="module")
def talker(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run as a Hugging Face folder with a chat template."""
    (done,) = export(run_folder, to="hf", output=tmp_path_factory.mktemp("chat") / "talker")
    (Path(done.folder) / "export.json").unlink()  # the hashes would tell of the changes
    settings = Path(done.folder) / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))
    return Path(done.folder)


@pytest.fixture(scope="module")
def server(talker: Path) -> Iterator[LiveServer]:
    """A server of the talker."""
    options = ServeOptions(engine="torch", dtype="fp32", slots=4)
    running = LiveServer(ModelPool([str(talker)], options))
    yield running
    running.stop()


FIELDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"repetition_penalty": 4.0}, {"repetition_penalty": 4.0}),
    ({"presence_penalty": 2}, {"presence_penalty": 2.0}),
    ({"frequency_penalty": 2}, {"frequency_penalty": 2.0}),
    ({"logit_bias": {"101": 50, "97": -5.5}}, {"logit_bias": {101: 50.0, 97: -5.5}}),
    ({"temperature": 2, "min_p": 0.1, "seed": -3}, {"temperature": 2.0, "min_p": 0.1, "seed": -3}),
    ({"temperature": 2, "typical_p": 0.6, "seed": 3}, {"temperature": 2.0, "typical_p": 0.6,
                                                      "seed": 3}),
    ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
    ({"temperature": 2, "top_k": -1, "seed": 2**63 - 1}, {"temperature": 2.0, "seed": 2**63 - 1}),
    ({"stop_token_ids": [119]}, {"stop_token_ids": [119]}),
    ({"stop": "own", "include_stop_str_in_output": True}, {"stop": "own", "keep_stop": True}),
    ({"stop": ["c", "o"], "min_tokens": 4}, {"stop": ["c", "o"], "min_tokens": 4}),
    ({"allowed_token_ids": [97, 98, 32]}, {"allowed_token_ids": [97, 98, 32]}),
]  # fmt: skip


def test_fields_are_honoured(server: LiveServer, speaker: LanguageModel) -> None:
    """The text is the model's own with the same options, whole, streamed, and twice in a batch."""
    for fields, options in FIELDS:
        body = {"prompt": PROMPT, "max_tokens": 24, "n": 2, **fields}
        texts = [choice["text"] for choice in server.complete(**body)["choices"]]
        assert texts == speaker.generate([PROMPT] * 2, 24, **options), fields
        _, page, _ = server.ask("/v1/completions", {"temperature": 0, **body, "stream": True})
        parts: list[list[str]] = [[], []]
        for line in page.split("\n\n")[:-2]:
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            parts[choice["index"]].append(choice["text"])
        assert ["".join(pieces) for pieces in parts] == texts, fields
    plain = server.complete(prompt=PROMPT, max_tokens=24, temperature=0)["choices"][0]["text"]
    assert plain == speaker.generate(PROMPT, 24)
    assert server.complete(prompt=PROMPT, request_id="mine")["id"] == "cmpl-mine"
    cut = server.complete(
        prompt="xyz" + PROMPT, max_tokens=24, truncate_prompt_tokens=10, echo=True
    )
    assert cut["choices"][0]["text"] == PROMPT + plain and cut["usage"]["prompt_tokens"] == 10
    ended = {"prompt": "def twice(", "max_tokens": 40, "ignore_eos": True}
    named = server.complete(**ended)["choices"][0]["text"]
    (bare,) = server.complete(**ended, skip_special_tokens=True, logprobs=0)["choices"]
    assert "<|endoftext|>" in named and bare["text"] == named.replace("<|endoftext|>", "")
    assert "<|endoftext|>" not in bare["logprobs"]["tokens"]
    assert bare["logprobs"]["text_offset"][-1] == len(bare["text"]) - 1


SEARCHES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"n": 2}, {"num_beams": 2, "num_return_sequences": 2}),
    ({"best_of": 4, "length_penalty": 0.0, "early_stopping": True},
     {"num_beams": 4, "length_penalty": 0.0, "early_stopping": True}),
    ({"n": 2, "best_of": 3, "stop": "own", "repetition_penalty": 1.5, "early_stopping": "never"},
     {"num_beams": 3, "num_return_sequences": 2, "stop": "own", "repetition_penalty": 1.5,
      "early_stopping": "never"}),
]  # fmt: skip


def test_a_beam_search_is_that_of_the_model(server: LiveServer, speaker: LanguageModel) -> None:
    """Among other texts, with log-probabilities, an echo and a chat."""
    prompts = [PROMPT, "def tw"]
    for fields, options in SEARCHES:
        # Clients send temperature=1 that never ask for anything else.
        body = {"prompt": prompts, "max_tokens": 16, "use_beam_search": True, "temperature": 1}
        with ThreadPoolExecutor(3) as clients:
            others = [
                clients.submit(server.complete, prompt=PROMPT, max_tokens=24, temperature=0)
                for _ in range(2)
            ]
            answer = clients.submit(server.complete, **body, **fields).result()
        done = speaker.complete(prompts, 16, **options)
        assert [choice["text"] for choice in answer["choices"]] == [one.text for one in done]
        for other in others:
            assert other.result()["choices"][0]["text"] == speaker.generate(PROMPT, 24)
    asked = {"prompt": PROMPT, "max_tokens": 6, "use_beam_search": True, "n": 2, "logprobs": 1}
    answer = server.complete(**asked, echo=True)
    done = speaker.complete([PROMPT], 6, num_beams=2, num_return_sequences=2)
    for choice, one in zip(answer["choices"], done, strict=True):
        assert choice["text"] == PROMPT + one.text
        scores = choice["logprobs"]["token_logprobs"][len(PROMPT.encode()) :]
        assert len(scores) == 6
        # The score is the mean, as length_penalty is 1.
        assert one.score == pytest.approx(sum(scores) / 6, abs=1e-5)
    assert answer["usage"]["completion_tokens"] == 12
    message = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6, "n": 2}
    status, answer, _ = server.ask("/v1/chat/completions", {**message, "use_beam_search": True})
    assert status == 200 and len(answer["choices"]) == 2
    scored = server.complete(**{**asked, "max_tokens": 0}, echo=True)
    assert [choice["text"] for choice in scored["choices"]] == [PROMPT] * 2
    end = time.monotonic() + 120
    while not server.idle():
        assert time.monotonic() < end, "a search kept its slots"
        time.sleep(0.01)


def test_the_best_of_several_texts_are_the_likeliest(
    server: LiveServer, speaker: LanguageModel
) -> None:
    drawn = {"prompt": PROMPT, "max_tokens": 8, "temperature": 1.8, "seed": 5}
    whole = server.complete(**drawn, n=6, logprobs=0)
    ranked = sorted(whole["choices"], key=lambda one: -mean(one["logprobs"]["token_logprobs"]))
    best = server.complete(**drawn, n=2, best_of=6)
    assert [one["text"] for one in best["choices"]] == [one["text"] for one in ranked[:2]]
    assert [one["index"] for one in best["choices"]] == [0, 1]
    assert best["choices"][0]["logprobs"] is None and ranked[0]["text"] != ranked[5]["text"]
    # All tokens were generated, and all are counted.
    assert best["usage"] == whole["usage"]
    echoed = server.complete(**drawn, best_of=6, logprobs=0, echo=True)["choices"]
    assert [one["text"] for one in echoed] == [PROMPT + ranked[0]["text"]]


def test_a_search_that_fails_or_is_cancelled_frees_its_slots(talker: Path) -> None:
    pytest.importorskip("llguidance")
    model = load(talker)
    events: list[StreamEvent] = []
    done = threading.Semaphore(0)

    def emit(event: StreamEvent) -> None:
        events.append(event)
        done.release()

    def search(**options: Any) -> ServedSearch:
        sampling = Sampling(**options)
        texts = [
            ServedText(model.continuation(PROMPT, 200), sampling, emit, model.config.vocab_size)
            for _ in range(2)
        ]
        return ServedSearch(texts, Search(2, 2))

    scheduler = Scheduler(model.engine, slots=3, length=256, most_waiting=9)
    running = search()
    # The second one waits for slots; it is cancelled while it does.
    waiting = search()
    scheduler.submit([running, waiting])
    scheduler.cancel(waiting.texts)
    scheduler.cancel(running.texts[:1])
    # Behind its third token, this form is too large for the library.
    scheduler.submit([search(grammar=model.grammars.regex("[a-z]{3}a{1000000}"))])
    # Each of its two texts is told, and none of the cancelled ones.
    for _ in range(2):
        assert done.acquire(timeout=200)
    scheduler.close()
    assert [type(event.error) for event in events] == [GrammarError] * 2
    assert not scheduler.searching and scheduler.batcher.free == 3 and scheduler.texts == 0


SCHEMA = {
    "type": "object",
    "properties": {"drink": {"enum": ["café", "🍵"]}, "n": {"type": "integer", "maximum": 99}},
    "required": ["drink", "n"],
    "additionalProperties": False,
}
FORMS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    {"guided_json": SCHEMA},
    {"guided_json": json.dumps(SCHEMA)},
    {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
]


def test_a_schema_is_kept_by_every_text(server: LiveServer) -> None:
    pytest.importorskip("llguidance")
    for fields in FORMS:
        for path, body in (
            ("/v1/completions", {"prompt": [PROMPT, "def "]}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}),
        ):
            asked = {**body, **fields, "max_tokens": 180, "n": 2, "seed": 5, "logprobs": 1}
            if "messages" in body:
                asked |= {"logprobs": True}
            status, answer, _ = server.ask(path, asked)
            assert status == 200, answer
            for choice in answer["choices"]:
                text = choice.get("text") or choice["message"]["content"]
                value = json.loads(text)
                assert value.keys() == {"drink", "n"} and value["drink"] in ("café", "🍵")
                assert choice["finish_reason"] == "stop"
                assert "\n" not in text or "structured_outputs" not in fields
    for fields, texts in (
        ({"guided_choice": ["naïve", "café"]}, {"naïve", "café"}),
        ({"structured_outputs": {"choice": ["one"]}}, {"one"}),
        ({"guided_regex": "a{3}b"}, {"aaab"}),
        ({"structured_outputs": {"grammar": 'root ::= "x" "y"'}}, {"xy"}),
    ):
        answer = server.complete(prompt=PROMPT, max_tokens=20, **fields)
        assert answer["choices"][0]["text"] in texts
    loose = server.complete(
        prompt=PROMPT, max_tokens=40, temperature=0, response_format={"type": "json_object"}
    )
    assert loose["choices"][0]["text"].startswith("{")


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"repetion_penalty": 2},
        "unknown field 'repetion_penalty'; did you mean 'repetition_penalty'",
    ),
    ({"verbosity": "low"}, "verbosity: not a field of this endpoint"),
    ({"logit_bias": {"999": 1}}, "logit_bias: id 999 is outside the vocabulary of 257 tokens"),
    ({"logit_bias": {"a": 1}}, "logit_bias: String should match pattern"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1: Input should be less than or equal to 100"),
    ({"stop_token_ids": [999]}, "stop_token_ids: id 999 is outside the vocabulary"),
    ({"min_tokens": 50}, "min_tokens is 50, above max_tokens=24"),
    ({"min_p": 2}, "min_p: Input should be less than or equal to 1"),
    ({"typical_p": -1}, "typical_p: Input should be greater than or equal to 0"),
    ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size: Input should be greater than"),
    ({"use_beam_search": True, "n": 2, "stream": True}, "use_beam_search: a beam search knows its"),
    ({"use_beam_search": True, "temperature": 0.7}, "draws no tokens; leave out temperature=0.7"),
    (
        {"use_beam_search": True},
        "number of beams, n or best_of, must be from 2 to 4, the slots",
    ),
    ({"use_beam_search": True, "n": 5}, "the slots of this server; got 5"),
    ({"length_penalty": 0}, "length_penalty: needs use_beam_search=true"),
    ({"early_stopping": True}, "early_stopping: needs use_beam_search=true"),
    (
        {"use_beam_search": True, "n": 4, "guided_choice": ["a", "b"]},
        "a beam search found 2 texts of 4: the options allow no more",
    ),
    ({"repetition_penalty": 0}, "repetition_penalty: Input should be greater than"),
    ({"seed": 2**63}, "seed: Input should be less than or equal to 9223372036854775807"),
    ({"guided_regex": "["}, "the regular expression cannot be used"),
    ({"guided_json": {"type": "objekt"}}, "the JSON schema cannot be used: Invalid type: objekt"),
    ({"guided_regex": "a{1000000}"}, "lexer error: too many expressions constructed"),
    ({"guided_json": {}, "guided_regex": "a"}, "guided_json and guided_regex each give the text"),
    ({"guided_regex": "a", "min_tokens": 3}, "min_tokens does not go with a text of a given form"),
    ({"guided_choice": ["a"], "ignore_eos": True}, "ignore_eos does not go with a text"),
    ({"response_format": {"type": "xml"}}, "response_format.type: Input should be 'text'"),
    ({"response_format": {"type": "json_schema"}}, "needs json_schema.schema"),
    ({"stop": 5}, "stop: Input should be a valid string or a valid list"),
    ({"guided_json": 5, "n": 0}, "n: Input should be greater than or equal to 1 (and 2 more)"),
    ({"stream_options": {"include_obfuscation": True}}, "include_obfuscation: not supported"),
]


def test_a_form_that_turns_out_too_large_ends_its_own_text_alone(talker: Path) -> None:
    pytest.importorskip("llguidance")
    model = load(talker)
    whole = model.generate(PROMPT, 30)
    grammars = [
        None,
        model.grammars.regex("[a-z]{3}a{1000000}"),
        model.grammars.regex("a{1000000}"),
    ]
    events: list[list[StreamEvent]] = [[], [], [], []]
    done = threading.Semaphore(0)

    def text(number: int) -> ServedText:
        def emit(event: StreamEvent) -> None:
            events[number].append(event)
            if event.error is not None or event.finish_reason is not None:
                done.release()

        sampling = Sampling(grammar=grammars[number % 3])
        return ServedText(model.continuation(PROMPT, 30), sampling, emit, model.config.vocab_size)

    scheduler = Scheduler(model.engine, slots=3, length=64, most_waiting=9)
    scheduler.submit([text(number) for number in range(4)])
    for _ in range(4):
        assert done.acquire(timeout=200)
    scheduler.close()
    for number in (0, 3):
        assert "".join(event.text for event in events[number]) == whole
    for number in (1, 2):
        assert isinstance(events[number][-1].error, ConfigError)
    assert not scheduler.running and scheduler.batcher.free == 3


def test_impossible_values_are_400(server: LiveServer) -> None:
    pytest.importorskip("llguidance")
    for fields, message in WRONG:
        body = {"prompt": PROMPT, "max_tokens": 24, **fields}
        status, answer, _ = server.ask("/v1/completions", body)
        assert status == 400 and message in answer["error"]["message"], (fields, answer)
        assert "at most 0" not in answer["error"]["message"]
    # A form that turns out too large on the way is the request's fault in a stream, too.
    body = {"prompt": PROMPT, "guided_regex": "[a-z]{3}a{1000000}", "stream": True}
    _, page, _ = server.ask("/v1/completions", body)
    error = json.loads(page.split("\n\n")[-2].removeprefix("data: "))["error"]
    assert error["type"] == "invalid_request_error" and "too many expr" in error["message"]


VLLM = """add_special_tokens allowed_token_ids bad_words cache_salt guided_choice
guided_decoding_backend guided_grammar guided_json guided_regex guided_whitespace_pattern ignore_eos
include_stop_str_in_output kv_transfer_params length_penalty logits_processors min_p min_tokens
priority prompt_logprobs repetition_penalty request_id response_format return_token_ids
return_tokens_as_token_ids skip_special_tokens spaces_between_special_tokens stop_token_ids
structured_outputs top_k truncate_prompt_tokens use_beam_search vllm_xargs"""
VLLM_CHAT = """add_generation_prompt chat_template chat_template_kwargs continue_final_message
documents echo include_reasoning mm_processor_kwargs reasoning_effort"""


def test_every_field_of_both_apis_is_known() -> None:
    openai = pytest.importorskip("openai.types")
    from openai.types.chat import completion_create_params as chat

    theirs = typing.get_type_hints(openai.completion_create_params.CompletionCreateParamsStreaming)
    assert {*theirs, *VLLM.split()} <= CompletionRequest.model_fields.keys()
    theirs = typing.get_type_hints(chat.CompletionCreateParamsStreaming)
    assert {*theirs, *VLLM.split(), *VLLM_CHAT.split()} <= ChatRequest.model_fields.keys()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_is_not_supported_is_refused_by_name_and_passes_if_neutral(
    server: LiveServer, path: str
) -> None:
    body: dict[str, Any] = {"max_tokens": 4, "temperature": 0, "prompt": PROMPT}
    kind: type[CompletionRequest | ChatRequest] = CompletionRequest
    if "chat" in path:
        del body["prompt"]
        body["messages"] = [{"role": "user", "content": PROMPT}]
        kind = ChatRequest
    refused = {}
    for name, field in kind.model_fields.items():
        for one in field.metadata:
            if isinstance(one, Only):
                refused[name] = one
    assert len(refused) > 20
    for name in refused:
        status, answer, _ = server.ask(path, {**body, name: {"some": "thing"}})
        assert status == 400 and answer["error"]["param"] == name, name
        assert f"{name}: not supported by this server" in answer["error"]["message"]
    most = max(len(one.values) for one in refused.values())
    for place in range(most):
        neutral = {name: one.values[place % len(one.values)] for name, one in refused.items()}
        status, answer, _ = server.ask(path, {**body, **neutral})
        assert status == 200, answer
    nulls = dict.fromkeys(kind.model_fields.keys() - body.keys())
    assert server.ask(path, {**body, **nulls})[0] == 200
    neutral = {"logit_bias": {}, "stop_token_ids": [], "allowed_token_ids": [], "stop": [],
               "length_penalty": 1.0, "early_stopping": False, "min_p": 0, "min_tokens": 0,
               "repetition_penalty": 1.0, "top_k": 0, "user": "me",
               "presence_penalty": 0, "response_format": {"type": "text"}, "stream_options": {},
               "structured_outputs": {}, "guided_choice": []}  # fmt: skip
    assert server.ask(path, {**body, **neutral})[0] == 200


def chat(**fields: Any) -> ChatRequest:
    """A chat request."""
    return ChatRequest.model_validate({"messages": CALLING, **fields})


def test_conversations_are_those_of_transformers(talker: Path) -> None:
    """Tools, calls, names and ids reach the template; a message is continued as it does."""
    hf = pytest.importorskip("transformers")
    theirs = hf.AutoTokenizer.from_pretrained(talker)
    template = read_chat_template(talker)
    assert template is not None
    # transformers' templates get the arguments as an object.
    call = CALL | {"function": {"name": "find", "arguments": {"what": "é"}}}
    messages = [
        CALLING[0] | {"content": "find it"},
        CALLING[1] | {"tool_calls": [call]},
        CALLING[2],
    ]
    ours = chat_prompt(template, chat(tools=[TOOL]), {})
    want = theirs.apply_chat_template(
        messages, tools=[TOOL], tokenize=False, add_generation_prompt=True
    )
    assert (
        ours == want and "[find ]" in want and "<user Ann>" in want and 'find{"what": "é"}' in want
    )
    assert "#7" in want and want.endswith("<assistant>")
    assert "[find ]" not in chat_prompt(template, chat(tools=[TOOL], tool_choice="none"), {})
    silent = chat_prompt(template, chat(add_generation_prompt=False), {})
    assert silent == theirs.apply_chat_template(messages, tokenize=False)
    spoken = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The naïve "}]
    continued = chat_prompt(template, chat(messages=spoken, continue_final_message=True), {})
    assert continued == theirs.apply_chat_template(
        spoken, tokenize=False, continue_final_message=True
    )
    assert continued.endswith("<assistant>The naïve ")


def test_a_template_that_does_not_read_tools_refuses_them() -> None:
    deaf = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", "here")
    for fields in ({"tools": [TOOL]}, {"documents": [{"text": "a"}]}, {"reasoning_effort": "low"}):
        (name,) = fields
        with pytest.raises(ConfigError, match=f"{name}: the model's chat template does not read"):
            chat_prompt(deaf, chat(messages=[{"role": "user", "content": "a"}], **fields), {})
    plain = ChatTemplate("{% for m in messages %}{{ m.role }}{% endfor %}{{ level }}", "here")
    assert chat_prompt(plain, chat(chat_template_kwargs={"level": 3}), {}) == "userassistanttool3"


CALLS = "{% for m in messages %}{% for c in m.tool_calls or [] %}"
CALLS += "{% set a = c.function.arguments %}ARGUMENTS;{% endfor %}{% endfor %}"
GIVEN = '{"text":  "é", "n": 1}'
"""JSON with a blank that no encoder writes, and the name of an attribute."""


@pytest.mark.parametrize(
    ("arguments", "given", "written"),
    [
        ("{{ a | tojson }}", GIVEN, '{"text": "é", "n": 1}'),
        ("{{ a | tojson }}", {"text": "é", "n": 1}, '{"text": "é", "n": 1}'),
        ("{{ a | tojson }}", "", "{}"),
        ("{{ a | tojson }}", "[1]", '"[1]"'),
        ("{{ a | tojson }}", "not JSON", '"not JSON"'),
        ("{{ a.text }}{% for k, v in a.items() %},{{ k }}={{ v }}{% endfor %}", GIVEN,
         "é,text=é,n=1"),
        ("{% if a is string %}text{% else %}{{ a | tojson }}{% endif %}", GIVEN,
         '{"text": "é", "n": 1}'),
        ("{{ a }}", GIVEN, GIVEN),
        ("{{ '[' + a + ']' }}", GIVEN, f"[{GIVEN}]"),
        ("{{ '[' ~ a ~ ']' }}", "", "[]"),
    ],
)  # fmt: skip
def test_a_call_is_trained_on_as_it_is_served(
    tmp_path: Path, arguments: str, given: Any, written: str
) -> None:
    """One conversation through the server and through `prepare --chat`."""
    call = CALL | {"function": {"name": "find", "arguments": given}}
    messages = [CALLING[0], CALLING[1] | {"tool_calls": [call, call]}, CALLING[2]]
    path = tmp_path / "template.jinja"
    path.write_text(CALLS.replace("ARGUMENTS", arguments))
    template = read_chat_template(None, path)
    assert template is not None
    served = chat_prompt(template, chat(messages=messages, add_generation_prompt=False), {})
    lines = tmp_path / "chats.jsonl"
    lines.write_text(json.dumps({"messages": messages}) + "\n")
    options = ChatOptions(template=str(path), mask=False)
    prepare([lines], tmp_path / "out", "bytes", keys=("messages",), chat=options)
    (tokens,) = IndexedDataset(tmp_path / "out_messages_document")[:]
    assert load_tokenizer("bytes").decode(tokens.tolist()) == served == f"{written};" * 2


def test_the_official_client_sends_fields(server: LiveServer, speaker: LanguageModel) -> None:
    openai = pytest.importorskip("openai")
    pytest.importorskip("llguidance")
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0
    )
    name = next(iter(server.pool.locations))
    made = client.completions.create(
        model=name, prompt=PROMPT, max_tokens=20, temperature=0, logit_bias={"101": -100}, seed=-1
    )
    assert made.choices[0].text == speaker.generate(PROMPT, 20, logit_bias={101: -100.0})
    stream = client.chat.completions.create(
        model=name,
        messages=CALLING,
        tools=[TOOL],
        max_completion_tokens=120,
        response_format=FORMS[0]["response_format"],
        extra_body={"repetition_penalty": 1.1, "min_p": 0.01},
        seed=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert json.loads("".join(pieces)).keys() == {"drink", "n"}
    with pytest.raises(openai.BadRequestError, match="tool_choice: not supported by this server"):
        client.chat.completions.create(
            model=name, messages=CALLING, tools=[TOOL], tool_choice="required"
        )
