"""Engines over their exports: equal greedy text in float32, quality in the card, clear errors."""

import json
import sys
from pathlib import Path

import pytest
import torch

import castalia
from castalia.checkpoint import Store
from castalia.config import dump_yaml
from castalia.core.errors import CheckpointError, ConfigError, DataError
from castalia.distributed import initialize
from castalia.export import export, parity
from castalia.inference import LanguageModel
from castalia.inference.engine import Engine
from castalia.inference.engines import ENGINES, engine_of_export
from castalia.machine.onednn import byte_steps
from castalia.models import Decoder, NeoxConfig
from castalia.models.init import start_weights
from castalia.native.weights import CONFIG_FILE, WEIGHTS_FILE, load_weights
from castalia.runs.config import RunConfig

PROMPTS = ["The naïve", "A second guest, who came in", "def", "", "asked for the same 🍵"]
EXACT = {"native": "fp32", "ct2": "float32", "gguf": "F32"}
QUANTIZED = [
    ("native", "int8"),
    ("native", "int4"),
    ("ct2", "int8"),
    ("gguf", "Q8_0"),
    ("gguf", "Q4_0"),
]


def require_engine(to: str) -> None:
    """Skip where the engine is not installed."""
    engine = engine_of_export(to)
    assert engine is not None
    if not engine.is_installed():
        pytest.skip(f"the package that runs {to} exports is not installed")


def exported(run: Path, folder: Path, to: str, numbers: str, **options: object) -> Path:
    """One export."""
    (done,) = export(run, to=to, quantization=numbers, output=folder, **options)
    return Path(done.folder)


@pytest.mark.parametrize("to", EXACT)
def test_greedy_text_of_float32_engines_is_identical(
    run_folder: Path, speaker: LanguageModel, known_text: str, tmp_path: Path, to: str
) -> None:
    require_engine(to)
    model = castalia.load(exported(run_folder, tmp_path / "out", to, EXACT[to]))
    assert model.generate(PROMPTS, 40) == speaker.generate(PROMPTS, 40)
    assert "".join(model.stream("The naïve", 40)) == speaker.generate("The naïve", 40)
    steering = {"repetition_penalty": 4.0, "min_tokens": 3, "stop_token_ids": [ord("w")]}
    assert model.generate(PROMPTS[:2], 12, **steering) == speaker.generate(
        PROMPTS[:2], 12, **steering
    )
    # llama.cpp takes GELU from a table in float16.
    tolerance = 0.02 if to == "gguf" else 2e-4
    assert (model.logprobs(known_text) - speaker.logprobs(known_text)).abs().max() < tolerance
    beams = {"num_beams": 3, "num_return_sequences": 2, "no_repeat_ngram_size": 3}
    found = model.complete(PROMPTS[:2], 12, **beams)
    for got, want in zip(found, speaker.complete(PROMPTS[:2], 12, **beams), strict=True):
        assert got.tokens == want.tokens and got.score == pytest.approx(want.score, abs=tolerance)
    drawn = model.generate(PROMPTS[:3], 12, temperature=0.8, top_k=20, seed=3)
    if to != "gguf":
        assert drawn == speaker.generate(PROMPTS[:3], 12, temperature=0.8, top_k=20, seed=3)
    assert drawn == model.generate(PROMPTS[:3], 12, temperature=0.8, top_k=20, seed=3)


@pytest.mark.parametrize(("to", "numbers"), QUANTIZED)
def test_the_card_says_what_quantization_changes(
    run_folder: Path, speaker: LanguageModel, known_text: str, tmp_path: Path, to: str, numbers: str
) -> None:
    require_engine(to)
    text = tmp_path / "heldout.txt"
    text.write_text(known_text, encoding="utf-8")
    folder = exported(run_folder, tmp_path / "out", to, numbers, heldout=text)
    record = json.loads((folder / "export.json").read_text())
    found = record["quality"]
    assert found["tokens"] == len(speaker.encode(known_text)) - 1 and found["text"] == "heldout.txt"
    losses = -speaker.logprobs(known_text)
    assert found["perplexity_fp32"] == pytest.approx(losses.mean().exp().item(), rel=0.02)
    assert found["perplexity"] == pytest.approx(found["perplexity_fp32"], rel=0.1)
    bound = 0.1 if "4" in numbers else 0.01
    if to == "ct2" and byte_steps() < 255:
        # Its sums overflow as oneDNN's would.
        bound = 0.05
    assert 0 < found["kl"] < bound and found["greedy_agreement"] > 0.9
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert (
        f"{found['greedy_agreement']:.2%}" in card
        and "SHA-256" in card
        and str(tmp_path) not in card
    )
    assert castalia.load(folder).quality == found
    assert castalia.load(folder).generate("The naïve", 30) == speaker.generate("The naïve", 30)


