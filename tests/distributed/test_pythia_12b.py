"""Pythia-12B laid out over 256 ranks: torch's fake process group, weights on the meta device."""

import json

import pytest

from castalia.models import NeoxConfig
from castalia.models.flops import parameter_counts
from castalia.recipes import load_config

PROBE = """
import json
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from castalia.distributed.config import AXES
from castalia.distributed.layout import parallelize
from castalia.distributed.pipeline import Stages, stage_numbers
from castalia.distributed.world import World, check_layout
from castalia.models import Decoder
from castalia.models.stages import split
from castalia.recipes import load_config

for name, degrees in LAYOUTS.items():
    overrides = [f"parallel.{axis}={degree}" for axis, degree in degrees.items()]
    config = load_config(["pythia-12b", *overrides])
    check_layout(config.parallel, 256)
    for rank in (0, 201, 255):
        dist.init_process_group("fake", rank=rank, world_size=256, store=FakeStore())
        degrees = config.parallel.degrees(256)
        world = World.arranged(rank, torch.device("meta"), degrees, "cpu")
        runs = split(config.model.num_layers, config.parallel.stages)
        stages = []
        for number in stage_numbers(config.parallel, world.coordinate("pp")):
            with torch.device("meta"):
                stage = Decoder(config.model, runs[number])
            stages.append(parallelize(stage, world, config.parallel))
        model = Stages(stages)
        parts = {}
        for key, parameter in model.named_parameters():
            parts[key] = [list(parameter.shape), list(parameter.to_local().shape)]
        places = {axis: world.coordinate(axis) for axis in AXES}
        sharded = all(hasattr(layer, "unshard") for stage in stages for layer in stage.layers)
        record = {"name": name, "rank": rank, "parts": parts, "places": places}
        print(json.dumps({**record, "sharded": sharded}))
        dist.destroy_process_group()
"""
COLUMN = (
    "attn.qkv.weight",
    "attn.qkv.bias",
    "mlp.up.weight",
    "mlp.up.bias",
    "embed.weight",
    "unembed.weight",
)
ROW = ("attn.out.weight", "mlp.down.weight")
LAYOUTS = {
    "fsdp": {},
    "fsdp x tp": {"tp": 8},
    "replicas x fsdp x tp": {"dp_replicate": 4, "tp": 8},
    "fsdp x cp x tp": {"cp": 2, "tp": 4},
    "fsdp x tp x pp": {"tp": 8, "pp": 4},
    "replicas x fsdp x tp x pp": {"dp_replicate": 2, "tp": 4, "pp": 2},
}


def expected(
    name: str, shape: list[int], degrees: dict[str, int], places: dict[str, int]
) -> list[int]:
    """One rank's shard, computed by hand: tp cuts equal parts, then FSDP cuts rows, rounded up."""
    shape = list(shape)
    tp = degrees.get("tp", 1)
    if name.endswith(COLUMN):
        shape[0] //= tp
    elif name.endswith(ROW):
        shape[1] //= tp
    cp = degrees.get("cp", 1)
    shards = 256 // (tp * degrees.get("dp_replicate", 1) * degrees.get("pp", 1))
    piece = -(-shape[0] // shards)
    start = min(shape[0], piece * (places["dp_shard"] * cp + places["cp"]))
    return [min(piece, shape[0] - start), *shape[1:]]


def stage_size(model: NeoxConfig, stages: int, number: int) -> int:
    """Parameters of a stage: equal runs of layers; the first embeds, the last has norm and head."""
    counts = parameter_counts(model)
    table = model.padded_vocab_size * model.hidden_size
    norm = 2 * model.hidden_size
    ends = table * (number == 0) + (table + norm) * (number == stages - 1)
    return (counts.non_embedding - norm) // stages + ends


@pytest.fixture(scope="module")
def built(training_shell):
    """Shards of some ranks under each layout."""
    done = training_shell.script(PROBE.replace("LAYOUTS", repr(LAYOUTS)))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("name", LAYOUTS)
def test_pythia_12b_on_256_ranks(name, built):
    records = [item for item in built if item["name"] == name]
    assert [item["rank"] for item in records] == [0, 201, 255]
    config = load_config(["pythia-12b"])
    for item in records:
        assert item["sharded"], "a block is not under FSDP"
        whole = sum(rows * (rest[0] if rest else 1) for (rows, *rest), _ in item["parts"].values())
        assert whole == stage_size(config.model, LAYOUTS[name].get("pp", 1), item["places"]["pp"])
        for parameter, (shape, part) in item["parts"].items():
            assert part == expected(parameter, shape, LAYOUTS[name], item["places"]), parameter
