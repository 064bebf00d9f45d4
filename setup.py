"""Builds the C++ sources into a wheel, for every level of instructions; all else is in pyproject.

A compiler is found as castalia.core.compilers says. Without one, or where it fails, the wheel is
pure Python and says so: a machine with a compiler then builds what it needs at first use. zig's
libraries run with any glibc since 2.17, and the wheel's tag says that.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "src"))

from castalia.core import compilers, levels  # noqa: E402
from castalia.core.prebuilt import PREBUILT, library_name, source_hash  # noqa: E402


def built(job: tuple[Path, levels.Level], compiler: tuple[str, ...]) -> bytes | None:
    """One library; None, with a notice, where the compiler fails."""
    source, level = job
    try:
        return compilers.compiled_code(source, compiler, level)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        print(f"{source.name} is not compiled for {level.name}: {' '.join(reason)}")
        return None


class BuildWithLibraries(build_py):
    """Copies the package, and adds the libraries beside their sources."""

    def run(self) -> None:
        """As setuptools, then compile; an editable installation compiles at first use."""
        super().run()
        compiler = compilers.chosen_compiler()
        known = levels.LEVELS.get(levels.architecture(), ())
        if self.editable_mode:
            return
        if compiler is None or not known:
            print("no C++ compiler: the wheel has no compiled code, and runs slower without one")
            return
        package = Path(self.build_lib) / "castalia"
        sources = sorted(package.rglob("*.cpp"))
        jobs = [(source, level) for source in sources for level in known if level.has_code]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(lambda job: built(job, compiler), jobs))
        for source in sources:
            facts = {}
            for (of, level), code in zip(jobs, made, strict=True):
                if of != source or code is None:
                    continue
                source.with_name(library_name(source, level)).write_bytes(code)
                facts[level.name] = hashlib.sha256(code).hexdigest()
            if facts:
                record = {"source": source_hash(source), "levels": facts}
                source.with_name(PREBUILT.format(source.stem)).write_text(json.dumps(record))


class CompiledDistribution(Distribution):
    """Says whether the package is for one platform."""

    def has_ext_modules(self) -> bool:
        """Whether there is something to compile with, and levels to compile for."""
        return bool(compilers.chosen_compiler() and levels.LEVELS.get(levels.architecture()))


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and any Python, where it has libraries."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none, because ctypes loads the libraries; the platform is what they need."""
        if self.root_is_pure:
            return super().get_tag()
        place = super().get_tag()[2]
        compiler = compilers.chosen_compiler()
        machine = platform.machine()
        if compiler and compilers.is_zig(compiler) and machine in compilers.OLDEST_GLIBC:
            version = compilers.OLDEST_GLIBC[machine].replace(".", "_")
            place = f"manylinux_{version}_{machine}"
        return "py3", "none", place


COMMANDS = {"build_py": BuildWithLibraries, "bdist_wheel": PlatformWheel}
setup(cmdclass=COMMANDS, distclass=CompiledDistribution)
