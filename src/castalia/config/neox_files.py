"""Rules for GPT-NeoX options about files: token files, checkpoints, validation."""

import os.path
from pathlib import Path
from typing import Any

from castalia.config.neox_keys import WHY
from castalia.config.neox_reading import NeoxOptions, NeoxReading, OptionRule, note, wrong
from castalia.config.neox_tokenizer import vocabulary

MIXERS = {"smoothed_mean": "odm-repo", "exp3": "exp3", "naive_validation": "naive-validation"}
"""data_sampling_method -> mixing.kind. Its `ema` fails at the first step of its own trainer."""
VALIDATION_FILES = ("valid_data_paths", "data_path", "pos_valid_data_paths")
"""Options that name data to validate on."""
LOADING = ("finetune", "iteration", "no_load_optim")
"""How `load` is loaded."""


def token_files(o: NeoxOptions, out: NeoxReading) -> None:
    """data_path with its split, or lists of paths with weights; GPT-NeoX refuses both together."""
    if o.has("data_path") and o.has("train_data_paths"):
        wrong(out, "data_path and train_data_paths are both given; keep one")
    if o.has("data_path"):
        o.put(out, "data.train", [o["data_path"]], "data_path")
        o.put(out, "data.split", o["split"], "split", "data_path")
    for part, ours in (("train", "weights"), ("valid", "valid_weights")):
        if o.has(f"{part}_data_paths"):
            o.put(out, f"data.{part}", o[f"{part}_data_paths"], f"{part}_data_paths")
        if o.has(f"{part}_data_weights") and weights_count(o, out, part):
            o.put(out, f"data.{ours}", o[f"{part}_data_weights"], f"{part}_data_weights")
    train = o["train_data_paths"]
    valid = o["valid_data_paths"]
    if train and train == valid:
        note(
            out,
            "validation reads the training data, as this file says: its loss is not held-out",
            "data.valid",
        )
    remark_missing("train", [o["data_path"]] if o.has("data_path") else train or [], out)
    remark_missing("valid", valid or [], out)


def weights_count(o: NeoxOptions, out: NeoxReading, part: str) -> bool:
    """Whether the weights of a part of the data are used; GPT-NeoX's two other rules replace them.

    Source  GPT-NeoX, megatron/data/data_utils.py: weight_by_num_documents overwrites all weights;
            validate_train_epochs refuses those of train_epochs unless all are 1.
    """
    weights = o[f"{part}_data_weights"]
    if o["weight_by_num_documents"]:
        note(
            out,
            f"{part}_data_weights {weights} have no effect with weight_by_num_documents",
            "data.document_alpha",
        )
        return False
    if o.has("train_epochs") and part == "train":
        if any(weight != 1 for weight in weights):
            wrong(
                out,
                f"train_data_weights {weights} with train_epochs: every source is passed over"
                " alike; delete one of the two",
                "data.weights",
            )
        return False
    return True


def document_weights(o: NeoxOptions, out: NeoxReading) -> None:
    """weight_by_num_documents with its exponent; a single source has nothing to weigh."""
    if o["weight_by_num_documents"] and not o.has("data_path"):
        o.put(
            out,
            "data.document_alpha",
            o["weighted_sampler_alpha"],
            "weight_by_num_documents",
            "weighted_sampler_alpha",
        )


def length(o: NeoxOptions, out: NeoxReading) -> None:
    """train_iters or train_epochs, and the horizon, which is a share of either."""
    if not o.has("train_epochs"):
        if o.complete and not o.has("train_iters"):
            note(
                out,
                "neither train_iters nor train_epochs is given, without which GPT-NeoX does not"
                " train: set train.steps",
                "train.steps",
            )
        return
    if o.has("train_iters"):
        wrong(out, "train_iters and train_epochs are both given; keep one", "train.epochs")
    if o.has("lr_decay_fraction") and not o.has("lr_decay_iters"):
        wrong(
            out,
            "lr_decay_fraction with train_epochs is a share of steps that the data decide; write"
            " lr_decay_iters",
            "schedule.decay_steps",
        )


def remark_missing(part: str, prefixes: list[Any], out: NeoxReading) -> None:
    """Note the first token file that does not exist on this machine."""
    missing = [str(prefix) for prefix in prefixes if not Path(f"{prefix}.idx").is_file()]
    if missing:
        note(
            out,
            f"token file {missing[0]}.idx does not exist; set data.{part}=PREFIX to your own",
            f"data.{part}",
        )


def validation(o: NeoxOptions, out: NeoxReading) -> None:
    """Validate every eval_interval steps if the files name validation data.

    eval_iters 0 turns validation off, in GPT-NeoX too; eval_interval 0 can mean nothing else.
    """
    if 0 in (o["eval_iters"], o["eval_interval"]):
        o.put(out, "train.eval_every", None, "eval_iters", "eval_interval")
        return
    if any(o.has(name) for name in VALIDATION_FILES):
        o.put(out, "train.eval_every", o["eval_interval"], "eval_interval", *VALIDATION_FILES)
    o.put(out, "train.eval_batches", o["eval_iters"], "eval_iters")


