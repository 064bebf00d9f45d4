"""The harness on Castalia's engine and its own `hf` model on the export: the same numbers."""

import contextlib
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tests.fixtures.harness_tasks import WORDS
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from castalia.checkpoint import Store
from castalia.config import dump_yaml
from castalia.distributed import initialize
from castalia.eval.harness.evaluate import Evaluation, evaluate
from castalia.eval.harness.numbers import metrics_of
from castalia.eval.harness.tasks import open_tasks
from castalia.export import export
from castalia.inference import load
from castalia.models import Decoder, NeoxConfig
from castalia.models.families.llama import LlamaConfig
from castalia.models.init import start_weights
from castalia.runs.config import RunConfig
from castalia.tokenizers.tokenizer import load_tokenizer

pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    # Shorter than the longest examples, so that contexts are cut and texts have several windows.
    "max_position_embeddings": 96,
    "make_vocab_size_divisible_by": 1,
}
BOOTSTRAP = 2000


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only make threads wait for one another; and no process pools."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # The harness's bootstrap in one process draws the same numbers.
        patch.setenv("DISABLE_MULTIPROC", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield
    torch.set_num_threads(threads)


def sentencepiece_like() -> str:
    """The tokenizer.json of a LLaMA-like tokenizer: <s> before every text, words that begin with a
    space, a decoder that strips the first one."""
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=names, show_progress=False)
    inner.train_from_iterator([" ".join(WORDS) + " Question: Answer: plus What is"] * 9, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    content = json.loads(inner.to_str())
    for token in content["added_tokens"]:
        # The bytes are tokens like any other.
        token["special"] = token["id"] < 3
    return json.dumps(content)


def saved(folder: Path, config: NeoxConfig | LlamaConfig, tokenizer: str) -> Path:
    """A run with one checkpoint whose weights are random and far from small."""
    model = Decoder(config)
    initialize(model, start_weights(config, 3))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        tensors[f"model.{name}"] = tensor.detach() + 0.2 * noise
    run = RunConfig(model=config, data={"seq_length": 64})
    files = {"config.yaml": dump_yaml(run), "tokenizer.json": tokenizer}
    Store(folder / "checkpoints").save(1, tensors, {"step": 1}, files, asynchronous=False)
    return folder


@pytest.fixture(scope="module", params=["neox", "llama"])
def models_of_both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """What Castalia loads, and the export that `hf` loads."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "neox":
        config = NeoxConfig(**SIZES, vocab_size=257, rotary_pct=0.5)
        run = saved(folder / "run", config, load_tokenizer("bytes").text)
    else:
        text = sentencepiece_like()
        size = tokenizers.Tokenizer.from_str(text).get_vocab_size()
        run = saved(folder / "run", LlamaConfig(**SIZES, vocab_size=size), text)
    list(export(run, to="hf", output=folder / "hf"))
    if request.param == "neox":
        return run, folder / "hf"
    # As in a folder of LLaMA's: the text begins and ends with different tokens.
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        content = json.loads((folder / "hf" / name).read_text())
        if name == "tokenizer_config.json":
            content["bos_token"] = "<s>"
        else:
            content["bos_token_id"] = 1
        (folder / "hf" / name).write_text(json.dumps(content))
    # An edited folder is no export any more.
    (folder / "hf" / "export.json").unlink()
    return folder / "hf", folder / "hf"


def of_hf(folder: Path, tasks: list[str], task_folder: Path, **options: Any) -> dict[str, Any]:
    """What `lm_eval --model hf` writes, in float32 on the CPU."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(str(folder), dtype="float32", device="cpu", batch_size=4)
    noise = io.StringIO()
    with (
        # The harness reads paths in a task's file relative to the current folder.
        contextlib.chdir(task_folder),
        contextlib.redirect_stdout(noise),
        contextlib.redirect_stderr(noise),
        pytest.MonkeyPatch.context() as patch,
    ):
        # A description of the machine, which takes seconds.
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        return lm_eval.simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=TaskManager(include_path=task_folder, include_defaults=False),
            bootstrap_iters=BOOTSTRAP,
            **options,
        )


def require_equal(theirs: dict[str, Any], done: Evaluation) -> int:
    """Compare every value and error to 1e-6; returns the number of metrics."""
    assert theirs["results"].keys() == done.json["results"].keys()
    compared = 0
    for task, values in theirs["results"].items():
        for metric, name, value, stderr in metrics_of(values):
            got = done[task, metric]
            assert got.filter == name
            # Of a byte-level model, the perplexity of words is 1e15: its logarithm is measured.
            scale = math.log if metric.endswith("perplexity") else float
            assert scale(got.value) == pytest.approx(scale(value), rel=1e-6, abs=1e-6), metric
            assert (got.stderr is None) == (stderr is None)
            if stderr is not None:
                assert scale(got.stderr) == pytest.approx(scale(stderr), rel=1e-6, abs=1e-6), metric
            compared += 1
    for key in ("versions", "n-shot", "higher_is_better", "n-samples", "group_subtasks"):
        assert theirs[key] == done.json[key]
    assert compared == len(done.numbers)
    return compared


def texts(samples: dict[str, Any], task: str) -> list[Any]:
    """What a model wrote, by document."""
    return [doc["resps"] for doc in samples[task]]


def test_every_metric_is_that_of_hf(models_of_both: tuple[Path, Path], task_folder: Path) -> None:
    ours, exported = models_of_both
    names = [
        *("local_group", "lambada_local", "pages_local"),
        *("stereotypes_local", "pronouns_local", "sums_local"),
    ]
    theirs = of_hf(exported, names, task_folder)
    tasks = open_tasks(names, include=[str(task_folder)])
    done = evaluate(load(ours), tasks, batch=3, bootstrap=BOOTSTRAP, samples=True)
    assert require_equal(theirs, done) == 13
    assert texts(theirs["samples"], "pronouns_local") == texts(done.samples, "pronouns_local")


def test_examples_and_chats_are_those_of_hf(
    models_of_both: tuple[Path, Path], task_folder: Path
) -> None:
    _, exported = models_of_both
    template = (
        "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (exported / "chat_template.jinja").write_text(template)
    names = ["choices_local", "pronouns_local", "sums_local"]
    tasks = open_tasks(names, include=[str(task_folder)], shots=2, limit=5)
    hashes = set()
    for chat in (False, True):
        theirs = of_hf(
            exported, names, task_folder, num_fewshot=2, limit=5, apply_chat_template=chat
        )
        done = evaluate(load(exported), tasks, bootstrap=BOOTSTRAP, samples=True, chat=chat)
        assert require_equal(theirs, done) == 4
        for name in names:
            prompts = [doc["arguments"] for doc in done.samples[name]]
            assert prompts == [doc["arguments"] for doc in theirs["samples"][name]]
            assert ("[assistant]" in str(prompts)) == chat
        hashes |= {one.task_hash for one in done.numbers}
        assert texts(theirs["samples"], "pronouns_local") == texts(done.samples, "pronouns_local")
    assert len(hashes) == 2 * len(names)
