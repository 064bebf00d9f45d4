import pytest

from castalia.checkpoint import PYTHIA_EARLY, CheckpointConfig, SavePolicy


def test_pythia_saves_154_checkpoints():
    policy = SavePolicy(CheckpointConfig(steps=PYTHIA_EARLY, every=1000), last_step=143000)
    steps = policy.all_steps()
    assert len(steps) == 154
    assert steps[:12] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
    assert steps[-2:] == [142000, 143000]


@pytest.mark.parametrize("every", [None, 1, 3, 7])
@pytest.mark.parametrize("listed", [[], [0], [0, 1, 5, 40]])
def test_due_agrees_with_all_steps(every, listed):
    policy = SavePolicy(CheckpointConfig(steps=listed, every=every), last_step=20)
    assert [step for step in range(21) if policy.due(step)] == policy.all_steps()


def test_last_step_is_always_saved_and_step_0_only_when_listed():
    policy = SavePolicy(CheckpointConfig(steps=[], every=1000), last_step=2500)
    assert policy.all_steps() == [1000, 2000, 2500]


def test_keep_spares_listed_steps_and_the_newest():
    policy = SavePolicy(CheckpointConfig(steps=[0, 2], every=5, keep=2), last_step=100)
    assert policy.expired([0, 2, 5, 10, 15]) == [5]
    assert policy.expired([0, 2, 5, 10]) == []
    assert policy.expired([5]) == []
    assert SavePolicy(CheckpointConfig(every=5), last_step=100).expired([5, 10, 15]) == []
