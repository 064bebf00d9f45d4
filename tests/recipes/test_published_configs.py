"""GPT-NeoX's and Pythia's published configs: each trains, or is refused for the reason expected."""

import ast
import json
import math
import os
from collections import Counter
from pathlib import Path

import pytest
from tests.recipes.published import REASONS, outcome, write_tokens

from castalia.config.neox import read_neox
from castalia.core.errors import ConfigError
from castalia.recipes import resolve

CONFIGS = Path(__file__).resolve().parents[3] / "shared" / "data" / "configs"
CLONES = "CASTALIA_NEOX_CONFIGS"
"""Environment variable with folders of clones of gpt-neox, pythia and online-data-mixing, `:`
between them."""
PARTIAL = (
    *("cpu_mock_config.yml", "docker_pythia-paths.yml", "eleutherai_cluster.yml"),
    *("local_setup.yml", "prof.yml", "slurm_local.json", "slurm_local.yml"),
    *("text_generation.yml", "sparse.yml"),
)
"""Files of GPT-NeoX without a model, which others name beside one with a model."""
REFUSED = {
    "pythia__models_12B_pythia-12b-deduped.yml": "fault of the file: layers and heads exchanged",
    "pythia__models_12B_pythia-12b.yml": "fault of the file: a comma is missing",
}
LLAMA = ("llama", "LlamaForCausalLM")
FAMILIES = {
    # No architecture of transformers has a Sinkhorn router.
    "neox__configs_125M-dmoe.yml": ("neox", ""),
    "neox__configs_gmlp_small.yml": ("gmlp", ""),
    # With GPT-NeoX's table of positions they are a transformer's in all but their layers.
    "neox__configs_mamba_mamba-130M.yml": ("neox", ""),
    "neox__configs_rwkv_170M.yml": ("neox", ""),
    "neox__configs_llama2_7B.yml": LLAMA,
    "neox__configs_llama_7B.yml": LLAMA,
    "neox__configs_llemma_7B.yml": LLAMA,
    "neox__configs_mistral_7B.yml": ("mistral", "MistralForCausalLM"),
    # No architecture of transformers has DeepSpeed's patterns.
    "neox__configs_sparse.yml": ("neox", ""),
}
"""Files that do not become `neox` and GPTNeoXForCausalLM."""
BF16 = (
    "neox__configs_rwkv_170M.yml",
    "neox__configs_125M-dmoe.yml",
    "neox__configs_bf16_125M.yml",
    "neox__configs_llemma_7B.yml",
    "neox__configs_pythia_1B.yml",
)
"""Files that ask for bf16, the last in the way of GPT-NeoX v1.0."""
FP32 = ("neox__configs_llama2_7B.yml", "neox__configs_llama_7B.yml", "neox__configs_mistral_7B.yml")
"""Files that are named beside another, which has the precision."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The token file, the label file, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("published")
    return *write_tokens(folder), folder


@pytest.mark.skipif(not CONFIGS.is_dir(), reason="the published configs are not on this machine")
def test_each_published_config_trains_or_is_refused_with_its_reason(files):
    paths = sorted(CONFIGS.iterdir())
    assert len(paths) >= 50 and {path.name for path in paths} >= {*REFUSED, *BF16}
    for path in paths:
        name = path.name
        done = outcome(path, *files)
        assert done.reason == REFUSED.get(name, ""), (name, done.reason)
        if done.reason:
            continue
        assert len(done.losses) == 2 and all(map(math.isfinite, done.losses)), (name, done)
        expected = FAMILIES.get(name, ("neox", "GPTNeoXForCausalLM"))
        assert (done.family, done.architecture) == expected, name
        precisions = dict.fromkeys(BF16, "bf16") | dict.fromkeys(FP32, "fp32")
        assert done.precision == precisions.get(name, "fp16"), name
        # Its published file has another precision than the released model.
        corrected = "precision=bf16" in "".join(done.notes)
        assert corrected == name.startswith("pythia__models_1B"), name
        if name.removeprefix("neox__configs_") in PARTIAL:
            with pytest.raises(
                ConfigError, match=r"no model in .*: name a preset or the file with"
            ):
                resolve([str(path)])


OPTIONS = [
    {"pos_emb": "learned", "opt_pos_emb_offset": 2, "activation": "relu", "init_method": "normal"},
    {"pos_emb": "sinusoidal", "norm": "scalenorm", "activation": "softsign"},
    {"pos_emb": "alibi", "gpt_j_residual": True, "gpt_j_tied": True, "activation": "mish"},
    {"pos_emb": "rpe", "rpe_num_buckets": 8, "rpe_max_distance": 16, "activation": "swish"},
    {"pos_emb": "none", "norm": "non_parametric_layernorm", "activation": "silu"},
    {"use_qk_layernorm": True, "activation": "geglu", "init_method": "orthogonal"},
    {"num_kv_heads": 1, "activation": "reglu", "output_layer_init_method": "scaled_orthogonal"},
    {"num_kv_heads": 2, "activation": "bilinear", "init_method": "xavier_uniform"},
    {"activation": "glu", "norm": "rmsnorm", "init_method": "xavier_normal"},
    {"hidden_dropout": 0.1, "attention_dropout": 0.1, "no_weight_tying": True},
    {"sliding_window_width": 7, "attention_config": [[["flash", "local"], "all"]]},
    {
        "attention_config": [[["bigbird", "sparse_fixed"], "all"]],
        "sparsity_config": {"block": 4, "num_local_blocks": 2, "num_random_blocks": 1},
    },
    {
        "attention_config": [[["sparse_variable", "bslongformer"], "all"]],
        "sparsity_config": {"block": 4, "local_window_blocks": [2]},
    },
    {"attention_config": [[["mamba", "flash"], "all"]], "moe_num_experts": 4, "moe_top_k": 2},
    {"attention_config": [[["rwkv", "amlp"], "all"]], "gmlp_attn_dim": 16, "dim_att": 128},
    # All of the older configs/125M-moe.yml.
    {
        "moe_type": "deepspeed",
        "moe_token_dropping": True,
        "moe_num_experts": 4,
        "enable_expert_tensor_parallelism": True,
        "moe_expert_parallel_size": 1,
    },
]
"""Options of GPT-NeoX that none of its files has, each at least once."""


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)))
def test_options_that_no_file_has_train_too(options, files, tmp_path):
    shape = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "mlp_multiple_of": 4}
    rest = {"seq_length": 32, "max_position_embeddings": 32, "train_iters": 2, "pos_emb": "rotary"}
    (tmp_path / "options.yml").write_text(json.dumps(shape | rest | options))
    done = outcome(tmp_path / "options.yml", *files)
    assert not done.reason and len(done.losses) == 2
    # Bytes at random: ln 256 = 5.55 at the start, and nothing but a fault is far from it.
    assert all(abs(loss - math.log(256)) < 0.6 for loss in done.losses), done.losses


def clones() -> list[Path]:
    """The folders that the environment names.

    Skips the test if it names none.
    """
    named = os.environ.get(CLONES)
    if not named:
        pytest.skip(f"set {CLONES} to clones of gpt-neox, pythia and online-data-mixing")
    return [Path(folder) for folder in named.split(":")]


def config_files(folder: Path) -> list[Path]:
    """The files of a clone that configure a training."""
    places = ("configs", "post-training", "models", "alon_configs")
    found = [path for place in places for path in (folder / place).rglob("*")]
    return sorted(path for path in found if path.suffix in (".yml", ".yaml", ".json"))


@pytest.mark.slow
def test_all_files_of_the_clones_train_or_are_refused_with_a_reason(files, capsys):
    """Prints the table: a file a line, and the count of each reason."""
    reasons: Counter[str] = Counter()
    lines = []
    for folder in clones():
        for path in config_files(folder):
            done = outcome(path, *files)
            reasons[done.reason or "trained"] += 1
            label = f"{folder.name}/{path.relative_to(folder)}"
            said = done.reason
            if not done.reason:
                assert all(map(math.isfinite, done.losses)), label
                said = f"{done.architecture or done.family} {done.precision} " + " ".join(
                    f"{loss:.4f}" for loss in done.losses
                )
            lines.append(f"{label:75} {said}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
        for reason, count in reasons.most_common():
            print(f"{count:4} {reason}")
    assert set(reasons) <= {"trained", *REASONS.values()}
    assert reasons["trained"] > 100


@pytest.mark.slow
def test_widths_are_those_of_gpt_neoxs_own_code():
    """Its ParallelMLP is built with layers that only note their sizes."""
    sources = [folder / "megatron" / "model" / "transformer.py" for folder in clones()]
    (source,) = [path for path in sources if path.is_file()]
    tree = ast.parse(source.read_text())
    (mlp,) = [node for node in tree.body if getattr(node, "name", "") == "ParallelMLP"]
    mlp.bases = []
    for node in mlp.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            # Without its module there is nothing that super() could initialize.
            node.body = node.body[1:]
    names = {
        "get_activation": lambda options: (None, options.activation in ("swiglu", "geglu")),
        "get_parallel_linear": lambda options: (Sizes, Sizes),
        "Gated_Activation": lambda *_: None,
        "swiglu": None,
    }
    exec(compile(ast.Module([mlp], []), str(source), "exec"), names)
    agreed = 0
    for activation in ("gelu", "swiglu"):
        for unit in (1, 2, 16, 256):
            for width in (None, 96, 97, 98, 100, 101, 250, 256, 500, 512, 1000, 14336):
                agreed += compare(names["ParallelMLP"], activation, unit, width)
    assert agreed > 60


class Sizes:
    """A linear layer of GPT-NeoX's that has its sizes only."""

    def __init__(self, *, input_size, output_size, **_):
        self.input_size = input_size
        self.output_size = output_size


def compare(mlp, activation, unit, width):
    """Whether GPT-NeoX can build this MLP; then its width must be ours, else ours a problem or a
    note."""
    options = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "activation": activation,
        "mlp_multiple_of": unit,
        "intermediate_size": width,
        "train_micro_batch_size_per_gpu": 1,
    }
    reading = read_neox({"a.yml": options})
    more = {"expansion_factor": None, "bias_gelu_fusion": False, "use_bias_in_mlp": True}
    given = type("Options", (), options | more | {"use_flashattn_swiglu": False})
    built = mlp(given, None, None, multiple_of=unit)
    gated = activation == "swiglu"
    outputs = built.linear1.output_size // (2 if gated else 1)
    ours = reading.values["model"].get("intermediate_size", 4 * 64)
    if outputs == built.linear2.input_size:
        assert not reading.problems and ours == outputs, (options, ours, outputs)
        return True
    older = gated and ours == width
    assert older or reading.problems, options
    return False
