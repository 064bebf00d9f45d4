"""Registry, files, extras and the errors that users read."""

import subprocess
import sys

import pytest

from castalia.core import extras, hashed_file
from castalia.core.errors import CastaliaError, ConfigError, nearest
from castalia.core.extras import require
from castalia.core.files import atomic_write, claimed, sha256_of, write_json
from castalia.core.functions import named_function, source_hash
from castalia.core.hashed_file import HashedFile
from castalia.core.lazy import lazy
from castalia.core.registry import Registry


def test_a_wrong_name_gets_the_menu():
    presets: Registry[int] = Registry("preset")
    presets.register("pythia-70m")(1)
    presets.register("debug")(2)
    assert presets["debug"] == 2 and "debug" in presets and list(presets) == ["pythia-70m", "debug"]
    with pytest.raises(
        ConfigError,
        match="unknown preset 'pythia-71m'; choose one of debug, pythia-70m;"
        " did you mean 'pythia-70m'",
    ):
        presets["pythia-71m"]
    assert nearest("zzz", ["abc"]) == ""


def test_a_write_is_whole_or_absent(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with atomic_write(path) as file:
        file.write("one")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("two")
        raise RuntimeError
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_full_disk_or_an_unwritable_place_is_a_sentence(tmp_path):
    with (
        pytest.raises(CastaliaError, match=r"cannot write .*: No space left on device; free space"),
        atomic_write(tmp_path / "x"),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(CastaliaError, match="cannot write /proc/x/y"):
        write_json("/proc/x/y", {})


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert (
        sha256_of(tmp_path / "x")
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_a_missing_extra_is_one_sentence_with_the_pip_line():
    assert require("json", "none", "this test").dumps([]) == "[]"
    with pytest.raises(
        ConfigError, match=r"export needs 'no_such_module'.*pip install -e '\.\[ct2\]'"
    ):
        require("no_such_module", "ct2", "export")


def test_the_pip_line_names_the_package_as_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.chdir(extras.ROOT)  # the tests run in a clone
    assert extras.pip_command("serve") == "pip install -e '.[serve]'"
    monkeypatch.chdir(tmp_path)
    assert extras.pip_command("serve") == f"pip install -e '.[serve]' (in {extras.ROOT})"
    monkeypatch.setattr(extras, "ROOT", tmp_path)
    origins = [
        ({}, "'castalia[serve]'"),
        ({"url": "file:///a%20b", "dir_info": {}}, "'/a b[serve]'"),
        (
            {"url": "https://x.y/c", "vcs_info": {"vcs": "git"}},
            "'castalia[serve] @ git+https://x.y/c'",
        ),
    ]
    for origin, package in origins:
        monkeypatch.setattr(extras, "installed_from", lambda origin=origin: origin)
        assert extras.pip_command("serve") == f"pip install {package}"


def test_lazy_names():
    get = lazy("castalia.core", {"Registry": "registry"})
    assert get("Registry") is Registry
    with pytest.raises(AttributeError, match=r"'castalia.core' has no attribute 'nothing'"):
        get("nothing")


HOLD = """
import sys, time
from pathlib import Path
from castalia.core.files import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_claimed_by_one_process_until_it_ends(tmp_path, capsys):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    message = f"is in use by process {holder.pid} on .*; wait until it ends, or stop it"
    with pytest.raises(ConfigError, match=message), claimed(tmp_path, seconds=0.3):
        raise AssertionError("claimed twice")
    assert "waiting 0 s" in capsys.readouterr().err
    holder.kill()  # nothing is left to clean up by hand
    with claimed(tmp_path, seconds=10):
        assert (tmp_path / ".claim").read_text().startswith("process ")
    holder.wait()


def test_a_function_is_known_by_its_file(tmp_path, monkeypatch):
    path = tmp_path / "functions_by_file.py"
    path.write_text("import functools\ndef f(a):\n    return a\ng = functools.partial(f, 1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("functions_by_file:f", "functions_by_file:g"):
        function = named_function(name, "--fn", "a:b")
        before = source_hash(function, name)
        assert before == sha256_of(path)
        path.write_text(path.read_text() + "OTHER = 1\n")
        assert source_hash(function, name) != before
    assert source_hash(sys.getsizeof, "sys:getsizeof") == "sys:getsizeof"


@pytest.mark.parametrize("advises", [True, False])  # macOS has no posix_fadvise
def test_a_file_hashed_while_it_is_written(tmp_path, monkeypatch, advises):
    monkeypatch.setattr(hashed_file, "BLOCK", 100)
    monkeypatch.setattr(hashed_file, "BEHIND", 150)
    if not advises:
        monkeypatch.delattr(hashed_file.os, "posix_fadvise")
    parts = [bytes(range(250)) * 7, b"", b"abc", bytes(5_000_000)]
    with HashedFile(tmp_path / "file") as file:
        sizes = [file.write(part) for part in parts]
        seal = file.sync()
    assert sizes == [1750, 0, 3, 5_000_000]
    assert (tmp_path / "file").read_bytes() == b"".join(parts)
    assert seal == (sha256_of(tmp_path / "file"), sum(sizes))
