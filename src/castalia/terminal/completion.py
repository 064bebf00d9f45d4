"""What a shell's completion offers for the words of a config."""

import glob
import os


def config_words(incomplete: str) -> list[tuple[str, str]]:
    """Presets, run folders, folders, YAML files and keys that begin with `incomplete`.

    Returns  (word, help) pairs; a key ends in `=`.
    """
    return [*presets(incomplete), *places(incomplete), *keys(incomplete)]


def checkpoint_words(incomplete: str) -> list[tuple[str, str]]:
    """Run folders, their saved steps as `RUN/step1000`, and other folders."""
    run, slash, step = incomplete.rpartition("/")
    return [*places(incomplete), *(saved_steps(run, step) if slash else ())]


def saved_steps(run: str, begin: str) -> list[tuple[str, str]]:
    """The steps that a run has saved, in the order of training, whose words start with `begin`."""
    folders = sorted(glob.glob(os.path.join(glob.escape(run), "checkpoints", "step-*")))
    numbers = [name for folder in folders if (name := folder.rpartition("step-")[2]).isdecimal()]
    words = [f"step{int(number)}" for number in numbers]
    return [(f"{run}/{word}", "checkpoint") for word in words if word.startswith(begin)]


def presets(incomplete: str) -> list[tuple[str, str]]:
    """Presets by name."""
    from castalia.recipes import preset_names

    return [(name, "preset") for name in preset_names() if name.startswith(incomplete)]


def places(incomplete: str) -> list[tuple[str, str]]:
    """Run folders, other folders with a slash behind, and YAML files."""
    words = []
    for path in sorted(glob.glob(glob.escape(incomplete) + "*")):
        # A run first, which is a folder too; it gets no slash, for nothing follows its name.
        if os.path.isfile(os.path.join(path, "config.yaml")):
            words.append((path, "run"))
        elif os.path.isdir(path):
            words.append((path + "/", "folder"))
        elif path.endswith((".yml", ".yaml")):
            words.append((path, "config file"))
    return words


def keys(incomplete: str) -> list[tuple[str, str]]:
    """Keys of a config as overrides; none for an empty word, which may become anything."""
    if not incomplete:
        return []
    from castalia.config.reference import entries
    from castalia.runs.config import RunConfig

    return [
        (f"{entry.key}=", entry.text)
        for entry in entries(RunConfig)
        if entry.key.startswith(incomplete)
    ]
