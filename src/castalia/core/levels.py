"""Levels of instructions that the compiled code has versions for, and the best one of this machine.

A level is a set of instructions with a name; each includes those before it on its architecture,
except that `avx-vnni` (processors without AVX-512) is beside `x86-64-v4`. `CASTALIA_ISA` names the
highest level to use, and `none` turns compiled code off. Needs nothing but Python: setup.py reads
this file where torch is not installed.
"""

import ctypes
import functools
import os
import platform
import struct
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from castalia.core.errors import ConfigError, nearest

VARIABLE = "CASTALIA_ISA"
AUXV = Path("/proc/self/auxv")
"""What Linux tells a process at its start: pairs of a type and a value."""
HWCAPS = {
    # AT_HWCAP
    16: {1: "asimd", 20: "asimddp", 22: "sve"},
    # AT_HWCAP2
    26: {13: "i8mm", 14: "bf16"},
}
"""Bits of these values on aarch64, with the names that /proc/cpuinfo has for them.
Source  Linux, arch/arm64/include/uapi/asm/hwcap.h."""
SYSCTL = "/usr/sbin/sysctl"
FEATURES = {"FEAT_DotProd": "asimddp", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16"}
"""macOS's names under hw.optional.arm, with those of /proc/cpuinfo."""


@dataclass(frozen=True)
class Level:
    """Instructions that code may use."""

    name: str
    needs: frozenset[str]
    """Their names in /proc/cpuinfo."""
    flags: tuple[str, ...] = ()
    """Options of g++ and clang."""
    has_code: bool = True
    """Whether the sources have anything for it beyond the level before. Without, it is only named,
    and that level's code runs."""

    def above(self, name: str, needs: str, *flags: str, has_code: bool = True) -> "Level":
        """A level with more instructions than this one."""
        return Level(name, self.needs | set(needs.split()), (*self.flags, *flags), has_code)


V2 = Level(
    "x86-64-v2",
    frozenset(("cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2")),
    ("-mcx16", "-msahf", "-mpopcnt", "-mssse3", "-msse4.2"),
)
V3 = V2.above(
    "x86-64-v3",
    "avx2 fma f16c bmi1 bmi2 abm movbe",
    *("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mmovbe"),
)
AVX_VNNI = V3.above("avx-vnni", "avx_vnni", "-mavxvnni")
V4 = V3.above(
    "x86-64-v4",
    "avx512f avx512bw avx512cd avx512dq avx512vl",
    *(f"-mavx512{part}" for part in ("f", "bw", "cd", "dq", "vl")),
    # Compilers take half a register by default, because the first of these processors slowed down.
    "-mprefer-vector-width=512",
)
VNNI = V4.above("vnni", "avx512_vnni", "-mavx512vnni")
BF16 = VNNI.above("bf16", "avx512_bf16", "-mavx512bf16")
# Its products are tested on a model of the instructions and have never run on a processor, so that
# only CASTALIA_ISA=amx takes it.
AMX = BF16.above("amx", "amx_tile amx_int8 amx_bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16")

NEON = Level("neon", frozenset(("asimd",)), ("-march=armv8-a",))
DOTPROD = Level("dotprod", NEON.needs | {"asimddp"}, ("-march=armv8.2-a+dotprod",))
# ARMv8.6 has both matrix products, and no processor is known with one of them alone.
I8MM = Level("i8mm", DOTPROD.needs | {"i8mm", "bf16"}, ("-march=armv8.2-a+dotprod+i8mm+bf16",))
# Only named, because it would compute no faster. Neoverse V1 (Graviton 3), the one core whose
# vectors have 256 bits, starts two products of SVE in a cycle or four of 128 bits: 2 x 64 or
# 4 x 32 products of bytes by smmla, and 2 x 8 or 4 x 4 multiply-adds in float32. In Neoverse N2 and
# V2 (Graviton 4, Grace) SVE has 128 bits, and Apple's processors have none outside of SME.
# Source  Arm Neoverse V1 Software Optimization Guide; LLVM, AArch64SchedNeoverseV1.td.
SVE = I8MM.above("sve", "sve", has_code=False)

LEVELS = {
    "x86_64": (V2, V3, AVX_VNNI, V4, VNNI, BF16, AMX),
    "aarch64": (NEON, DOTPROD, I8MM, SVE),
}
"""Of each architecture, the lowest first."""


def architecture() -> str:
    """x86_64, aarch64, or what else this machine calls itself."""
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


@functools.cache
def instructions() -> frozenset[str]:
    """The words of /proc/cpuinfo for what the processor and the kernel allow."""
    if architecture() == "aarch64":
        if platform.system() == "Darwin":
            return instructions_of_mac()
        with suppress(OSError):
            return instructions_of_auxv(AUXV.read_bytes())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, words = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(words.split())
    return frozenset()


def instructions_of_auxv(content: bytes) -> frozenset[str]:
    """The words of an ARM processor, from its AUXV file.

    In an emulated process /proc/cpuinfo is about the processor that emulates.
    """
    found: set[str] = set()
    for kind, value in struct.iter_unpack("<QQ", content[: len(content) // 16 * 16]):
        names = HWCAPS.get(kind, {})
        found.update(name for bit, name in names.items() if value >> bit & 1)
    return frozenset(found)


def instructions_of_mac() -> frozenset[str]:
    """The words of a Mac's ARM processor."""
    command = [SYSCTL, "hw.optional.arm"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        # macOS 11, which knows none of these names. Every such Mac has dot products.
        return frozenset(("asimd", "asimddp"))
    found = {"asimd"}
    for line in lines.splitlines():
        name, _, value = line.rpartition(": ")
        word = FEATURES.get(name.rpartition(".")[2])
        if word is not None and value.strip() == "1":
            found.add(word)
    return frozenset(found)


def highest_allowed() -> str | None:
    """What CASTALIA_ISA says; None where it is not set.

    Raises  ConfigError if there is no such level on any architecture.
    """
    name = os.environ.get(VARIABLE, "").strip()
    if not name:
        return None
    known = ["none", *(level.name for levels in LEVELS.values() for level in levels)]
    if name not in known:
        raise ConfigError(
            f"unknown {VARIABLE}={name}; choose one of {', '.join(known)}{nearest(name, known)}"
        )
    return name


def tiles_are_allowed() -> bool:
    """Ask Linux for the tile registers of AMX, for this process and its children.

    Source  Linux, Documentation/arch/x86/xstate.rst: ARCH_REQ_XCOMP_PERM with XFEATURE_XTILEDATA.
    """
    if (platform.system(), architecture()) != ("Linux", "x86_64"):
        return False
    arch_prctl = 158
    refused = int(ctypes.CDLL(None).syscall(arch_prctl, 0x1023, 18))
    return refused == 0


def levels_here() -> tuple[Level, ...]:
    """Levels of this machine up to the allowed one, the best first; empty where there is none.

    Raises  ConfigError as highest_allowed.
    """
    allowed = highest_allowed()
    if allowed == "none":
        return ()
    known = LEVELS.get(architecture(), ())
    names = [level.name for level in known]
    if allowed in names:
        known = known[: names.index(allowed) + 1]
    if allowed != AMX.name or not tiles_are_allowed():
        known = tuple(level for level in known if level is not AMX)
    return tuple(level for level in reversed(known) if level.needs <= instructions())
