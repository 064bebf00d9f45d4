"""GPT-NeoX's options of pairs: their files, and `train_impl: dpo`.

Source  GPT-NeoX, megatron/training.py:626-686, megatron/data/data_utils.py and
        megatron/text_generation_utils.py, precompute_logits.
"""

from castalia.config.neox_reading import NeoxOptions, NeoxReading, note, wrong

SIDES = {"pos": "chosen", "neg": "rejected"}
"""GPT-NeoX's name of a side of the pairs -> ours."""
PAIR_FILES = {
    f"{theirs}_{part}{kind}_data_paths": f"{'valid_' if part == 'valid' else ''}{ours}{suffix}"
    for theirs, ours in SIDES.items()
    for part in ("train", "valid")
    for kind, suffix in (("", ""), ("_label", "_labels"))
}
"""GPT-NeoX's name of a list of files -> the field of `data`."""
DPO_OPTIONS = ("dpo_beta", "dpo_reference_free", "precompute_model_name")
TEXT_FILES = ("train", "valid", "labels", "valid_labels", "weights", "valid_weights", "split")
"""Fields of `data` that GPT-NeoX does not read under dataset_impl pairwise."""


def pair_files(o: NeoxOptions, out: NeoxReading) -> None:
    """The files of both sides, for kinds of training that read pairs."""
    if o["dataset_impl"] != "pairwise":
        wrong(
            out,
            f"train_impl {o['train_impl']} reads pairs, but dataset_impl is {o['dataset_impl']};"
            " write `dataset_impl: pairwise`",
            "data.chosen",
        )
    data = out.values.setdefault("data", {})
    unread = [name for name in TEXT_FILES if data.pop(name, None)]
    if unread:
        note(
            out,
            f"data.{unread[0]}: GPT-NeoX reads pairs under dataset_impl pairwise, and no other"
            " files, so they are left out",
            "data.chosen",
        )
    for theirs, ours in PAIR_FILES.items():
        if o.has(theirs):
            o.put(out, f"data.{ours}", o[theirs], theirs)
    if not o.has("pos_train_data_paths"):
        wrong(
            out,
            f"train_impl {o['train_impl']} without pos_train_data_paths and neg_train_data_paths",
            "data.chosen",
        )


def dpo(o: NeoxOptions, out: NeoxReading) -> None:
    """Direct preference optimization, with the reference that GPT-NeoX takes."""
    pair_files(o, out)
    o.put(out, "loss.kind", "dpo", "train_impl")
    o.put(out, "loss.beta", o["dpo_beta"], "train_impl", "dpo_beta")
    if o["dpo_reference_free"]:
        o.put(out, "loss.reference", "free", "dpo_reference_free")
        return
    name = o["precompute_model_name"]
    if name:
        # generate.py wrote a file beside each token file, its name behind that of the tokens.
        for theirs, ours in PAIR_FILES.items():
            if "label" not in theirs and o.has(theirs):
                files = [f"{path}_{name}" for path in o[theirs]]
                o.put(out, f"data.{ours}_reference", files, "precompute_model_name")
        o.put(out, "loss.reference", "cached", "precompute_model_name")
        return
    # A row of several pairs lets an answer see those before it, in both models alike.
    live = o["pack_impl"] == "pack_until_overflow"
    o.put(out, "loss.reference", "live" if live else "cached", "train_impl")
    if not live:
        note(
            out,
            "the reference model runs once over the data, before the first step; GPT-NeoX runs it"
            " in every step: set loss.reference=live for that",
            "loss.reference",
        )
