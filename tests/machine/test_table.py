"""The table of this machine: what is chosen by it, where it is kept, and how long it takes."""

import json
from dataclasses import replace

import pytest
import torch

from castalia.core.errors import ConfigError
from castalia.machine import instructions, measuring, table, this_machine
from castalia.machine.measuring import Load
from castalia.machine.onednn import byte_layer, byte_steps, multiplied

MEASURED = {
    "memory_rate": 2e10,
    "seconds": 2.0,
    "busy": 0.0,
    "tries": 1,
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
    monkeypatch.setattr(Load, "share", lambda load: 0.0)
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


def test_the_products_of_a_training_step(folder, measurements):
    rates = {
        "fp32": {"torch": {1: 5e9, 512: 1e11}, "onednn": {1: 9e9, 512: 2e11}},
        "fp32 dx": {"torch": {512: 2e11}, "onednn": {512: 1e11}},
        "fp32 dW": {"torch": {512: 5e10}, "onednn": {512: 2e11}},
    }
    machine = replace(this_machine(), rates=rates)
    # Seconds of 1e12 FLOP: 10 + 5 + 20 by torch, 5 + 10 + 5 by oneDNN.
    assert machine.training_gain(512) == pytest.approx(35 / 20)
    assert this_machine().training_gain(512) == 0.0


def test_it_is_measured_once_for_its_threads_and_caps(folder, measurements, monkeypatch):
    first = this_machine()
    assert this_machine() is first and len(measurements) == 1
    # Another process reads the file, and gets the same table.
    table.KEPT.clear()
    assert this_machine() == first and len(measurements) == 1
    for variable, value in (
        ("ATEN_CPU_CAPABILITY", "avx2"),
        ("ONEDNN_MAX_CPU_ISA", "AVX2"),
        ("CASTALIA_ISA", "x86-64-v3"),
    ):
        monkeypatch.setenv(variable, value)
        assert this_machine().caps[variable] == value
    assert len(measurements) == 4
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert this_machine().threads == 64 and len(measurements) == 5
    assert len(list(folder.glob("machine-*.json"))) == 5
    this_machine(anew=True)
    assert len(measurements) == 6


def test_a_busy_machine_is_measured_again(folder, measurements, monkeypatch):
    """By the next processes, TRIES times at most; the best rates of all count."""
    shares = iter([0.8, 0.5, 0.7])
    monkeypatch.setattr(Load, "share", lambda load: next(shares))
    faster = {"fp32": {"torch": {1: 1e9, 8: 9e10, 512: 9e10}}}
    monkeypatch.setattr(table, "product_rates", lambda: MEASURED["rates"] | faster)
    first = this_machine()
    assert this_machine() is first and first.busy == 0.8 and first.rate("fp32", 8) == 9e10
    monkeypatch.setattr(table, "product_rates", lambda: MEASURED["rates"])
    monkeypatch.setattr(table, "memory_rate", lambda: 1e10)
    monkeypatch.setattr(table, "TRIES", 3)
    for busy in (0.5, 0.5, 0.5):
        table.KEPT.clear()
        machine = this_machine()
        assert machine.busy == busy and machine.memory_rate == 2e10
        assert machine.rate("fp32", 8) == 9e10 and machine.rate("fp32", 1) == 5e9
    # The fourth process reads what three have measured.
    assert next(shares, None) is None


def test_the_load_is_that_of_others(tmp_path):
    path = tmp_path / "stat"
    own = sum(measuring.os.times()[:4])
    tick = measuring.os.sysconf("SC_CLK_TCK")
    path.write_text(f"cpu  {500 * tick} 0 {20 * tick} 90000 7000 0 0 {3 * tick} 0 0\ncpu0 1 2\n")
    assert measuring.others_seconds(path) == pytest.approx(523 - own, abs=1)
    assert measuring.others_seconds(tmp_path / "none") == 0.0
    assert 0 <= Load().share() < 1e6


DAMAGES = [
    "",
    "{",
    "[]",
    "7",
    json.dumps(MEASURED | {"rates": {}}),
    json.dumps(MEASURED | {"rates": {"fp32": {"torch": {}}}}),
    json.dumps(MEASURED | {"rates": {"fp32": {"torch": {"1": -3}}}}),
    json.dumps(MEASURED | {"rates": {"fp32": {"torch": {"1": "fast"}}}}),
    json.dumps(MEASURED | {"memory_rate": float("nan")}),
    json.dumps({"rates": MEASURED["rates"], "seconds": 1, "busy": 0, "tries": 1}),
    json.dumps({**MEASURED, "tries": None}),
]


def test_a_damaged_file_is_measured_anew(folder, measurements):
    this_machine()
    (path,) = folder.glob("machine-*.json")
    for number, damage in enumerate(DAMAGES, start=2):
        path.write_text(damage)
        table.KEPT.clear()
        assert this_machine().memory_rate == 2e10
        assert len(measurements) == number, damage
        assert table.stored_at(path)["rates"] == MEASURED["rates"]
    path.write_bytes(b"\xff\xfe")
    table.KEPT.clear()
    assert this_machine().memory_rate == 2e10 and table.stored_at(path)


@pytest.mark.parametrize("home", ["a file", "nowhere"])
def test_a_home_that_cannot_be_written(home, tmp_path, measurements, monkeypatch):
    monkeypatch.setattr(table, "KEPT", {})
    blocked = tmp_path / "file"
    blocked.write_text("")
    # Root may write to folders that say otherwise, but nobody into a file.
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked if home == "a file" else "/proc/none"))
    machine = this_machine()
    assert machine.rate("fp32", 1) == 5e9
    assert this_machine() is machine and len(measurements) == 1


