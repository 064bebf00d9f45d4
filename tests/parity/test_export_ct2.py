"""CTranslate2 exports: text and scores in float32 equal Castalia's; other storages load."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from castalia.checkpoint import Store
from castalia.config import dump_yaml
from castalia.core.errors import CheckpointError, ConfigError
from castalia.core.extras import pip_command
from castalia.distributed import initialize
from castalia.export import export
from castalia.export.ct2 import ct2_keymap, ct2_vocabulary, write_ct2
from castalia.export.ct2_file import QUANTIZATIONS
from castalia.formats.saved_model import open_model
from castalia.inference import load
from castalia.inference.ct2_engine import Ct2Engine
from castalia.machine.onednn import byte_steps
from castalia.models import Decoder, NeoxConfig
from castalia.models.init import start_weights
from castalia.runs.config import RunConfig
from castalia.tokenizers.tokenizer import load_tokenizer

pytest.importorskip("ctranslate2")

OPTIONS = {
    "pythia": {},
    "serial-erf": {"parallel_residual": False, "activation": "gelu"},
    "tied": {"tie_word_embeddings": True, "rotary_pct": 1.0},
    "no-bias": {"attention_bias": False, "mlp_bias": False, "rotary_emb_base": 500.0},
    "epsilon": {"layernorm_epsilon": 0.3},
}
PROMPTS = ["def twice(x):", "naïve café 🍵", "", "a"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only make threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_run(folder: Path, *, with_tokenizer: bool = True, **options: object) -> Path:
    """A byte-level run whose weights are random and far from small, so that no two logits tie."""
    sizes = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    config = NeoxConfig(**{**sizes, "vocab_size": 257, "rotary_pct": 0.5, **options})
    files = {"config.yaml": dump_yaml(RunConfig(model=config, data={"seq_length": 64}))}
    if with_tokenizer:
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


@pytest.fixture(scope="module", params=list(OPTIONS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One kind of model as a run."""
    return save_run(tmp_path_factory.mktemp(request.param) / "run", **OPTIONS[request.param])


@pytest.fixture(scope="module")
def float32(run: Path) -> Path:
    """Its float32 export."""
    (done,) = export(run, to="ct2", quantization="float32")
    return Path(done.folder)


def test_greedy_text_is_ours(run: Path, float32: Path) -> None:
    ours = load(run)
    model = load(float32)
    ids = [ours.tokenizer.encode(prompt) or [ours.eod_id] for prompt in PROMPTS]
    assert model.generate_ids(ids, 40) == ours.generate_ids(ids, 40)
    assert model.generate(PROMPTS, 40) == ours.generate(PROMPTS, 40)


