"""The server of `castalia view`: what it reads, what it answers, and whom it refuses."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.fixtures.live_page import ROWS, Serve, Served, append, stop

from castalia.analysis.live import growing
from castalia.analysis.live.growing import GrowingMetrics
from castalia.analysis.live.jobs import BusyError, Jobs
from castalia.analysis.live.watched import Watched
from castalia.analysis.live.web import RefusalError, require_host
from castalia.cli import view
from castalia.cli.serve import listening
from castalia.core.errors import ConfigError, DataError
from castalia.inference import LanguageModel
from castalia.memorization.recall import memorization_score, memorized


@pytest.fixture(scope="module")
def served(suite: Path, serve: Serve) -> Served:
    """A server over the suite."""
    return serve(suite)


def wait_for(served: Served, states: tuple[str, ...]) -> dict[str, Any]:
    """The job once it is in one of the states."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        _, job, _ = served.ask("/job")
        if job["state"] in states:
            return dict(job)
        time.sleep(0.01)
    raise AssertionError(job)


def test_only_what_grew_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    append(tmp_path, range(1, 4), end="\n")
    metrics = GrowingMetrics(tmp_path / "metrics.jsonl")
    parsed: list[str] = []
    whole = growing.json.loads
    monkeypatch.setattr(growing.json, "loads", lambda text: parsed.append(text) or whole(text))

    def steps() -> list[int]:
        metrics.update()
        return [record["step"] for record in metrics.records]

    assert steps() == [1, 2, 3] and len(parsed) == 3
    append(tmp_path, range(4, 5), end="")  # its line break is not written yet
    assert steps() == [1, 2, 3] and len(parsed) == 3
    with open(metrics.path, "a") as file:
        file.write("\n")
    assert steps() == [1, 2, 3, 4] and len(parsed) == 4
    append(tmp_path, range(3, 4))  # a step again, without a new file
    assert steps() == [1, 2, 3, 4]  # rare: the whole file is read once more
    assert metrics.columns.curve(("tokens",))[0].tolist() == [1, 2, 3, 4]
    parsed.clear()
    # A resume writes the file anew, here longer than it was.
    metrics.path.unlink()
    append(tmp_path, range(1, 9))
    assert steps() == list(range(1, 9)) and len(parsed) == 8
    # The same file, cut and written over.
    metrics.path.write_text('{"step": 7}\n' * 400)
    assert steps() == [7]
    with open(metrics.path, "a") as file:
        file.write("{broken\n")
    for _ in range(2):
        with pytest.raises(DataError, match=r"metrics.jsonl line 401 is not JSON"):
            metrics.update()
    metrics.path.unlink()
    assert steps() == []


def test_the_page_follows_its_files(serve: Serve, tmp_path: Path):
    (tmp_path / "x").mkdir()
    append(tmp_path / "x", range(1, 4))
    served = serve(tmp_path)
    page = served.server.view.page

    def data() -> dict[str, Any]:
        page.due = page.watched.searched = 0.0  # as if seconds had gone by
        status, answer, _ = served.ask("/data")
        assert status == 200
        return dict(answer)

    first = data()
    assert [run["name"] for run in first["runs"]] == ["x"]
    asked = time.monotonic()
    assert served.ask("/version")[1]["version"] == first["live"]["version"]
    assert page.due > asked  # the next look is not at once
    append(tmp_path / "x", range(4, 6))
    (tmp_path / "a").mkdir()
    append(tmp_path / "a", range(1, 3))
    second = data()
    assert second["live"]["version"] != first["live"]["version"]
    # A new run is last: the colour of a run is its place.
    assert [run["name"] for run in second["runs"]] == ["x", "a"]
    assert sum(second["panels"][0]["series"][0]["points"]["steps"]) == 5
    assert [run["name"] for run in data()["runs"]] == ["x", "a"]
    # A damaged run says so; the others go on, and it comes back.
    (tmp_path / "a" / "summary.json").write_text("{<b>")
    third = data()
    assert [run["name"] for run in third["runs"]] == ["x"]
    (wrong,) = [run["error"] for run in third["live"]["runs"] if run["error"]]
    assert "summary.json is not JSON" in wrong
    # So does one whose files are read and then cannot be drawn.
    (tmp_path / "a" / "summary.json").unlink()
    for name, text in (
        ("env.json", "[1]"),
        ("env.json", "{half"),
        ("summary.json", '{"tables":1}'),
    ):
        (tmp_path / "a" / name).write_text(text)
        third = data()
        assert [run["name"] for run in third["runs"]] == ["x"]
        assert [bool(run["error"]) for run in third["live"]["runs"]] == [False, True]
        (tmp_path / "a" / name).unlink()
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "results.parquet").write_bytes(b"PAR1")
    fourth = data()
    assert len(fourth["runs"]) == 2 and "cannot be read as Parquet" in fourth["live"]["problems"][0]
    assert "scores" not in fourth
    (tmp_path / "a" / "metrics.jsonl").unlink()
    assert [run["name"] for run in data()["runs"]] == ["x"]


