"""Serves metrics to Prometheus on METRICS_PORT: those of the worker, of the backlog in the database, and of health."""

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from importlib.metadata import version
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector

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
OPENMETRICS = "application/openmetrics-text"
MAX_CONNECTIONS = 32  # one more closes the oldest
MAX_HEAD = 8192  # bytes of a request
REQUEST_TIMEOUT = 5.0  # seconds for a whole request, and then for its whole answer
SELECT_TIMEOUT = 0.5  # seconds, after which the service sees whether it is to stop
FRESH_FOR = 1.0  # seconds for which all who ask get the same values
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
    """Answers Prometheus. It retries a port that is taken: the worker runs on, as jobs matter more than metrics.

    One thread serves all connections and waits for none of them, so slow clients hold up neither others nor the worker.
    """

    name = "metrics"

    def __init__(self, port: int, collector: Collector) -> None:
        super().__init__()
        self._port = port
        self._values = _Values(collector)
        self._server: _Server | None = None

    def run_once(self) -> bool:
        """Binds the port at the first run, then serves what clients have sent."""
        if self._server is None:
            self._server = _Server(self._port, self._values.answer)
            log.info("metrics_served", port=self._server.port)
        self._server.serve()
        return True

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    def _log_failure(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno is not None:
            reason = PORT_TAKEN if error.errno == errno.EADDRINUSE else os.strerror(error.errno)
            log.error("metrics_not_served", port=self._port, error=reason)
        else:
            super()._log_failure(error)


class _Values(Collector):
    """The answers to requests. Requests within FRESH_FOR share one collection."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._metrics: list[Metric] = []
        self._encoded: dict[str, bytes] = {}  # by content type
        self._collected_at = float("-inf")

    def collect(self) -> list[Metric]:
        return self._metrics

    def answer(self, head: bytes) -> bytes:
        """The answer to a request. head: its first line and headers."""
        line, *headers = head.decode("latin-1").split("\r\n")
        match line.split(" "):
            case ["GET", target, "HTTP/1.1" | "HTTP/1.0"]:
                pass
            case [_, _, "HTTP/1.1" | "HTTP/1.0"]:
                return _response(HTTPStatus.METHOD_NOT_ALLOWED)
            case _:
                return _response(HTTPStatus.BAD_REQUEST)
        if target.partition("?")[0] != PATH:
            return _response(HTTPStatus.NOT_FOUND)
        accept = next((value for name, _, value in map(_split, headers) if name == "accept"), "")
        try:
            return _response(HTTPStatus.OK, *self._encode(accept))
        except Exception as error:
            report(error, task="scrape")
            return _response(HTTPStatus.INTERNAL_SERVER_ERROR)

    def _encode(self, accept: str) -> tuple[str, bytes]:
        if time.monotonic() - self._collected_at >= FRESH_FOR:
            self._metrics, self._encoded = list(self._collector.collect()), {}
            self._collected_at = time.monotonic()
        # Not what the client wrote: each version would be an encoding of its own, and an odd one raises TypeError.
        encode, content_type = choose_encoder(f"{OPENMETRICS}; version=1.0.0" if OPENMETRICS in accept else "")
        if content_type not in self._encoded:
            self._encoded[content_type] = encode(self)
        return content_type, self._encoded[content_type]


def _split(header: str) -> tuple[str, str, str]:
    name, colon, value = header.partition(":")
    return name.strip().lower(), colon, value.strip()


def _response(status: HTTPStatus, content_type: str = "text/plain", body: bytes | None = None) -> bytes:
    content = f"{status.phrase}\n".encode() if body is None else body
    allow = "Allow: GET\r\n" if status is HTTPStatus.METHOD_NOT_ALLOWED else ""
    head = f"HTTP/1.1 {status} {status.phrase}\r\nContent-Type: {content_type}\r\n{allow}"
    return f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content


@dataclass(eq=False)
class _Connection:
    """A client: first its request is read, then the answer is written."""

    socket: socket.socket
    ends_at: float  # monotonic seconds
    head: bytearray = field(default_factory=bytearray)
    answer: memoryview | None = None


class _Server:
    """Listens on all addresses of the machine, IPv4 and IPv6."""

    def __init__(self, port: int, answer: Callable[[bytes], bytes]) -> None:
        """answer: makes the answer to a request's first line and headers."""
        self._answer = answer
        self._listener = socket.create_server(
            ("", port),
            family=socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET,
            dualstack_ipv6=socket.has_dualstack_ipv6(),
        )
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._connections: dict[_Connection, None] = {}  # the oldest first
        self._selector = DefaultSelector()
        self._selector.register(self._listener, EVENT_READ)

    def serve(self) -> None:
        """Goes on with all clients that are ready. Waits up to SELECT_TIMEOUT for one."""
        for key, _ in self._selector.select(SELECT_TIMEOUT):
            if key.data is None:
                self._accept()
            elif key.data in self._connections:  # not closed meanwhile, for a new one
                try:
                    self._continue(key.data)
                except OSError:  # the client has gone
                    self._drop(key.data)
        now = time.monotonic()
        for connection in [each for each in self._connections if each.ends_at <= now]:
            self._drop(connection)

    def _accept(self) -> None:
        with suppress(BlockingIOError, ConnectionError):  # the client has gone
            client, _ = self._listener.accept()
            client.setblocking(False)
            if len(self._connections) >= MAX_CONNECTIONS:
                self._drop(next(iter(self._connections)))
            connection = _Connection(client, time.monotonic() + REQUEST_TIMEOUT)
            self._connections[connection] = None
            self._selector.register(client, EVENT_READ, connection)

    def _continue(self, connection: _Connection) -> None:
        if connection.answer is None:
            self._read(connection)
        if connection.answer is not None:
            with suppress(BlockingIOError):
                connection.answer = connection.answer[connection.socket.send(connection.answer) :]
            if not connection.answer:
                self._drop(connection)

    def _read(self, connection: _Connection) -> None:
        received = connection.socket.recv(MAX_HEAD)
        connection.head += received
        head, end, _ = bytes(connection.head).partition(b"\r\n\r\n")
        if end and len(head) <= MAX_HEAD:
            answer = self._answer(head)
        elif len(head) > MAX_HEAD:
            answer = _response(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif received:
            return
        else:
            raise ConnectionResetError
        connection.answer = memoryview(answer)
        connection.ends_at = time.monotonic() + REQUEST_TIMEOUT
        self._selector.modify(connection.socket, EVENT_WRITE, connection)

    def _drop(self, connection: _Connection) -> None:
        del self._connections[connection]
        self._selector.unregister(connection.socket)
        connection.socket.close()

    def close(self) -> None:
        for connection in list(self._connections):
            self._drop(connection)
        self._selector.close()
        self._listener.close()
