"""The cache of machine code: what is damaged, foreign or writable by others is never loaded."""

import os
import warnings
from pathlib import Path

import pytest

from castalia.core import compilers, native_code
from castalia.core.private_cache import PrivateCache, keep_compiled_code_private, replaceable

KEY = "0123456789abcdef"


def files(folder: Path) -> list[Path]:
    """What a cache holds."""
    return sorted((folder / "native").iterdir())


def test_a_changed_file_is_deleted_and_counts_as_missing(tmp_path, monkeypatch):
    folder = tmp_path / "native"
    content = bytes(range(256)) * 40

    def stored() -> Path:
        with PrivateCache(folder) as cache:
            cache.write(KEY, content)
            assert cache.read(KEY) == content
            assert cache.read("f" * 16) is None
        (path,) = files(tmp_path)
        assert path.stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700
        return path

    def found() -> bytes | None:
        with PrivateCache(folder) as cache:
            return cache.read(KEY)

    flipped = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
    for damaged in (flipped, content[:-1], b""):
        stored().write_bytes(damaged)
        assert found() is None and files(tmp_path) == []
    path = stored()
    path.chmod(0o666)
    assert found() is None and files(tmp_path) == []
    # Kept by somebody else under another name.
    path = stored()
    os.link(path, tmp_path / "elsewhere")
    assert found() is None and files(tmp_path) == []
    path = stored()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert found() is None and files(tmp_path) == []
    os.mkfifo(path)
    assert found() is None and files(tmp_path) == []
    # Of another user.
    stored()
    with PrivateCache(folder) as cache:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert cache.read(KEY) is None


def test_files_of_killed_writers_are_swept(tmp_path):
    folder = tmp_path / "native"
    with PrivateCache(folder) as cache:
        old = folder / ".a.tmp"
        young = folder / ".b.tmp"
        old.touch()
        young.touch()
        os.utime(old, (0, 0))
        cache.write(KEY, b"1")
    assert not old.exists() and young.exists()


@pytest.mark.skipif(compilers.chosen_compiler() is None, reason="no C++ compiler here")
def test_a_library_is_compiled_anew_where_the_cached_one_is_not_ours(tmp_path, monkeypatch):
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    compiled = []
    compile_it = native_code.compiled_code

    def counted(*arguments):
        compiled.append(arguments)
        return compile_it(*arguments)

    monkeypatch.setattr(native_code, "compiled_code", counted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "castalia" / "native"

    def answers() -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return native_code.native_library(source, "the answer", "none is used").answer() == 42

    assert answers() and answers() and len(compiled) == 1
    (path,) = cache.iterdir()
    # Loading the half of it would end this process with SIGBUS.
    os.truncate(path, path.stat().st_size // 2)
    assert answers() and len(compiled) == 2
    cache.chmod(0o777)
    with pytest.warns(UserWarning, match=r"native is writable by others \(mode 777\); chmod go-w"):
        assert native_code.native_library(source, "the answer", "none is used").answer() == 42
    assert len(compiled) == 3
    path.unlink()
    cache.rmdir()
    (tmp_path / "planted").mkdir()
    cache.symlink_to(tmp_path / "planted")
    with pytest.warns(UserWarning, match="native is a link or a file; remove it"):
        assert native_code.native_library(source, "the answer", "none is used").answer() == 42
    assert len(compiled) == 4 and list((tmp_path / "planted").iterdir()) == []
    # Without files in memory, the copy is in a folder of its own.
    monkeypatch.delattr(os, "memfd_create")
    cache.unlink()
    assert answers() and answers() and len(compiled) == 5


def test_torch_compiles_into_a_private_folder(tmp_path, monkeypatch):
    name = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(name, "chosen")
    keep_compiled_code_private()
    assert os.environ[name] == "chosen"
    monkeypatch.delenv(name)
    keep_compiled_code_private()
    ours = tmp_path / "home" / "castalia" / "torch-compile"
    assert Path(os.environ[name]).parent == ours and ours.stat().st_mode & 0o777 == 0o700
    # Code for other instructions is found by the same graph.
    usual = os.environ.pop(name)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    keep_compiled_code_private()
    assert Path(os.environ[name]).parent == ours and os.environ[name] != usual
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    monkeypatch.delenv(name)
    keep_compiled_code_private()
    assert os.environ[name] == usual
    # Others could rename the folder and put their own in its place.
    monkeypatch.delenv(name)
    (tmp_path / "home").chmod(0o777)
    assert replaceable(tmp_path / "home")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    keep_compiled_code_private()
    assert os.environ[name].startswith(str(tmp_path / "castalia-compile-"))
    (tmp_path / "home").chmod(0o1777)
    assert not replaceable(tmp_path / "home")
