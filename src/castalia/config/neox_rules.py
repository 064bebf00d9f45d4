"""Rules for GPT-NeoX options about training: layout, batch, optimizer, schedule, launching."""

import math
from pathlib import Path

from castalia.config.neox_curriculum import curriculum
from castalia.config.neox_keys import HONOURED
from castalia.config.neox_optimizer import optimizer
from castalia.config.neox_precision import precision
from castalia.config.neox_reading import NeoxOptions, NeoxReading, OptionRule, note, wrong


def parallel(o: NeoxOptions, out: NeoxReading) -> None:
    """Degrees of parallelism; pipe_parallel_size 0 and 1 are both one stage."""
    tensor = max(1, o["model_parallel_size"])
    o.put(out, "parallel.tp", tensor, "model_parallel_size")
    o.put(out, "parallel.pp", max(1, o["pipe_parallel_size"]), "pipe_parallel_size")
    if tensor > 1:
        note(
            out,
            f"parallel.tp is {tensor} as in the file; parallel.tp=1 trains the same model unsplit",
            "parallel.tp",
        )
    # 0 stages means one without DeepSpeed's pipeline engine, so both are 1 here.
    split = tensor * max(1, o["pipe_parallel_size"])
    if o.world > 1 and o.world % split:
        wrong(
            out,
            f"world size {o.world} is not divisible by model_parallel_size * pipe_parallel_size ="
            f" {split}",
            "parallel.tp",
        )


def zero(o: NeoxOptions, out: NeoxReading) -> None:
    """Stage 3 gathers weights block by block; the lower stages keep them over the step."""
    stage = (o["zero_optimization"] or {}).get("stage", 0)
    if o.has("autotuning") and isinstance(stage, list) and stage:
        # What the autotuner would try; the first is its simplest.
        stage = stage[0]
    if stage not in (0, 1, 2, 3):
        wrong(out, f"unknown zero_optimization.stage {stage!r}; choose one of 0, 1, 2, 3")
    # What the lower stages shard is a matter of memory alone; FSDP2 shards all of it.
    o.put(out, "parallel.reshard_after_forward", stage == 3, "zero_optimization")