def tasks(o: NeoxOptions, out: NeoxReading) -> None:
    """eval_tasks are evaluated with each validation and at the end, as GPT-NeoX does.

    Source  GPT-NeoX, megatron/training.py, evaluate; eval_tasks/eval_adapter.py, run_eval; eval.py.
    """
    if not o["eval_tasks"]:
        for name in ("eval_num_fewshot", "eval_results_prefix"):
            if o.has(name):
                out.ignored.setdefault("nothing is evaluated without eval_tasks", []).append(name)
        return
    names = ("eval_tasks", "eval_num_fewshot", "eval_results_prefix", "eval_interval")
    o.put(out, "eval.tasks", o["eval_tasks"], *names)
    o.put(out, "eval.shots", o["eval_num_fewshot"], *names)
    # An empty prefix is GPT-NeoX's default, under which the file has no prefix.
    o.put(out, "eval.results_prefix", o["eval_results_prefix"] or None, *names)
    validates = 0 not in (o["eval_iters"], o["eval_interval"])
    o.put(out, "eval.every", o["eval_interval"] if validates else 0, *names)
    o.put(out, "eval.at_end", validates, *names)
    text = "eval_tasks: all documents of each task count; GPT-NeoX stops after 10 of each"
    if not validates:
        text = (
            "eval_tasks are not evaluated while training, since GPT-NeoX evaluates them with the"
            " validation, which eval_iters or eval_interval turn off; set eval.every=N"
        )
    note(out, text, "eval.limit" if validates else "eval.every")


def mixing(o: NeoxOptions, out: NeoxReading) -> None:
    """The online mixer of GPT-NeoX's fork; without a method, or with `none`, sources are
    blended."""
    method = o["data_sampling_method"]
    if method in (None, "none"):
        return
    if method not in MIXERS:
        wrong(
            out,
            f"unknown data_sampling_method {method!r}; choose one of {', '.join(MIXERS)}",
            "mixing.kind",
        )
        return
    every = o["data_sampling_update_frequency"]
    if every < 1:
        wrong(
            out,
            f"data_sampling_update_frequency {every} never updates; write 1, as its scripts do",
            "mixing.update_every",
        )
    o.put(out, "mixing.kind", MIXERS[method], "data_sampling_method")
    o.put(out, "mixing.warmup_steps", o["data_sampling_warmup_steps"], "data_sampling_warmup_steps")
    o.put(out, "mixing.update_every", max(every, 1), "data_sampling_update_frequency")
    if method == "smoothed_mean":
        o.put(
            out,
            "mixing.smoothing",
            o["data_sampling_smoothing_factor"],
            "data_sampling_smoothing_factor",
        )
    if o["mixed_minibatches"]:
        note(
            out,
            "mixed_minibatches drew whole micro-batches of one source; here the rows of a step are"
            " drawn one by one, so that a micro-batch holds several sources",
            "mixing.kind",
        )


def saving(o: NeoxOptions, out: NeoxReading) -> None:
    """checkpoint_factor is an interval, or with checkpoint_scale log the ratio of steps."""
    interval = o["save_interval"]
    factor = o["checkpoint_factor"]
    if factor is None:
        factor = interval
    scale = o["checkpoint_scale"]
    if interval not in (None, factor) or (interval and scale == "log"):
        wrong(
            out,
            f"save_interval {interval} is the old name of checkpoint_factor with checkpoint_scale"
            f" linear, but checkpoint_factor is {factor} and checkpoint_scale {scale}; keep one",
            "checkpoint.every",
        )
    steps = list(o["extra_save_iters"] or [])
    every = None
    if scale not in ("linear", "log"):
        wrong(out, f"unknown checkpoint_scale {scale!r}; choose one of linear, log")
    # A factor of 1 or less would list steps without end.
    elif factor and scale == "log" and factor > 1:
        steps = sorted({*steps, *powers(factor, o["train_iters"] or 0)})
    elif factor and (scale == "log" or int(factor) != factor):
        wrong(
            out,
            f"checkpoint_factor {factor} must be an integer with checkpoint_scale linear, and above"
            f" 1 with log; checkpoint_scale is {scale}",
            "checkpoint.every",
        )
    elif factor:
        every = int(factor)
    o.put(out, "checkpoint.steps", steps, "extra_save_iters", "checkpoint_scale")
    o.put(out, "checkpoint.every", every, "checkpoint_factor", "save_interval", "checkpoint_scale")


def powers(factor: float, last: int) -> list[int]:
    """int(factor ** k) up to `last`: the steps of checkpoint_scale log."""
    out = []
    power = 1.0
    while power <= last:
        out.append(int(power))
        power *= factor
    return out