def test_int4_changes_more_than_int8(run_folder: Path, tmp_path: Path, known_text: str) -> None:
    text = tmp_path / "heldout.txt"
    text.write_text(known_text, encoding="utf-8")
    kl = {}
    for numbers in ("fp32", "bf16", "int8", "int4"):
        (done,) = export(
            run_folder, to="native", quantization=numbers, output=tmp_path / numbers, heldout=text
        )
        kl[numbers] = done.quality["kl"]
    assert kl["fp32"] < 1e-6 < kl["int8"] < kl["int4"]


def test_an_export_beyond_max_kl_is_not_written(
    run_folder: Path, tmp_path: Path, known_text: str
) -> None:
    text, folder = tmp_path / "heldout.txt", tmp_path / "out"
    text.write_text(known_text, encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"out was not written: its perplexity .* KL .*; max_kl is 1e-06"
    ):
        exported(run_folder, folder, "native", "int4", heldout=text, max_kl=1e-6)
    assert [item.name for item in tmp_path.iterdir()] == ["heldout.txt"]
    exported(run_folder, folder, "native", "int4", heldout=text, max_kl=0.5)
    with pytest.raises(ConfigError, match="max_kl needs held-out text"):
        exported(run_folder, tmp_path / "other", "native", "int8", max_kl=0.5)
    with pytest.raises(DataError, match="cannot read the held-out text"):
        exported(run_folder, tmp_path / "other", "native", "int8", heldout=tmp_path / "no.txt")


def test_a_native_export_is_mapped_and_small(run_folder: Path, tmp_path: Path) -> None:
    folder = exported(run_folder, tmp_path / "out", "native", "int8")
    data = (folder / WEIGHTS_FILE).read_bytes()
    assert (8 + int.from_bytes(data[:8], "little")) % 64 == 0
    weights = load_weights(folder)
    exact = castalia.load(run_folder, engine="torch").model
    parameters = sum(tensor.nbytes for tensor in exact.state_dict().values())
    assert weights.nbytes() < 0.32 * parameters and len(data) < weights.nbytes() + 8192
    with open("/proc/self/maps") as maps:
        assert WEIGHTS_FILE in maps.read()


def test_dtype_auto_decodes_in_int8_and_scores_in_it_where_nothing_is_faster(
    run_folder: Path, speaker: LanguageModel, known_text: str, tmp_path: Path
) -> None:
    folder = exported(run_folder, tmp_path / "out", "native", "int8")
    for model in (
        castalia.load(run_folder, dtype="auto"),
        castalia.load(folder),
        castalia.load(folder, dtype="auto"),
    ):
        # Layers this small are not measured.
        assert (model.engine.name, model.engine.numbers, model.engine.scoring) == (
            "native",
            "int8",
            "int8",
        )
        assert model.step == 220 and model.generate("The naïve", 30) == speaker.generate(
            "The naïve", 30
        )
        assert (model.logprobs(known_text) - speaker.logprobs(known_text)).abs().mean() < 0.03
    exact = castalia.load(folder, dtype="int8")
    assert exact.engine.scoring == "int8"
    assert castalia.load(run_folder, engine="native", dtype="bf16").engine.numbers == "bf16"


def test_parity_of_dtype_auto(run_folder: Path, tmp_path: Path, known_text: str) -> None:
    text = tmp_path / "heldout.txt"
    text.write_text(known_text, encoding="utf-8")
    found = parity(run_folder, dtype="auto", heldout=text)
    assert 0 < found.decoding.kl < 0.01 and found.decoding.greedy_agreement > 0.95
    assert 0 < found.scoring_error < 0.05
    assert found.scoring_perplexity == pytest.approx(found.scoring_perplexity_fp32, rel=0.03)
    assert "native int8 decodes: perplexity" in str(
        found
    ) and "native int8 scores: perplexity" in str(found)
    with pytest.raises(ConfigError, match="names no held-out text; give heldout"):
        parity(run_folder)


