"""The instructions of this processor that kernels may use, after the caps of the environment.

Three variables take instructions away, so that one machine can stand for older ones:
ATEN_CPU_CAPABILITY from torch's own kernels, ONEDNN_MAX_CPU_ISA from oneDNN, and CASTALIA_ISA from
the compiled step. An instruction counts here if none of them takes it away.
"""

import os
import platform
from collections.abc import Mapping
from pathlib import Path

from castalia.core.levels import LEVELS, highest_allowed, instructions

CAPS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "CASTALIA_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Variables that change what the measured table would say; MKL obeys its own on Intel alone."""
X86 = tuple(level.name for level in LEVELS["x86_64"])
ARM = tuple(level.name for level in LEVELS["aarch64"])
LEAST = {
    "avx2": "x86-64-v3",
    "avx512f": "x86-64-v4",
    "avx_vnni": "avx-vnni",
    "avx512_vnni": "vnni",
    "avx512_bf16": "bf16",
    "avx512_fp16": "amx",
    "amx_int8": "amx",
    "amx_bf16": "amx",
    "neon": "neon",
    "dotprod": "dotprod",
    "i8mm": "i8mm",
    "bf16": "i8mm",
    "sve": "sve",
}
"""Instructions that decide how fast products are, with the smallest cap that leaves them."""
NAMES = {"asimd": "neon", "asimddp": "dotprod"}
"""Linux's names of what others call otherwise."""
ATEN = {"default": "x86-64-v2", "avx2": "x86-64-v3"}
"""Caps that ATEN_CPU_CAPABILITY stands for; avx512 takes nothing away."""
ONEDNN = {
    "SSE41": "x86-64-v2",
    "AVX": "x86-64-v2",
    "AVX2": "x86-64-v3",
    "AVX2_VNNI": "avx-vnni",
    "AVX2_VNNI_2": "avx-vnni",
    "AVX512_CORE": "x86-64-v4",
    "AVX512_CORE_VNNI": "vnni",
    "AVX512_CORE_BF16": "bf16",
    "AVX512_CORE_FP16": "bf16",
    "AVX10_1_512": "bf16",
}
"""Caps that ONEDNN_MAX_CPU_ISA stands for; other values take nothing away."""
FLAGS = {
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
    "x86-64-v2": {"cx16", "popcnt", "sse4_1", "sse4_2", "ssse3"},
}
"""Flags of /proc/cpuinfo that make a level, the highest first.
Source  System V ABI for x86-64, table 3.1."""
PARTS = {
    "0x41 0xd08": "Arm Cortex-A72",
    "0x41 0xd0b": "Arm Cortex-A76",
    "0x41 0xd0c": "Arm Neoverse N1",
    "0x41 0xd40": "Arm Neoverse V1",
    "0x41 0xd49": "Arm Neoverse N2",
    "0x41 0xd4f": "Arm Neoverse V2",
    "0x46 0x001": "Fujitsu A64FX",
    "0xc0 0xac3": "Ampere-1",
}
"""ARM processors by implementer and part, since /proc/cpuinfo has no name of them.
Source  Linux, arch/arm64/include/asm/cputype.h."""


def caps() -> dict[str, str]:
    """The caps that are set, by variable.

    Raises  ConfigError if CASTALIA_ISA is not a level that the compiled step knows.
    """
    highest_allowed()
    return {name: os.environ[name] for name in CAPS if os.environ.get(name)}


def processor_lines() -> dict[str, str]:
    """The lines of /proc/cpuinfo about the first core, by their names; empty without that file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    first = text.split("\n\n")[0]
    lines = [line.partition(":") for line in first.splitlines()]
    return {name.strip(): value.strip() for name, _, value in lines}


def processor_name(lines: Mapping[str, str]) -> str:
    """The name of the processor."""
    if "model name" in lines:
        return lines["model name"]
    part = f"{lines.get('CPU implementer')} {lines.get('CPU part')}"
    return PARTS.get(part) or platform.processor() or platform.machine()


def flags_of(lines: Mapping[str, str]) -> set[str]:
    """What the processor says it can do, in the names of LEAST and FLAGS."""
    words = f"{lines.get('flags', '')} {lines.get('Features', '')}".split()
    flags = {NAMES.get(word, word) for word in words}
    if platform.machine() in ("arm64", "aarch64"):
        # macOS has no /proc/cpuinfo, and in an emulated process it is about another processor.
        flags |= {NAMES.get(word, word) for word in instructions()}
    return flags


def allowed(instruction: str, given: Mapping[str, str]) -> bool:
    """Whether none of the caps takes an instruction away."""
    least = LEAST[instruction]
    scale = X86 if least in X86 else ARM
    limits = (
        ATEN.get(given.get("ATEN_CPU_CAPABILITY", "")),
        ONEDNN.get(given.get("ONEDNN_MAX_CPU_ISA", "").upper()),
        given.get("CASTALIA_ISA"),
    )
    return all(scale.index(least) <= scale.index(cap) for cap in limits if cap in scale)


def usable(flags: set[str], given: Mapping[str, str]) -> tuple[str, ...]:
    """The instructions of LEAST that this processor has and that the caps leave."""
    return tuple(name for name in LEAST if name in flags and allowed(name, given))


def level_of(flags: set[str], given: Mapping[str, str]) -> str:
    """x86-64-v2, -v3 or -v4 after the caps; elsewhere the architecture, such as aarch64."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return platform.machine()
    for level, needed in FLAGS.items():
        marks = needed & set(LEAST)
        if needed <= flags and all(allowed(mark, given) for mark in marks):
            return level
    return "x86-64"
