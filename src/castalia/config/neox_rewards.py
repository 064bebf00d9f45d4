"""GPT-NeoX's reward models and its KTO: `train_impl: rm` and `kto`.

Source  GPT-NeoX, megatron/training.py:600-625 and 687-795.
"""

from castalia.config.neox_pairs import pair_files
from castalia.config.neox_reading import NeoxOptions, NeoxReading, note, wrong

REWARD_FILES = {
    "train_reward_data_paths": "rewards",
    "valid_reward_data_paths": "valid_rewards",
}
"""GPT-NeoX's name of a list of files -> the field of `data`."""
KTO_OPTIONS = ("kto_beta", "kto_desirable_weight", "kto_undesirable_weight")


def rm(o: NeoxOptions, out: NeoxReading) -> None:
    """A reward model, its scores read where GPT-NeoX reads them: before each target."""
    pair_files(o, out)
    o.put(out, "loss.kind", "reward", "train_impl")
    o.put(out, "model.head", "score", "train_impl")
    o.put(out, "loss.at", "targets", "train_impl")
    o.put(out, "loss.z_loss", o["z_loss"], "z_loss")


def kto(o: NeoxOptions, out: NeoxReading) -> None:
    """Answers with a reward above or below 0, compared with the other half of a micro-batch."""
    o.put(out, "loss.kind", "kto", "train_impl")
    o.put(out, "loss.kl", "halves", "train_impl")
    for name in KTO_OPTIONS:
        o.put(out, f"loss.{name.removeprefix('kto_')}", o[name], "train_impl", name)
    for theirs, ours in REWARD_FILES.items():
        if o.has(theirs):
            o.put(out, f"data.{ours}", o[theirs], theirs)
    if not o.has("train_reward_data_paths"):
        wrong(out, "train_impl kto without train_reward_data_paths", "data.rewards")
    if o.has("precompute_model_name"):
        wrong(
            out,
            "precompute_model_name with train_impl kto: delete it; the run computes the reference's"
            " log-probabilities itself, once",
            "loss.reference",
        )
    note(
        out,
        "each answer counts with its own weight; GPT-NeoX gives all of a half the mean of theirs",
        "loss.desirable_weight",
    )
