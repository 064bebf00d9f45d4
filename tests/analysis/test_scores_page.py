"""The part of a page about evaluations, in a browser: draw, search, filter, compare, keyboard."""

from pathlib import Path
from typing import Any

import pytest
from tests.fixtures.browser import PHONE, Visit
from tests.fixtures.suite_results import ODD, write_suite

from castalia.analysis import write_report
from castalia.results import Result, ResultsStore


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a suite."""
    folder = write_suite(tmp_path_factory.mktemp("page") / "toy")
    return write_report(folder).as_uri()


def settled(page: Any, part: str = "curves") -> None:
    """Wait until a part has been drawn for what is chosen now."""
    page.wait_for_selector("html[data-ready=yes]", state="attached")
    page.wait_for_function(
        "(part) => { const { turn, [part]: drawn } = document.getElementById('scores').dataset;"
        " return turn && drawn === turn; }",
        arg=part,
    )


def show(page: Any, part: str) -> Any:
    """Scroll to a part and wait for it; returns it."""
    place = page.locator(f"#scores [data-part={part}]")
    place.scroll_into_view_if_needed()
    settled(page, part)
    return place


def names(page: Any) -> list[str]:
    """Tasks of the panels of score against training."""
    titles: list[str] = page.locator("#scores > .panels h3").all_inner_texts()
    return [title.split()[0] for title in titles]


def curves(panel: Any) -> int:
    """Curves of a panel, without bands and published finals."""
    count: int = panel.locator(".js-line[style*='stroke-width: 2px']").count()
    return count


def choose(page: Any, name: str, part: str = "curves") -> None:
    """Click a choice and wait for what it redraws."""
    page.get_by_role("radio", name=name, exact=True).check(force=True)
    settled(page, part)


def test_tasks_models_and_axes_are_chosen_by_mouse_and_key(address: str, visit: Visit):
    page = visit(address)
    settled(page)
    panel = page.locator("#scores > .panels .panel").first
    assert names(page) == ["lambada_openai"]
    # The median of each size, and its quartiles.
    assert curves(panel) == 3 and panel.locator(".js-fill").count() == 3
    assert panel.locator(".annotation-text").all_text_contents() == ["1m", "4m", "16m"]
    page.get_by_role("button", name="4m", exact=True).click()
    settled(page)
    assert curves(panel) == 2 and "small=4m" in page.url
    choose(page, "each")
    assert curves(panel) == 6
    page.get_by_role("radio", name="step", exact=True).focus()
    page.keyboard.press("ArrowRight")
    settled(page)
    assert page.get_by_role("radio", name="% of training").is_checked()
    # The controls are new ones, and the same one has the focus.
    assert page.evaluate("document.activeElement.value") == "percent"
    assert "axis=percent" in page.url and panel.locator(".xtick").last.text_content() == "100%"
    page.get_by_role("checkbox", name="published as lines").check()
    settled(page)
    assert curves(panel) == 6 and panel.locator(".js-line").count() == 6 + 6 + 3
    search_for_tasks(page)
    # `visit` asserts at the end that a phone need not scroll sideways.
    page.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
    page.emulate_media(color_scheme="dark")
    settled(page)
    assert curves(page.locator("#scores > .panels")) == 24


def search_for_tasks(page: Any) -> None:
    """Add tasks by name and by group, and remove one."""
    search = page.get_by_role("combobox", name="search for a task")
    search.fill("mmlu la")
    assert page.locator("#scores-list li").all_inner_texts() == ["mmlu_law"]
    search.press("ArrowDown")
    search.press("Enter")
    settled(page)
    assert names(page) == ["lambada_openai", "mmlu_law"] and "mmlu_law" in page.url
    search.fill("mmlu")
    page.get_by_role("option", name="all 3 tasks").click()
    settled(page)
    assert len(names(page)) == 4
    page.get_by_role("button", name="remove the task lambada_openai").click()
    settled(page)
    assert names(page)[0] == "mmlu_law" and len(names(page)) == 3
    search.fill("odd")
    search.press("Enter")
    settled(page)
    assert names(page)[-1] == ODD and page.locator("#scores i:not(.swatch)").count() == 0
    # Who gets the address sees the same.
    page.reload()
    settled(page)
    assert names(page)[-1] == ODD and len(names(page)) == 4


def test_sizes_tables_and_pairs_follow_what_is_chosen(address: str, visit: Visit):
    page = visit(address + "#seeds=each&axis=tokens")
    scales = show(page, "scales")
    assert page.get_by_role("radio", name="tokens").is_checked()  # as the address says
    fits = scales.locator(".fit span").all_inner_texts()
    assert [fit.split(":")[0] for fit in fits] == ["toy", "opt"]
    assert "9 models" in fits[0] and "residual s.d." in fits[0] and "3 models" in fits[1]
    assert scales.locator(".point").count() == 12
    scales.get_by_role("radio", name="training FLOPs").check(force=True)
    settled(page, "scales")
    # Nothing says on how many tokens the published models were trained.
    assert scales.locator(".point").count() == 9
    sort_the_table(page)
    compare_two(page)
    scales.get_by_role("slider").focus()
    page.keyboard.press("Home")
    settled(page, "scales")
    assert "at=0" in page.url and "has a size and a score" in scales.inner_text()
    # New results of a page that is served live: what the reader chose stays.
    fresh = """async () => {
      const data = await window.castalia.data();
      data.scores.version = "new";
      data.scores.tasks = data.scores.tasks.filter(({ name }) => name !== 'arc_easy');
      window.castalia.scores.part.refresh(data);
    }"""
    page.evaluate(fresh)
    settled(page)
    assert scales.get_by_role("radio", name="training FLOPs").is_checked()
    page.get_by_role("combobox", name="search for a task").fill("arc")
    assert page.locator("#scores-list").inner_text() == "no such task"


def test_a_start_alone_long_names_and_seeds_that_differ(tmp_path: Path, visit: Visit):
    name = "first-" + "n" * 190 + "-1m"
    rows = [
        Result("s", f"toy-{size}", task, "acc", 0.3, size=size, seed=seed, step=0, stderr=0.0)
        for size, seeds in (("1m", (1, 2)), ("2m", (1, 2)))
        for task in ("one", "two")
        for seed in (seeds[:1] if task == "two" else seeds)
    ]
    ResultsStore(tmp_path).add([*rows, Result("s", name, "one", "acc", 0.5, step=0)])
    page = visit(write_report(tmp_path).as_uri(), PHONE)
    settled(page)
    # Step 0 has a place on the logarithmic axis, and the hover box says which step it is.
    line = "document.querySelector('#scores .plot').data.filter((trace) => trace.hovertemplate)"
    assert (
        page.evaluate(f"{line}.map(({{ x, customdata }}) => [x[0], customdata[0][0]])")
        == [
            [0.5, "0"],
        ]
        * 3
    )
    assert page.evaluate(f"{line}[0].hovertemplate").count("step %{customdata[0]}") == 1
    edges = """[...document.querySelectorAll('#scores .annotation-text')].map((text) =>
      text.getBoundingClientRect().right - text.closest('svg').getBoundingClientRect().right)"""
    assert len(page.evaluate(edges)) == 3 and max(page.evaluate(edges)) <= 0
    values = show(page, "values")
    # One row a model, also where a task has fewer seeds.
    assert [row.split()[0] for row in values.locator("tbody tr").all_inner_texts()] == [
        "toy-1m",
        "toy-2m",
        name,
    ]
    first = values.locator("tbody th").last.bounding_box()
    assert first and first["width"] < PHONE[0] / 1.5
    pairs = show(page, "pairs")
    assert pairs.locator(".interval").count() == 0 or "0.0" in pairs.inner_text()
    # Another address of the same page is another view.
    page.evaluate("location.hash = 'tasks=two'")
    page.wait_for_function("document.querySelector('#scores .chip')?.value === 'two'")


def sort_the_table(page: Any) -> None:
    """The head of a column sorts by it, down and then up."""
    values = show(page, "values")
    first = values.locator("tbody tr").first
    assert first.inner_text().split()[0] == "toy-1m"
    values.get_by_role("button", name="lambada_openai").focus()
    page.keyboard.press("Enter")
    settled(page, "values")
    assert first.inner_text().split()[0] == "opt-1.3b" and "0.5200" in first.inner_text()
    assert values.locator("th[aria-sort=descending]").inner_text().startswith("lambada")
    page.keyboard.press("Enter")
    settled(page, "values")
    assert first.inner_text().split()[0] == "toy-1m"


def compare_two(page: Any) -> None:
    """Two models, and one under other conditions, which is refused until the reader insists."""
    pairs = show(page, "pairs")
    pairs.get_by_label("A", exact=True).select_option(label="toy · toy-16m seed 1")
    pairs.get_by_label("B", exact=True).select_option(label="toy · toy-1m seed 1")
    settled(page, "pairs")
    rows = pairs.locator("tbody tr").all_inner_texts()
    assert len(rows) == 4 and all("A better" in row for row in rows)
    assert "4 of 4 differences are outside" in pairs.inner_text()
    pairs.get_by_label("B", exact=True).select_option(label="opt · opt-1.3b")
    settled(page, "pairs")
    (row,) = pairs.locator("tbody tr").all_inner_texts()
    assert "not compared: harness lm-eval 0.4.13 and lm-eval <0.4" in row
    pairs.get_by_role("checkbox", name="compare across conditions").check()
    settled(page, "pairs")
    (row,) = pairs.locator("tbody tr").all_inner_texts()
    assert "not compared" not in row and "dtype fp32 and unknown" in row
