"""Plans for clusters that are not here: arithmetic by hand, published runs, and measured memory of
local processes.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from castalia.core.errors import ConfigError
from castalia.cost.estimate import estimate
from castalia.cost.plan import find_gpu, plan, propose
from castalia.data import IndexedDatasetWriter
from castalia.models.flops import layer_costs, parameter_counts
from castalia.monitor.gpus import GPUS
from castalia.recipes import load_config

H100 = GPUS["h100"]


def test_data_parallel_bytes_by_hand():
    words = ["pythia-1b", "precision=bf16", "train.recompute=false", "train.micro_batch_size=16"]
    config = load_config([*words, "parallel.reshard_after_forward=true"])
    found = plan(config.workload, 1, 8, H100)
    weights = 4 * parameter_counts(config.model).total
    root = 4 * (2 * config.model.padded_vocab_size + 2) * config.model.hidden_size
    steps = 1024 // (16 * 8)
    assert found.communication["reduce_scatter"] == pytest.approx(7 / 8 * steps * weights)
    # Gathered in bf16, reduced in fp32.
    gathered = (2 * weights - root) / 2
    assert found.communication["all_gather"] == pytest.approx(7 / 8 * steps * gathered)
    assert found.communication["all_reduce"] == found.communication["p2p"] == 0
    kept = plan(load_config([*words, "parallel.reshard_after_forward=false"]).workload, 1, 8, H100)
    assert kept.communication["all_gather"] == pytest.approx(7 / 8 * steps * weights / 2)
    assert kept.memory.gathered > found.memory.gathered


def test_tensor_parallel_bytes_by_hand():
    words = [
        "pythia-1b",
        "precision=bf16",
        "train.micro_batch_size=4",
        "parallel.tp=8",
        "train.recompute=false",
    ]
    config = load_config(words)
    found = plan(config.workload, 1, 8, H100)
    activations = 4 * 2048 * config.model.hidden_size * 2
    expected = 4 * config.model.num_layers * (1024 // 4) * activations * 7 / 8
    assert (
        found.communication["all_gather"]
        == found.communication["reduce_scatter"]
        == pytest.approx(expected)
    )
    assert found.memory.optimizer == pytest.approx(
        8 * parameter_counts(config.model).total / 8, rel=1e-3
    )


def test_what_experts_send_by_hand():
    words = ["debug-moe", "precision=bf16", "train.batch_size=8", "train.micro_batch_size=1"]
    configs = [load_config([*words, f"parallel.ep={ep}"]) for ep in (1, 4)]
    whole, split = (plan(config.workload, 1, 8, H100) for config in configs)
    model = configs[0].model
    assert whole.communication["all_to_all"] == 0
    # Two experts of each token, there and back, forward and backward, in bf16.
    numbers = 2 * model.hidden_size * model.num_layers * 64
    assert split.communication["all_to_all"] == pytest.approx(3 / 4 * 4 * 2 * numbers)
    experts = 4 * sum(costs.experts for costs in layer_costs(model))
    # Eight ranks share all experts, or two each quarter.
    less = whole.communication["reduce_scatter"] - split.communication["reduce_scatter"]
    assert less == pytest.approx(7 / 8 * experts - 1 / 2 * experts / 4)
    assert split.memory.gathered < whole.memory.gathered
    assert split.memory.optimizer == whole.memory.optimizer
    again = load_config([*words, "parallel.ep=4", "train.recompute=selective"])
    sent = plan(again.workload, 1, 8, H100).communication["all_to_all"]
    assert sent == pytest.approx(1.5 * split.communication["all_to_all"])
    proposed = propose(configs[0].workload, 1, 8, H100)
    assert proposed is not None and 8 % proposed.degrees.ep == 0


def test_replicas_and_pipelines():
    config = load_config(["pythia-1b", "train.micro_batch_size=8", "parallel.dp_replicate=4"])
    found = plan(config.workload, 4, 8, H100)
    assert found.communication["all_reduce"] == pytest.approx(
        2 * 3 / 4 * 4 * parameter_counts(config.model).total / 8, rel=1e-3
    )
    parallel = config.parallel.model_copy(update={"dp_replicate": 1, "pp": 4})
    piped = plan(config.model_copy(update={"parallel": parallel}).workload, 4, 8, H100)
    assert piped.bubble == pytest.approx(3 / (1024 // (8 * 8) + 3))
    assert piped.communication["p2p"] > 0 and piped.mfu < found.mfu


@pytest.mark.parametrize(
    ("preset", "gpu", "nodes", "published"),
    [
        ("pythia-1.4b", "h100", 1, 0.418),
        ("pythia-2.8b", "h100", 2, 0.437),
        ("pythia-6.9b", "h100", 1, 0.464),
        ("pythia-12b", "h100", 1, 0.398),
        ("pythia-1.4b", "a100-80", 1, 0.599),
        ("pythia-2.8b", "a100-80", 1, 0.621),
        ("pythia-6.9b", "a100-80", 1, 0.642),
        ("pythia-12b", "a100-80", 1, 0.596),
    ],
)
def test_published_runs_of_such_shapes_fit_and_have_about_this_mfu(preset, gpu, nodes, published):
    """MosaicML's MPT-1B, 3B, 7B and 13B, rows of 2048 tokens, bf16, FSDP (llm-foundry benchmarking
    README).
    """
    found = propose(load_config([preset, "precision=bf16"]).workload, nodes, 8, GPUS[gpu])
    assert found is not None and found.fits
    assert found.mfu == pytest.approx(published, rel=0.2)


def test_a_proposal_fits_and_is_no_slower_than_the_config():
    # With weights gathered in bf16 it would fit as it is.
    config = load_config(["pythia-12b", "precision=bf16", "parallel.gather=fp32"])
    own, best = (
        plan(config.workload, 32, 8, GPUS["a100-40"]),
        propose(config.workload, 32, 8, GPUS["a100-40"]),
    )
    assert not own.fits and best is not None and best.fits
    assert best.memory.total <= 0.92 * 39.4 * 2**30
    assert propose(config.workload, 1, 1, GPUS["a10g"]) is None


def test_an_unknown_gpu_gets_the_menu():
    with pytest.raises(
        ConfigError, match=r"unknown GPU 'h300'; choose one of h200, .*did you mean"
    ):
        find_gpu("h300")


EXPERTS = ("model.family=llama", "model.moe.experts=8", "model.moe.top_k=2")
EXPERTS = (*EXPERTS, "model.moe.expert_size=384")
MEASURE = """
import json, sys
from torch.profiler import ProfilerActivity, profile
from castalia.distributed import World
from castalia.recipes import load_config
from castalia.train.trainer import Trainer
config = load_config(sys.argv[2:])
world = World.start(config.parallel, "cpu")
with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
    Trainer(config, world, hooks=[]).fit()
