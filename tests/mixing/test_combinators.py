"""What is put around a mixer, against numbers worked out by hand."""

import numpy as np
import pytest

from castalia.core.errors import ConfigError
from castalia.mixing import (
    Average,
    Clip,
    EpochCap,
    Every,
    Floor,
    Freeze,
    Mixer,
    Schedule,
    Smooth,
    Stats,
    Warmup,
    Within,
    make_mixer,
)


class Told(Mixer):
    """Takes the losses of the last step for shares, and keeps what it saw."""

    kind = "told"

    def update(self, stats):
        self.seen = [*getattr(self, "seen", []), stats]
        total = np.sum(stats.loss_sum)
        self.shares = np.asarray(stats.loss_sum, float) / total if total else self.shares


def told(prior=(0.5, 0.5), names=("a", "b")):
    return Told(names, prior=prior)


def weights_over(mixer, losses):
    """The weights after each step, rounded."""
    out = []
    for step, pair in enumerate(losses, 1):
        mixer.observe(Stats(step, pair, [1, 1]))
        out.append([round(float(weight), 6) for weight in mixer.weights()])
    return out


MOVES = [[1, 3], [3, 1], [1, 1], [0, 2]]
PLAIN = [[0.25, 0.75], [0.75, 0.25], [0.5, 0.5], [0.0, 1.0]]


def test_told_is_what_it_says():
    assert weights_over(told(), MOVES) == PLAIN


def test_warmup_holds_the_prior_for_its_steps():
    """Steps 1 and 2 are warm-up: the weights after step 1 are those of step 2."""
    mixer = Warmup(told(), steps=2, prior=[0.9, 0.1])
    assert mixer.weights().tolist() == [0.9, 0.1]
    assert weights_over(mixer, MOVES) == [[0.9, 0.1], *PLAIN[1:]]
    assert len(mixer.inner[0].seen) == 4
    silent = Warmup(told(), steps=2, collect=False)
    assert weights_over(silent, MOVES) == [[0.5, 0.5], [0.5, 0.5], *PLAIN[2:]]
    assert [stats.step for stats in silent.inner[0].seen] == [3, 4]
    with pytest.raises(ConfigError, match="warmup_steps: expected >= 0, got -1"):
        Warmup(told(), steps=-1)


def test_floor_lifts_every_share():
    """Of 0.2 each source has 0.1 for certain."""
    assert weights_over(Floor(told(), total=0.2), MOVES) == [
        [0.3, 0.7],
        [0.7, 0.3],
        [0.5, 0.5],
        [0.1, 0.9],
    ]
    assert Floor(told((0.0, 1.0)), total=0.2).weights().tolist() == [0.1, 0.9]


def test_clip_caps_every_share():
    assert weights_over(Clip(told(), most=0.7), MOVES) == [
        [0.3, 0.7],
        [0.7, 0.3],
        [0.5, 0.5],
        [0.3, 0.7],
    ]


def test_smooth_moves_by_halves():
    """From 0.5: halfway to 0.25, to 0.75, to 0.5, to 0."""
    found = [weights[0] for weights in weights_over(Smooth(told(), past=0.5), MOVES)]
    assert found == [0.375, 0.5625, 0.53125, 0.265625]
    with pytest.raises(ConfigError, match="weight_smoothing: expected in"):
        Smooth(told(), past=1.0)


def test_average_is_the_mean_of_all_weights():
    """0.5; 0.25; 0.75; 0.5; 0: their running means."""
    found = [weights[0] for weights in weights_over(Average(told()), MOVES)]
    assert found == [0.375, 0.5, 0.5, 0.4]


def test_freeze_stands():
    mixer = Freeze(told(), after=2)
    assert weights_over(mixer, MOVES) == [PLAIN[0], PLAIN[1], PLAIN[1], PLAIN[1]]
    assert len(mixer.inner[0].seen) == 2


