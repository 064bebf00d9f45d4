"""Numbers of a server for Prometheus."""

from typing import Any

from castalia.core.extras import require
from castalia.serve.limits import App, Message, Receive, Scope, Send

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Measures:
    """Counters and histograms, in a registry of their own so that two servers in one process do not mix."""

    def __init__(self) -> None:
        client = require("prometheus_client", "serve", "castalia serve")
        self.client = client
        self.registry = client.CollectorRegistry()

        def make(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
            return kind(f"castalia_{name}", text, labels, registry=self.registry, **options)

        self.requests = make(
            client.Counter, "requests_total", "Requests by path and status", "path", "status"
        )
        self.prompt_tokens = make(client.Counter, "prompt_tokens_total", "Tokens of prompts")
        self.made_tokens = make(
            client.Counter, "generated_tokens_total", "Tokens that were generated"
        )
        self.cancelled = make(
            client.Counter, "cancelled_total", "Requests whose client left before the end"
        )
        self.running = make(client.Gauge, "running", "Texts that are being continued")
        self.waiting = make(client.Gauge, "waiting", "Texts in the queue")
        self.first_token = make(
            client.Histogram,
            "time_to_first_token_seconds",
            "From the request to its first token",
            buckets=SECONDS,
        )
        self.each_token = make(
            client.Histogram,
            "time_per_token_seconds",
            "Between tokens of one text",
            buckets=SECONDS,
        )

    def page(self) -> tuple[bytes, str]:
        """The text and its content type."""
        return self.client.generate_latest(self.registry), self.client.CONTENT_TYPE_LATEST


class Counted:
    """Counts every answer by its path and status. Plain ASGI, so that streams pass through."""

    def __init__(self, app: App, measures: Measures) -> None:
        self.app, self.measures = app, measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self.measures.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, count)
