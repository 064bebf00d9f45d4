"""Hugging Face exports: transformers computes equal logits and greedy text; Castalia reads them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from castalia.checkpoint import Store
from castalia.config import dump_yaml
from castalia.core.errors import CheckpointError, ConfigError
from castalia.distributed import initialize
from castalia.export import export
from castalia.inference import LanguageModel, load
from castalia.models import Decoder, NeoxConfig
from castalia.models.init import start_weights
from castalia.runs.config import RunConfig
from castalia.tokenizers.tokenizer import load_tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only make threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


OPTIONS = {
    "pythia": {},
    "serial": {"parallel_residual": False, "activation": "gelu"},
    "tied": {"tie_word_embeddings": True, "rotary_pct": 1.0},
    "no-bias": {"attention_bias": False, "rotary_emb_base": 500.0, "layernorm_epsilon": 1e-3},
}
TEXTS = [
    "def twice(x):\n    return x + x",
    "  naïve café 🍵",
    "end<|endoftext|>start",
    "",
    "a" * 30,
]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 300 tokens."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(
        ["def twice(x): return x + x\nthe naïve guest said that the café was closed\n" * 20],
        300,
        path,
    )
    return path


def save_run(
    folder: Path, tokenizer_file: Path, steps: tuple[int, ...] = (5,), **options: object
) -> Path:
    """A run whose weights are random and far from small, so that no two logits tie."""
    tokenizer = load_tokenizer(tokenizer_file)
    sizes = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    config = NeoxConfig(
        **{**sizes, "vocab_size": tokenizer.vocab_size, "rotary_pct": 0.5, **options}
    )
    run = RunConfig(model=config, data={"seq_length": 64})
    files = {"config.yaml": dump_yaml(run), "tokenizer.json": tokenizer_file.read_text("utf-8")}
    generator = torch.Generator().manual_seed(0)
    for step in steps:
        model = Decoder(config)
        initialize(model, start_weights(model.config, step))
        tensors = {
            f"model.{name}": tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in model.state_dict().items()
        }
        Store(folder / "checkpoints").save(step, tensors, {"step": step}, files, asynchronous=False)
    return folder


@pytest.fixture(scope="module", params=list(OPTIONS))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path
) -> tuple:
    """(run folder, exported folder) of one kind of model."""
    run = save_run(
        tmp_path_factory.mktemp(request.param) / "run", tokenizer_file, **OPTIONS[request.param]
    )
    list(export(run, to="hf", output=run / "out"))
    return run, run / "out"


def theirs(folder: Path) -> tuple:
    """transformers' model and tokenizer of an export; no key may be left over on either side."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def rows(model: LanguageModel) -> torch.Tensor:
    """Random ids, (2, 64)."""
    return torch.randint(
        0, model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(1)
    )


def test_logits_are_equal(pair: tuple) -> None:
    ours, (hf, _) = load(pair[0]), theirs(pair[1])
    assert hf.dtype == torch.float32
    with torch.no_grad():
        want = hf(rows(ours)).logits
    got = torch.stack([ours.logits(row.tolist()) for row in rows(ours)])
    assert want.abs().max() > 1
    assert (got - want).abs().max() <= 1e-5


def test_tokenizer_ids_are_equal(pair: tuple) -> None:
    tokenizer, (_, hf) = load(pair[0]).tokenizer, theirs(pair[1])
    for text in TEXTS:
        assert hf(text)["input_ids"] == tokenizer.encode(text)
        assert hf.decode(hf(text)["input_ids"]) == tokenizer.decode(tokenizer.encode(text)) == text
    assert hf.eos_token_id == hf.bos_token_id == tokenizer.eod_id
    assert len(hf) == tokenizer.vocab_size and hf.model_max_length == 64


def test_greedy_text_is_that_of_transformers(pair: tuple) -> None:
    ours, (hf, tokenizer) = load(pair[0]), theirs(pair[1])
    forbidden = list(
        range(ours.config.vocab_size, ours.config.padded_vocab_size)
    )  # ours never chooses padding
    for prompt in TEXTS[:2]:
        inputs = tokenizer(prompt, return_tensors="pt")
        made = hf.generate(**inputs, max_new_tokens=30, do_sample=False, suppress_tokens=forbidden)[
            0
        ]
        want = [
            i for i in made[inputs["input_ids"].shape[1] :].tolist() if i != tokenizer.eos_token_id
        ]
        assert ours.generate_ids(ours.tokenizer.encode(prompt), 30) == want


