"""Whether a trained suite is what its file says: every checkpoint, the seeds and the batches."""

from collections.abc import Callable, Iterator
from typing import Any

from castalia.config.anchor import CONFIG
from castalia.config.base import check
from castalia.config.values import read_yaml
from castalia.core.errors import ConfigError
from castalia.runs.config import RunConfig
from castalia.suites.batches import compare_batches
from castalia.suites.members import Member, Suite
from castalia.suites.running import is_done, state_of
from castalia.weights.audit import audit
from castalia.weights.findings import Finding, Report


def verify_suite(suite: Suite, on_revision: Callable[[str, int, int], Any] | None = None) -> Report:
    """Check every member: its steps and seeds, equal batches within each stream, and all that
    `audit` checks of its checkpoints, of which step 0 must be the initialization of its seed.

    Raises  ConfigError if no member has begun.
    """
    begun = [member for member in suite.members if state_of(member) is not None]
    if not begun:
        raise ConfigError(
            f"no member of {suite.name} has begun in {suite.folder}; castalia suite --run trains"
            " them"
        )
    findings = [finding for member in suite.members for finding in member_findings(member)]
    if suite.config.same_batches:
        findings += batch_findings(suite)
    folders = [str(member.folder) for member in begun if has_checkpoints(member)]
    checked = {"models": 0, "revisions": 0, "tensors": 0, "bytes": 0}
    if folders:
        report = audit(folders, on_revision=on_revision)
        findings += report.findings
        checked = report.checked
    return Report(findings, {"members": len(suite.members), **checked})


def has_checkpoints(member: Member) -> bool:
    """Whether a member has saved anything."""
    state = state_of(member)
    return state is not None and bool(state.checkpoints)


def member_findings(member: Member) -> Iterator[Finding]:
    """A member that lacks steps, or whose run is not the one that the suite describes."""
    state = state_of(member)
    steps = member.config.train.steps
    if state is None:
        yield Finding("unfinished", str(member.folder), f"{member.name} has not begun")
        return
    if not is_done(member, state):
        what = f"{member.name} has {state.step} of {steps} steps"
        if state.step >= steps:
            what = f"{member.name} lacks the checkpoint of its last step, {steps}"
        yield Finding("unfinished", str(member.folder), what)
    try:
        config, _ = check(RunConfig, read_yaml(member.folder / CONFIG))
    except ConfigError as error:
        yield Finding("member", str(member.folder), str(error))
        return
    if config is None:
        yield Finding("member", str(member.folder), f"this version cannot read its {CONFIG}")
        return
    pairs = (
        ("the model", member.config.model.weights_shape(), config.model.weights_shape()),
        ("the seed of the data", member.data_seed, config.order_seed),
        ("the seed of the weights", member.weight_seed, config.start_seed),
    )
    for name, expected, got in pairs:
        if expected != got:
            what = f"{name} of {member.name} is {expected} in the suite and {got} in its {CONFIG}"
            yield Finding("member", str(member.folder), what)


def batch_findings(suite: Suite) -> Iterator[Finding]:
    """Members of one stream that read different rows."""
    for stream in compare_batches(suite):
        where = f"{suite.folder}, data {stream.data}, data seed {stream.data_seed}"
        for problem in stream.problems:
            yield Finding("batches", where, problem)
