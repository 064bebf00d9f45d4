"""Libraries that a wheel carries: checked before they are loaded, and left out if outdated."""

import ctypes
import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from castalia.core import compilers, native_code
from castalia.core.levels import Level, levels_here
from castalia.core.prebuilt import PREBUILT, library_name, source_hash

needs_compiler = pytest.mark.skipif(
    compilers.chosen_compiler() is None or not levels_here(), reason="no C++ compiler here"
)


@needs_compiler
def test_a_library_of_the_wheel_needs_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    level = next(level for level in levels_here() if level.has_code)
    compiler = compilers.chosen_compiler()
    assert compiler is not None
    code = compilers.compiled_code(source, compiler, level)
    library = tmp_path / library_name(source, level)
    library.write_bytes(code)
    facts = {level.name: hashlib.sha256(code).hexdigest()}
    record = json.dumps({"source": source_hash(source), "levels": facts})
    (tmp_path / PREBUILT.format("answer")).write_text(record)
    monkeypatch.setenv("CASTALIA_CXX", "none")
    loaded = native_code.native_library(source, "the answer", "none is used")
    assert loaded is not None and loaded.answer() == 42
    # Loading it would end this process with SIGBUS.
    library.write_bytes(code[: len(code) // 2])
    with pytest.warns(UserWarning, match=r"\.so is damaged; install castalia again"):
        assert native_code.native_library(source, "the answer", "none is used") is None
    library.write_bytes(code)
    monkeypatch.setenv("CASTALIA_ISA", "none")
    assert native_code.native_library(source, "the answer", "none is used") is None
    monkeypatch.delenv("CASTALIA_ISA")
    # Somebody changed the source in place.
    source.write_text('extern "C" int answer() { return 43; }')
    assert native_code.native_library(source, "the answer", "none is used") is None


@needs_compiler
def test_a_compiler_older_than_the_processor_builds_the_best_level_that_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "level.cpp"
    source.write_text('extern "C" const char *level() { return CASTALIA_LEVEL; }')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known = [level for level in levels_here() if level.has_code]
    compile_it = compilers.compiled_code

    def old(source: Path, compiler: tuple[str, ...], level: Level) -> bytes:
        if level is not known[-1]:
            said = f"error: {level.name} is unknown"
            raise subprocess.CalledProcessError(1, "g++", stderr=f"g++: x\n{said}\ng++: a note\n")
        return compile_it(source, compiler, level)

    monkeypatch.setattr(native_code, "compiled_code", old)
    if len(known) < 2:
        pytest.skip("one level alone")
    match = f"so the level {known[-1].name} is used: error: {known[0].name} is unknown"
    with pytest.warns(UserWarning, match=match):
        built = native_code.native_library(source, "the answer", "none is used")
    assert built is not None
    built.level.restype = ctypes.c_char_p
    assert built.level().decode() == known[-1].name
