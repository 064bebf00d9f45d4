"""Which checkpoint a file of results is about, by its config first and its path second."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from castalia.results.schema import Labels
from castalia.results.suites import (
    BLOOM_SIZES,
    FORMER_SIZES,
    OPT_SIZES,
    PYTHIA_SEED,
    PYTHIA_SIZES,
    PYTHIA_STEPS,
    pythia,
)

STEP = re.compile(r"(?<![a-z])step-?0*(\d+)", re.IGNORECASE)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PYTHIA_ID = re.compile(r"(intervention-)?pythia-(?:v1\.1-)?([\d.]+[mb])((?:-[\w.]+)*)", re.I)
SEED = re.compile(r"(?:(data|weight)-)?seed(\d+)")
BATCH = re.compile(r"([\d.]+)MtokBS")
"""A batch of so many 2**20 tokens, in place of 2."""
NEOX_NAME = re.compile(r"(?:pythia-)?([\d.]+[mb])((?:[-_].*)?)")
"""A checkpoint folder of GPT-NeoX's runs of Pythia in lower case, such as 410m_deduped."""
WINDOWS_OF_INTERVENTION = {"intervene_7": "intervention", "intervene_21": "intervention-long"}
"""Folders by the share of training that saw changed pronouns, in percent -> variant."""


def subject_of_hub_id(name: str, revision: str | None, path: PurePath) -> Labels:
    """The checkpoint `name` (OWNER/NAME of the hub or a local folder), as its results record it.

    revision  of the hub; where it says no step, `path` of the results may.
    """
    step = step_in(revision or "")
    if step is None:
        step = step_on(PurePath(name, path.name), path)
    checkpoint = name
    if revision is not None:
        checkpoint = f"{name}@{revision}"
    owner, _, model = name.rpartition("/")
    known = None
    # A path of several folders is no hub id, even where it ends like one.
    if HUB_ID.fullmatch(name):
        known = subject_of_pythia(owner, model, step, path)
        known = known or subject_of_family("opt", "facebook", OPT_SIZES, name)
        known = known or subject_of_family("bloom", "bigscience", BLOOM_SIZES, name)
    known = known or subject_of_folder(name, step)
    if revision not in (None, "main") and step_in(revision or "") is None and not known.variant:
        # Another branch holds other weights.
        known = known._replace(variant=str(revision))
    return known._replace(checkpoint=checkpoint)


def subject_of_pythia(owner: str, model: str, step: int | None, path: PurePath) -> Labels | None:
    """A Pythia model by its id on the hub; None if it is another model."""
    match = PYTHIA_ID.fullmatch(model)
    if owner != "EleutherAI" or match is None:
        return None
    former = match[2].lower() in FORMER_SIZES
    size = FORMER_SIZES.get(match[2].lower(), match[2].lower())
    marks = match[3]
    seed = SEED.search(marks)
    batch = BATCH.search(marks)
    rest = [mark for mark in SEED.sub("", BATCH.sub("", marks)).split("-") if mark]
    # A name with other marks is a model that somebody derived from Pythia.
    if size not in PYTHIA_SIZES or not set(rest) <= {"deduped", "bf16", "long", "v0"}:
        return None
    suite = "pythia-v1"
    if seed:
        suite = "polypythias"
    elif former or "v0" in rest or "pythia-v0" in path.parts:
        suite = "pythia-v0"
    variant = ""
    if path.name.startswith("baseline-"):
        # The model itself, evaluated once more beside an intervened one.
        variant = "baseline"
    elif match[1]:
        variant = intervention(long="long" in rest)
    elif batch:
        variant = batch[0]
    elif seed and seed[1]:
        # Only the data or only the start weights were drawn anew.
        variant = f"{seed[1]}-seed"
    steps = PYTHIA_STEPS
    if batch:
        # Every run read the same tokens, so a smaller batch needs more steps.
        steps = round(PYTHIA_STEPS * 2 / float(batch[1]))
    if step is None:
        # The branch `main` holds the last step.
        step = steps
    return pythia(
        suite,
        size,
        step,
        deduped="deduped" in rest,
        variant=variant,
        seed=int(seed[2]) if seed else PYTHIA_SEED,
        steps=steps,
    )


def intervention(*, long: bool) -> str:
    """The variant of a continued run with changed pronouns; `long` is that of the last 21%."""
    if long:
        return "intervention-long"
    return "intervention"