def folders(o: NeoxOptions, out: NeoxReading) -> None:
    """`save` is the run's folder; `load` is the same folder, or the run to start from."""
    if o.has("save"):
        o.put(out, "output", o["save"], "save")
    if not o.has("load"):
        for name in LOADING:
            if asked(o, name):
                out.ignored.setdefault("nothing is loaded without `load`", []).append(name)
    elif o.has("save") and same_folder(o["load"], o["save"]):
        own_folder(o, out)
    else:
        other_run(o, out)


def same_folder(one: str, other: str) -> bool:
    """Whether two paths name one folder, such as `runs/a` and `./runs/a/`."""
    return os.path.realpath(one) == os.path.realpath(other)


def own_folder(o: NeoxOptions, out: NeoxReading) -> None:
    """Refuse to resume from anything but the run's own newest checkpoint with all its state."""
    out.ignored.setdefault("a run resumes from its own folder", []).append("load")
    effects = {
        "finetune": "would count from step 0 again at every start",
        "iteration": "would go back to that step at every start",
        "no_load_optim": "would drop the optimizer's state at every start",
    }
    for name, effect in effects.items():
        if asked(o, name):
            wrong(
                out,
                f"{name} with `load` in the folder of `save` {effect}; a run resumes with all its"
                f" state from its newest checkpoint: delete {name}, or give `save` another folder"
                f" to start a new run from {o['load']!r}",
            )


def asked(o: NeoxOptions, name: str) -> bool:
    """Whether a file asks for the option. A plain truth test would miss iteration 0."""
    return o.has(name) and o[name] is not False


def other_run(o: NeoxOptions, out: NeoxReading) -> None:
    """Start from another run: with finetune from its weights alone, else at its step too.

    Source  GPT-NeoX megatron/checkpointing.py, load_checkpoint. With finetune the iteration is 0
            and neither optimizer nor learning rate schedule is loaded; with no_load_optim alone
            the iteration counts on.
    """
    load = o["load"]
    step = o["iteration"]
    finetune = o["finetune"]
    # A tag of GPT-NeoX is global_stepN; a run here names its steps stepN.
    o.put(out, "model.start", load if step is None else f"{load}/step{step}", "load")
    o.put(out, "train.start_step", not finetune, "load")
    o.put(out, "train.start_optimizer", not (finetune or o["no_load_optim"]), "load")
    note(
        out,
        f"load {load!r} is not the folder of `save`: a fresh run starts from it, and a run with a"
        " checkpoint of its own resumes from that; GPT-NeoX would load it at every start",
        "model.start",
    )
    if o["no_load_optim"] and not finetune:
        note(
            out,
            "no_load_optim: moments and learning rate schedule begin anew while steps and data"
            " continue, as in GPT-NeoX, which loads optimizer and schedule together",
            "train.start_optimizer",
        )


MONITORED = (
    "comms_logger",
    "flops_profiler",
    "steps_per_print",
    "tensorboard",
    "wall_clock_breakdown",
    "wandb",
)
"""DeepSpeed's options about what is measured and where it is shown."""


def deepspeed_extras(o: NeoxOptions, out: NeoxReading) -> None:
    """deepspeed_extra_args may only contain options without effect here."""
    extras = o.given.get("deepspeed_extra_args") or {}
    if not isinstance(extras, dict):
        wrong(out, f"deepspeed_extra_args: expected a mapping, got {extras!r}")
        return
    for name in extras:
        if name in MONITORED:
            # Without effect on the weights: a published file keeps it here, and still trains.
            where = "what is measured is read at the top level alone"
            out.ignored.setdefault(where, []).append(f"deepspeed_extra_args.{name}")
        elif name in WHY:
            out.ignored.setdefault(WHY[name], []).append(f"deepspeed_extra_args.{name}")
        else:
            wrong(out, f"deepspeed_extra_args.{name} is not read; write {name} at the top level")


FILE_RULES: list[tuple[tuple[str, ...], OptionRule]] = [
    (
        (
            "tokenizer_type",
            "vocab_file",
            "merge_file",
            "make_vocab_size_divisible_by",
            "model_parallel_size",
        ),
        vocabulary,
    ),
    (
        ("data_path", "split", "train_data_paths", "train_data_weights", "valid_data_paths"),
        token_files,
    ),
    (("weight_by_num_documents", "weighted_sampler_alpha"), document_weights),
    (("train_epochs",), length),
    (
        (
            "data_sampling_method",
            "data_sampling_warmup_steps",
            "data_sampling_update_frequency",
            "data_sampling_smoothing_factor",
            "mixed_minibatches",
        ),
        mixing,
    ),
    (("eval_interval", "eval_iters", *VALIDATION_FILES), validation),
    (("eval_tasks", "eval_num_fewshot", "eval_results_prefix", "eval_interval"), tasks),
    (("checkpoint_factor", "save_interval", "checkpoint_scale", "extra_save_iters"), saving),
    (("save", "load", *LOADING), folders),
    (("deepspeed_extra_args",), deepspeed_extras),
]
"""The options that a rule reads, and the rule."""
