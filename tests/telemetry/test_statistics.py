"""Statistics of steps: right numbers, the same on any layout, and no bit of the weights changed."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.telemetry.statistics_of import BASE, LAYOUTS, NAMES, NOISE, ON, digest, trained
from torch.autograd import DeviceType

from castalia.core.errors import ConfigError
from castalia.monitor.sinks.sink import flatten
from castalia.recipes import load_config
from castalia.telemetry.collectives import spans_of
from castalia.telemetry.watch import Watching
from castalia.train.hooks import Save


@pytest.fixture(scope="module")
def alone():
    """Metrics and trainer of one rank."""
    return trained(*ON, NOISE)


@pytest.fixture(scope="module")
def tied():
    """The same with tied embeddings."""
    return trained(*ON, "model.tie_word_embeddings=true")


@pytest.fixture(scope="module")
def on_two(on_ranks):
    """What each of two ranks has of every layout."""
    script = Path(__file__).with_name("statistics_of.py")
    return on_ranks(str(script), 2, "fsdp")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_measure_what_one_does(alone, tied, on_two, layout):
    expected, _ = tied if layout == "pp" else alone
    for rank in on_two:
        for ours, theirs in zip(rank[layout]["steps"], expected, strict=True):
            numbers = flatten({name: value for name, value in theirs.items() if statistic(name)})
            compared = flatten({name: value for name, value in ours.items() if statistic(name)})
            assert compared.keys() == numbers.keys() and len(numbers) > 60
            for name, value in numbers.items():
                # The gradient of a key's bias is rounding noise, which is exactly 0 now and then.
                noise = 1e-3 if "zero" in name else 1e-6
                assert compared[name] == pytest.approx(value, rel=2e-3, abs=noise), name
            if NOISE in LAYOUTS[layout]:
                scale = flatten(theirs["noise_scale"])
                assert flatten(ours["noise_scale"]) == pytest.approx(scale, rel=1e-3, nan_ok=True)


def statistic(name):
    """Whether a metric is compared here."""
    return name in {*NAMES, "weights"} - {"times"}


def test_no_bit_of_the_weights_changes_on_ranks(on_two):
    for rank in on_two:
        assert rank["fsdp"]["weights"] == rank["fsdp"]["without"]


@pytest.mark.parametrize(
    "options", [(), ("train.recompute=selective", "precision=bf16")], ids=["plain", "recompute"]
)
def test_no_bit_of_the_weights_changes(options):
    _, measured = trained(*ON, NOISE, "train.micro_batch_size=12", *options)
    _, plain = trained("train.micro_batch_size=12", *options)
    assert digest(measured) == digest(plain)


def test_norms_are_those_of_the_tensors(alone):
    steps, trainer = alone
    last = steps[-1]
    assert last["gradient_norms"]["all"] == pytest.approx(last["grad_norm"], rel=1e-6)
    weights = dict(trainer.model.named_parameters())
    layer = [p.detach().flatten() for name, p in weights.items() if name.startswith("layers.1.")]
    norm = float(torch.cat(layer).norm())
    assert last["weight_norms"]["layers"]["1"] == pytest.approx(norm, rel=1e-6)
    whole = torch.cat([p.detach().flatten() for p in weights.values()])
    assert last["weight_norms"]["all"] == pytest.approx(float(whole.norm()), rel=1e-6)
    embedding = weights["embed.weight"].detach()
    found = last["weights"]["embedding"]
    assert found["max"] == float(embedding.abs().max())
    assert found["rms"] == pytest.approx(float(embedding.square().mean().sqrt()), rel=1e-6)
    moments = trainer.updater.state("unembed.weight")["exp_avg"]
    head = last["state_norms"]["exp_avg"]["head"]
    assert head == pytest.approx(float(moments.norm()), rel=1e-6)


def test_the_first_update_of_adam_is_the_rate_for_each_weight():
    """Without weight decay, and gradients far above eps: |update| is lr for every number."""
    steps, trainer = trained(
        "monitor.update_norms_every=1", "optim.weight_decay=0", "optim.eps=1e-12", "train.steps=1"
    )
    head = trainer.model.unembed.weight.numel()
    assert steps[0]["update_norms"]["head"] == pytest.approx(steps[0]["lr"] * head**0.5, rel=1e-2)


def test_zeros_of_gradients_are_rows_of_tokens_that_did_not_occur():
    steps, trainer = trained("monitor.zero_gradients_every=1", "train.steps=1")
    rows = len(trainer.model.embed.weight)
    share = steps[0]["zero_gradients"]["embedding"]
    # Each token of the step has a row; 12 rows of 16 tokens are at most 192 of 384 or more.
    assert (rows - 12 * 16) / rows <= share < 1
    assert share * rows == pytest.approx(round(share * rows), abs=1e-6)


def test_a_statistic_is_of_its_steps_alone():
    steps, _ = trained("monitor.activations_every=2", "monitor.times_every=3", "train.steps=3")
    assert [("activations" in step, "times" in step) for step in steps] == [
        (False, False),
        (True, False),
        (False, True),
    ]


def test_times_add_up_to_the_step():
    steps, _ = trained(*ON, NOISE)
    whole = []
    for step in steps:
        times = dict(step["times"])
        times.pop("hooks", None)
        parts = {"data", "forward", "loss", "backward", "gradient_norm", "update", "statistics"}
        assert parts <= times.keys()
        seconds = pytest.approx(step["step_seconds"], rel=0.02, abs=2e-3)
        whole.append(sum(times.values()) == seconds)
    # A busy machine may stop the process between two of them, but not in each step.
    assert any(whole)
    assert "Collect" in steps[1]["times"]["hooks"]


def test_ranks_time_their_collectives(on_two):
    for layout in LAYOUTS:
        assert on_two[0][layout]["steps"][0]["times"]["collectives"] > 0, layout


def test_ranks_count_their_collectives(on_two):
    sharded = on_two[0]["fsdp"]["steps"][1]["collectives"]
    # Of each of two micro-batches: the root and two layers forward, the layers again backward.
    assert sharded["all_gather"]["calls"] == 10
    # Gloo scatters by sums: those of three gradients, of the weight of the batch and of its totals.
    assert sharded["all_reduce"]["calls"] == 5
    assert sharded["all_gather"]["seconds"] > 0
    assert on_two[0]["pp"]["steps"][1]["collectives"]["send"]["calls"] > 0


def test_kernels_and_calls_are_told_apart():
    """Events as torch's profiler has them on a GPU: launches on the host, kernels on the device."""

    def event(name, began, ended, shapes=(), device=DeviceType.CUDA):
        span = SimpleNamespace(start=began, end=ended)
        return SimpleNamespace(name=name, time_range=span, input_shapes=shapes, device_type=device)

    events = [
        event("nccl:_all_gather_base", 0, 5, [[], [16, 4]], DeviceType.CPU),
        # The range of the same call on the device counts no second time.
        event("nccl:_all_gather_base", 10, 40),
        event("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 10, 40),
        event("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 50, 60),
        event("aten::mm", 0, 100, [[3, 3]], DeviceType.CPU),
    ]
    gather, kernel, sent = spans_of(events)
    assert (gather.kind, gather.numbers, gather.is_timed) == ("all_gather", 64, False)
    assert (kernel.kind, kernel.is_call, kernel.ended - kernel.began) == ("all_gather", False, 30)
    assert sent.kind == "send"


def test_an_error_in_the_passes_is_not_followed_by_a_collective():
    """The other ranks would not join it."""

    class Watched(Watching):
        finished = 0

        def install(self):
            return []

        def finish(self):
            self.finished += 1

    watched = Watched(1, torch.nn.Linear(1, 1))
    with pytest.raises(MemoryError), watched.watch():
        raise MemoryError
    assert watched.finished == 0
    with watched.watch():
        pass
    assert watched.finished == 1


def test_averages_of_the_noise_scale_survive_a_resume(tmp_path):
    words = (NOISE, f"output={tmp_path}/run", "checkpoint.every=1", "checkpoint.asynchronous=false")
    first, _ = trained(*words, "train.exit_every=1", hooks=[Save()])
    second, _ = trained(*words, hooks=[Save()])
    whole, _ = trained(NOISE)
    assert [step["noise_scale"] for step in (*first, *second)] == [
        pytest.approx(step["noise_scale"], nan_ok=True) for step in whole
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["parallel.pp=2"], "pipeline"),
        (["train.batch_size=1", "train.micro_batch_size=null"], "two rows.*to 2 or"),
        (["parallel.dp_shard=12", "train.micro_batch_size=null"], "two rows.*to 24 or"),
    ],
)
def test_what_the_noise_scale_cannot_do_is_refused(options, words):
    with pytest.raises(ConfigError, match=f"monitor.noise_scale_every.*{words}"):
        load_config([*BASE, NOISE, *options])


def test_the_peak_gives_the_mfu():
    steps, trainer = trained("monitor.peak_tflops=0.5")
    flops = trainer.clock.rate.flops_per_token * steps[0]["tokens_per_second"]
    assert steps[0]["model_tflops"] == pytest.approx(flops / 1e12, rel=1e-3, abs=1e-6)
    assert steps[0]["mfu"] == pytest.approx(flops / 5e11, rel=1e-3, abs=1e-6)


def test_groups_can_be_kinds_or_parts():
    kinds, _ = trained("monitor.norm_groups=kinds", "monitor.weight_norms_every=1", "train.steps=1")
    parts, _ = trained("monitor.norm_groups=parts", "monitor.weight_norms_every=1", "train.steps=1")
    of_kinds = kinds[0]["weight_norms"]
    of_parts = parts[0]["weight_norms"]
    assert set(of_kinds) == {"all", "embedding", "attention", "mlp", "norms", "norm", "head"}
    squares = sum(layer["mlp"] ** 2 for layer in of_parts["layers"].values())
    assert of_kinds["mlp"] ** 2 == pytest.approx(squares, rel=1e-6)
    assert of_kinds["all"] == of_parts["all"]
