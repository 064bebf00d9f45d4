"""Another optimizer over a preset takes none of the options that were chosen for the preset's."""

import pytest

from castalia.recipes.load import resolve


@pytest.mark.parametrize(
    ("kind", "lr", "betas"),
    [
        ("adam", 2e-3, (0.9, 0.95)),  # the same options
        ("muon", 2e-3, (0.9, 0.95)),  # AdamW's rate, betas of its own
        ("sgd", 2e-3, None),
        ("lion", 1e-4, (0.9, 0.99)),
    ],
)
def test_the_defaults_of_the_new_kind_hold(kind, lr, betas):
    resolved = resolve(["demo", f"optim.kind={kind}", "schedule.min_lr=0"])
    optim = resolved.config.optim
    assert (optim.lr, getattr(optim, "betas", None), optim.clip) == (lr, betas, 1.0)
    assert any("those given for adamw" in note for note in resolved.notes) is (kind != "adam")


def test_what_the_user_gives_holds():
    words = ["optim.kind=lion", "optim.lr=3e-5", "optim.betas=[0.9,0.98]", "schedule.min_lr=0"]
    config = resolve(["demo", *words]).config
    assert (config.optim.lr, config.optim.betas) == (3e-5, (0.9, 0.98))
    assert resolve(["demo", "optim.betas=[0.8,0.9]"]).config.optim.betas == (0.8, 0.9)


def test_an_option_of_the_old_kind_is_refused():
    with pytest.raises(Exception, match=r"optim.betas: unknown key of this kind"):
        resolve(["demo", "optim.kind=sgd", "optim.betas=[0.9,0.9]"])
