"""`serve_page`: the HTTP server of `castalia view`, on the standard library alone."""

import gzip
import json
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from castalia.analysis.live.jobs import BusyError, Jobs
from castalia.analysis.live.page import LivePage
from castalia.analysis.live.readers import Batches, OpenRun
from castalia.analysis.live.recalls import LoadModel, Recalls, question_of
from castalia.analysis.live.watched import read_samples
from castalia.analysis.live.web import (
    HEADERS,
    MOST_BODY,
    Answer,
    RefusalError,
    as_json,
    new_nonce,
    policy,
    problem,
    require_host,
    require_same_origin,
)
from castalia.core.errors import CastaliaError

Query = Mapping[str, str]
PATIENCE = 60.0
"""Seconds in which a request must arrive."""
WORTH_PACKING = 4096
"""Bytes from which an answer is compressed."""


class LiveView:
    """What the server answers: one method a path. `open_run` opens the rows of a run's folder."""

    def __init__(
        self, paths: Sequence[Path], open_run: OpenRun, load_model: LoadModel | None = None
    ) -> None:
        self.page = LivePage(paths)
        self.batches = Batches(open_run)
        self.recalls = Recalls(self.batches, load_model)
        self.jobs = Jobs()
        self.gets: dict[str, Callable[[Query], Answer]] = {
            "/": self.get_page,
            "/version": self.get_version,
            "/data": self.get_data,
            "/batch": self.get_batch,
            "/samples": self.get_samples,
            "/job": self.get_job,
        }
        self.posts: dict[str, Callable[[Any], Answer]] = {
            "/memorized": self.post_memorized,
            "/cancel": self.post_cancel,
        }

    def folder(self, name: str) -> Path:
        """The folder of a run by its name on the page: no other path is ever opened.

        Raises  RefusalError if there is no such run.
        """
        if name not in self.page.watched.runs:
            self.page.version()  # looks for new runs
        # The search puts another dict in the place of this one, and never changes it.
        runs = self.page.watched.runs
        if name not in runs:
            raise RefusalError(404, f"no run {name!r} on this page")
        return runs[name].folder

    def get_page(self, query: Query) -> Answer:
        """The page itself."""
        nonce = new_nonce()
        html = self.page.html(nonce).encode("utf-8", "replace")
        headers = {"Content-Security-Policy": policy(nonce)}
        return Answer(200, "text/html; charset=utf-8", html, headers)

    def get_version(self, query: Query) -> Answer:
        """The version of the page, which its script asks for again and again."""
        return as_json({"version": self.page.version()})

    def get_data(self, query: Query) -> Answer:
        """The page's data."""
        return as_json(self.page.data())

    def get_batch(self, query: Query) -> Answer:
        """Rows of a step of a run."""
        batch = self.batches.batch(
            self.folder(query.get("run", "")),
            number_of(query, "step"),
            number_of(query, "first", 0),
            number_of(query, "count", 16),
            query.get("search", "").strip(),
        )
        return as_json(batch)

    def get_samples(self, query: Query) -> Answer:
        """The samples of a run."""
        return as_json({"samples": read_samples(self.folder(query.get("run", "")))})

    def get_job(self, query: Query) -> Answer:
        """State and results of the newest job."""
        return as_json(self.jobs.report(number_of(query, "first", 0)))

    def post_memorized(self, body: Any) -> Answer:
        """Start the job that finds memorized rows."""
        question = question_of(body)
        work = self.recalls.work(self.folder(question.run), question)
        try:
            job = self.jobs.start(question._asdict(), work)
        except BusyError as error:
            return problem(409, str(error))
        return as_json(job.report(), 202)

    def post_cancel(self, body: Any) -> Answer:
        """Cancel the job."""
        self.jobs.cancel()
        return as_json(self.jobs.report())

    def answer(self, method: str, target: str, body: bytes) -> Answer:
        """The answer to a request that has passed the checks.

        Raises  RefusalError for an unknown path or method.
        """
        path, _, words = target.partition("?")
        other = self.posts if method == "GET" else self.gets
        if path in other:
            allowed = "POST" if method == "GET" else "GET"
            raise RefusalError(405, f"{path} takes {allowed} only")
        try:
            if method == "GET" and path in self.gets:
                return self.gets[path](dict(parse_qsl(words, keep_blank_values=True)))
            if method == "POST" and path in self.posts:
                return self.posts[path](parsed(body))
        except CastaliaError as error:
            return problem(422, str(error))
        raise RefusalError(404, f"no page {path}; the page is at /")


def number_of(query: Query, name: str, default: int | None = None) -> int:
    """A count in a query.

    Raises  RefusalError if it is missing or no count.
    """
    text = query.get(name)
    if text is None and default is not None:
        return default
    if text is None or not (text.isascii() and text.isdigit() and len(text) < 16):
        raise RefusalError(400, f"{name}: expected a number from 0 on, got {text!r}")
    return int(text)


def parsed(body: bytes) -> Any:
    """The JSON value of a body.

    Raises  RefusalError.
    """
    try:
        return json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise RefusalError(400, "the body is not JSON") from None


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "castalia"
    sys_version = ""
    timeout = PATIENCE
    server: "PageServer"

    def do_GET(self) -> None:
        """Answer GET."""
        self.respond("GET")

    def do_POST(self) -> None:
        """Answer POST."""
        self.respond("POST")

    def respond(self, method: str) -> None:
        """Check the request, answer it, and turn every error into an answer."""
        try:
            body = self.body()
            require_host(self.headers.get("Host"), self.server.host)
            require_same_origin(self.headers, method)  # type: ignore[arg-type]
            answer = self.server.view.answer(method, self.path, body)
        except RefusalError as refusal:
            answer = problem(refusal.status, str(refusal))
        except Exception as error:
            traceback.print_exc()
            answer = problem(500, f"{type(error).__name__}; the server's terminal says more")
        self.send(answer)

    def body(self) -> bytes:
        """The bytes that come with the request.

        Raises  RefusalError if they are too many.
        """
        text = self.headers.get("Content-Length", "0")
        is_count = text.isascii() and text.isdigit() and len(text) < 16
        if not is_count or int(text) > MOST_BODY or "Transfer-Encoding" in self.headers:
            raise RefusalError(413, f"a body of at most {MOST_BODY} bytes, with its length")
        return self.rfile.read(int(text))

    def send(self, answer: Answer) -> None:
        """Write the answer."""
        body = answer.body
        self.send_response(answer.status)
        for name, value in {**HEADERS, **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", answer.kind)
        if len(body) > WORTH_PACKING and "gzip" in (self.headers.get("Accept-Encoding") or ""):
            # The fastest level: this is one machine, and the page is packed already.
            body = gzip.compress(body, 1)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        # A connection kept open would keep a thread, for a question a second.
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a page that asks every second would fill the terminal."""


class PageServer(ThreadingHTTPServer):
    """The server over a socket that listens already."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, listener: socket.socket, view: LiveView) -> None:
        super().__init__(listener.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.host: str = listener.getsockname()[0]
        self.view = view
        self.server_activate()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that closes its tab in the middle of an answer is no error."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def serve_page(listener: socket.socket, view: LiveView) -> None:
    """Serve until Ctrl-C, which is raised again once the socket is closed."""
    with PageServer(listener, view) as server:
        try:
            server.serve_forever(poll_interval=0.2)
        finally:
            view.jobs.cancel()
