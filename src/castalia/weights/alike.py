"""What all revisions of a model have alike: names and shapes of tensors, files, config.json; and
that no weight is NaN."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from castalia.checkpoint.hf.weights import ORDER
from castalia.core.errors import CheckpointError
from castalia.core.files import read_json
from castalia.weights.equal import Model
from castalia.weights.findings import Finding
from castalia.weights.measured import Checkpoint

T = TypeVar("T", bound=Hashable)

CONFIG = "config.json"
OF_LIBRARY = {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache"}
"""Keys of config.json that say how a revision was written, and nothing of the model."""
NAMED = 4
"""Names that a sentence has, of many."""
SHARE = 2 / 3
"""Share of the revisions that have a file which the others lack."""


def tensor_findings(model: Model) -> Iterator[Finding]:
    """Tensors that are missing, more, or of another shape or dtype than in most revisions."""
    if not model.checkpoints:
        return
    usual = dict(most_common([form_of(checkpoint) for checkpoint in model.checkpoints]))
    for number, checkpoint in enumerate(model.checkpoints):
        form = dict(form_of(checkpoint))
        where = model.place(number)
        missing = sorted(usual.keys() - form.keys())
        if missing:
            yield Finding(
                "tensors",
                where,
                f"lacks {counted(missing)}, which the other revisions have",
            )
        more = sorted(form.keys() - usual.keys())
        if more:
            yield Finding("tensors", where, f"has {counted(more)}, which the others lack")
        for name in sorted(form.keys() & usual.keys()):
            if form[name] != usual[name]:
                what = f"{name} is {form[name]}; the other revisions: {usual[name]}"
                yield Finding("tensors", where, what)


def form_of(checkpoint: Checkpoint) -> tuple[tuple[str, str], ...]:
    """Names, shapes and dtypes."""
    return tuple(
        (name, f"{tensor.dtype} {list(tensor.shape)}") for name, tensor in checkpoint.items()
    )


def most_common(values: Sequence[T]) -> T:
    """The value that most have; of several the first one."""
    return Counter(values).most_common(1)[0][0]


def counted(names: Sequence[str]) -> str:
    """`tensor a` or `5 tensors (a, b, ...)`."""
    if len(names) == 1:
        return f"the tensor {names[0]}"
    more = ""
    if len(names) > NAMED:
        more = ", ..."
    return f"{len(names)} tensors ({', '.join(names[:NAMED])}{more})"


def finite_findings(model: Model) -> Iterator[Finding]:
    """Tensors with NaN or infinite elements."""
    for number, checkpoint in enumerate(model.checkpoints):
        for name, tensor in checkpoint.items():
            if tensor.broken:
                yield Finding(
                    "not_finite",
                    f"{model.place(number)}/{tensor.file}",
                    f"{name} has {tensor.broken} elements that are NaN or infinite",
                )


def file_findings(model: Model) -> Iterator[Finding]:
    """Files that most revisions of a folder have and one lacks, and settings in config.json that
    are not those of most."""
    if model.series.is_run or len(model.revisions) < 3:
        return
    names = [other_files(revision.folder) for revision in model.revisions]
    counts = Counter(name for each in names for name in each)
    usual = {name for name, count in counts.items() if count >= SHARE * len(names)}
    for number, own in enumerate(names):
        for name in sorted(usual - own):
            yield Finding("files", model.place(number), f"lacks {name}, which the others have")
    yield from config_findings(model)


def other_files(folder: Path) -> set[str]:
    """The files of a revision that are not its weights."""
    return {
        item.name
        for item in folder.iterdir()
        if item.is_file() and item.name not in ORDER and item.suffix not in (".safetensors", ".bin")
    }


def config_findings(model: Model) -> Iterator[Finding]:
    """Settings of the model that differ from those of most revisions."""
    configs: dict[int, dict[str, Any]] = {}
    for number, revision in enumerate(model.revisions):
        path = revision.folder / CONFIG
        if path.is_file():
            try:
                configs[number] = read_json(path, CheckpointError)
            except CheckpointError as error:
                yield Finding("damaged", str(path), str(error))
    keys = sorted({key for config in configs.values() for key in config} - OF_LIBRARY)
    for key in keys:
        values = {number: repr(config.get(key)) for number, config in configs.items()}
        usual = most_common(list(values.values()))
        for number, value in values.items():
            if value != usual:
                yield Finding(
                    "config",
                    f"{model.place(number)}/{CONFIG}",
                    f"{key} is {value}; the other revisions have {usual}",
                )