def test_an_export_loads_again_as_ours(pair: tuple) -> None:
    ours, again = load(pair[0]), load(pair[1])
    assert again.config.vocab_size == ours.config.vocab_size
    assert torch.equal(again.logits([1, 2, 3]), ours.logits([1, 2, 3]))
    assert again.generate(TEXTS, 12) == ours.generate(TEXTS, 12)


def test_a_folder_of_transformers_itself_loads(tmp_path: Path, pair: tuple) -> None:
    """What save_pretrained writes, in several shards: other names, other config keys."""
    hf, tokenizer = theirs(pair[1])
    hf.save_pretrained(tmp_path, max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(load(tmp_path).logits([4, 5, 6]), load(pair[0]).logits([4, 5, 6]))
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"has no model-0\S+\.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 0.5), ("fp16", 0.05)])
def test_half_precision_is_what_transformers_takes(
    tmp_path: Path, tokenizer_file: Path, dtype: str, bound: float
) -> None:
    run = save_run(tmp_path / "run", tokenizer_file)
    (done,) = export(run, output=tmp_path / "out", dtype=dtype)
    hf, _ = theirs(tmp_path / "out")
    assert str(hf.dtype) == {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[dtype]
    ours = load(run)
    with torch.no_grad():
        assert (
            hf.float()(rows(ours)[:1]).logits[0] - ours.logits(rows(ours)[0].tolist())
        ).abs().max() < bound
    assert done.bytes < sum(
        file.stat().st_size for file in (run / "checkpoints").rglob("*.safetensors")
    )


def test_revisions_of_a_run(tmp_path: Path, tokenizer_file: Path) -> None:
    run = save_run(tmp_path / "run", tokenizer_file, steps=(0, 1, 1000))
    assert [done.folder for done in export(run, steps="all")] == [
        str(run / "exports" / "hf" / name) for name in ("step0", "step1", "step1000")
    ]
    assert [
        done.step for done in export(run / "step1", steps=[1000, 0], output=tmp_path / "dir")
    ] == [0, 1000]
    assert sorted(item.name for item in (tmp_path / "dir").iterdir()) == ["step0", "step1000"]
    (one,) = export(run / "step1000", to="hf", dtype="bf16", force=True)
    assert one.folder == str(run / "exports" / "hf" / "step1000") and one.step == 1000
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        run / "exports" / "hf" / "step0", local_files_only=True
    )
    with torch.no_grad():
        want = hf(torch.tensor([[1, 2, 3]])).logits[0]
    assert (load(run / "step0").logits([1, 2, 3]) - want).abs().max() <= 1e-5
    assert load(run / "exports" / "hf" / "step1000").step == 1000
    with pytest.raises(CheckpointError, match="step 7 was not saved"):
        export(run, steps=[7])


def test_the_record_names_checkpoint_and_hashes(tmp_path: Path, tokenizer_file: Path) -> None:
    from castalia.core.files import sha256_of

    run = save_run(tmp_path / "run", tokenizer_file)
    list(export(run, output=tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    manifest = run / "checkpoints" / "step-00000005" / "manifest.json"
    assert record["step"] == 5 and record["source_sha256"] == {"manifest.json": sha256_of(manifest)}
    assert record["checkpoint"] == str(manifest.parent) and record["model"]["num_layers"] == 2
    files = {file.name for file in (tmp_path / "out").iterdir()} - {"export.json"}
    assert (
        files
        == set(record["files_sha256"])
        == {
            "README.md",
            "certificate.json",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
        }
    )
    assert all(
        sha256_of(tmp_path / "out" / name) == digest
        for name, digest in record["files_sha256"].items()
    )


def test_an_existing_output_is_kept_without_force(tmp_path: Path, tokenizer_file: Path) -> None:
    run, out = save_run(tmp_path / "run", tokenizer_file), tmp_path / "out"
    list(export(run, output=out))
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="exists already; use --force"):
        export(run, output=out, dtype="bf16")
    assert (out / "model.safetensors").read_bytes() == before
    list(export(run, output=out, dtype="bf16", force=True))
    assert len((out / "model.safetensors").read_bytes()) < len(before)
    assert [item.name for item in tmp_path.iterdir() if item.name.startswith(".")] == []


def test_force_never_replaces_what_is_not_an_export(tmp_path: Path, tokenizer_file: Path) -> None:
    run = save_run(tmp_path / "run", tokenizer_file)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="is not an export"):
        export(run, output=tmp_path / "home", force=True)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_a_failed_export_leaves_nothing(tmp_path: Path, tokenizer_file: Path) -> None:
    run = save_run(tmp_path / "run", tokenizer_file, mlp_bias=False)
    with pytest.raises(ConfigError, match="cannot express mlp_bias=false"):
        list(export(run, output=tmp_path / "out"))
    assert sorted(item.name for item in tmp_path.iterdir()) == ["run"]


def test_an_unwritable_place_is_one_sentence(tmp_path: Path, tokenizer_file: Path) -> None:
    from castalia.core.errors import CastaliaError

    run = save_run(tmp_path / "run", tokenizer_file)
    (tmp_path / "file").write_text("")
    with pytest.raises(CastaliaError, match=r"cannot write \S+out: Not a directory"):
        list(export(run, output=tmp_path / "file" / "out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "gguff"}, "unknown export format 'gguff'; choose one of hf, ct2"),
        ({"dtype": "int8"}, "unknown dtype 'int8' for hf; choose one of fp32, bf16, fp16"),
        ({"quantization": "int8"}, "hf takes a dtype, not a quantization"),
        ({"to": "ct2", "dtype": "fp32"}, "ct2 takes a quantization, not a dtype"),
        (
            {"to": "ct2", "quantization": "int9"},
            "unknown quantization 'int9' for ct2.*did you mean",
        ),
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export(tmp_path, output=tmp_path / "out", **options)


def test_damaged_and_foreign_weights_are_refused(tmp_path: Path, pair: tuple) -> None:
    import shutil

    copy = shutil.copytree(pair[1], tmp_path / "copy")
    (copy / "export.json").unlink()  # its hashes would tell first
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(
        CheckpointError, match=r"\S+model\.safetensors is corrupt.*copy the file again"
    ):
        load(copy)
    weights.write_bytes(whole)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(CheckpointError, match="do not fit its config"):
        load(copy)
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"no rule knows: 'gpt_neox\.layers\.1\."):
        load(copy)
    weights.rename(copy / "tf_model.h5")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors or .*, only .*tf_model"):
        load(copy)


def test_a_hugging_face_folder_can_be_exported_too(tmp_path: Path, pair: tuple) -> None:
    (done,) = export(pair[1], output=tmp_path / "again", dtype="fp32")
    assert done.step is None
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        pair[1] / "model.safetensors"
    ).read_bytes()
    with pytest.raises(ConfigError, match="give output, and no steps"):
        export(pair[1], to="hf")


def test_a_full_disk_leaves_nothing_and_is_one_sentence(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    import resource

    from castalia.core.errors import CastaliaError

    run = save_run(tmp_path / "run", tokenizer_file)
    list(export(run, output=tmp_path / "out"))
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(
            CastaliaError, match=r"cannot write \S+out: .*[Ff]ile too large.*choose another place"
        ):
            list(export(run, output=tmp_path / "out", force=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out", "run"]


def test_without_a_tokenizer_the_weights_go_alone(tmp_path: Path, tokenizer_file: Path) -> None:
    run = save_run(tmp_path / "run", tokenizer_file)
    from castalia.checkpoint import read, read_config

    step = run / "checkpoints" / "step-00000005"
    tensors = {f"model.{name}": tensor for name, tensor in read(step).items()}
    files = {"config.yaml": dump_yaml(RunConfig(**read_config(step)))}
    Store(tmp_path / "bare" / "checkpoints").save(5, tensors, {}, files, asynchronous=False)
    (done,) = export(tmp_path / "bare")
    assert done.notes == ["the checkpoint has no tokenizer.json, so neither has the export"]
    assert torch.equal(load(done.folder).logits([1, 2]), load(run).logits([1, 2]))


def test_rope_numerics_that_are_lost_are_said(tmp_path: Path, tokenizer_file: Path) -> None:
    run = save_run(tmp_path / "run", tokenizer_file, rope_numerics="neox_v1_fp16")
    (done,) = export(run)
    assert len(done.notes) == 1 and "rope_numerics=neox_v1_fp16 is not kept" in done.notes[0]