if world.leads:
    seen.export_chrome_trace(sys.argv[1])
world.close()
"""


def peak_of(trace):
    """Most bytes that were allocated at a time, by a trace of torch's profiler.

    It does not see what a thread of gloo frees between two collectives: a piece of memory that is
    given out again was freed before.
    """
    events = [
        event
        for event in json.loads(trace.read_text())["traceEvents"]
        if event.get("name") == "[memory]"
    ]
    live, peak = {}, 0
    for event in sorted(events, key=lambda event: (event["ts"], event["args"]["Ev Idx"])):
        start, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size < 0:
            live.pop(start, None)
            continue
        for other in [
            other
            for other, length in live.items()
            if other < start + size and start < other + length
        ]:
            del live[other]
        live[start] = size
        peak = max(peak, sum(live.values()))
    assert peak
    return peak


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A token file for two steps."""
    prefix = tmp_path_factory.mktemp("tokens") / "text"
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for document in np.random.default_rng(0).integers(0, 255, (40, 300)):
            writer.add(document.tolist())
    return prefix


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (1, ()),
        (1, ("precision=bf16",)),
        (2, ()),
        (2, ("precision=bf16",)),
        (2, ("parallel.tp=2",)),
        (2, ("parallel.tp=2", "precision=bf16")),
        (2, ("parallel.reshard_after_forward=false",)),
        (1, EXPERTS),
        (2, (*EXPERTS, "parallel.ep=2")),
        (2, (*EXPERTS, "parallel.ep=2", "precision=bf16")),
        (2, (*EXPERTS, "parallel.tp=2", "model.moe.split_over_tp=true")),
    ],
)
def test_peak_memory_of_a_process_is_within_a_tenth(tokens, tmp_path, processes, overrides):
    words = ["debug", "model.num_layers=6", "model.hidden_size=384", "model.num_attention_heads=6"]
    words += [
        "model.vocab_size=16384",
        "model.max_position_embeddings=256",
        "data.seq_length=256",
        "train.steps=2",
    ]
    words += [
        "train.batch_size=8",
        "checkpoint.steps=[]",
        "checkpoint.every=null",
        "data.tokenizer=null",
    ]
    words += [f"data.train={tokens}", f"output={tmp_path}/run", *overrides]
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        "--nproc-per-node=2",
    ]
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    trace = tmp_path / "trace.json"
    command = [
        sys.executable,
        *(launcher if processes > 1 else []),
        str(script),
        str(trace),
        *words,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    memory = estimate(load_config(words).workload, processes, "cpu").memory
    assert memory.total == pytest.approx(peak_of(trace), rel=0.1), json.dumps(memory._asdict())
