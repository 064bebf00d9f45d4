"""The page of `castalia view` in a real browser, while runs grow under it."""

import functools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from tests.fixtures.browser import PHONE, Visit, drawn, overflow
from tests.fixtures.live_page import ROWS, Serve, Served, append, stop

LAST = "document.querySelector('.panel .plot').data[0].x.at(-1)"
"""The last step of the first curve in the first panel."""


@pytest.fixture(scope="module")
def served(suite: Path, serve: Serve) -> Served:
    """A server over the suite, which looks for new runs at once."""
    return serve(suite)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at the files at every question, so that tests need not wait for it."""
    monkeypatch.setattr("castalia.analysis.live.watched.SEARCH_SECONDS", 0.0)
    monkeypatch.setattr("castalia.analysis.live.page.LEAST_SECONDS", 0.0)
    monkeypatch.setattr("castalia.analysis.live.page.PAUSE", 0.0)


HURRY = "{ const own = setTimeout; window.setTimeout = (f, ms) => own(f, Math.min(ms, 100)); }"


@pytest.fixture
def visit(visit: Visit) -> Visit:
    """Pages that ask the server ten times a second, in place of every few seconds."""
    return functools.partial(visit, script=HURRY)


def until(page: Any, condition: str) -> None:
    """Wait until a condition in JavaScript holds. playwright's own waiting needs eval, which the
    policy of the page forbids."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if page.evaluate(condition):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"not within 120 s: {condition}")


def says(page: Any, reader: str, text: str) -> None:
    """Wait until the line of a reader has the text."""
    line = f"document.querySelector('#{reader} [role=status]').textContent"
    until(page, f"{line}.includes({json.dumps(text, ensure_ascii=False)})")


def names(page: Any, selector: str) -> list[str]:
    """The texts of elements."""
    return [text.strip() for text in page.locator(selector).all_text_contents()]