def test_every_loses_nothing_in_between():
    """Every second step, the sums of two: 4 and 4, then 1 and 3."""
    mixer = Every(told((0.9, 0.1)), steps=2)
    assert weights_over(mixer, MOVES) == [[0.9, 0.1], [0.5, 0.5], [0.5, 0.5], [0.25, 0.75]]
    assert [np.asarray(stats.tokens).tolist() for stats in mixer.inner[0].seen] == [[2, 2], [2, 2]]
    alone = Every(told(), steps=2, collect=False)
    assert weights_over(alone, MOVES) == [[0.5, 0.5], PLAIN[1], PLAIN[1], PLAIN[3]]


def test_every_passes_an_evaluation_on_at_once():
    mixer = Every(told(), steps=10)
    mixer.observe(Stats(1, [1, 1], [2, 2], ref_loss_sum=[3, 4], excess_sum=[5, 6]))
    mixer.observe(Stats(2, [1, 1], [2, 2], val_loss=[7, 8], ref_loss_sum=[3, 4], excess_sum=[5, 6]))
    (passed,) = mixer.inner[0].seen
    assert passed.val_loss == [7, 8]
    assert [
        np.asarray(v).tolist() for v in (passed.tokens, passed.ref_loss_sum, passed.excess_sum)
    ] == [
        [4, 4],
        [6, 8],
        [10, 12],
    ]


def test_every_leaves_a_bad_loss_out():
    mixer = Every(told(), steps=2)
    mixer.observe(Stats(1, [float("nan"), 3], [1, 1]))
    mixer.observe(Stats(2, [1, 1], [1, 1]))
    assert mixer.weights().tolist() == [0.2, 0.8]
    assert mixer.rejected_losses().tolist() == [1, 0]


def test_schedule_takes_turns():
    mixer = Schedule(
        [(1, make_mixer("static", sources=["a", "b"], prior=[0.9, 0.1])), (3, told()), (4, told())]
    )
    assert mixer.weights().tolist() == [0.9, 0.1]
    assert weights_over(mixer, MOVES) == [[0.9, 0.1], *PLAIN[1:]]
    assert [mixer.place(step) for step in (1, 2, 3, 4, 99)] == [0, 0, 1, 2, 2]
    assert mixer.known(2).tolist() == [0.9, 0.1] and mixer.known(3) is None
    with pytest.raises(
        ConfigError, match=r"schedule: expected increasing steps starting at 1, got .2."
    ):
        Schedule([(2, told())])
    with pytest.raises(ConfigError, match="must have the same sources"):
        Schedule([(1, told()), (2, told(names=("a", "c")))])


def test_epoch_cap_holds_what_is_left():
    """2 epochs of 3 tokens in 20 to come: at most 0.3; with 4 of them read, 2 in 12 to come."""
    mixer = EpochCap(told((0.8, 0.2)), sizes=[3, 100], max_epochs=2, horizon=20)
    np.testing.assert_allclose(mixer.weights(), [0.3, 0.7])
    mixer.observe(Stats(1, [3, 1], [4, 4]))
    np.testing.assert_allclose(mixer.weights(), [2 / 12, 10 / 12])
    assert not mixer.binds
    mixer.observe(Stats(2, [3, 1], [2, 8]))
    np.testing.assert_allclose(mixer.weights(), [0, 1])


def test_epoch_cap_that_cannot_hold():
    """Two epochs of everything are 12 tokens of 20: both caps bind, in proportion 2 : 1."""
    mixer = EpochCap(told(), sizes=[4, 2], max_epochs=2, horizon=20)
    assert mixer.binds
    np.testing.assert_allclose(mixer.weights(), [2 / 3, 1 / 3])


def test_within_gives_the_others_nothing():
    mixer = Within(told(), ["x", "b", "a"])
    mixer.observe(Stats(1, [9, 3, 1], [9, 1, 1]))
    assert mixer.weights().tolist() == [0, 0.75, 0.25]
    assert mixer.prior.tolist() == [0, 0.5, 0.5]
    with pytest.raises(ConfigError, match="source 'a' of the inner mixer is not among x, b"):
        Within(told(), ["x", "b"])


def test_what_a_mixer_says_of_itself():
    mixer = make_mixer("odm", sources=["a", "b"], warmup_steps=3, smoothing=0.8)
    said = mixer.describe()
    assert said["kind"] == "warm-up" and said["settings"]["smoothing"] == 0.8
    assert said["inner"] == [{"kind": "clip", "inner": [{"kind": "odm"}]}]
