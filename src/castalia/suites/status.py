"""How far the members of a suite are."""

from typing import NamedTuple

from castalia.analysis.run_list import RunState
from castalia.models.flops import parameter_counts
from castalia.suites.members import Suite
from castalia.suites.running import state_of


class MemberStatus(NamedTuple):
    """How far one member is."""

    name: str
    folder: str
    size: str
    data: str
    data_seed: int
    weight_seed: int
    parameters: int
    step: int
    steps: int
    loss: float | None
    """Of the last step that has one, in nats a token."""
    state: str
    """running, done, stopped, not begun or unreadable."""
    checkpoints: list[int]

    def cells(self) -> list[str]:
        """The columns of the table."""
        loss = "-"
        if self.loss is not None:
            loss = f"{self.loss:.4f}"
        saved = str(len(self.checkpoints))
        step = f"{self.step}/{self.steps}"
        seed = str(self.data_seed)
        return [self.name, f"{self.parameters:,}", step, loss, self.state, saved, seed]


def status_of(suite: Suite) -> list[MemberStatus]:
    """The status of each member."""
    out = []
    for member in suite.members:
        state = state_of(member)
        if state is None:
            state = RunState(member.folder, 0, None, None, "not begun", [], 0.0)
        out.append(
            MemberStatus(
                name=member.name,
                folder=str(member.folder),
                size=member.size,
                data=member.data,
                data_seed=member.data_seed,
                weight_seed=member.weight_seed,
                parameters=parameter_counts(member.config.model).total,
                step=state.step,
                steps=member.config.train.steps,
                loss=state.loss,
                state=state.state,
                checkpoints=state.checkpoints,
            )
        )
    return out