def test_curves_grow_and_what_the_reader_chose_stays(
    suite: Path, served: Served, visit: Visit, serve: Serve
):
    page = visit(served.url)
    drawn(page)
    assert page.locator("#live").inner_text().startswith("live")
    assert names(page, ".state .name") == ["a", "b"]
    assert page.locator(".panel").first.locator(".js-line").count() == 4
    page.get_by_role("checkbox", name="b", exact=True).uncheck()
    assert page.locator(".panel").first.locator(".js-line").count() == 2 and "hide=b" in page.url
    # A zoom by dragging, an open part, and a place on the page.
    box = page.locator(".panel .nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 22, steps=4)
    page.mouse.up()
    page.wait_for_selector("button.reset:not([hidden])")
    zoom = "document.querySelector('.panel .plot').layout.xaxis.range.join()"
    before = page.evaluate(zoom)
    page.locator("#parts details summary").first.click()
    page.evaluate("window.scrollTo(0, 300)")
    # What is read stays in its place, also when the list of runs above it grows.
    place = "Math.round(document.querySelector('.panel').getBoundingClientRect().top)"
    height = page.evaluate(place)
    # The run goes on, with its last line half written; a new run appears.
    append(suite / "a", range(21, 25), end="")
    (suite / "c").mkdir(exist_ok=True)
    append(suite / "c", range(1, 4))
    until(page, "document.querySelectorAll('.state').length === 3")
    until(page, f"{LAST} === 23")
    assert names(page, ".tick") == ["a", "b", "c"]
    assert page.locator(".panel").first.locator(".js-line").count() == 4  # a and c
    assert page.evaluate(zoom) == before and page.evaluate(place) == height
    assert page.locator("#parts details").first.get_attribute("open") is not None
    assert not page.get_by_role("checkbox", name="b", exact=True).is_checked()
    # The server goes, and comes back on its port.
    port = served.port
    stop(served)
    page.wait_for_selector(".dot[data-kind=gone]")
    assert "not connected" in page.locator("#live").inner_text()
    append(suite / "a", range(0))  # the end of the half line
    append(suite / "a", range(25, 26))
    serve(suite, port)
    page.wait_for_selector(".dot[data-kind=live]")
    until(page, f"{LAST} === 25")
    assert all("ERR_CONNECTION" in each for each in page.complaints)
    page.complaints.clear()
    shutil.rmtree(suite / "c")
    # The address keeps the choice.
    again = visit(page.url, PHONE, dark=True)
    drawn(again)
    assert not again.get_by_role("checkbox", name="b", exact=True).is_checked()


def test_batches_are_read_with_keys_alone(suite: Path, serve: Serve, visit: Visit):
    page = visit(serve(suite).url)
    drawn(page)
    page.get_by_role("tab", name="Report").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tab", name="Batches").get_attribute("aria-selected") == "true"
    rows = page.locator("#batches .row")
    rows.first.wait_for()
    assert rows.count() == ROWS and "known" in rows.first.inner_text()
    page.keyboard.press("Tab")  # the run
    page.keyboard.press("Tab")
    page.keyboard.type("7")
    page.keyboard.press("Enter")
    until(
        page, "document.querySelector('#batches [role=status]').textContent.startsWith('Step 7 ')"
    )
    page.get_by_role("button", name="next step").press("Enter")
    until(
        page, "document.querySelector('#batches [role=status]').textContent.startsWith('Step 8 ')"
    )
    page.get_by_label("search in the batch").fill("o")
    page.keyboard.press("Enter")
    page.wait_for_selector("#batches mark")
    assert {text.lower() for text in names(page, "#batches mark")} == {"o"}
    assert "find=o" in page.url
    page.get_by_label("step", exact=True).fill("99")
    page.get_by_label("search in the batch").fill("")
    page.evaluate("document.querySelector('#batches form').noValidate = true")
    page.get_by_role("button", name="read").click()
    page.get_by_text("step 99: the run has the steps 0 to 29").wait_for()
    assert page.complaints and all("422" in each for each in page.complaints)
    page.complaints.clear()  # the browser's own notes
    phone = visit(page.url.replace("step=99", "step=2"), PHONE)
    phone.locator("#batches .row").first.wait_for()
    assert overflow(phone) <= 0


def test_samples_side_by_side_and_memorized_rows(suite: Path, serve: Serve, visit: Visit):
    page = visit(serve(suite).url + "#tab=samples", dark=True)
    page.locator("#samples .pair").first.wait_for()
    # Names and texts of files are no markup.
    assert names(page, "#samples .pair pre") == [
        "The <b>café</b> zzz",
        "The <b>café</b> owner said:",
    ]
    page.get_by_label("left checkpoint").select_option("10")
    assert names(page, "#samples .pair pre")[0] == "The <b>café</b> owner"
    samples = json.loads((suite / "a/samples/samples.json").read_text())
    samples.append({"step": 30, "prompt": "The <b>café</b>", "text": " was new"})
    (suite / "a/samples/samples.json").write_text(json.dumps(samples))
    until(page, "document.querySelectorAll('#samples select')[3].options.length === 4")
    page.get_by_role("tab", name="Memorized").click()
    assert page.get_by_label("checkpoint").last.input_value() == "220"
    for label, value in (("prompt tokens", "24"), ("continuation tokens", "24")):
        page.get_by_label(label).fill(value)
    page.get_by_role("button", name="start").click()
    until(page, f"document.querySelectorAll('#memorized .row').length === {ROWS}")
    status = page.locator("#memorized [role=status]")
    until(page, "/memorized/.test(document.querySelector('#memorized [role=status]').textContent)")
    assert "a, checkpoint 220, rows of step 0 · 4 rows" in status.inner_text()
    page.wait_for_selector("#memorized button:has-text('start'):not([hidden])")
    whole = page.locator("#memorized .row[data-whole=yes]")
    assert whole.count() >= 1 and whole.first.locator("ins").count() == 1
    assert whole.first.locator("del").count() == 0
    page.get_by_label("memorized rows only").check()
    assert page.locator("#memorized .row:visible").count() == whole.count()
    # The start weights differ, and a reader who comes later finds the job.
    page.get_by_label("memorized rows only").uncheck()
    page.get_by_label("checkpoint").last.select_option("0")
    page.get_by_role("button", name="start").click()
    page.locator("#memorized del").first.wait_for()
    phone = visit(page.url, PHONE, dark=True)
    phone.locator("#memorized del").first.wait_for()
    assert overflow(phone) <= 0