def test_batches_are_those_of_data_view(served: Served):
    _, page, _ = served.ask("/batch?run=a&step=3&count=2")
    assert page["steps"] == 30 and page["batch_size"] == page["matching"] == ROWS
    assert [row["row"] for row in page["rows"]] == [0, 1]
    assert page["rows"][0]["source"] == "known" and "guest" in "".join(
        row["text"] for row in served.ask("/batch?run=a&step=3")[1]["rows"]
    )
    assert {"document", "start", "length", "text"} <= set(page["rows"][0]["documents"][0])
    _, found, _ = served.ask("/batch?run=a&step=3&search=SECOND%20guest")
    assert 0 < found["matching"] == len(found["rows"]) < ROWS
    assert served.ask("/batch?run=a&step=3&search=xyzzy")[1]["rows"] == []
    status, answer, _ = served.ask("/batch?run=a&step=30")
    assert (status, answer["error"]) == (422, "step 30: the run has the steps 0 to 29")
    status, answer, _ = served.ask("/batch?run=b&step=0")
    assert status == 422 and "b" in answer["error"]
    _, samples, _ = served.ask("/samples?run=a")
    assert [each["step"] for each in samples["samples"]] == [0, 10, 20]


def test_rows_that_a_checkpoint_knows_by_heart(served: Served, speaker: LanguageModel):
    ask = {"run": "a", "checkpoint": 220, "step": 1, "rows": 3, "prompt": 24, "continuation": 24}
    assert served.ask("/memorized", ask)[0] == 202
    job = wait_for(served, ("done", "failed"))
    assert job["error"] == "" and job["total"] == job["done"] == 3
    rows = [served.server.view.batches.of(served.folder / "a").ids(ROWS + i) for i in range(3)]
    scores = memorized(speaker, rows, prompt=24, continuation=24, batch=2)
    assert [row["score"] for row in job["results"]] == pytest.approx(scores.tolist())
    assert max(scores) == 1.0
    whole = next(row for row in job["results"] if row["score"] == 1.0)
    assert len(whole["parts"]) == 1 and whole["parts"][0]["same"]
    assert len(whole["prompt"]) + len(whole["parts"][0]["true"]) <= 48
    assert served.ask("/job?first=2")[1]["results"] == job["results"][2:]
    # The start weights know nothing.
    assert served.ask("/memorized", {**ask, "checkpoint": 0})[0] == 202
    job = wait_for(served, ("done", "failed"))
    assert max(row["score"] for row in job["results"]) < 0.5
    assert any("made" in part for part in job["results"][0]["parts"])
    for wrong, says in (
        ({"prompt": "32"}, "prompt: expected int, got '32'"),
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"rows": True}, "rows: expected int, got True"),
    ):
        status, answer, _ = served.ask("/memorized", ask | wrong)
        assert (status, answer["error"]) == (422, says)
    for wrong, says in (({"prompt": 60}, "choose shorter lengths"), ({"checkpoint": 7}, "step7")):
        assert served.ask("/memorized", ask | wrong)[0] == 202
        assert says in wait_for(served, ("failed",))["error"]


def test_the_score_is_a_share_of_equal_tokens(speaker: LanguageModel):
    made = np.array([[1, 2, 3, 4], [1, 2, 9, 9], [9, 9, 9, 4]])
    assert memorization_score(made, [[1, 2, 3, 4]] * 3).tolist() == [1.0, 0.5, 0.25]
    with pytest.raises(ValueError, match="shape"):
        memorization_score(made, made[:, :2])
    for settings, says in (
        ({"prompt": 0}, "prompt must be at least 1"),
        ({"continuation": 9}, "but a row has 40"),
    ):
        with pytest.raises(ConfigError, match=says):
            memorized(speaker, [[1] * 40], **settings)
    with pytest.raises(ConfigError, match="but the model reads 256"):
        memorized(speaker, [[1] * 400], prompt=250)


def test_one_job_at_a_time_and_it_can_be_cancelled():
    jobs = Jobs()
    gate = [True]

    def endless():
        while gate:
            time.sleep(0.002)
            yield {"row": 1}

    job = jobs.start({}, lambda: (9, endless()))
    with pytest.raises(BusyError, match="another job runs"):
        jobs.start({}, lambda: (0, iter(())))
    jobs.cancel()
    job.thread.join(120)
    assert jobs.report()["state"] == "cancelled"

    def fails():
        raise DataError("no such row")

    jobs.start({}, fails).thread.join(120)
    assert jobs.report()["state"] == "failed" and jobs.report()["error"] == "no such row"


