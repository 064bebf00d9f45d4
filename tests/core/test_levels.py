"""Levels of instructions: the best that a processor has, below the cap of the environment."""

import struct
from pathlib import Path

import pytest

from castalia.core import levels
from castalia.core.compilers import options
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
    "Apple M2": (
        "aarch64",
        {"asimd", "asimddp", "i8mm", "bf16"},
        ["i8mm", "dotprod", "neon"],
    ),
    "A64FX": ("aarch64", {"asimd", "sve"}, ["neon"]),
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


def test_sve_is_named_and_runs_the_code_of_the_level_below(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CASTALIA_ISA", raising=False)
    pretend(monkeypatch, "aarch64", LEVELS["aarch64"][-1].needs)
    assert levels_here()[0].name == "sve"
    assert next(level.name for level in levels_here() if level.has_code) == "i8mm"


def test_zig_gets_the_instructions_of_arm_as_features_of_a_processor() -> None:
    flags = {"neon": "v8a", "dotprod": "v8_2a+dotprod", "i8mm": "v8_2a+dotprod+i8mm+bf16"}
    for level in LEVELS["aarch64"][:3]:
        assert f"-mcpu=generic+{flags[level.name]}" in options(("zig", "c++"), level)
        assert set(level.flags) < set(options(("g++",), level))


def auxv(*pairs: tuple[int, int]) -> bytes:
    """As Linux writes it."""
    return b"".join(struct.pack("<QQ", *pair) for pair in (*pairs, (0, 0)))


def test_linux_on_arm_tells_a_process_what_it_may_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # AT_PAGESZ, AT_HWCAP with fp, asimd, aes and asimddp, AT_HWCAP2 with i8mm and bf16.
    graviton = auxv((6, 4096), (16, 1 << 0 | 1 << 1 | 1 << 3 | 1 << 20), (26, 1 << 13 | 1 << 14))
    assert levels.instructions_of_auxv(graviton) == {"asimd", "asimddp", "i8mm", "bf16"}
    assert levels.instructions_of_auxv(graviton[:-9]) == {"asimd", "asimddp", "i8mm", "bf16"}
    assert levels.instructions_of_auxv(auxv((16, 1 << 1 | 1 << 22))) == {"asimd", "sve"}
    (tmp_path / "auxv").write_bytes(graviton)
    monkeypatch.setattr(levels, "AUXV", tmp_path / "auxv")
    monkeypatch.setattr(levels, "architecture", lambda: "aarch64")
    monkeypatch.setattr(levels.platform, "system", lambda: "Linux")
    assert levels.instructions.__wrapped__() == {"asimd", "asimddp", "i8mm", "bf16"}


@pytest.mark.parametrize(
    ("printed", "status", "words"),
    [
        ("FEAT_DotProd: 1 FEAT_BF16: 1 FEAT_I8MM: 1 FEAT_SME: 1", 0, "asimd asimddp bf16 i8mm"),
        ("FEAT_DotProd: 1 FEAT_BF16: 0 FEAT_I8MM: 0", 0, "asimd asimddp"),
        ("", 1, "asimd asimddp"),
    ],
    ids=["M4", "M1", "macOS 11"],
)
def test_a_mac_is_asked_for_its_instructions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, printed: str, status: int, words: str
) -> None:
    script = tmp_path / "sysctl"
    lines = printed.replace("FEAT", "hw.optional.arm.FEAT").replace("1 hw", "1\nhw")
    lines = lines.replace("0 hw", "0\nhw")
    script.write_text(f"#!/bin/sh\n[ $1 = hw.optional.arm ] && echo '{lines}'\nexit {status}\n")
    script.chmod(0o755)
    monkeypatch.setattr(levels, "SYSCTL", str(script))
    monkeypatch.setattr(levels, "architecture", lambda: "aarch64")
    monkeypatch.setattr(levels.platform, "system", lambda: "Darwin")
    assert levels.instructions.__wrapped__() == set(words.split())


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