def test_log_probabilities_are_ours(run: Path, float32: Path) -> None:
    ours = load(run)
    ids = torch.randint(0, 257, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    want = ours.logprobs(ids)
    got = load(float32).logprobs(ids)
    assert want.std() > 1
    assert (got - want).abs().max() <= 4e-5


@pytest.mark.parametrize("quantization", ["int8", "int8_float16", "float16", "int8_float32"])
def test_other_storage_loads_and_speaks(run: Path, tmp_path: Path, quantization: str) -> None:
    ours = load(run)
    (done,) = export(run, to="ct2", quantization=quantization, output=tmp_path / "out")
    model = load(done.folder)
    made = model.generate(PROMPTS, 20)
    assert len(made) == len(PROMPTS) and all(isinstance(text, str) and text for text in made)
    ids = torch.randint(0, 257, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    want = ours.logprobs(ids)
    # Random weights and flat logits: the mean error says that the tensors are the right ones.
    bound = 0.05
    if quantization.startswith("int8") and byte_steps() < 255:
        # Sums of bytes overflow 16 bits in CTranslate2, as they would in oneDNN.
        bound = 0.3
    assert (model.logprobs(ids) - want).abs().mean() < bound * want.std()


def test_int8_is_a_quarter_of_float32(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", hidden_size=128)
    sizes = {}
    for quantization in ("float32", "int8"):
        (done,) = export(run, to="ct2", quantization=quantization)
        assert done.folder == str(run / "exports" / f"ct2-{quantization}" / "step3")
        sizes[quantization] = (Path(done.folder) / "model.bin").stat().st_size
    assert 3.5 < sizes["float32"] / sizes["int8"] < 4.1


def test_the_weights_are_left_as_they_were(tmp_path: Path) -> None:
    source = open_model(save_run(tmp_path / "run"))
    before = {name: tensor.clone() for name, tensor in source.tensors.items()}
    write_ct2(
        tmp_path,
        source.tensors,
        source.config,
        source.tokenizer,
        source.special,
        quantization="int8",
    )
    assert all(torch.equal(before[name], source.tensors[name]) for name in before)


def test_the_key_map_goes_there_and_back() -> None:
    config = NeoxConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=100)
    model = Decoder(config)
    initialize(model, start_weights(model.config, 0))
    ours = model.state_dict()
    names = ct2_keymap(config)
    back = names.to_ours(names.to_theirs(ours))
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    assert names.to_theirs(ours)["decoder/embeddings/weight"].shape == (128, 32)


def test_queries_keys_and_values_stand_apart() -> None:
    """Row (3 * head + c) * D + d of ours is row (c * H + head) * D + d of theirs."""
    config = NeoxConfig(
        num_layers=1, hidden_size=12, num_attention_heads=3, vocab_size=8, rotary_pct=0.5
    )
    ours = Decoder(config).state_dict()
    ours["layers.0.attn.qkv.bias"] = torch.arange(36.0)
    theirs = ct2_keymap(config).to_theirs(ours)["decoder/layer_0/self_attention/linear_0/bias"]
    for c in range(3):
        for head in range(3):
            for d in range(4):
                assert theirs[(c * 3 + head) * 4 + d] == (3 * head + c) * 4 + d


def test_the_folder_has_what_other_readers_look_for(run: Path, float32: Path) -> None:
    config = json.loads((float32 / "config.json").read_text())
    end = "<|endoftext|>"
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == (end, end, end)
    assert config["layer_norm_epsilon"] == load(run).config.layernorm_epsilon
    vocabulary = json.loads((float32 / "vocabulary.json").read_text())
    assert len(vocabulary) == 384 and vocabulary[256] == end and vocabulary[383] == "<extra_id_126>"
    assert {"tokenizer.json", "tokenizer_config.json", "export.json"} <= {
        file.name for file in float32.iterdir()
    }


def test_a_vocabulary_is_filled_up_and_checked() -> None:
    assert ct2_vocabulary(["a", "b"], 4) == ["a", "b", "<extra_id_0>", "<extra_id_1>"]
    with pytest.raises(ConfigError, match="2 tokens but the model's vocabulary 1"):
        ct2_vocabulary(["a", "b"], 1)
    with pytest.raises(ConfigError, match="a token twice"):
        ct2_vocabulary(["a", "a"], 4)


def test_what_the_engine_cannot_express_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rotary_pct=0"):
        list(export(save_run(tmp_path / "a", rotary_pct=0.0), to="ct2"))
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        list(export(save_run(tmp_path / "b", with_tokenizer=False), to="ct2"))
    with pytest.raises(CheckpointError, match="cannot load"):
        Ct2Engine(tmp_path, open_model(tmp_path / "a").config, load_tokenizer("bytes"))


def test_the_file_is_the_one_of_the_official_converter(tmp_path: Path) -> None:
    """Its loader fails on transformers 5, which renamed fields; the test restores the names."""
    transformers = pytest.importorskip("transformers")
    from ctranslate2.converters.transformers import _MODEL_LOADERS

    run = save_run(tmp_path / "run", rotary_pct=0.25)
    (done,) = export(run, to="hf", dtype="fp16")
    for quantization in QUANTIZATIONS:
        model = transformers.GPTNeoXForCausalLM.from_pretrained(done.folder, dtype="float16")
        settings = json.loads((Path(done.folder) / "config.json").read_text())
        model.config.rotary_pct, model.embed_out = settings["rotary_pct"], model.lm_head
        tokenizer = transformers.AutoTokenizer.from_pretrained(done.folder)
        with torch.no_grad():
            theirs = _MODEL_LOADERS["GPTNeoXConfig"](model, tokenizer)
            theirs.validate()
            theirs.optimize(quantization)
        folder = tmp_path / quantization
        folder.mkdir()
        theirs.save(str(folder))
        (ours,) = export(
            done.folder,
            to="ct2",
            quantization=quantization,
            output=tmp_path / f"ours-{quantization}",
        )
        for name in ("model.bin", "vocabulary.json"):
            assert (Path(ours.folder) / name).read_bytes() == (folder / name).read_bytes(), (
                quantization,
                name,
            )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_file_is_the_one_of_its_own_serializer(
    tmp_path: Path, options: dict, quantization: str
) -> None:
    from ctranslate2.specs.common_spec import Activation
    from ctranslate2.specs.model_spec import index_spec
    from ctranslate2.specs.transformer_spec import TransformerDecoderModelSpec

    source = open_model(save_run(tmp_path / "run", num_layers=11, **options))
    config = source.config
    spec = TransformerDecoderModelSpec.from_config(
        config.num_layers,
        config.num_attention_heads,
        activation=Activation.GELU if config.activation == "gelu" else Activation.GELUTanh,
        rotary_dim=config.rotary_dim,
        rotary_interleave=False,
        rotary_base=config.rotary_emb_base,
        parallel_residual=config.parallel_residual,
    )
    spec.decoder.scale_embeddings = False
    for path, tensor in ct2_keymap(config).to_theirs(source.tensors).items():
        place, name = path.rsplit("/", 1)
        setattr(index_spec(spec, place), name, tensor.clone().numpy())
    if config.tie_word_embeddings:
        spec.decoder.projection.weight = spec.decoder.embeddings.weight.copy()
    spec.register_vocabulary(ct2_vocabulary(source.tokenizer.tokens(), config.padded_vocab_size))
    end = "<|endoftext|>"
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = end
    spec.config.layer_norm_epsilon = config.layernorm_epsilon
    spec.validate()
    spec.optimize(quantization)
    (tmp_path / "theirs").mkdir()
    spec.save(str(tmp_path / "theirs"))
    (tmp_path / "ours").mkdir()
    write_ct2(
        tmp_path / "ours",
        source.tensors,
        config,
        source.tokenizer,
        source.special,
        quantization=quantization,
    )
    for file in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes(), file.name


def test_writing_needs_no_engine_and_running_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(tmp_path / "run")
    for name in [name for name in sys.modules if name.split(".")[0] == "ctranslate2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    (done,) = export(run, to="ct2")
    with pytest.raises(
        ConfigError,
        match=re.escape(f"needs 'ctranslate2', which is not installed: {pip_command('ct2')}"),
    ):
        load(done.folder)
