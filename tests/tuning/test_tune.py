"""`castalia tune`: what is compared, what is skipped, who wins, and an attempt that is ended."""

import json

import pytest
import torch
from typer.testing import CliRunner

from castalia.cli.app import app
from castalia.core.errors import ConfigError
from castalia.recipes import load_config
from castalia.tuning import search as tuning
from castalia.tuning.attempt import is_memory, measured, peak_bytes
from castalia.tuning.choices import Choice, share_of, sizes
from castalia.tuning.report import bytes_of
from castalia.tuning.search import Search, answer_of, tune

TINY = (
    *("model.num_layers=1", "model.hidden_size=32", "model.num_attention_heads=2"),
    *("data.corpus=null", "data.seq_length=32", "train.batch_size=8", "device=cpu"),
)
PLAIN = Choice(4, False, False, "fp32")


@pytest.fixture
def config(tmp_path):
    """A tiny run without data."""
    return load_config(["debug", *TINY, f"output={tmp_path}/run"])


@pytest.fixture
def rates(monkeypatch):
    """Choice -> tokens a second of attempts that are not made; unknown ones have 100."""
    known = {}

    def process(self, choice):
        answer = known.get(choice, 100.0)
        if isinstance(answer, str):
            return {"status": answer, "note": "as the test says"}
        return {"rates": [answer - 1, answer, answer + 3], "rate": answer, "peak": choice.micro}

    monkeypatch.setattr(Search, "process", process)
    return known


def test_sizes_are_divisors_of_what_a_rank_has():
    config = load_config(["debug", "train.batch_size=96"])
    assert sizes(config) == [1, 2, 6, 16, 32, 96]
    # The config's own size is among them.
    own = load_config(["debug", "train.batch_size=96", "train.micro_batch_size=8"])
    assert sizes(own) == [1, 2, 6, 8, 16, 32, 96]
    few = load_config(["debug", "train.batch_size=8", "parallel.dp_shard=2"])
    assert share_of(few) == 4 and sizes(few) == [1, 2, 4]
    ramp = load_config(["debug", "train.batch_size=12", "train.batch_ramp=[4, 4, 100]"])
    assert sizes(ramp) == [1, 2, 4]
    with pytest.raises(ConfigError, match=r"parallel.tp=2 split it; `castalia show --gpu`"):
        share_of(load_config(["debug", "parallel.tp=2"]))


def test_the_fastest_that_fits(config, rates):
    rates |= {
        PLAIN: 300.0,
        Choice(8, False, False, "fp32"): "out of memory",
        Choice(8, "selective", False, "fp32"): 250.0,
        Choice(4, False, True, "fp32"): 400.0,
        # Not faster, but as fast with the same memory: the first stays.
        Choice(4, "selective", True, "fp32"): 396.0,
    }
    tuned = tune(config, seconds=60)
    assert tuned.best.choice == Choice(4, False, True, "fp32")
    assert tuned.best.spread == pytest.approx(2 / 400) and tuned.rows == "random tokens"
    tried = [each.choice for each in tuned.results]
    # The config's own size is all 8 rows; then what keeps less of them, then the largest first.
    whole = Choice(8, False, False, "fp32")
    assert tried[:3] == [whole, whole._replace(recompute="selective"), PLAIN]
    assert len(tried) == len(set(tried))


def test_an_open_precision_is_compared(config, rates):
    config = config.model_copy(update={"precision": "auto"})
    rates |= {Choice(8, False, False, "fp32"): 150.0, Choice(8, False, False, "bf16"): 500.0}
    tuned = tune(config, seconds=60)
    assert tuned.best.choice == Choice(8, False, False, "bf16")
    assert "precision=bf16" in tuned.best.choice.words(config)


def test_what_cannot_fit_is_not_tried(config):
    tuned = tune(config, seconds=60, memory=2**20)
    assert {each.status for each in tuned.results} == {"too large"} and tuned.best is None
    assert all(each.note.startswith("estimated 1") for each in tuned.results)


def test_an_attempt_is_the_real_loop(config, tmp_path):
    """In a process of its own; the others have no time left. No run folder is made."""
    tuned = tune(config, seconds=1)
    first, *others = tuned.results
    assert first.status == "measured", first.note
    assert len(first.rates) >= 2 and first.rate > 100
    assert first.peak > 2**26
    assert {each.status for each in others} == {"not tried"} and others
    assert not (tmp_path / "run").exists()


def test_an_attempt_computes_the_whole_step(config, tmp_path):
    ready, _ = tuning.with_rows(config, str(tmp_path))
    train = ready.train.model_copy(update={"batch_size": 4, "micro_batch_size": 2})
    request = {
        "config": ready.model_copy(update={"train": train}).model_dump(mode="json"),
        "seconds": 0.0,
        "memory": None,
        "passes": 4,
        "tokens": 1000,
    }
    one = measured(request)["rate"]
    # Ten times as many passes take longer, whatever else the machine does.
    assert measured(request | {"passes": 400})["rate"] < one / 5
    assert peak_bytes(torch.device("cpu")) > 2**26


def test_attempts_that_end_early():
    answer = answer_of("{}", 10 * 2**20, 60)
    assert answer["status"] == "out of memory" and answer["note"].endswith("of 10 MiB")
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**48)
    assert is_memory(refused.value) and is_memory(MemoryError())
    assert not is_memory(RuntimeError("shapes differ"))
    killed = tuning.read_answer("", -9, tuning.MemoryGuard(None, None), None)
    assert killed == {"status": "out of memory", "note": "the system ended it"}
    failed = tuning.read_answer('{"error": ["no"]}', 0, tuning.MemoryGuard(None, None), None)
    assert failed == {"status": "failed", "note": "no"}
    broken = tuning.read_answer("", 3, tuning.MemoryGuard(None, None), None)
    assert broken == {"status": "failed", "note": "exit status 3"}


def test_the_command(rates, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rates[PLAIN] = 300.0
    words = ["tune", "debug", *TINY, "--memory", "2GiB"]
    done = CliRunner().invoke(app, [*words, "--output", "fast.yaml"])
    assert done.exit_code == 0, done.output
    last = "train.micro_batch_size=4 train.recompute=false train.compile=false"
    assert last in done.output and "fastest that fits" in done.output
    # The file stands behind the config of the run.
    tuned = load_config(["debug", "fast.yaml", *TINY])
    assert tuned.train.micro_batch_size == 4
    done = CliRunner().invoke(app, [*words, "--json"])
    found = json.loads(done.stdout)
    assert found["best"]["train.micro_batch_size"] == 4 and found["limit"] == 2**31
    assert {path.name for path in tmp_path.iterdir()} == {"fast.yaml"}


def test_sizes_of_memory():
    assert [bytes_of(text) for text in ("8GiB", "8g", "1.5 MiB", "100", "2kb")] == [
        *(2**33, 2**33, 3 * 2**19, 100, 2048),
    ]
    for text in ("much", "0", "8 XB", "-1"):
        with pytest.raises(ConfigError, match="expected a size such as 8GiB"):
            bytes_of(text)
