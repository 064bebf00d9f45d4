"""The Dockerfile, compose.yaml and the Apptainer files: what they name exists, and their steps run
as shell in an empty folder."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from tests.fixtures import dockerfile
from tests.fixtures.dockerfile import StandIn

from castalia.core import compilers
from castalia.core.levels import levels_here

ROOT = Path(__file__).resolve().parents[2]
STAGES = dockerfile.read(ROOT / "Dockerfile")
IMAGES = ("cpu", "cuda")
APPTAINER = ROOT / "examples" / "apptainer"
FILES = ("Dockerfile", "compose.yaml", ".dockerignore", "examples/apptainer/castalia.def")


def line_of(name: str) -> list[dockerfile.Stage]:
    """A stage and its parents, the image first."""
    found = []
    while name in STAGES:
        found.append(STAGES[name])
        name = STAGES[name].parent
    return found


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a path of the repository into the build."""
    sent = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        # The last line that matches a path, or a folder above it, decides.
        if fnmatch.fnmatch(path, pattern) or path.startswith(f"{pattern}/"):
            sent = line.startswith("!")
    return sent


def test_every_copied_file_exists_and_is_sent_to_the_builder() -> None:
    copied = []
    for stage in STAGES.values():
        for rest in stage.rests("COPY"):
            origin, *sources = rest.split()[:-1]
            if origin.startswith("--from="):
                assert origin.removeprefix("--from=") in STAGES, rest
                continue
            copied += [origin, *sources]
    assert {"src", "pyproject.toml", "constraints.txt"} <= set(copied)
    for path in copied:
        assert (ROOT / path).exists(), path
        assert is_sent(path), f".dockerignore leaves {path} out"
    assert not is_sent("runs/first") and not is_sent(".git") and not is_sent("tests/conftest.py")
    # What a build sends is what a build may read: the patterns name nothing that is gone.
    named = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert all((ROOT / path).exists() for path in named)


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_small_and_runs_as_a_user(name: str) -> None:
    stages = line_of(name)
    users = [user for stage in stages for user in stage.rests("USER")]
    assert users[0] == "castalia"
    runs = [command for stage in stages for command in stage.rests("RUN")]
    assert any("useradd" in command and "castalia" in command for command in runs)
    # A compiler only where it was asked for, and never pip's cache.
    assert not any("g++" in command or "pip install" in command for command in runs)
    assert dockerfile.command_of(STAGES, name) == ["castalia", "doctor"]
    for stage in STAGES.values():
        pips = [command for command in stage.rests("RUN") if "pip install" in command]
        assert all("--no-cache-dir" in command for command in pips)
    # torch, then the packages, then Castalia: a change of the sources installs neither again.
    steps = [f"{word} {rest}" for word, rest in STAGES[f"packages-{name}"].steps]
    order = [
        next(at for at, step in enumerate(steps) if part in step)
        for part in ("grep '^torch=='", "requirements.txt", "--from=wheel", "--no-deps /wheel")
    ]
    assert order == sorted(order) and "src" not in " ".join(steps).replace("/source", "")


def test_the_default_image_is_that_for_cpus() -> None:
    assert list(STAGES)[-1] == "cpu"
    steps = " ".join(STAGES["packages-cpu"].rests("RUN"))
    assert 'test -n "$TORCH_INDEX"' in steps and "torch.version.cuda is None" in steps
    assert "TORCH_INDEX" not in " ".join(rest for _, rest in STAGES["packages-cuda"].steps)


def test_no_file_has_the_address_of_a_registry() -> None:
    for name in FILES:
        assert "://" not in (ROOT / name).read_text(encoding="utf-8"), name


def test_compose_names_stages_verbs_and_options_that_exist() -> None:
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    services = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))["services"]
    assert set(services) == {"train", "serve", "tensorboard"}
    declared = {rest.partition("=")[0] for stage in STAGES.values() for rest in stage.rests("ARG")}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for service in services.values():
        assert service["build"]["target"] in STAGES
        assert set(service["build"]["args"]) <= declared
        names = service["build"]["args"]["EXTRAS"].split(",")
        assert set(names) <= set(extras["optional-dependencies"]) and "serve" in names
        # Nothing is reachable from other machines unless a user changes it.
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    from typer.main import get_command

    from castalia.cli.app import app

    for name in ("train", "serve"):
        verb, *words = services[name]["command"]
        command = get_command(app).commands[verb]
        command.make_context(verb, list(words))


def test_the_requirements_of_a_layer_are_those_of_the_package() -> None:
    words = [sys.executable, str(ROOT / "tools" / "requirements.py")]
    plain = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert plain.stdout.splitlines() == project["dependencies"]
    more = subprocess.run([*words, "report"], capture_output=True, text=True, check=True, cwd=ROOT)
    added = more.stdout.splitlines()[len(project["dependencies"]) :]
    assert [name.split(">")[0] for name in added] == ["duckdb", "pyarrow", "plotly"]
    wrong = subprocess.run([*words, "hff"], capture_output=True, text=True, cwd=ROOT)
    assert wrong.returncode == 1 and "unknown extra 'hff'; choose of hf, ct2" in wrong.stderr


