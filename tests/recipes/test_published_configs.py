"""GPT-NeoX's and Pythia's published configs: each is read, or refused for the reason expected."""

import re
from pathlib import Path

import pytest

from castalia.core.errors import ConfigError
from castalia.recipes import resolve

CONFIGS = Path(__file__).resolve().parents[3] / "shared" / "data" / "configs"
PARTIAL = (
    *("cpu_mock_config.yml", "docker_pythia-paths.yml", "eleutherai_cluster.yml"),
    *("local_setup.yml", "prof.yml", "slurm_local.json", "slurm_local.yml"),
    "text_generation.yml",
)
"""Files of GPT-NeoX without a model, which others name beside one with a model."""
REFUSED = {
    "neox__configs_125M-dmoe.yml": "mixture-of-experts layers are not supported",
    "neox__configs_gmlp_small.yml": "unknown attention type gmlp",
    "neox__configs_llama2_7B.yml": "write `norm: layernorm`",
    "neox__configs_llama_7B.yml": "write `norm: layernorm`",
    "neox__configs_llemma_7B.yml": "write `norm: layernorm`",
    "neox__configs_mamba_mamba-130M.yml": "unknown attention type mamba",
    "neox__configs_mistral_7B.yml": "every layer attends to the whole row",
    "neox__configs_rwkv_170M.yml": "unknown attention type rwkv",
    "neox__configs_sparse.yml": "unknown attention type local",
    # Published with layers and heads exchanged, and without a comma.
    "pythia__models_12B_pythia-12b-deduped.yml": "set model.num_layers=36",
    "pythia__models_12B_pythia-12b.yml": "a comma is missing before this place",
}
BF16 = ("neox__configs_bf16_125M.yml", "neox__configs_pythia_1B.yml")
"""Files that ask for bf16, the second in the way of GPT-NeoX v1.0."""
pytestmark = pytest.mark.skipif(
    not CONFIGS.is_dir(), reason="the published configs are not on this machine"
)


def test_each_published_config_is_read_or_refused_with_its_reason():
    paths = sorted(CONFIGS.iterdir())
    assert len(paths) >= 50 and {path.name for path in paths} >= {*REFUSED, *BF16}
    for path in paths:
        partial = path.name.removeprefix("neox__configs_") in PARTIAL
        # A reason of its own is found beside a model too.
        bases = ["pythia-70m"] if partial or "sparse" in path.name else []
        try:
            config = resolve([*bases, str(path)]).config
        except ConfigError as error:
            assert re.search(REFUSED[path.name], str(error)), str(error)
            continue
        assert path.name not in REFUSED, path.name
        expected = "bf16" if path.name in BF16 else "fp16"
        assert config.precision == expected, path.name
        # Its published file has another precision than the released model.
        corrected = "precision=bf16" in "".join(resolve([*bases, str(path)]).notes)
        assert corrected == path.name.startswith("pythia__models_1B"), path.name
        if partial:
            with pytest.raises(
                ConfigError, match=r"no model in .*: name a preset or the file with"
            ):
                resolve([str(path)])
