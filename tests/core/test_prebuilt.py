"""Libraries that a wheel carries: checked before they are loaded, and left out if outdated."""

import hashlib
import json
from pathlib import Path

import pytest

from castalia.core import compilers, native_code
from castalia.core.levels import levels_here
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
