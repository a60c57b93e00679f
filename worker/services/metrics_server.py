"""Serves metrics to Prometheus on METRICS_PORT: those of the worker, of the backlog in the database, and of health."""

import errno
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

import structlog
from prometheus_client import Metric, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import Engine

from worker.observability.metrics import Instruments
from worker.observability.sentry import report
from worker.services.backlog_metrics import BacklogCollector
from worker.services.service import Service

log = structlog.get_logger(__name__)

PATH = "/metrics"
PORT_TAKEN = "METRICS_PORT is taken: give each worker of a machine its own"


class HealthCollector(Collector):
    """The version that runs, and when each part of the worker last succeeded."""

    def __init__(self, last_successes: Callable[[], Mapping[str, float]]) -> None:
        """last_successes: of Health."""
        self._last_successes = last_successes

    def collect(self) -> Iterator[GaugeMetricFamily]:
        build = GaugeMetricFamily("confirm_offer_build_info", "The version that runs", labels=["version"])
        build.add_metric([version("confirm-offer")], 1)
        yield build
        successes = GaugeMetricFamily(
            "confirm_offer_last_well_timestamp_seconds", "When a part of this worker last succeeded", labels=["part"]
        )
        for part, at in self._last_successes().items():
            successes.add_metric([part], at)
        yield successes


class WorkerMetrics(Collector):
    """All metrics of a worker."""

    def __init__(
        self, instruments: Instruments, engine: Engine, last_successes: Callable[[], Mapping[str, float]]
    ) -> None:
        """engine: a separate one, for the queries of the backlog; last_successes: of Health."""
        self._collectors = (
            instruments.collector(),
            HealthCollector(last_successes),
            BacklogCollector(engine),
            ProcessCollector(registry=None),
        )

    def collect(self) -> Iterator[Metric]:
        for collector in self._collectors:
            yield from collector.collect()


class MetricsServer(Service):
    """Answers Prometheus. It retries a port that is taken: the worker runs on, as jobs matter more than metrics."""

    name = "metrics"

    def __init__(self, port: int, collector: Collector) -> None:
        super().__init__()
        self._port = port
        self._collector = collector
        self._server: _Server | None = None

    def run_once(self) -> bool:
        """Binds the port at the first run, then waits for a request, which a thread of its own answers."""
        if self._server is None:
            self._server = _Server(self._port, self._collector)
            log.info("metrics_served", port=self._server.server_address[1])
        self._server.handle_request()
        return True

    def close(self) -> None:
        if self._server is not None:
            self._server.server_close()

    def _log_failure(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno is not None:
            reason = PORT_TAKEN if error.errno == errno.EADDRINUSE else os.strerror(error.errno)
            log.error("metrics_not_served", port=self._port, error=reason)
        else:
            super()._log_failure(error)


class _Server(ThreadingHTTPServer):
    """Listens on all addresses of the machine, IPv4 and IPv6."""

    timeout = 0.5  # seconds that handle_request waits, after which the service sees whether it is to stop

    def __init__(self, port: int, collector: Collector) -> None:
        self.collector = collector
        if socket.has_dualstack_ipv6():
            self.address_family = socket.AF_INET6
        super().__init__(("", port), _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignored: the client has gone, or was too slow."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10  # seconds for one request
    server_version, sys_version = "confirm-offer", ""

    def do_GET(self) -> None:
        if urlsplit(self.path).path != PATH:
            self.send_error(404)
            return
        encode, content_type = choose_encoder(self.headers.get("Accept", ""))
        try:
            body = encode(self.server.collector)
        except Exception as error:
            report(error, task="scrape")
            self.send_error(500)
            return
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Requests are not logged."""
