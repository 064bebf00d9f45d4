"""Every form of result files: what stands in a row, and what is said about files of no form."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from castalia.core.errors import DataError
from castalia.results import Result, ResultsStore, import_results
from castalia.results.dialects import hash_of, read_results
from castalia.results.task_hash import config_hash

ACC = {"acc": 0.5, "acc_stderr": 0.01}


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def former(arguments: object, shots: int | None = 0, **more) -> dict:
    """A file of the harness before 0.4 with one number."""
    config = {"model": "hf-causal", "model_args": arguments, "num_fewshot": shots, **more}
    return {"results": {"piqa": ACC}, "versions": {"piqa": 0}, "config": config}


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        (
            "zero-shot/1b-bf16-5shot_step512.json",
            "pretrained=EleutherAI/pythia-v1.1-1b-bf16,revision=step512",
            ("pythia-v1", "pythia-1b", "", 1234, 512, 143_000, 512 * 2_097_152),
        ),
        (
            "baseline/baseline-70m-deduped_step134000.json",
            "use_accelerate=True,pretrained=EleutherAI/pythia-v1.1-70m-deduped,revision=step134000",
            ("pythia-v1", "pythia-70m-deduped", "baseline", 1234, 134_000, 143_000, 281018368000),
        ),
        (
            "intervention/intervention-1.4b-deduped-long_step114000.json",
            "pretrained=EleutherAI/intervention-pythia-v1.1-1.4b-deduped-long,revision=step114000",
            ("pythia-v1", "pythia-1.4b-deduped", "intervention-long", 1234, 114_000, 143_000, None),
        ),
        (
            "70m-0.25MtokBS_step24000.json",
            "pretrained=EleutherAI/pythia-v1.1-70m-0.25MtokBS,revision=step24000",
            ("pythia-v1", "pythia-70m", "0.25MtokBS", 1234, 24_000, 1_144_000, 24_000 * 262_144),
        ),
        (
            "x.json",
            "pretrained=EleutherAI/pythia-160m-weight-seed2,revision=step64",
            ("polypythias", "pythia-160m", "weight-seed", 2, 64, 143_000, 64 * 2_097_152),
        ),
        (
            "x.json",
            "pretrained=EleutherAI/pythia-70m-v0",
            ("pythia-v0", "pythia-70m", "", 1234, 143_000, 143_000, 143_000 * 2_097_152),
        ),
        (
            "x.json",
            {"iteration": 71000, "load": "/ckpts/350M_dedup_genderintervention/", "seed": 1234}
            | {"train_iters": 71500, "precision": "fp16"},
            ("pythia-v0", "pythia-410m-deduped", "intervention", 1234, 71_000, 71_500, None),
        ),
        (
            "pythia-v0/pythia-12b/zero-shot/pythia-12b-0shot-global_step3000.json",
            {"iteration": 3000, "load": "/elsewhere/staged_model", "train_iters": 143000},
            ("pythia-v0", "pythia-12b", "", 1234, 3000, 143_000, 3000 * 2_097_152),
        ),
        (
            "x.json",
            {"iteration": 20, "load": "/data/suite/mine", "train_iters": 40, "seed": 7},
            ("suite", "mine", "", 7, 20, 40, None),
        ),
        ("x.json", "pretrained=facebook/opt-350m", ("opt", "opt-350m", "", *[None] * 4)),
        ("x.json", "pretrained=bigscience/bloom-1b7", ("bloom", "bloom-1b7", "", *[None] * 4)),
        (
            "x.json",
            "pretrained=some/model,revision=v2",
            ("some", "model", "v2", *[None] * 4),
        ),
        (
            "x.json",
            "pretrained=runs/tiny/exports/hf/step1000",
            ("runs", "tiny", "", None, 1000, None, None),
        ),
        ("mine/model_step5.json", None, ("mine", "model_step5", "", None, 5, None, None)),
    ],
)
def test_the_checkpoint_of_a_file(tmp_path, name, arguments, expected):
    (row,) = read_results(write(tmp_path / name, former(arguments)))
    got = (row.suite, row.model, row.variant, row.seed, row.step, row.last_step, row.tokens)
    if expected[-1] is None:
        assert got[:-1] == expected[:-1]
    else:
        assert got == expected
    # By the config, whatever the name says.
    assert (row.shots, row.task, row.value, row.stderr) == (0, "piqa", 0.5, 0.01)


def test_shots_dtype_and_batch_where_the_config_is_silent(tmp_path):
    content = former("pretrained=a/b,dtype=bfloat16", None, batch_size="8", limit=100)
    for name, shots in (
        ("b-5shot_step1.json", 5),
        ("five-shot/b.json", 5),
        ("zero-shot/b.json", 0),
        ("b.json", None),
    ):
        (row,) = read_results(write(tmp_path / name, content))
        assert (row.shots, row.dtype, row.batch, row.documents) == (shots, "bf16", 8, 100)
        assert (row.harness, row.engine, row.task_version) == ("lm-eval <0.4", "hf", "0")


CONFIG = {"task": "mine", "doc_to_text": "{{text}}", "num_fewshot": 5, "metadata": {"version": 2.0}}
PRESENT = {
    "results": {
        "mine": {
            "alias": " mine",
            "acc,none": 0.25,
            "acc_stderr,none": "N/A",
            "exact_match,flexible-extract": float("nan"),
            "exact_match_stderr,flexible-extract": 0.125,
            "perplexity,none": float("inf"),
        },
        "group": {"acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 70, "alias": "group"},
    },
    "configs": {"mine": {**CONFIG, "metadata": {"version": 2.0, "pretrained": "x", "dtype": "y"}}},
    "versions": {"mine": 2.0, "group": "N/A"},
    "n-shot": {"mine": 5, "group": 0},
    "higher_is_better": {"mine": {"acc": True, "perplexity": False}, "group": {"acc": None}},
    "n-samples": {"mine": {"original": 100, "effective": 60}},
    "config": {
        "model": "hf",
        "model_args": {"pretrained": "EleutherAI/pythia-14m-seed3", "revision": "step512"}
        | {"dtype": "y"},
        "model_dtype": "torch.float16",
        "model_num_parameters": 14_000_000,
        "model_sha": "0a1b2c",
        "batch_size": "auto",
        "batch_sizes": [64],
    },
    "lm_eval_version": "0.4.13",
    "date": 0.0,
}


def test_the_form_since_0_4(tmp_path):
    path = write(tmp_path / "results_2025-03-01T12-30-15.123456.json", PRESENT)
    acc, exact, perplexity, group = read_results(path)
    assert acc == Result(
        *("polypythias", "pythia-14m", "mine", "acc", 0.25),
        size="14m",
        parameters=14_067_712,
        seed=3,
        step=512,
        last_step=143_000,
        tokens=512 * 2_097_152,
        shots=5,
        documents=60,
        higher_is_better=True,
        harness="lm-eval 0.4.13",
        task_version="2.0",
        # What the harness adds to the metadata is not of the task, nor are the shots.
        task_hash=config_hash(CONFIG | {"num_fewshot": 0}),
        dtype="fp16",
        engine="hf",
        batch=64,
        evaluated_at=datetime(2025, 3, 1, 12, 30, 15),
        checkpoint="EleutherAI/pythia-14m-seed3@step512",
        checkpoint_hash="0a1b2c",
        source=str(path),
    )
    # Prompts of another form are another question.
    others = [{"chat_template": "a"}, {"chat_template": "b"}, {"system_instruction": "a"}]
    others += [{"chat_template": "a", "fewshot_as_multiturn": False}]
    others += [{"config": {"model": "hf", "fewshot_seed": 7}}]
    usual = {"chat_template": None, "config": {"model": "hf", "fewshot_seed": 1234}}
    hashes = [hash_of("mine", CONFIG, other) for other in others]
    assert len({acc.task_hash, *hashes}) == 6 and hash_of("mine", CONFIG, usual) == acc.task_hash
    assert exact.value != exact.value and exact.filter == "flexible-extract"
    assert exact.stderr == 0.125 and exact.higher_is_better is True
    assert perplexity.value == float("inf") and perplexity.higher_is_better is False
    assert (group.shots, group.documents, group.task_version, group.task_hash) == (
        0,
        70,
        None,
        None,
    )
    (first, *_) = read_results(write(tmp_path / "undated.json", PRESENT))
    assert first.evaluated_at == datetime(1970, 1, 1)


def test_json_that_castalia_wrote(tmp_path):
    content = PRESENT | {"task_hashes": {"mine": "0123456789abcdef", "group": "f" * 64}}
    content["config"] = {"model": "castalia:native", "model_args": {"dtype": "int8"}} | {
        "model_num_parameters": 77
    }
    acc, *_, group = read_results(write(tmp_path / "suite" / "run.json", content))
    assert (acc.engine, acc.dtype, acc.task_hash) == ("native", "int8", "0123456789abcdef")
    assert (acc.suite, acc.model, group.task_hash) == ("suite", "run", None)
    assert (acc.parameters, acc.checkpoint_hash) == (77, None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "a.json: invalid JSON"),
        ("a.json", "[" * 100_000, "a.json: invalid JSON"),
        ("a.json", "[1]", "a.json: expected a JSON object, got list"),
        ("a.json", {"a": 1}, r"a.json: no file of results: expected .*`results`.*got 'a'"),
        ("a.json", {}, "a.json: no file of results: .*got no keys"),
        ("a.json", {"results": {}}, "a.json: no numbers in it"),
        ("a.json", {"results": {"piqa": 0.5}}, "a.json: results of 'piqa': .*got float"),
        ("a.json", {"results": [1]}, "a.json: results: each item needs `task_name`"),
        ("a.json", {"table_results": {"x": []}}, "a.json: table_results of 'x'"),
        ("a.csv", "a,b\n1,2\n", "a.csv: expected the columns model,checkpoint,.*got a,b"),
        (
            "a.csv",
            "model,checkpoint,task,fewshot,acc,acc_stderr\nm,1,t,0,half,0\n",
            "a.csv: line 2: could not convert string to float: 'half'",
        ),
        ("a.csv", "model,checkpoint,task,fewshot,acc,acc_stderr\nm,1\n", "a.csv: line 2"),
        ("a.csv", "", "a.csv: expected the columns .*got none"),
    ],
)
def test_a_file_of_no_form_is_one_sentence_and_the_others_are_imported(
    tmp_path, name, content, message
):
    good = write(tmp_path / "good.json", former("pretrained=a/b"))
    bad = write(tmp_path / "bad" / name, content)
    with pytest.raises(DataError, match=message):
        read_results(bad)
    done = import_results([bad, tmp_path / "none", good], ResultsStore(tmp_path / "s"))
    assert (done.files, done.rows, done.total, len(done.problems)) == (1, 1, 1, 2)
    assert "none: no such file or folder" in done.problems[1]


def test_bytes_that_are_no_text(tmp_path):
    for name in ("a.json", "a.csv", "a.parquet"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00" * 50)
    done = import_results([tmp_path / n for n in ("a.json", "a.csv", "a.parquet")], store(tmp_path))
    assert [done.files, *(text.split(":")[0].split()[0] for text in done.problems)] == [
        0,
        *(str(tmp_path / name) for name in ("a.json", "a.csv", "a.parquet")),
    ]


def store(folder: Path) -> ResultsStore:
    return ResultsStore(folder / "store")


def test_a_folder_with_a_store_and_one_without_results(tmp_path):
    (tmp_path / "empty").mkdir()
    first = ResultsStore(tmp_path / "runs" / "a" / "evals")
    first.add([Result("runs", "a", "t", "acc", 0.5)])
    done = import_results([tmp_path / "empty", tmp_path / "runs"], store(tmp_path))
    assert (done.files, done.total, done.suites) == (1, 1, {"runs": (1, 1)})
    assert "empty: no .json, .csv or results.parquet in this folder" in done.problems[0]
    assert store(tmp_path).table().equals(first.table())
