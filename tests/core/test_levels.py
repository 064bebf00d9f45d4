"""Levels of instructions: the best that a processor has, below the cap of the environment."""

import pytest

from castalia.core import levels
from castalia.core.errors import ConfigError
from castalia.core.levels import LEVELS, levels_here

V3 = LEVELS["x86_64"][1].needs
V4 = LEVELS["x86_64"][3].needs
PROCESSORS = {
    "Haswell": ("x86_64", V3, ["x86-64-v3", "x86-64-v2"]),
    "Alder Lake": ("x86_64", V3 | {"avx_vnni"}, ["avx-vnni", "x86-64-v3", "x86-64-v2"]),
    "Ice Lake": ("x86_64", V4 | {"avx512_vnni"}, ["vnni", "x86-64-v4", "x86-64-v3", "x86-64-v2"]),
    "Nehalem without SSE 4.2": ("x86_64", {"ssse3", "sse4_1"}, []),
    "Cortex-A72": ("aarch64", {"asimd"}, ["neon"]),
    "Neoverse N1": ("aarch64", {"asimd", "asimddp"}, ["dotprod", "neon"]),
    "POWER": ("ppc64le", {"altivec"}, []),
}
"""Architecture and instructions, and the levels that are right, the best first."""


def pretend(monkeypatch: pytest.MonkeyPatch, architecture: str, words: object) -> None:
    """The machine is another one."""
    monkeypatch.setattr(levels, "architecture", lambda: architecture)
    monkeypatch.setattr(levels, "instructions", lambda: words)


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor_gets_its_levels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CASTALIA_ISA", raising=False)
    architecture, words, want = PROCESSORS[name]
    pretend(monkeypatch, architecture, frozenset(words))
    assert [level.name for level in levels_here()] == want


def test_amx_and_sve_are_named_and_run_the_code_of_the_level_below(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CASTALIA_ISA", raising=False)
    for architecture, named, code in (("x86_64", "amx", "bf16"), ("aarch64", "sve", "dotprod")):
        pretend(monkeypatch, architecture, LEVELS[architecture][-1].needs)
        assert levels_here()[0].name == named
        assert next(level.name for level in levels_here() if level.has_code) == code


def test_the_environment_caps_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "x86_64", V4 | {"avx512_vnni", "avx512_bf16"})
    best = {"x86-64-v2": "x86-64-v2", "avx-vnni": "x86-64-v3", "x86-64-v4": "x86-64-v4"}
    for cap, name in (best | {"amx": "bf16", "": "bf16", "neon": "bf16"}).items():
        monkeypatch.setenv("CASTALIA_ISA", cap)
        assert levels_here()[0].name == name
    monkeypatch.setenv("CASTALIA_ISA", "none")
    assert levels_here() == ()
    monkeypatch.setenv("CASTALIA_ISA", "x86-64-v5")
    with pytest.raises(ConfigError, match=r"unknown CASTALIA_ISA=x86-64-v5; choose one"):
        levels_here()
