"""The table of this machine: what is chosen by it, where it is kept, and how long it takes."""

import pytest

from castalia.machine import table, this_machine

MEASURED = {
    "memory_rate": 2e10,
    "seconds": 2.0,
    "rates": {
        "fp32": {"torch": {1: 4e9, 8: 3e10, 512: 9e10}, "onednn": {1: 5e9, 8: 2e10, 512: 1e11}},
        "bf16": {"torch": {1: 9e9, 8: 3.1e10, 512: 2e10}},
        "int8": {"torch": {1: 3e9, 8: 6e10, 512: 3e11}},
    },
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder, in a process that has read no table."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(table, "KEPT", {})
    return tmp_path / "castalia"


@pytest.fixture
def measurements(monkeypatch):
    """The measurements that were taken, each of which gives MEASURED."""
    calls = []

    def rates():
        calls.append(1)
        return MEASURED["rates"]

    monkeypatch.setattr(table, "memory_rate", lambda: MEASURED["memory_rate"])
    monkeypatch.setattr(table, "product_rates", rates)
    return calls


def test_choices_by_the_table(folder, measurements):
    machine = this_machine()
    assert machine.rate("fp32", 1) == 5e9 and machine.library("fp32", 1) == "onednn"
    assert machine.rate("fp32", 8) == 3e10 and machine.library("fp32", 8) == "torch"
    # Halfway between 8 and 512 in the logarithm, and beyond the largest.
    assert machine.rate("int8", 64) == pytest.approx((6e10 + 3e11) / 2)
    assert machine.rate("int8", 4096) == 3e11
    assert machine.faster(("fp32", "bf16", "int8"), 1) == "bf16"
    assert machine.faster(("fp32", "bf16"), 512) == "fp32"
    # 1.03 times as fast is not worth a change.
    assert machine.faster(("fp32", "bf16"), 8) == "fp32"
    assert machine.faster(("fp32", "bf16"), 8, margin=1.01) == "bf16"
    assert machine.rate("fp8", 8) == 0 and machine.faster(("fp32", "fp8"), 8) == "fp32"