X86 = {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "avx_vnni"}
X86 |= set().union(*instructions.FLAGS.values())
CAPPED = [
    ({}, "avx2 avx512f avx_vnni avx512_vnni avx512_bf16 amx_int8", "x86-64-v4"),
    ({"ATEN_CPU_CAPABILITY": "avx2"}, "avx2", "x86-64-v3"),
    ({"ATEN_CPU_CAPABILITY": "default"}, "", "x86-64-v2"),
    ({"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "avx2_vnni"}, "avx2 avx_vnni", "v3"),
    ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "avx2 avx512f avx_vnni", "v4"),
    ({"CASTALIA_ISA": "vnni"}, "avx2 avx512f avx_vnni avx512_vnni", "v4"),
    ({"CASTALIA_ISA": "none"}, "avx2 avx512f avx_vnni avx512_vnni avx512_bf16 amx_int8", "v4"),
]


@pytest.mark.parametrize(("caps", "left", "level"), CAPPED)
def test_caps_take_instructions_away(caps, left, level, monkeypatch):
    monkeypatch.setattr(instructions.platform, "machine", lambda: "x86_64")
    assert instructions.usable(X86, caps) == tuple(left.split())
    assert instructions.level_of(X86, caps).endswith(level)


def test_other_processors(monkeypatch):
    lines = {"CPU implementer": "0x41", "CPU part": "0xd40", "Features": "asimd asimddp i8mm bf16"}
    assert instructions.processor_name(lines) == "Arm Neoverse V1"
    flags = instructions.flags_of(lines)
    assert instructions.usable(flags, {}) == ("neon", "dotprod", "i8mm", "bf16")
    assert instructions.usable(flags, {"CASTALIA_ISA": "dotprod"}) == ("neon", "dotprod")
    monkeypatch.setattr(instructions.platform, "machine", lambda: "aarch64")
    assert instructions.level_of(flags, {}) == "aarch64"
    monkeypatch.setenv("CASTALIA_ISA", "x86-64-v5")
    with pytest.raises(ConfigError, match=r"unknown CASTALIA_ISA.*x86-64-v5.*did you mean 'x86-64"):
        this_machine()


class SlowMachine:
    """A clock that calls move by what they would take."""

    def __init__(self, *rates):
        """`rates`: FLOP/s by dtype and library."""
        self.now = 0.0
        self.rates = dict(rates)
        self.calls = []

    def perf_counter(self):
        return self.now

    def cells(self):
        return {
            (*product, rows): lambda product=product, rows=rows: self.call(product, rows)
            for product in self.rates
            for rows in measuring.ROWS
        }

    def call(self, product, rows):
        self.calls.append((product, rows))
        if self.rates[product] is None:
            raise RuntimeError("no such instruction")
        self.now += 2 * rows * measuring.INPUTS * measuring.OUTPUTS / self.rates[product]


def test_what_would_take_too_long_is_not_tried(monkeypatch):
    """bf16 is emulated, 300 times slower; int8 does not exist; all of it ends in time."""
    fp32 = ("fp32", "torch")
    bf16 = ("bf16", "torch")
    machine = SlowMachine((fp32, 7.5e8), (bf16, 2.5e6), (("int8", "onednn"), None))
    monkeypatch.setattr(measuring, "time", machine)
    times = measuring.best_times(machine.cells(), measuring.SECONDS)
    assert machine.now < measuring.SECONDS + 0.1
    assert {call for call in machine.calls if call[0] == bf16} == {(bf16, 1)}
    assert machine.calls.count((("int8", "onednn"), 1)) == 1
    assert (*fp32, 8) in times and (fp32, 512) not in machine.calls
    for cell, seconds in times.items():
        assert 2 * cell[2] * measuring.INPUTS * measuring.OUTPUTS / seconds == pytest.approx(
            machine.rates[cell[:2]]
        )
    assert len(times) == 10


def test_a_busy_moment_does_not_count(monkeypatch):
    machine = SlowMachine((("fp32", "torch"), 2e11))
    monkeypatch.setattr(measuring, "time", machine)
    cells = machine.cells()
    quick = cells["fp32", "torch", 1]

    def disturbed():
        quick()
        if machine.calls.count((("fp32", "torch"), 1)) < 3:
            machine.now += 0.3

    times = measuring.best_times(cells | {("fp32", "torch", 1): disturbed}, measuring.SECONDS)
    for rows in measuring.ROWS:
        rate = 2 * rows * measuring.INPUTS * measuring.OUTPUTS / times["fp32", "torch", rows]
        assert rate == pytest.approx(2e11)


@pytest.mark.skipif(not hasattr(torch.ops.onednn, "qlinear_pointwise"), reason="no oneDNN here")
@pytest.mark.parametrize("rows", (1, 8, 128))
def test_sums_of_the_largest_bytes_are_exact(rows):
    """A quarter of them would be wrong where two products overflow."""
    weights = torch.full((48, 256), 127, dtype=torch.int8)
    weights[::3] = -127
    layer = byte_layer(weights, torch.ones(48), None)
    q = torch.full((rows, 256), byte_steps(), dtype=torch.uint8)
    assert byte_steps() in (127, 255)
    assert torch.equal(multiplied(q, 1.0, 0, layer), (q.double() @ weights.double().T).float())


def test_the_products_are_right():
    """All libraries and dtypes multiply the same matrices, up to rounding; nothing else moves."""
    before = torch.random.get_rng_state()
    calls = measuring.calls_of()
    found = {}
    for cell, call in calls.items():
        if cell[2] == 8:
            try:
                found[cell] = call().float()
            except RuntimeError:
                # Its products of bf16 need AVX-512.
                assert cell[:2] == ("bf16", "onednn")
                assert torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        rates = measuring.product_rates(seconds=0.0)
    assert torch.equal(torch.random.get_rng_state(), before)
    exact = found["fp32", "torch", 8]
    for (dtype, library, _), y in found.items():
        assert len(y) == 8
        error = (y - exact).norm() / exact.norm()
        bound = {"fp32": 1e-5, "bf16": 0.01, "int8": 0.02}[dtype]
        if (dtype, library) == ("int8", "onednn"):
            bound *= 255 / byte_steps()
        assert error < bound, (dtype, library)
    # Those of the backward pass are products of other matrices, alike in both libraries.
    for name, shape in (("fp32 dx", (32, 512)), ("fp32 dW", (512, 1024))):
        both = [call() for cell, call in calls.items() if cell[0] == name and cell[2] == 32]
        assert both[0].shape == shape and len(both) == 1 + measuring.has_onednn()
        # The matrices of the first call of each.
        torch.testing.assert_close(both[0], both[-1])
    backward = set(table.TRAINED) - {"fp32"}
    assert set(rates) == {"fp32", "bf16", "int8"} | backward
    for name, one in rates.items():
        rows = measuring.BACKWARD_ROWS if name in backward else measuring.ROWS
        assert set(one["torch"]) == set(rows)


def test_a_user_without_home_or_name(tmp_path, measurements, monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(table, "KEPT", {})
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("castalia.core.files.Path.home", nobody)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert this_machine().memory_rate == 2e10
    (folder,) = tmp_path.glob("castalia-*")
    assert list(folder.glob("machine-*.json"))
