"""The server's metrics for Prometheus."""

from typing import Any

from castalia.core.extras import require
from castalia.serve.connections import ConnectionTable
from castalia.serve.limits import App, Message, Receive, Scope, Send
from castalia.serve.model_pool import ModelPool

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Bucket bounds: from one token of a small model to a first token behind a long queue."""


class ServerMetrics:
    """Counters, gauges and histograms.

    They live in a registry of their own: two servers in one process must not share counts.
    """

    def __init__(self) -> None:
        client = require("prometheus_client", "serve", "castalia serve")
        self.client = client
        self.registry = client.CollectorRegistry()

        def make(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
            return kind(f"castalia_{name}", text, labels, registry=self.registry, **options)

        self.requests = make(
            client.Counter, "requests_total", "Requests by path and status", "path", "status"
        )
        self.prompt_tokens = make(client.Counter, "prompt_tokens_total", "Prompt tokens")
        self.generated_tokens = make(
            client.Counter, "generated_tokens_total", "Tokens that were generated"
        )
        self.cancelled = make(
            client.Counter, "cancelled_total", "Requests whose client disconnected before the end"
        )
        self.running = make(client.Gauge, "running", "Texts being generated")
        self.waiting = make(client.Gauge, "waiting", "Texts in the queue")
        self.cache_bytes = make(
            client.Gauge, "cache_bytes", "Keys and values of full slots, where the engine tells"
        )
        self.models = make(
            client.Gauge, "models", "Models in memory, awaited, and making room", "state"
        )
        self.connections = make(client.Gauge, "connections", "Open connections")
        self.ended_connections = make(
            client.Gauge,
            "ended_connections",
            "Connections that the server ended since its start, by reason",
            "reason",
        )
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

    def observe(self, pool: ModelPool) -> None:
        """Read the gauges of texts and models."""
        running, waiting = pool.counts()
        self.running.set(running)
        self.waiting.set(waiting)
        self.cache_bytes.set(pool.cache_bytes())
        models = pool.models
        self.models.labels("ready").set(len(models.ready))
        self.models.labels("loading").set(len(models.loading()))
        self.models.labels("leaving").set(len(models.leaving()))

    def observe_connections(self, table: ConnectionTable) -> None:
        """Read the gauges of connections."""
        self.connections.set(len(table.admitted))
        for reason, count in table.ended.items():
            self.ended_connections.labels(reason).set(count)

    def page(self) -> tuple[bytes, str]:
        """The metrics in Prometheus's text format, and its content type."""
        return self.client.generate_latest(self.registry), self.client.CONTENT_TYPE_LATEST


class RequestCounter:
    """ASGI middleware: counts every answer by path and status.

    Plain ASGI: Starlette's middleware class would buffer streamed answers.
    """

    def __init__(self, app: App, metrics: ServerMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on and count its answer."""

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The route's pattern, not the path asked for: clients must not create labels.
                path = getattr(scope.get("route"), "path", "other")
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, count)
