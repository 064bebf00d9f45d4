"""The command line as a whole: help, examples, hints for words that are no verbs, completion."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import castalia
from castalia.cli.app import app
from castalia.recipes.zoo_rwkv import RWKV
from castalia.terminal.hints import WANTED

ROOT = typer.main.get_command(app)
FULL = 8
"""Options above which a help without panels is a wall."""


def leaf_commands(group=ROOT, path=()):
    """(words, command) of every verb that does something."""
    for name, verb in group.commands.items():
        if hasattr(verb, "commands"):
            yield from leaf_commands(verb, (*path, name))
        else:
            yield (*path, name), verb


COMMANDS = dict(leaf_commands())


def examples(command):
    """The command lines under `Example:` in a command's help."""
    text = command.help.partition("Example")[2]
    return [line for line in text.splitlines()[1:] if line.strip()]


def command_of(words):
    """(command, its arguments) of a line without `castalia`."""
    command = ROOT
    while hasattr(command, "commands"):
        command = command.commands[words[0]]
        words = words[1:]
    return command, words


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_verb_has_examples_that_are_right(path):
    lines = examples(COMMANDS[path])
    assert lines, "no example"
    assert ("Examples:" in COMMANDS[path].help) == (len(lines) > 1)
    for line in lines:
        # At 80 columns an example must stay one line, or it cannot be copied.
        assert len(line) <= 78, line
        program, *words = shlex.split(line)
        if program == "castalia":
            command, arguments = command_of(words)
            assert command is COMMANDS[path]
            command.make_context(command.name, arguments)  # an unknown option raises


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_has_no_python_types_and_many_options_stand_in_panels(path):
    command = COMMANDS[path]
    text = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80"}).output
    assert not re.search(r"<(str|bool|int|float|list\[.*\])>|\d{10}<", text)
    options = [param for param in command.params if param.param_type_name == "option"]
    panels = {param.rich_help_panel for param in options}
    assert len(options) <= FULL or len(panels) > 1


def test_the_first_help_has_verbs_in_groups_and_no_python_types():
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    titles = ["Start", "Text to tokens", "Training", "Trained models"]
    places = [text.index(f"─ {title} ─") for title in titles]
    assert places == sorted(places) and "<bool>" not in text and "--install-completion" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("trian", "unknown verb 'trian'; did you mean 'train'?"),
        ("materialize", "unknown verb 'materialize'; use castalia data materialize"),
        ("data train", "unknown verb 'data train'; use castalia train"),
        ("data veiw", "unknown verb 'data veiw'; did you mean 'view'?"),
        ("evaluate", "use castalia eval MODEL --tasks NAME"),
        ("chat", "use castalia serve MODEL for chat requests, or castalia generate MODEL"),
        ("finetune", "use castalia train CONFIG model.start=MODEL"),
        ("ls", "use castalia runs [DIR]"),
        ("mixing report", "unknown verb 'mixing report'; use castalia report"),
        ("Resume", "use castalia train RUN"),
        ("xyzzy", "unknown verb 'xyzzy'; choose one of demo, doctor, version, prepare"),
    ],
)
def test_a_word_that_is_no_verb(command, words, says):
    code, out, err = command(*words.split())
    assert (code, out) == (2, "")
    assert err.startswith("castalia: error: unknown verb ") and says in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("train debug --lr 3e-4", "a key of a config is written without dashes: optim.lr=VALUE"),
        ("train debug --train-steps=5", "written without dashes: train.steps=VALUE"),
        ("launch debug --learning-rate 1", "written without dashes: optim.lr=VALUE"),
        ("train debug --output x", "written without dashes: output=VALUE"),
        ("train --config x.yaml", "write the file without it: castalia train FILE.yaml"),
        ("show debug --jsn", "no option --jsn; did you mean '--json'?"),
        ("data view debug --xyzzy", "keys of a config are written a.b=c, and castalia show --keys"),
        ("demo --steps 10", "written without dashes: train.steps=VALUE"),
        ("generate m --max-tokens 8", "no option --max-tokens; did you mean '--max-new-tokens'?"),
        ("prepare x --out y", "no option --out; did you mean '--output'?"),
        ("prepare x -o y", "no option -o; castalia prepare --help lists the options"),
        ("-v", "no option -v; castalia --help lists the options"),
        ("train", "castalia train needs CONFIG; for example: castalia train debug output="),
        ("data view debug", "castalia data view needs --steps; for example: castalia data view"),
        ("report", "castalia report needs PATH; for example: castalia report runs/first"),
        ("generate m text", "castalia generate does not expect 'text'; for example: castalia gen"),
        (
            "generate m --top-k x",
            "castalia generate: invalid value for '--top-k': expected a valid",
        ),
        (
            "serve m --port 99999",
            "invalid value for '--port': expected less than or equal to 65535",
        ),
        ("prepare x --output", "castalia prepare: option '--output' requires an argument"),
    ],
)
def test_a_line_that_the_parser_refuses(command, words, says):
    code, out, err = command(*words.split())
    assert (code, out) == (2, "") and says in err
    assert err.startswith("castalia: error: ") and err.count("\n") == 1