def batch(o: NeoxOptions, out: NeoxReading) -> None:
    """train_batch_size, or micro * accumulation * data-parallel ranks."""
    micro = o["train_micro_batch_size_per_gpu"]
    rows = o["train_batch_size"]
    split = max(1, o["model_parallel_size"]) * max(1, o["pipe_parallel_size"])
    ranks = max(1, o.world // split)
    gas = max(1, o["gradient_accumulation_steps"])
    if rows is None and micro is None:
        if o.complete:
            wrong(
                out,
                "neither train_batch_size nor train_micro_batch_size_per_gpu is given",
                "train.batch_size",
            )
        return
    if rows is None:
        rows = micro * gas * ranks
        note(
            out,
            f"train.batch_size is {rows} rows: {micro} a rank * {gas} accumulated * {ranks}"
            f" data-parallel rank{'s' if ranks > 1 else ''}, GPT-NeoX's rule for a file without"
            " train_batch_size; set train.batch_size=N to make it independent of the world size",
            "train.batch_size",
        )
    elif o.has("gradient_accumulation_steps") and micro and rows % (micro * gas):
        wrong(
            out,
            f"train_batch_size {rows} is not divisible by train_micro_batch_size_per_gpu {micro} *"
            f" gradient_accumulation_steps {gas}",
            "train.batch_size",
        )
    o.put(out, "train.batch_size", rows, "train_batch_size", "train_micro_batch_size_per_gpu")
    if micro:
        o.put(out, "train.micro_batch_size", micro, "train_micro_batch_size_per_gpu")


def schedule(o: NeoxOptions, out: NeoxReading) -> None:
    """Shape of the learning rate; `cosine` is that of GPT-NeoX v1.0, which trained Pythia and
    20B."""
    style = o["lr_decay_style"]
    if style not in ("cosine", "linear", "exponential", "constant"):
        wrong(
            out,
            f"unknown lr_decay_style {style!r};"
            " choose one of constant, linear, cosine, exponential",
        )
        return
    if style == "cosine" and o["warmup"] == 1:
        o.put(out, "schedule.name", "cosine", "lr_decay_style")
        note(
            out,
            "lr_decay_style cosine is today's form, because GPT-NeoX v1.0 has rate 0 at every step"
            " with warmup 1",
            "schedule.name",
        )
        return
    o.put(out, "schedule.name", "cosine_neox_v1" if style == "cosine" else style, "lr_decay_style")
    if style == "cosine":
        note(
            out,
            "lr_decay_style cosine is read as GPT-NeoX v1.0 computed it, the code that trained"
            " Pythia and 20B: towards 0 over the horizon, floored at min_lr; schedule.name=cosine"
            " takes the newer form, which reaches min_lr at the end",
            "schedule.name",
        )


def rates_of_llemma(o: NeoxOptions, out: NeoxReading) -> None:
    """decay_lr_to, the share of the peak at the end, and warmup_iters, the steps of the warmup.

    configs/llemma/34B.yml has the same schedule in GPT-NeoX's words: min_lr is 0.033 of the peak,
    and warmup 500 of the iterations.
    """
    params = (o["optimizer"] or {}).get("params") or {}
    stray(o, out, "decay_lr_to", "min_lr", params.get("lr"))
    steps = o["lr_decay_iters"] or o["train_iters"]
    stray(o, out, "warmup_iters", "warmup", steps and 1 / steps)


def stray(o: NeoxOptions, out: NeoxReading, name: str, known: str, unit: float | None) -> None:
    """Set the option `known` to `unit` times the option `name`, if that is given."""
    if not o.has(name):
        return
    path = HONOURED[known].path
    if o.has(known) or not isinstance(unit, int | float):
        wrong(out, f"{name} is not an option of GPT-NeoX; write {known} alone", path)
        return
    # Six digits remove the float error.
    value = float(f"{o[name] * unit:.6g}")
    o.put(out, path, value, name)
    note(
        out,
        f"{name} is not an option of GPT-NeoX, which would refuse the file; it is read as {known}"
        f" {value:g}",
        path,
    )


def autotuning(o: NeoxOptions, out: NeoxReading) -> None:
    """The autotuner of DeepSpeed searches for micro-batch and ZeRO stage; here they are given."""
    if (o["autotuning"] or {}).get("enabled"):
        note(
            out,
            "autotuning is not run: train.micro_batch_size is that of the file; `castalia tune`"
            " measures it on a machine, and `castalia show --gpu` plans a layout",
            "train.micro_batch_size",
        )


def horizon(o: NeoxOptions, out: NeoxReading) -> None:
    """lr_decay_iters, or the share lr_decay_fraction of train_iters, or train_iters."""
    if o.has("lr_decay_iters"):
        o.put(out, "schedule.decay_steps", o["lr_decay_iters"], "lr_decay_iters")
    elif o.has("lr_decay_fraction") and o.has("train_iters"):
        steps = math.floor(o["train_iters"] * o["lr_decay_fraction"])
        o.put(out, "schedule.decay_steps", steps, "lr_decay_fraction")


def launching(o: NeoxOptions, out: NeoxReading) -> None:
    """Launcher, hosts, and whether ssh is tried first; training does not depend on them."""
    known = {"pdsh": "pdsh", "openmpi": "mpi", "slurm": "slurm"}
    name = o["launcher"]
    if o["deepspeed_slurm"]:
        name = "slurm"
    elif o["deepspeed_mpi"]:
        name = "openmpi"
    if name in known:
        o.put(out, "launch.launcher", known[name], "launcher", "deepspeed_slurm", "deepspeed_mpi")
    elif name is not None:
        note(
            out,
            f"unknown launcher {name!r}; choose launch.launcher from torchrun, slurm, mpi, pdsh",
            "launch.launcher",
        )
    # As DeepSpeed does: GPT-NeoX's own examples name the file /mock_path.
    if o.has("hostfile") and not Path(o["hostfile"]).exists():
        note(
            out,
            f"hostfile {o['hostfile']} does not exist: the ranks start on this machine, as in"
            " GPT-NeoX; name another with --hostfile",
            "launch.hostfile",
        )
    elif o.has("hostfile"):
        o.put(out, "launch.hostfile", o["hostfile"], "hostfile")
    # -1 is DeepSpeed's word for all nodes of the hostfile.
    if o["num_nodes"] > 0:
        o.put(out, "launch.nodes", o["num_nodes"], "num_nodes")
    if o.has("no_ssh_check"):
        o.put(out, "launch.ssh_check", not o["no_ssh_check"], "no_ssh_check")


TRAINING_RULES: list[tuple[tuple[str, ...], OptionRule]] = [
    (("model_parallel_size", "pipe_parallel_size"), parallel),
    (("zero_optimization",), zero),
    (("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), batch),
    (("optimizer", "use_bnb_optimizer", "weight_decay", "gradient_clipping"), optimizer),
    (("lr_decay_style", "warmup"), schedule),
    (("decay_lr_to", "warmup_iters"), rates_of_llemma),
    (("autotuning",), autotuning),
    (("curriculum_learning",), curriculum),
    (("lr_decay_iters", "lr_decay_fraction"), horizon),
    (
        (
            *("precision", "fp16", "bf16", "te_fp8_mha", "te_fp8_format", "te_fp8_wgrad"),
            *("data_types", "fp32_allreduce"),
        ),
        precision,
    ),
    (
        (
            "launcher",
            "deepspeed_slurm",
            "deepspeed_mpi",
            "hostfile",
            "num_nodes",
            "no_ssh_check",
        ),
        launching,
    ),
]
"""The options that a rule reads, and the rule."""
