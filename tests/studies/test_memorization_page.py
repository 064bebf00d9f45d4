"""The page of a study of memorization in a browser: menus, dark, small."""

from pathlib import Path

import numpy as np
from tests.fixtures.browser import PHONE, Visit, drawn
from tests.fixtures.scans import scan_file, scan_table

from castalia.studies.memorization import write_study


def test_menus_change_what_a_chart_shows_and_the_address_keeps_it(tmp_path: Path, visit: Visit):
    rng = np.random.default_rng(2)
    late = np.where(rng.random(2000) < 0.05, 32, rng.integers(0, 32, 2000))
    # The small model memorizes nothing early. A name is a text, never markup.
    early = {"7m <b>": np.minimum(late[:500], 31), "70m": late[:500]}
    words = [
        f"{name}={scan_file(tmp_path / f'{len(name)}.parquet', scan_table({5: first, 20: late}))}"
        for name, first in early.items()
    ]
    _, path = write_study(words, tmp_path / "study")
    page = visit(path.as_uri())
    drawn(page)
    assert page.get_by_text("No row is memorized by 7m <b> at 5").count() == 1
    windows = page.locator(".panel", has=page.get_by_role("heading", name="in a window"))
    assert windows.locator(".bars .point").count() > 3
    windows.get_by_label("checkpoint").select_option("5")
    windows.get_by_label("model").select_option("7m <b>")
    assert windows.get_by_text("their density has no shape").is_visible()
    heat = page.locator(".panel", has=page.get_by_role("heading", name="Correlation"))
    heat.get_by_label("between").select_option("checkpoints of 70m")
    assert heat.locator(".hm").count() == 1
    phone = visit(page.url, PHONE, dark=True)
    drawn(phone)
    assert phone.get_by_text("their density has no shape").is_visible()
    heat = phone.locator(".panel", has=phone.get_by_role("heading", name="Correlation"))
    assert heat.get_by_label("between").input_value() == "3"
