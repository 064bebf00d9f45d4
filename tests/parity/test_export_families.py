"""Every family in CTranslate2 and llama.cpp: their logits and greedy texts are ours."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import castalia
from castalia.checkpoint import Store
from castalia.config import dump_yaml
from castalia.core.errors import ConfigError
from castalia.distributed import initialize
from castalia.export import export
from castalia.export.formats import EXPORTS
from castalia.inference import LanguageModel
from castalia.inference.engines import engine_of_export
from castalia.inference.gguf_architectures import ARCHITECTURES, architecture_of
from castalia.machine.onednn import byte_steps
from castalia.models import Decoder
from castalia.models.families import build_model_config
from castalia.models.init import start_weights
from castalia.runs.config import RunConfig
from castalia.tokenizers.tokenizer import load_tokenizer

SIZES = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 257}
GROUPED = {"num_kv_heads": 2}
SERIAL = {"parallel_residual": False, "shared_norm": False}
BIASES = {"attention_bias": True, "mlp_bias": True}
ALIBI = {"pos_emb": "alibi", "alibi_scaled": True}
MOE = {"experts": 4, "top_k": 2, "expert_size": 96}
EXACT = {"ct2": "float32", "gguf": "F32"}


def scaled(kind: str) -> dict[str, Any]:
    """Frequencies scaled by 4 from rows of 32 tokens."""
    scaling = {"kind": kind, "factor": 4.0, "original_max_position_embeddings": 32}
    return GROUPED | {"rope_scaling": scaling}


CASES: dict[str, tuple[str, dict[str, Any], str | None, bool]] = {
    "neox": ("neox", {"rotary_pct": 0.5}, "gptneox", True),
    "neox-swiglu": (
        "neox",
        SERIAL | {"norm": "rmsnorm", "activation": "swiglu", "rotary_pct": 1.0},
        "llama",
        True,
    ),
    "neox-multipliers": (
        "neox",
        {
            "norm": "non_parametric_layernorm",
            "shared_norm": True,
            "embedding_multiplier": 2.0,
            "output_multiplier": 0.5,
            "tie_word_embeddings": True,
        },
        "gptneox",
        True,
    ),
    "llama": ("llama", scaled("llama3"), "llama", True),
    "llama-linear": ("llama", scaled("linear") | BIASES, "llama", True),
    "llama-yarn": ("llama", scaled("yarn") | {"attention_head_dim": 32}, "llama", True),
    "mistral": ("mistral", GROUPED, "llama", True),
    "falcon": ("falcon", {"activation": "gelu_tanh"}, "falcon", True),
    "falcon-40b": (
        "falcon",
        GROUPED | {"activation": "gelu_tanh", "shared_norm": False},
        "falcon",
        True,
    ),
    "falcon-rw": ("falcon", SERIAL | BIASES | ALIBI | {"num_kv_heads": 4}, None, True),
    "falcon-alibi": (
        "falcon",
        SERIAL | BIASES | {"pos_emb": "alibi", "alibi_scaled": False, "num_kv_heads": 4},
        None,
        True,
    ),
    "gpt2": ("gpt2", {}, "gpt2", True),
    "gpt2-alibi": ("gpt2", {"pos_emb": "alibi"}, "mpt", True),
    "gpt2-sinusoidal": ("gpt2", {"pos_emb": "sinusoidal"}, "gpt2", True),
    "qwen2": ("qwen2", scaled("ntk"), "qwen2", True),
    "qwen2-yarn": ("qwen2", scaled("yarn"), "qwen2", True),
    "qwen3": (
        "qwen2",
        GROUPED | {"qkv_bias": False, "qk_norm": "head", "attention_head_dim": 32},
        "qwen3",
        True,
    ),
    "olmo2": (
        "olmo2",
        {"sliding_window": 16, "attention_config": ["sliding", "global"]},
        "olmo2",
        False,
    ),
    "palm": ("palm", {}, "stablelm", True),
    "mixtral": (
        "mistral",
        GROUPED | {"sliding_window": None, "moe": MOE | {"normalize": True}},
        "llama",
        False,
    ),
    "olmoe": ("llama", {"qk_norm": "width", "moe": MOE}, "olmoe", False),
    "qwen2moe": (
        "qwen2",
        GROUPED | {"moe": MOE | {"shared_size": 64, "shared_gate": True}},
        "qwen2moe",
        False,
    ),
}
"""Family and options; llama.cpp's architecture, None if it has none; whether CTranslate2 has it."""
UNREAD = {
    "llama": r"those of no known llama3 scaling",
    "llama-yarn": r"those of no known llama3 scaling",
    "gpt2-alibi": r"unknown general.architecture 'mpt'",
    "palm": r"unknown general.architecture 'stablelm'",
}
"""What Castalia's own reader of GGUF files, which is for published models, says of others."""
GELU = ("gelu", "gelu_tanh")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only make threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_run(folder: Path, family: str, **options: Any) -> Path:
    """A byte-level run whose weights are random and far from small, so that no two logits tie."""
    sizes = {**SIZES, "max_position_embeddings": 128, **options}
    config = build_model_config({"family": family, **sizes}, "a test")
    files = {"config.yaml": dump_yaml(RunConfig(model=config, data={"seq_length": 64}))}
    load_tokenizer("bytes").save(folder / "tokenizer.json")
    files["tokenizer.json"] = (folder / "tokenizer.json").read_text("utf-8")
    model = Decoder(config)
    initialize(model, start_weights(model.config, 0))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.{name}": tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }
    Store(folder / "checkpoints").save(3, tensors, {"step": 3}, files, asynchronous=False)
    return folder


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a case, whose run is in `RUNS`."""
    family, options, _, _ = CASES[request.param]
    RUNS[request.param] = save_run(
        tmp_path_factory.mktemp(request.param) / "run", family, **options
    )
    return str(request.param)


RUNS: dict[str, Path] = {}


def require_engine(to: str) -> None:
    """Skip where the package that runs an export is not installed."""
    engine = engine_of_export(to)
    assert engine is not None
    if not engine.is_installed():
        pytest.skip(f"the package that runs {to} exports is not installed")


def exported(run: Path, folder: Path, to: str, numbers: str | None = None) -> LanguageModel:
    """An export of a run, on its engine."""
    list(export(run, to=to, quantization=numbers or EXACT[to], output=folder, certificate=False))
    return castalia.load(folder)


@pytest.mark.parametrize("to", EXACT)
def test_logits_and_greedy_text_are_ours(case: str, tmp_path: Path, to: str) -> None:
    require_engine(to)
    _, _, architecture, ct2 = CASES[case]
    run = RUNS[case]
    if (to == "gguf" and architecture is None) or (to == "ct2" and not ct2):
        with pytest.raises(ConfigError, match=r"does not implement ([a-z_]+=|model\.moe;)"):
            exported(run, tmp_path / "out", to)
        return
    ours = castalia.load(run)
    theirs = exported(run, tmp_path / "out", to)
    if to == "gguf":
        assert architecture_of(theirs.config).name == architecture
    ids = torch.randint(0, 257, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    want = ours.logits(ids)
    assert want.std() > 1
    # llama.cpp takes GELU from a table in float16.
    table = to == "gguf" and theirs.config.activation in GELU
    tolerance = 1e-2 if table else {"ct2": 1e-4, "gguf": 1e-3}[to]
    assert (theirs.logits(ids) - want).abs().max() < tolerance
    prompts = [ids[:9], ids[20:24], [5]]
    assert theirs.generate_ids(prompts, 24) == ours.generate_ids(prompts, 24)


def test_a_gguf_file_is_what_other_readers_expect(case: str, tmp_path: Path) -> None:
    """The gguf package reads names, shapes and keys; Castalia's own reader gives the model back."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    _, _, architecture, _ = CASES[case]
    if architecture is None:
        pytest.skip("llama.cpp has no such model")
    run = RUNS[case]
    list(export(run, to="gguf", quantization="F32", output=tmp_path / "out", certificate=False))
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    kind = reader.get_field("general.architecture").contents()
    assert kind == architecture
    known = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[kind]
    names = gguf.TensorNameMap(known, 2)
    for tensor in reader.tensors:
        base = tensor.name.rsplit(".", 1)[0]
        assert base in {name for _, name in names.mapping.values()}, tensor.name
    ours = castalia.load(run)
    values = {field.name: field.contents() for field in reader.fields.values()}
    assert values[f"{kind}.attention.head_count_kv"] == ours.config.kv_heads
    assert values[f"{kind}.attention.key_length"] == ours.config.head_dim
    shutil.copy(tmp_path / "out" / "model.gguf", tmp_path / "alone.gguf")
    if case in UNREAD:
        with pytest.raises(ConfigError, match=UNREAD[case]):
            castalia.load(tmp_path / "alone.gguf", engine="torch")
        return
    ids = list(range(40))
    back = castalia.load(tmp_path / "alone.gguf", engine="torch")
    assert (back.logits(ids) - ours.logits(ids)).abs().max() < 1e-4


