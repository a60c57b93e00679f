"""What Prometheus gets on METRICS_PORT: what the worker has counted, what the database knows, when parts were well."""

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
TAKEN = "METRICS_PORT is taken: give each worker of a machine its own"


class HealthCollector(Collector):
    """Which version this is, and when its parts were last well."""

    def __init__(self, notes: Callable[[], Mapping[str, float]]) -> None:
        """notes: of worker/health.py."""
        self._notes = notes

    def collect(self) -> Iterator[GaugeMetricFamily]:
        build = GaugeMetricFamily("confirm_offer_build_info", "The version that runs", labels=["version"])
        build.add_metric([version("confirm-offer")], 1)
        yield build
        on_success = GaugeMetricFamily(
            "confirm_offer_last_well_timestamp_seconds", "When a part of this worker was last well", labels=["part"]
        )
        for part, at in self._notes().items():
            on_success.add_metric([part], at)
        yield on_success


class WorkerMetrics(Collector):
    """All that is shown."""

    def __init__(self, instruments: Instruments, engine: Engine, notes: Callable[[], Mapping[str, float]]) -> None:
        """engine: for this alone; notes: of worker/health.py."""
        self._collectors = (
            instruments.exposed(),
            HealthCollector(notes),
            BacklogCollector(engine),
            ProcessCollector(registry=None),
        )

    def collect(self) -> Iterator[Metric]:
        for collector in self._collectors:
            yield from collector.collect()


class MetricsServer(Service):
    """Answers Prometheus. A port that is taken is tried again and again: jobs matter more than being seen."""

    name = "metrics"

    def __init__(self, port: int, exposed: Collector) -> None:
        super().__init__()
        self._port = port
        self._exposed = exposed
        self._server: Server | None = None

    def run_once(self) -> bool:
        """Takes the port, then a request, which is answered in a thread of its own."""
        if self._server is None:
            self._server = Server(self._port, self._exposed)
            log.info("metrics_served", port=self._server.server_address[1])
        self._server.handle_request()
        return True

    def close(self) -> None:
        if self._server is not None:
            self._server.server_close()

    def _log_failure(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno is not None:
            reason = TAKEN if error.errno == errno.EADDRINUSE else os.strerror(error.errno)
            log.error("metrics_not_served", port=self._port, error=reason)
        else:
            super()._log_failure(error)


class Server(ThreadingHTTPServer):
    """All addresses of the machine, IPv4 and IPv6."""

    timeout = 0.5  # seconds that handle_request waits, so that the Loop sees when it is to end

    def __init__(self, port: int, exposed: Collector) -> None:
        self.exposed = exposed
        if socket.has_dualstack_ipv6():
            self.address_family = socket.AF_INET6
        super().__init__(("", port), _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who asked has gone, or was too slow."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 10  # seconds for one request
    server_version, sys_version = "confirm-offer", ""

    def do_GET(self) -> None:
        if urlsplit(self.path).path != PATH:
            self.send_error(404)
            return
        encode, content_type = choose_encoder(self.headers.get("Accept", ""))
        try:
            body = encode(self.server.exposed)
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
        """Nothing."""