@pytest.mark.parametrize("damage", ["shorter", "gone", "header", "listing", "version"])
def test_a_damaged_native_export_is_one_sentence(
    run_folder: Path, tmp_path: Path, damage: str
) -> None:
    folder = exported(run_folder, tmp_path / "out", "native", "int8")
    file, listing = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    if damage == "shorter":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "gone":
        file.unlink()
    elif damage == "header":
        file.write_bytes(b"\xff" * 20)
    elif damage == "listing":
        listing.write_text("{}")
    else:
        listing.write_text(listing.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(
        CheckpointError, match=r"export (the model )?again|reads castalia-native version 1"
    ):
        castalia.load(folder, verify=False)


@pytest.mark.parametrize("to", ["ct2", "gguf"])
def test_a_truncated_file_of_another_engine_is_one_sentence(
    run_folder: Path, tmp_path: Path, to: str
) -> None:
    require_engine(to)
    folder = exported(run_folder, tmp_path / "out", to, EXACT[to])
    file = folder / {"ct2": "model.bin", "gguf": "model.gguf"}[to]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="cannot load"):
        castalia.load(folder, verify=False)


def test_a_missing_tokenizer_is_one_sentence(
    run_folder: Path, speaker: LanguageModel, tmp_path: Path
) -> None:
    folder = exported(run_folder, tmp_path / "out", "native", "int8")
    (folder / "tokenizer.json").unlink()
    assert castalia.load(folder, verify=False).generate_ids([84, 104], 4) == speaker.generate_ids(
        [84, 104], 4
    )
    with pytest.raises(ConfigError, match="no tokenizer; give ids"):
        castalia.load(folder, verify=False).generate("Th")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"engine": "natve"},
            "unknown engine 'natve'; choose one of auto, native, torch, ct2.*did you mean 'native'",
        ),
        (
            {"engine": "native", "dtype": "int5"},
            "unknown dtype 'int5' for engine=native; choose one of auto, fp32, bf16, fp16, int8",
        ),
        ({"engine": "native", "device": "cuda"}, "engine=native runs on the CPU"),
        ({"engine": "ct2"}, "engine=ct2 runs an export: castalia export .* --to ct2"),
        ({"engine": "torch", "dtype": "int8"}, "unknown dtype 'int8' for engine=torch"),
    ],
)
def test_wrong_options_are_named(run_folder: Path, options: dict, message: str) -> None:
    if options.get("engine") == "ct2":
        require_engine("ct2")
    with pytest.raises(ConfigError, match=message):
        castalia.load(run_folder, **options)


def test_an_export_is_for_its_engine(run_folder: Path, tmp_path: Path) -> None:
    folder = exported(run_folder, tmp_path / "out", "native", "int8")
    with pytest.raises(ConfigError, match="is an export for engine=native, not torch"):
        castalia.load(folder, engine="torch")
    with pytest.raises(ConfigError, match="stores int8 weights, not int4"):
        castalia.load(folder, dtype="int4")


@pytest.mark.parametrize(
    ("engine", "module", "extra"),
    [
        ("llama.cpp", "llama_cpp", "llama"),
        ("ct2", "ctranslate2", "ct2"),
        ("openvino", "openvino", "openvino"),
    ],
)
def test_a_missing_package_is_one_sentence(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, engine: str, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"engine={engine} needs '{module}'.*\[{extra}\]"):
        castalia.load(run_folder, engine=engine)


@pytest.mark.parametrize("numbers", ["fp32", "int8"])
def test_openvino_says_the_same(
    run_folder: Path, speaker: LanguageModel, known_text: str, numbers: str
) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    model = castalia.load(run_folder, engine="openvino", dtype=numbers)
    assert model.engine.numbers == numbers
    assert model.generate(PROMPTS[:3], 30) == speaker.generate(PROMPTS[:3], 30)
    error = (model.logprobs(known_text) - speaker.logprobs(known_text)).abs()
    assert error.max() < 1e-4 if numbers == "fp32" else error.mean() < 0.02
    if numbers == "fp32":
        options = {"temperature": 1.3, "top_p": 0.9, "seed": 3}
        assert model.generate(PROMPTS[:3], 12, **options) == speaker.generate(
            PROMPTS[:3], 12, **options
        )
        with pytest.raises(ConfigError, match="unknown dtype 'int4' for engine=openvino"):
            castalia.load(run_folder, engine="openvino", dtype="int4")


