"""The page while its files grow: a version that changes with them, the data, the document."""

import hashlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from castalia.analysis.live.watched import FAULTS, Watched
from castalia.analysis.page_file import SCRIPTS, STYLES, document
from castalia.analysis.report import SCORES, Contents, contents_of
from castalia.analysis.runs import RunFiles
from castalia.analysis.scores import Flops, scores_data
from castalia.analysis.smoothing import WINDOWS, Smoother
from castalia.results import ResultsStore

PAUSE = 10.0
"""Times the time that the last page took: so long it stands, whatever the files do. Making pages
takes a tenth of a core at the most, also of a run of 143,000 steps."""
LEAST_SECONDS = 0.5
"""Time between two looks at the files."""
LIVE_SCRIPTS = (*SCRIPTS[:-1], "live.js", "live_readers.js", "live_recalls.js", SCRIPTS[-1])
"""page.js is last: it starts the others."""
NOTHING = "No run has made a step yet. Its curves appear here with the first one."


class LivePage:
    """The page over the runs in some folders. Several threads may ask."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.watched = Watched(paths)
        self.lock = threading.Lock()
        self.value = ""
        """The version that `current` answers until `due`."""
        self.due = 0.0
        self.scored: tuple[str, dict[str, Any] | None] = ("", None)
        """What the scores were made of, and they."""
        self.smooth = Smoother()
        self.made: dict[str, Any] = {}
        """The data of the page of version `self.made["live"]["version"]`."""

    def version(self) -> str:
        """Another word whenever the page would be another one."""
        with self.lock:
            return self.current()

    def current(self) -> str:
        """As `version`, with the lock held."""
        now = time.monotonic()
        if now >= self.due:
            stamps = repr(self.watched.stamps())
            self.value = hashlib.sha256(stamps.encode()).hexdigest()[:16]
            self.due = now + LEAST_SECONDS
        return self.value

    def data(self) -> dict[str, Any]:
        """What the scripts draw, with the key `live`: version, states of the runs, HTML."""
        with self.lock:
            version = self.current()
            if not self.made or self.made["live"]["version"] != version:
                # This thread's own time: on a busy machine the clock would say far more.
                begun = time.thread_time()
                self.made = self.make(version)
                self.due = time.monotonic() + PAUSE * (time.thread_time() - begun)
            return self.made

    def make(self, version: str) -> dict[str, Any]:
        """The data of the files as they are."""
        runs = self.watched.read()
        stores = self.watched.read_stores()
        try:
            contents = self.contents(runs, stores)
        except FAULTS:
            # A run that can be read but not drawn must not take the page of the others either.
            if not self.watched.leave_out(lambda run: contents_of([run], smooth=self.smooth)):
                raise
            contents = self.contents(self.watched.read(), stores)
        live = {
            "version": version,
            "title": contents.title,
            "lead": contents.lead,
            "charts": contents.charts,
            "parts": contents.parts,
            "runs": self.watched.states(),
            "problems": self.watched.problems,
        }
        return {**contents.data, "live": live}

    def contents(self, runs: Sequence[RunFiles], stores: Sequence[ResultsStore]) -> Contents:
        """The page about runs and results, or about none yet."""
        if runs or stores:
            return contents_of(runs, stores, self.scores, self.smooth)
        return Contents("castalia view", NOTHING, "", "", EMPTY)

    def scores(self, stores: Sequence[ResultsStore], flops: Flops) -> dict[str, Any] | None:
        """As `scores_data`, which is asked again only when a store has changed: a run that trains
        changes the page every second, and a table may have a million rows."""
        key = repr((self.watched.store_stamps(), sorted(flops.items())))
        if key != self.scored[0]:
            self.scored = (key, scores_data(stores, flops))
        return self.scored[1]

    def html(self, nonce: str) -> str:
        """The document."""
        data = self.data()
        live = data["live"]
        charts = live["charts"]
        # Places for what is not there yet: the first step, the first evaluation.
        if 'class="panels"' not in charts:
            charts = f'<section class="training">{NO_CHARTS}</section>{charts}'
        if 'id="scores"' not in charts:
            charts += SCORES
        body = (
            f'<div id="report">{charts}<div id="parts">{live["parts"]}</div></div>'
            '<div id="readers"></div>'
        )
        return document(
            live["title"],
            live["lead"],
            body,
            data,
            styles=(*STYLES, "live.css"),
            scripts=LIVE_SCRIPTS,
            nonce=nonce,
        )


EMPTY: dict[str, Any] = {"runs": [], "panels": [], "windows": WINDOWS}
NO_CHARTS = '<div id="controls"></div><div class="panels"></div>'
"""Where the charts will stand."""