def test_the_page_allows_itself_alone(served: Served):
    status, text, headers = served.ask("/")
    policy = headers["Content-Security-Policy"]
    nonce = policy.partition("script-src 'nonce-")[2].partition("'")[0]
    assert status == 200 and f'<script nonce="{nonce}">' in text and len(nonce) > 20
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "unsafe-eval" not in policy and "http" not in policy
    assert nonce not in served.ask("/")[2]["Content-Security-Policy"]
    for path in ("/", "/version", "/nothing"):
        headers = served.ask(path)[2]
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
    _, _, headers = served.ask("/data", Accept_Encoding="identity")
    assert "Content-Encoding" not in headers


@pytest.mark.parametrize(
    ("request_line", "status", "says"),
    [
        (("/version", None, "", {"Host": "evil.example:8765"}), 403, "does not name this server"),
        (("/version", None, "", {"Host": ""}), 403, "does not name"),
        (("/version", None, "", {"Host": "192.168.0.7"}), 403, "does not name"),
        (("/version", None, "", {"Host": "localhost:99"}), 200, ""),  # a tunnel's port
        (("/version", None, "", {"Sec_Fetch_Site": "cross-site"}), 403, "another site"),
        (("/memorized", {}, "", {"Origin": "http://evil.example"}), 403, "Origin"),
        (("/cancel", {}, "", {"Origin": "http://[evil"}), 403, "Origin"),
        (("/cancel", {}, "", {"Origin": "null"}), 403, "Origin"),
        (("/cancel", None, "POST", {"Content_Length": "²"}), 413, "at most"),
        (("/cancel", {}, "", {"Content_Type": "text/plain"}), 415, "application/json"),
        (("/memorized", None, "", {}), 405, "takes POST only"),
        (("/data", {}, "", {}), 405, "takes GET only"),
        (("/data", None, "DELETE", {}), 501, ""),
        (("/memorized", {"run": "x" * 99999}, "", {}), 413, "at most"),
        (("/batch?run=a&step=-1", None, "", {}), 400, "step: expected a number"),
        (("/batch?run=..%2F..%2Fetc&step=1", None, "", {}), 404, "no run"),
        (("/../a/config.yaml", None, "", {}), 404, "no page"),
        (("/a/config.yaml", None, "", {}), 404, "no page"),
        (("/batch?run=%2Fetc&step=1", None, "", {}), 404, "no run"),
    ],
)
def test_who_and_what_is_refused(served: Served, request_line: Any, status: int, says: str):
    path, body, method, headers = request_line
    code, answer, _ = served.ask(path, body, method, **headers)
    assert code == status
    assert says in (answer["error"] if says else "")


def test_hosts_of_a_server_that_others_reach():
    for header in ("192.168.0.7:8765", "[fe80::1]:8765", "localhost", socket.gethostname()):
        require_host(header, "0.0.0.0")
    for header in ("evil.example", None, "[fe80", "127.0.0.1.evil.example"):
        with pytest.raises(RefusalError):
            require_host(header, "0.0.0.0")


def test_places_that_cannot_be_viewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "code.py").write_text("")
    (tmp_path / "runs").mkdir()
    Watched([tmp_path / "empty"])  # runs may appear
    for path, says in (
        ("src", "expected a run, a folder of runs, or a results store"),
        ("src/code.py", "nothing to view in"),
        ("rnus", "does not exist; did you mean"),
    ):
        with pytest.raises(ConfigError, match=says):
            Watched([tmp_path / path])
    monkeypatch.chdir(tmp_path)
    assert view.usual_place() == "runs"
    (tmp_path / "metrics.jsonl").write_text("")
    assert view.usual_place() == "."
    monkeypatch.chdir(tmp_path / "src")
    with pytest.raises(ConfigError, match="name what to view: castalia view PATH"):
        view.usual_place()


def test_a_port_in_use(served: Served):
    with pytest.raises(ConfigError, match=rf"port {served.port}: .* in use; .*--port 0"):
        listening("127.0.0.1", served.port)


def test_a_folder_without_a_step(serve: Serve, tmp_path: Path):
    served = serve(tmp_path)
    _, text, _ = served.ask("/")
    assert "No run has made a step yet" in text
    stop(served)
    with pytest.raises(OSError):
        served.ask("/version")
    os.rmdir(tmp_path)
    assert json.dumps(served.server.view.page.data()["runs"]) == "[]"