@pytest.mark.parametrize(
    "options",
    [
        {"parallel_residual": False, "activation": "gelu", "rotary_pct": 1.0},
        {"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "rotary_pct": 0},
    ],
)
def test_openvino_runs_every_option(tmp_path: Path, options: dict) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    run = save_run(tmp_path / "run", **options)
    model, exact = castalia.load(run, engine="openvino", dtype="fp32"), castalia.load(run)
    ids = torch.randint(0, 257, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    assert (model.logits(ids) - exact.logits(ids)).abs().max() < 1e-5
    slots = model.engine.slots(2, 100)
    slots.feed([0], [ids[:20]])
    slots.copy(0, 1, 8)
    assert (slots.feed([1], [ids[8:12]])[0] - exact.logits(ids)[11]).abs().max() < 1e-5


def save_run(folder: Path, **options: object) -> Path:
    """A run of random weights with an architecture option."""
    sizes = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 257}
    config = NeoxConfig(**{**sizes, **options})
    model = Decoder(config)
    initialize(model, start_weights(model.config, 0))
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    files = {"config.yaml": dump_yaml(RunConfig(model=config, data={"seq_length": 64}))}
    castalia.tokenizers.tokenizer.load_tokenizer("bytes").save(folder / "tokenizer.json")
    files["tokenizer.json"] = (folder / "tokenizer.json").read_text("utf-8")
    Store(folder / "checkpoints").save(1, tensors, {"step": 1}, files, asynchronous=False)
    return folder


@pytest.mark.parametrize(
    ("options", "numbers", "message"),
    [
        (
            {"activation": "gelu"},
            "F32",
            "engine=llama.cpp does not implement activation='gelu', only 'gelu_tanh'",
        ),
        ({"rotary_pct": 0}, "F32", "llama.cpp cannot express rotary_pct=0"),
        (
            {"hidden_size": 48},
            "Q8_0",
            "Q8_0 needs widths in multiples of 32; the model has 48 and 192",
        ),
    ],
)
def test_what_llama_cpp_cannot_express(
    tmp_path: Path, options: dict, numbers: str, message: str
) -> None:
    run = save_run(tmp_path / "run", **options)
    with pytest.raises(ConfigError, match=message):
        exported(run, tmp_path / "out", "gguf", numbers)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [{"parallel_residual": False}, {"tie_word_embeddings": True, "attention_bias": False}],
)
def test_llama_cpp_runs_the_options_that_it_can_express(tmp_path: Path, options: dict) -> None:
    require_engine("gguf")
    run = save_run(tmp_path / "run", **options)
    ids = torch.randint(0, 257, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    theirs = castalia.load(exported(run, tmp_path / "out", "gguf", "F32")).logits(ids)
    assert (theirs - castalia.load(run).logits(ids)).abs().max() < 5e-3


def test_native_keeps_the_rounded_angles_of_neox(tmp_path: Path) -> None:
    run = save_run(
        tmp_path / "run", rope_numerics="neox_v1_fp16", hidden_size=64, max_position_embeddings=1024
    )
    folder = exported(run, tmp_path / "out", "native", "fp32")
    assert not json.loads((folder / "export.json").read_text())["notes"]
    ids = torch.randint(0, 257, (900,), generator=torch.Generator().manual_seed(0)).tolist()
    assert (castalia.load(folder).logits(ids) - castalia.load(run).logits(ids)).abs().max() < 1e-4


def cell(engine: type[Engine]) -> str:
    """The cells of an engine's row in the docs, as its class declares them."""
    reads = ["a checkpoint, a Hugging Face folder"] if engine.reads_checkpoints else []
    reads += [f"`export --to {engine.export_kind}`"] if engine.export_kind else []
    dtypes = ", ".join(engine.dtypes) or "as exported"
    extra = engine.package.extra if engine.package else ""
    cells = [f"`{engine.name}`", ", ".join(reads), dtypes, ", ".join(engine.devices)]
    cells += [engine.batching, engine.scores, extra]
    return "| " + " | ".join(cells).rstrip() + " |"


@pytest.mark.parametrize("name", list(ENGINES))
def test_the_table_of_engines_is_what_they_declare(name: str) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "inference.md").read_text()
    assert cell(ENGINES[name]) in page
