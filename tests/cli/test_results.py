"""`castalia results`: import, SQL, conditions, comparisons, and what it says about wrong words."""

import csv
import io
import json

import pytest

pytest.importorskip("duckdb")

FORMER = {
    "results": {"piqa": {"acc": 0.5, "acc_stderr": 0.01}, "wsc": {"acc": 0.25, "acc_stderr": 0.02}},
    "versions": {"piqa": 0, "wsc": 1},
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with two evaluations of one model, and a model of another suite."""
    monkeypatch.chdir(tmp_path)
    for name, revision, more in (("v1/a", "step0", {}), ("v1/b", "step1000", {}), ("c", "", {})):
        owner, model = ("facebook", "opt-125m") if name == "c" else ("EleutherAI", "pythia-70m")
        arguments = f"pretrained={owner}/{model}" + (f",revision={revision}" if revision else "")
        config = {"model": "hf-causal", "model_args": arguments, "num_fewshot": 0}
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(FORMER | more | {"config": config}))
    return tmp_path


def test_import_then_ask(files, command):
    code, out, err = command("results", "--import", "v1", "c.json", "--store", "store")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "opt        1 file, 2 rows",
        "pythia-v1  2 files, 4 rows",
        "imported 3 files, 6 rows, of them 0 older duplicates dropped; the table has 6 rows",
    ]
    assert command("results", "--import", "v1", "--import", "c.json", "--store", "store")[1] == out
    code, out, _ = command("results", "--store", "store")
    first, opt, pythia = out.splitlines()
    assert first.split()[:3] == ["suite", "model", "variant"] and "opt-125m" in opt
    assert pythia.split() == ["pythia-v1", "pythia-70m", "1", "2", "0", "1000", "2", "4"]
    sql = "select step, value, variant, parameters from results where task = 'wsc' order by step"
    names, *rows = csv.reader(io.StringIO(command("results", "store", "--sql", sql, "--csv")[1]))
    assert names == ["step", "value", "variant", "parameters"]
    assert rows == [
        ["0", "0.25", "", "70426624"],
        ["1000", "0.25", "", "70426624"],
        ["", "0.25", "", "125239296"],
    ]
    objects = json.loads(command("results", "--store", "store", "--sql", sql, "--json")[1])
    assert objects[2] == {"step": None, "value": 0.25, "variant": "", "parameters": 125_239_296}
    text = command("results", "store/results.parquet", "--sql", sql, "--markdown")[1]
    assert text.splitlines()[:3] == [
        "| step | value | variant | parameters |",
        "| ---: | ---: | --- | ---: |",
        "| 0 | 0.25 |  | 70426624 |",
    ]


def test_one_call_imports_and_asks(files, command):
    sql = "select task, any_value(source) as source from results group by task order by task"
    code, out, err = command("results", "--import", "c.json", "--sql", sql)
    assert code == 0 and "imported 1 file, 2 rows" in err
    assert out.splitlines() == ["task  source", "piqa  c.json", "wsc   c.json"]
    assert (files / "evals" / "results.parquet").is_file()
    # A comment in a condition ends with it.
    rows = command("results", "--where", "task = 'piqa' -- or task = 'wsc'", "--json")[1]
    assert [row["task"] for row in json.loads(rows)] == ["piqa"]


def test_values_that_are_no_numbers_of_json(files, command):
    command("results", "--import", "c.json")
    sql = (
        "select 'nan'::double a, 'inf'::double b, -'inf'::double c, [1, null] d, {'x': 'y'} e,"
        " date '2026-01-02' f, 'a|b' || chr(10) || 'c' g, true h, 1.50::decimal(9, 2) i"
    )
    (value,) = json.loads(command("results", "--sql", sql, "--json")[1])
    expected = {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": [1, None], "e": {"x": "y"}}
    assert value == expected | {"f": "2026-01-02", "g": "a|b\nc", "h": True, "i": "1.50"}
    assert command("results", "--sql", sql, "--markdown")[1].splitlines()[2] == (
        "| nan | inf | -inf | [1, None] | {'x': 'y'} | 2026-01-02 | a\\|b c | True | 1.50 |"
    )
    many = command("results", "--sql", "from range(1200)")
    assert len(many[1].splitlines()) == 1001 and many[2] == "200 more rows; --csv prints all\n"


def test_comparisons(files, command):
    command("results", "--import", "v1", "c.json")
    words = ("--compare", "pythia-v1/pythia-70m@1000", "opt")
    code, out, err = command("results", *words, "--json")
    first, second = json.loads(out)
    assert (code, first["task"], second["stderr"]) == (0, "piqa", pytest.approx(0.02 * 2**0.5))
    assert err.startswith("2 numbers: pythia-v1/pythia-70m@1000 is better in 0, opt in 0;")
    code, out, err = command("results", "--compare", "pythia-v1", "optt")
    assert (code, out) == (1, "") and "did you mean 'opt'" in err


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--sql", "drop table results"), 1, "SQL: expected one SELECT, got DROP"),
        (("--store", "none"), 1, "none: no results here: expected a folder with results.parquet"),
        (("--import", "none"), 1, "not imported:\nnone: no such file or folder"),
        (("--import", "v1", "bad.json"), 1, "not imported:\nbad.json: no file of results"),
        (("--sql", "select 1", "--where", "true"), 2, "--sql stands alone"),
        (("--across", "dtype"), 2, "--across needs --compare A B"),
        (("--compare", "opt", "opt", "--across", "dtypes"), 2, "did you mean 'dtype'"),
        (("--csv", "--json"), 2, "give one of --csv, --markdown and --json"),
        (("--compare", "opt"), 2, "--compare"),
    ],
)
def test_wrong_words(files, command, words, status, message):
    (files / "bad.json").write_text('{"a": 1}')
    command("results", "--import", "c.json")
    code, _, err = command("results", *words)
    assert code == status and message in err, err