def test_the_apptainer_image_has_the_same_steps() -> None:
    text = (APPTAINER / "castalia.def").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^%(\w+)[^\n]*\n(.*?)(?=^%|^Bootstrap|\Z)", text, re.M | re.S))
    files = [line.split()[0] for line in parts["files"].splitlines() if line.strip()]
    for name in files:
        assert name.startswith("/") or (ROOT / name).exists(), name
    for step in (
        "python -m venv /opt/castalia",
        "grep '^torch==' constraints.txt",
        "tools/requirements.py",
        "pip wheel --no-cache-dir --no-deps",
    ):
        assert step in text, step
    script = (APPTAINER / "train.sbatch").read_text(encoding="utf-8")
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    assert "srun" in script and "apptainer exec" in script and "--signal=" in script


@pytest.mark.parametrize(
    ("step", "status", "requeued"),
    [(20, 0, False), (10, 0, True), (None, 0, False), (10, 3, False)],
    ids=["done", "told to stop", "nothing saved", "failed"],
)
def test_the_job_is_requeued_only_where_there_is_more_to_do(
    tmp_path: Path, step: int | None, status: int, requeued: bool
) -> None:
    """srun, apptainer and scontrol stand in; castalia saves `step` of 20 and ends with `status`."""
    bin = tmp_path / "bin"
    bin.mkdir()
    saved = "" if step is None else f"runs/a/checkpoints/step-{step:08d}"
    castalia = f"""mkdir -p runs/a {saved}
printf 'checkpoint:\n  steps: [1]\ntrain:\n  steps: 20\nother: 1\n' > runs/a/config.yaml
{f"touch {saved}/COMPLETE" if saved else ""}
exit {status}"""
    texts = {
        # Without their own options: what they start is the rest.
        "srun": 'shift; exec "$@"',
        "apptainer": 'while [ "$1" != castalia ]; do shift; done; exec "$@"',
        "castalia": castalia,
        "scontrol": 'echo "$@" > requeued',
    }
    for name, text in texts.items():
        (bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin / name).chmod(0o755)
    environment = {"PATH": f"{bin}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", str(APPTAINER / "train.sbatch"), "debug", "runs/a"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    assert (tmp_path / "requeued").exists() == requeued


def programs(folder: Path) -> Path:
    """What stands for the programs of the base image; those that would change this machine only
    write down what they were asked."""
    folder.mkdir()
    python = Path(sys.base_prefix, "bin", "python3")
    (folder / "python").symlink_to(python)
    (folder / "pip").write_text(f'#!/bin/sh\nexec {python} -m pip "$@"\n')
    for name in ("apt-get", "useradd", "chown"):
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/asked\n')
    for path in folder.iterdir():
        if not path.is_symlink():
            path.chmod(0o755)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(compilers.chosen_compiler() is None, reason="no C++ compiler here")
@pytest.mark.skipif(not levels_here(), reason="no level for this processor")
def test_the_steps_of_the_cpu_image_make_a_castalia_that_trains(tmp_path: Path) -> None:
    from pip._internal.models.index import PyPI

    context = tmp_path / "context"
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", context / "src", ignore=left_out)
    (context / "tools").mkdir()
    names = ("pyproject.toml", "setup.py", "constraints.txt", "README.md", "LICENSE")
    for name in (*names, "tools/requirements.py"):
        shutil.copy(ROOT / name, context / name)
    bin = programs(tmp_path / "bin")
    image = StandIn(STAGES, context, tmp_path / "image", bin)
    # pip's own default index stands for that of PyTorch; pip's settings here have a CPU build.
    image.build("cpu", {"TORCH_INDEX": PyPI.simple_url, "EXTRAS": "serve,tensorboard"})
    asked = (bin / "asked").read_text()
    assert "apt-get install -y --no-install-recommends g++" in asked
    assert "useradd --create-home --uid 1000 castalia" in asked and asked.count("g++") == 1
    # The same place again, since environments know their paths.
    image.place("cpu").rename(image.root)
    work = image.root / "work"
    environment = image.environments["cpu"] | {"CASTALIA_CXX": "none", "HOME": str(work)}
    castalia = str(image.root / "opt" / "castalia" / "bin" / "castalia")
    small = "model.num_layers=1 model.hidden_size=32 train.batch_size=2 train.steps=2"
    for words in (
        ["train", "debug", *small.split(), "output=runs/first"],
        ["generate", "runs/first", "--prompt", "a", "--max-new-tokens", "2"],
        ["serve", "--help"],
    ):
        done = subprocess.run(
            [castalia, *words], cwd=work, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    # The libraries came with the wheel: there is no compiler in this environment.
    probe = "from castalia.native import compiled; print(compiled.level(), compiled.__file__)"
    python = str(Path(castalia).with_name("python"))
    done = subprocess.run(
        [python, "-c", probe], cwd=work, env=environment, capture_output=True, text=True
    )
    level, file = done.stdout.split()
    assert level in {each.name for each in levels_here()} and file.startswith(str(image.root))
    assert (work / "runs" / "first" / "checkpoints" / "step-00000002" / "COMPLETE").is_file()
