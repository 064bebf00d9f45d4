"""GPT-NeoX's `train_impl`: what kind of training a file asks for, and the options of each kind.

Source  GPT-NeoX, megatron/training.py:596-860 and megatron/data/online_dataset.py.
"""

from castalia.config.neox_pairs import PAIR_FILES, dpo
from castalia.config.neox_reading import NeoxOptions, NeoxReading, OptionRule, note, wrong
from castalia.config.neox_rewards import KTO_OPTIONS, REWARD_FILES, kto, rm
from castalia.core.errors import nearest

ONLINE_DATA = ("train", "valid", "labels", "valid_labels", "weights", "valid_weights", "split")
"""Fields of `data` that a file with `dataset_impl: online` may name, which GPT-NeoX then never
opens."""


def train_impl(o: NeoxOptions, out: NeoxReading) -> None:
    """Apply the rule of the kind that the file names."""
    kind = o["train_impl"]
    if kind not in TRAIN_IMPLS:
        wrong(
            out,
            f"unknown train_impl {kind!r}; choose one of {', '.join(TRAIN_IMPLS)}"
            f"{nearest(str(kind), TRAIN_IMPLS)}",
            "loss.kind",
        )
        return
    TRAIN_IMPLS[kind](o, out)
    for name, kinds in OWN_OPTIONS.items():
        if o.has(name) and kind not in kinds:
            out.ignored.setdefault(f"belongs to train_impl {' or '.join(kinds)}", []).append(name)


def normal(o: NeoxOptions, out: NeoxReading) -> None:
    """The next token of text: nothing beside what the other rules say."""
    if o["dataset_impl"] != "gpt2":
        wrong(
            out,
            f"dataset_impl {o['dataset_impl']} without a train_impl that reads it; write"
            " `dataset_impl: gpt2`, or name the train_impl",
            "loss.kind",
        )


def reinforce(o: NeoxOptions, out: NeoxReading) -> None:
    """REINFORCE on answers that in GPT-NeoX a server sends and here the run writes itself."""
    o.put(out, "loss.kind", "reinforce", "train_impl")
    baseline = "leave_one_out" if o["reinforce_leave_one_out"] else "running_mean"
    o.put(out, "loss.baseline", baseline, "train_impl", "reinforce_leave_one_out")
    for name in ("kl_impl", "kl_div_beta"):
        o.put(out, f"loss.{name}", o[name], "train_impl", name)
    # The mean of each micro-batch, over its tokens and once more over its answers.
    o.put(out, "loss.average", "neox", "train_impl")
    data = out.values.setdefault("data", {})
    unread = [name for name in ONLINE_DATA if data.pop(name, None)]
    data["packing"] = "unpacked"
    if unread:
        note(
            out,
            f"data.{unread[0]}: GPT-NeoX opens no token files under dataset_impl online, so they"
            " are left out",
            "data.prompts",
        )
    wrong(
        out,
        "train_impl reinforce: GPT-NeoX receives answers with rewards from a server"
        " (online_dataserver_ips); here the run answers prompts itself: set"
        " data.prompts=FILE.jsonl, and loss.rewards=[module:function] or loss.reward_model",
        "data.prompts",
    )
    note(
        out,
        "train.batch_size counts answers in GPT-NeoX and prompts here: divide it by"
        " loss.completions, the answers to each",
        "train.batch_size",
    )


TRAIN_IMPLS: dict[str, OptionRule] = {
    "normal": normal,
    "dpo": dpo,
    "kto": kto,
    "rm": rm,
    "reinforce": reinforce,
}
"""Every kind by its name in GPT-NeoX."""
OWN_OPTIONS = (
    dict.fromkeys(PAIR_FILES, ("dpo", "rm"))
    | dict.fromkeys(("dpo_beta", "dpo_reference_free"), ("dpo",))
    | {"precompute_model_name": ("dpo", "kto"), "z_loss": ("rm",)}
    | dict.fromkeys((*KTO_OPTIONS, *REWARD_FILES), ("kto",))
)
"""Option -> the kinds that read it."""
TRAIN_IMPL_RULES: list[tuple[tuple[str, ...], OptionRule]] = [
    (("train_impl", "dataset_impl", *OWN_OPTIONS), train_impl),
]
