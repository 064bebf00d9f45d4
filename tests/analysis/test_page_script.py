"""page.js in a browser, where there is one: it draws, and follows what the address says."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from castalia.analysis import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
LINES = 6


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_browser_draws_every_panel(tmp_path: Path):
    lines = [
        {"step": s, "loss": 3.0 + 1 / s, "grad_norm": 1.0, "tokens": 512 * s, "valid_loss": 3.0}
        | {"sources": {name: {"loss": 2.0 + 1 / s} for name in ("<b>", "prose")}}
        for s in range(1, LINES + 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(tmp_path).as_uri() + "#x=tokens&xscale=log&yscale=log&smooth=0.1"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,4000"]
    flags += ["--virtual-time-budget=30000", f"--user-data-dir={tmp_path / 'browser'}"]
    done = subprocess.run(
        [str(BROWSER), *flags, "--dump-dom", page], capture_output=True, text=True, timeout=120
    )
    dom = re.sub("<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    assert 'data-ready="yes"' in dom, done.stderr
    panels = dom.split("<figure")[1:]
    assert len(panels) == 3 and all('class="main-svg"' in panel for panel in panels)
    # The values and the fit of the training loss, and the validation.
    assert panels[0].count('class="scatterlayer') == 1 and panels[0].count("js-line") == 3
    assert ">tokens</text>" in panels[0] and "± 10% of the step" in dom
    assert "No time are" not in dom and 'value="seconds" disabled' in dom
    assert "&lt;b&gt;" in panels[2]  # the name of a source is no markup
