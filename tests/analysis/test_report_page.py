"""The report page in a browser: click, zoom, dark, small."""

import json
from pathlib import Path

from tests.fixtures.browser import PHONE, Visit, drawn

from castalia.analysis import write_report


def test_names_and_the_axis_are_switched_by_click_and_key(tmp_path: Path, visit: Visit):
    lines = [
        {"step": s, "loss": 3.0 + 1 / s, "lr": 0.1, "tokens": 512 * s, "valid_loss": 3.0}
        for s in range(1, 40)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    address = write_report(tmp_path).as_uri()
    page = visit(address)
    drawn(page)
    curves = page.locator(".panel").first.locator(".js-line")
    assert curves.count() == 3  # training, as it is and smoothed; validation
    page.get_by_role("button", name="validation").click()
    assert curves.count() == 2
    page.get_by_role("radio", name="steps").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("radio", name="tokens").is_checked() and "x=tokens" in page.url
    phone = visit(page.url, PHONE, dark=True)
    drawn(phone)
    assert phone.get_by_role("radio", name="tokens").is_checked()