def test_quantized_models_speak(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", "llama", **GROUPED)
    ours = castalia.load(run)
    ids = torch.randint(0, 257, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    want = ours.logits(ids)
    for to, numbers in (("ct2", "int8"), ("gguf", "Q8_0"), ("gguf", "F16")):
        if engine_of_export(to).is_installed():
            got = exported(run, tmp_path / numbers, to, numbers).logits(ids)
            # CTranslate2's sums of bytes overflow before VNNI, as oneDNN's would.
            bound = 0.4 if numbers == "int8" and byte_steps() < 255 else 0.15
            assert (got - want).abs().mean() < bound * want.std()


def test_the_docs_list_the_architectures() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "inference.md").read_text()
    assert all(f"`{architecture.name}`" in page for architecture in ARCHITECTURES)


def test_a_window_is_kept_where_it_can_be(tmp_path: Path) -> None:
    """CTranslate2 computes it for generated tokens alone; a GGUF file ends where it would begin."""
    run = save_run(tmp_path / "run", "mistral", sliding_window=24, **GROUPED)
    ours = castalia.load(run)
    ids = torch.randint(0, 257, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    if engine_of_export("ct2").is_installed():
        model = exported(run, tmp_path / "ct2", "ct2")
        assert model.generate_ids([ids[:24]], 60) == ours.generate_ids([ids[:24]], 60)
        assert (model.logits(ids[:24]) - ours.logits(ids[:24])).abs().max() < 1e-4
        with pytest.raises(ConfigError, match=r"cannot read 25 tokens .* sliding_window=24"):
            model.logits(ids[:25])
        with pytest.raises(ConfigError, match="cannot read 30 tokens at once"):
            model.generate_ids([ids[:30]], 4)
        assert "prompt of more than 24 tokens" in (tmp_path / "ct2" / "README.md").read_text()
    (done,) = export(run, to="gguf", quantization="F32", output=tmp_path / "gguf")
    assert "the file's context is 24 tokens" in done.notes[0]
    record = json.loads((tmp_path / "gguf" / "export.json").read_text())["model"]
    assert (record["max_position_embeddings"], record["sliding_window"]) == (24, None)
    if engine_of_export("gguf").is_installed():
        model = castalia.load(tmp_path / "gguf")
        assert (model.logits(ids[:24]) - ours.logits(ids[:24])).abs().max() < 1e-3
        with pytest.raises(ConfigError, match="reads from 1 to 24"):
            model.logits(ids[:25])


def test_a_table_of_positions_ends_with_the_window(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", "gpt2", sliding_window=16)
    ours = castalia.load(run).logits(list(range(16)))
    (done,) = export(run, to="gguf", quantization="F32", output=tmp_path / "gguf")
    # A file of floats is a model for every engine.
    read = castalia.load(tmp_path / "gguf", engine="torch", dtype="fp32")
    assert read.config.max_position_embeddings == 16
    assert (read.logits(list(range(16))) - ours).abs().max() < 1e-4
    if engine_of_export("gguf").is_installed():
        # llama.cpp takes GELU from a table in float16.
        assert done.certificate["largest_difference"] < 1e-2
    list(export(run, to="gguf", quantization="Q8_0", output=tmp_path / "q8", certificate=False))
    with pytest.raises(ConfigError, match=r"for engine=llama\.cpp, not torch"):
        castalia.load(tmp_path / "q8", engine="torch")


@pytest.mark.parametrize(
    ("family", "options", "to", "message"),
    [
        ("llama", scaled("dynamic"), "ct2", "rope_scaling.kind='dynamic', only None, 'linear'"),
        ("llama", scaled("dynamic"), "gguf", "rope_scaling.kind='dynamic', only None, 'linear'"),
        ("qwen2", scaled("yarn") | {"qk_norm": "width"}, "ct2", "qk_norm='width', only 'none'"),
        ("olmo2", {"qk_norm": "none"}, "ct2", "norm_placement='post'"),
        ("neox", {"norm": "scalenorm"}, "ct2", "norm='scalenorm', only 'layernorm'"),
        ("neox", {"norm": "scalenorm"}, "gguf", "norm='scalenorm', only 'layernorm'"),
        ("neox", {"activation": "mish"}, "ct2", "activation='mish', only 'gelu'"),
        ("neox", {"activation": "relu2"}, "gguf", "activation='relu2', only 'gelu_tanh'"),
        ("neox", {"pos_emb": "rpe"}, "ct2", "pos_emb='rpe', only 'rotary'"),
        ("neox", {"pos_emb": "none"}, "gguf", "pos_emb='none', only 'rotary'"),
        ("llama", {"rmsnorm_partial": 0.5}, "gguf", "rmsnorm_partial=0.5"),
        ("llama", {"parallel_residual": True}, "gguf", "parallel_residual=True, only False"),
        ("palm", {"shared_norm": False}, "gguf", "parallel_residual=True with shared_norm=False"),
        ("gpt2", {"attention_head_dim": 8}, "gguf", "attention_head_dim=8 of 4 heads"),
        ("falcon", {"rotary_pct": 0.5, "activation": "gelu"}, "gguf", "activation='gelu'"),
        (
            "mistral",
            {"sliding_window": 8, "attention_config": ["sliding", "global"]},
            "ct2",
            "attention_config=.'sliding', 'global'.: all its layers have one",
        ),
        ("olmo2", {"attention_config": ["bigbird"]}, "gguf", "attention_config=.'bigbird'"),
        ("llama", {"attention_config": ["bigbird"]}, "ct2", "attention_config=.'bigbird'"),
        (
            "olmo2",
            {"sliding_window": 8, "rope_scaling": {"kind": "linear", "factor": 2.0}},
            "gguf",
            "sliding_window with rope_scaling.kind='linear' for olmo2",
        ),
        (
            "qwen2",
            {"rope_scaling": {"kind": "yarn", "factor": 2.0, "beta_fast": 8}, "qk_norm": "head"},
            "gguf",
            "rope_scaling.beta_fast=8.0 for qwen3",
        ),
        (
            "neox",
            {"rope_scaling": {"kind": "yarn", "factor": 2.0}},
            "ct2",
            "rope_scaling.attention_factor with rotary_pct=0.25",
        ),
        (
            "llama",
            {"num_attention_heads": 2, "attention_head_dim": 24},
            "Q8_0",
            "the heads have 48 together",
        ),
    ],
)
def test_what_an_engine_lacks_is_named(
    family: str, options: dict[str, Any], to: str, message: str
) -> None:
    config = build_model_config({"family": family, **SIZES, **options}, "a test")
    reason = EXPORTS[to if to in EXACT else "gguf"].refuses(config, EXACT.get(to, to))
    assert reason is not None
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(reason)