def subject_of_family(suite: str, owner: str, sizes: Mapping[str, int], name: str) -> Labels | None:
    """A final model of a published family by its id on the hub; None if it is another model."""
    for size, parameters in sizes.items():
        if name == f"{owner}/{suite}-{size}":
            return Labels(suite, f"{suite}-{size}", size=size, parameters=parameters)
    return None


def subject_of_folder(name: str, step: int | None) -> Labels:
    """A model of which only the name is known: OWNER/NAME, or the last two parts of a path."""
    parts = PurePath(name).parts
    for inside in ("exports", "checkpoints"):
        # RUN/exports/hf/step1000 is about the run.
        if inside in parts[2:]:
            parts = parts[: parts.index(inside, 2)]
    if len(parts) > 1 and STEP.fullmatch(parts[-1]):
        parts = parts[:-1]
    # Both columns are part of a row's key, so a name without folders gets a suite as well.
    suite = ""
    model = "model"
    if parts:
        model = parts[-1]
    if len(parts) > 1:
        suite = parts[-2].strip("/")
    return Labels(suite or "models", model, step=step)


def subject_of_neox(settings: Mapping[str, Any], path: PurePath) -> Labels:
    """The checkpoint that GPT-NeoX evaluated, by the arguments of its run.

    settings  its flat arguments, or only `iteration` and the names of `config_files`.
    """
    step = settings.get("iteration")
    if not isinstance(step, int):
        step = step_on(path)
    folder = neox_folder(settings, path)
    # The path of the results names the model where the folder of the checkpoints does not.
    names = [PurePath(folder).name, *reversed(path.parent.parts)]
    known = next(
        filter(None, (subject_of_neox_name(name, step, settings, path) for name in names)), None
    )
    if known is None:
        known = subject_of_folder(folder, step)._replace(
            last_step=integer_at(settings, "train_iters"), seed=integer_at(settings, "seed")
        )
    return known._replace(checkpoint=folder)


def integer_at(settings: Mapping[str, Any], key: str) -> int | None:
    """A setting that is an integer; None for one that is missing, or text."""
    value = settings.get(key)
    if isinstance(value, int):
        return value
    return None


def neox_folder(settings: Mapping[str, Any], path: PurePath) -> str:
    """The folder of checkpoints that GPT-NeoX loaded; else the name of its config file."""
    folder = settings.get("load")
    if isinstance(folder, str) and folder:
        return folder
    files = settings.get("config_files")
    if isinstance(files, Mapping) and len(files) == 1:
        return str(next(iter(files)))
    return str(path.parent)


def subject_of_neox_name(
    name: str, step: int | None, settings: Mapping[str, Any], path: PurePath
) -> Labels | None:
    """A Pythia model by the name of its training folder; None if it is another model."""
    match = NEOX_NAME.fullmatch(name.lower())
    if match is None:
        return None
    size = FORMER_SIZES.get(match[1], match[1])
    if size not in PYTHIA_SIZES:
        return None
    marks = match[2]
    variant = variant_on(path)
    if "interven" in marks:
        # The longer one began at an earlier step, which its name has.
        variant = intervention(long=marks.endswith("start"))
    elif "long" in marks:
        variant = intervention(long=True)
    suite = "pythia-v1"
    if match[1] in FORMER_SIZES or "pythia-v0" in path.parts:
        suite = "pythia-v0"
    steps = integer_at(settings, "train_iters")
    if steps is None or steps <= 0:
        steps = PYTHIA_STEPS
    return pythia(
        suite,
        size,
        step,
        # Pronouns were changed in continued runs of deduplicated models only.
        deduped="dedup" in marks or variant.startswith("intervention"),
        variant=variant,
        steps=steps,
    )


def variant_on(path: PurePath) -> str:
    """The variant that a folder of `path` or its file's name says; "" if none does."""
    for folder, variant in WINDOWS_OF_INTERVENTION.items():
        if folder in path.parts:
            return variant
    if path.name.startswith("long-intervention-"):
        return intervention(long=True)
    if path.name.startswith("intervention-"):
        return intervention(long=False)
    return ""


def step_in(text: str) -> int | None:
    """The step that a name says, such as step143000; None if it says none."""
    match = STEP.search(text)
    if match is None:
        return None
    return int(match[1])


def step_on(*paths: PurePath) -> int | None:
    """The step that the names of a path say, the last first; None if none does."""
    for path in paths:
        for part in reversed(path.parts):
            step = step_in(part)
            if step is not None:
                return step
    return None


def subject_of_path(path: Path) -> Labels:
    """The model of results that name none: the file's folder and its name."""
    return subject_of_folder(str(path.absolute().with_suffix("")), step_on(path))
