"""Whether the weights of each revision lie where its step says, and began at step 0."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from castalia.weights.alike import most_common
from castalia.weights.equal import Model, names_of
from castalia.weights.findings import Finding
from castalia.weights.measured import cosine, distances, stacked
from castalia.weights.order import Misplaced, misplaced

APART = 0.15
"""Cosine below which two sets of weights have nothing in common: that of independent draws is 0, up
to the error of the estimate."""
TOGETHER = 0.5
"""Cosine above which one comes from the other."""


def order_findings(
    model: Model, kept: Sequence[int], foreign: set[tuple[int, str]]
) -> list[Finding]:
    """Revisions and files out of order.

    Takes   kept: revisions of different weights, ascending. foreign: (revision, tensor) that are
            known to be another revision's.
    """
    ordered = [number for number in kept if model.revisions[number].step is not None]
    odd: dict[int, dict[str, Misplaced]] = defaultdict(dict)
    parts = parts_of(model, ordered)
    for file, names in parts.items():
        own = [n for n in ordered if not any((n, name) in foreign for name in names)]
        table = distances(stacked([model.checkpoints[number] for number in own], names))
        for each in misplaced(table):
            nearest = tuple(own[place] for place in each.nearest)
            odd[own[each.place]][file] = Misplaced(own[each.place], nearest)
    findings: list[Finding] = []
    for number, files in sorted(odd.items()):
        whole = len(files) == len([f for f, n in parts.items() if owns(number, n, foreign)])
        if whole:
            what = f"its weights {lie(model, number, next(iter(files.values())))}"
            findings.append(Finding("order", model.place(number), what))
            continue
        for file, each in files.items():
            what = f"the weights of this file {lie(model, number, each)}, unlike the other files'"
            findings.append(Finding("mixed_shard", f"{model.place(number)}/{file}", what))
    return findings


def owns(number: int, names: Sequence[str], foreign: set[tuple[int, str]]) -> bool:
    """Whether a revision has these tensors of its own."""
    return not any((number, name) in foreign for name in names)


def lie(model: Model, number: int, odd: Misplaced) -> str:
    """Where misplaced weights lie, in words."""
    if not odd.nearest:
        return "are far from those of every other revision"
    near = " and ".join(model.revisions[place].name for place in odd.nearest)
    return f"are nearest to {near}, not to the neighbours of {model.revisions[number].name}"


def parts_of(model: Model, kept: Sequence[int]) -> dict[str, list[str]]:
    """The tensors that are judged together, by file where there are several.

    Revisions may be divided differently; the division of most of them is taken.
    """
    checkpoints = [model.checkpoints[number] for number in kept]
    names = names_of(checkpoints)
    if not checkpoints:
        return {}
    usual = dict(most_common([tuple((n, t.file) for n, t in each.items()) for each in checkpoints]))
    parts: dict[str, list[str]] = defaultdict(list)
    for name in names:
        parts[usual.get(name, "")].append(name)
    # A tensor without a usual file is judged with no other, and so not at all.
    parts.pop("", None)
    return dict(parts)


def descent_findings(model: Model, kept: Sequence[int], others: Sequence[Model]) -> list[Finding]:
    """Whether the first checkpoints began at step 0.

    They did not if their matrices have nothing in common with step 0, though the next ones, after
    at least as many steps more, still come from them.
    """
    ordered = [number for number in kept if model.revisions[number].step is not None]
    steps = [model.revisions[number].step or 0 for number in ordered]
    later = [place for place in range(2, len(ordered)) if steps[place] >= 2 * steps[1]]
    if len(ordered) < 3 or steps[0] != 0 or not later:
        return []
    chosen = [ordered[0], ordered[1], ordered[later[0]]]
    names = matrices_of(model, chosen)
    begin, first, second = stacked([model.checkpoints[number] for number in chosen], names)
    if cosine(begin, first) >= APART or cosine(first, second) < TOGETHER:
        return []
    name = model.revisions[chosen[1]].name
    whose = "; they come from no step 0 that was read"
    for other in others:
        if other is model or not other.revisions or other.revisions[0].step != 0:
            continue
        if set(names) <= other.checkpoints[0].keys():
            (start,) = stacked([other.checkpoints[0]], names)
            if cosine(start, first) > TOGETHER:
                whose = f"; they come from the step 0 of {other.series.name}"
    what = f"its weights have nothing in common with those of {name} and later{whose}"
    return [Finding("descent", model.place(chosen[0]), what)]


def matrices_of(model: Model, chosen: Sequence[int]) -> list[str]:
    """Names of the matrices: norms and biases, which begin as ones and zeros, are alike in
    unrelated models."""
    first = model.checkpoints[chosen[0]]
    return [name for name in names_of([first]) if first[name].is_matrix]


def progress_findings(model: Model, states: dict[int, dict[str, object]]) -> Iterator[Finding]:
    """Checkpoints of a run whose own record contradicts their place."""
    before: dict[str, int] = {}
    for number, revision in enumerate(model.revisions):
        record = states.get(revision.step or 0, {}).get("progress")
        if not isinstance(record, dict):
            continue
        if record.get("step") != revision.step:
            what = f"its optimizer was at step {record.get('step')}, not {revision.step}"
            yield Finding("progress", model.place(number), what)
        for key in ("updates", "tokens"):
            if key in record and record[key] < before.get(key, 0):
                what = f"it has {record[key]} {key}, fewer than the checkpoint before it"
                yield Finding("progress", model.place(number), what)
        before = record