def test_hints_lead_to_verbs_that_exist():
    for word, text in WANTED.items():
        assert word not in ROOT.commands
        for verb in re.findall(r"castalia ([a-z]+)", text):
            assert verb in ROOT.commands, text


def completions(monkeypatch, command, line):
    """What bash offers for a line."""
    monkeypatch.setenv("_CASTALIA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    return command()[1].split()


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("castalia trai", ["train"]),
        ("castalia data ma", ["mask", "materialize"]),
        ("castalia show --gp", ["--gpu", "--gpus-per-node"]),
        ("castalia train demo", ["demo"]),
        ("castalia launch mixing.warm", ["mixing.warmup_steps="]),
        ("castalia train r", ["recipe=", "reward", *RWKV, "runs/", "r.yaml", "r1"]),
        ("castalia data view runs/a", ["runs/abs"]),
        ("castalia generate runs/a", ["runs/abs"]),
        ("castalia generate runs/abs/st", ["runs/abs/step8", "runs/abs/step20"]),
        ("castalia export runs/abs/step2", ["runs/abs/step20"]),
        ("castalia tune debug-aml", ["debug-amlp"]),
    ],
)
def test_completion(monkeypatch, command, tmp_path, line, offers):
    (tmp_path / "runs" / "abs").mkdir(parents=True)
    (tmp_path / "runs" / "abs" / "config.yaml").touch()
    for name in ("step-00000008", "step-00000020", "step-00000030.tmp"):
        (tmp_path / "runs" / "abs" / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "r1").mkdir()
    (tmp_path / "r1" / "config.yaml").touch()
    (tmp_path / "r.yaml").touch()
    (tmp_path / "r.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert sorted(completions(monkeypatch, command, line)) == sorted(offers)


def test_the_script_for_a_shell_is_for_castalia(monkeypatch, command):
    monkeypatch.setattr("shellingham.detect_shell", lambda *_: ("bash", "/bin/bash"))
    code, out, _ = command("--show-completion")
    assert code == 0 and out.rstrip().endswith("-F _castalia_completion castalia")


def test_completion_is_installed_into_a_home(monkeypatch, command, tmp_path):
    monkeypatch.setattr("shellingham.detect_shell", lambda *_: ("bash", "/bin/bash"))
    monkeypatch.setenv("HOME", str(tmp_path))
    code, out, _ = command("--install-completion")
    assert code == 0 and "bash completion installed" in out
    scripts = [path for path in tmp_path.rglob("*") if "_CASTALIA_COMPLETE" in read(path)]
    assert scripts and "castalia" in (tmp_path / ".bashrc").read_text()


def read(path):
    """The text of a file; nothing of a folder."""
    return path.read_text() if path.is_file() else ""


def spoken(tree):
    """The texts of a module but its docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in docstrings:
            yield node.value


DECIMAL = r"\b[kKMGT]B\b"


def test_sizes_have_one_system_of_units():
    # Binary ones, as `size_text` writes them; rich's speed of a transfer is decimal.
    for path in Path(castalia.__file__).parent.rglob("*.py"):
        source = path.read_text()
        assert "TransferSpeedColumn" not in source, path
        if not re.search(DECIMAL, source):
            continue  # parsing all sources takes seconds
        found = [text for text in spoken(ast.parse(source)) if re.search(DECIMAL, text)]
        assert not found, (path, found)
