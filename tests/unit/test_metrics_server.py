"""The server of the metrics: bounded in threads, connections, time and collections, whoever asks."""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from urllib.request import Request, urlopen

import pytest
from prometheus_client import Metric
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

from tests.support.system import until
from worker.services import metrics_server
from worker.services.metrics_server import MAX_CONNECTIONS, MetricsServer

HUGE = 32_000_000  # bytes; more than the system buffers for a connection


class Counting(Collector):
    """Collects how often it was asked, and is HUGE on request."""

    def __init__(self) -> None:
        self.collections = 0
        self.is_huge = False

    def collect(self) -> Iterator[Metric]:
        self.collections += 1
        yield GaugeMetricFamily("collections", "x" * HUGE if self.is_huge else "So far", self.collections)


@pytest.fixture
def collector() -> Counting:
    return Counting()


@pytest.fixture
def server(collector: Counting, monkeypatch: pytest.MonkeyPatch) -> Iterator[MetricsServer]:
    monkeypatch.setattr(metrics_server, "REQUEST_TIMEOUT", 0.5)
    monkeypatch.setattr(metrics_server, "SELECT_TIMEOUT", 0.05)
    server = MetricsServer(0, collector)
    server.start()
    until(lambda: server._server)
    yield server
    server.stop()


@pytest.fixture
def port(server: MetricsServer) -> int:
    assert server._server is not None
    return server._server.port


def scrape(port: int, accept: str = "text/plain") -> str:
    with urlopen(Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept}), timeout=10) as answer:
        return str(answer.read().decode())


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def is_closed(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        while client.recv(65536):
            pass
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_clients_that_send_no_whole_request_keep_nobody_from_an_answer(port: int) -> None:
    threads = threading.active_count()
    drips = [connect(port) for _ in range(5 * MAX_CONNECTIONS)]

    for number in count():
        for client in drips:
            try:
                client.send(b"GET /metrics HTTP/1.1\r\n"[number : number + 1] or b"X")
            except OSError:
                continue
        assert "collections" in scrape(port)
        if all(is_closed(client) for client in drips):
            break
    assert threading.active_count() == threads
    for client in drips:
        client.close()


def test_one_more_connection_closes_the_oldest(port: int) -> None:
    with connect(port) as oldest, connect(port) as next_oldest:
        others = [connect(port) for _ in range(MAX_CONNECTIONS - 1)]
        until(lambda: is_closed(oldest))
        assert not is_closed(next_oldest)
        for client in others:
            client.close()


def test_a_client_that_does_not_read_its_answer_is_dropped(
    server: MetricsServer, port: int, collector: Counting
) -> None:
    collector.is_huge = True
    with connect(port) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        until(lambda: collector.collections)
        until(lambda: server._server and not server._server._connections)

        received = 0
        with suppress(ConnectionResetError):
            while chunk := client.recv(65536):
                received += len(chunk)
        assert received < HUGE
    collector.is_huge = False
    assert "collections" in scrape(port)


def test_all_who_ask_at_once_share_a_collection(port: int, collector: Counting) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = set(pool.map(lambda _: scrape(port), range(40)))

    assert len(answers) == collector.collections <= 2
    scrape(port, accept="application/openmetrics-text; version=1.0.0")
    assert collector.collections <= 2


@pytest.mark.parametrize("version", ["x", "", "1.0.0\nX-Other: y", "9" * 3000, "1.0.\xe9"])
def test_a_version_that_nobody_has_is_no_defect(port: int, version: str, caplog: pytest.LogCaptureFixture) -> None:
    with connect(port) as client:
        accept = f"Accept: application/openmetrics-text; version={version}"
        client.sendall(f"GET /metrics HTTP/1.1\r\n{accept}\r\n\r\n".encode("latin-1"))
        answer = client.recv(65536)

    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"X-Other" not in answer
    assert b"999" not in answer
    assert not caplog.records


def test_whatever_clients_accept_there_are_two_encodings(collector: Counting) -> None:
    values = metrics_server._Values(collector)
    for number in range(100):
        for kind in "application/openmetrics-text", "text/plain":
            values.answer(f"GET /metrics HTTP/1.1\r\nAccept: {kind}; version=1.0.{number}".encode())

    assert len(values._encoded) == 2


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /other HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", b"405 Method Not Allowed"),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", b"405 Method Not Allowed"),
        (b"GET /metrics\r\n\r\n", b"400 Bad Request"),
        (b"\xff\x00\r\n\r\n", b"400 Bad Request"),
        (b"GET //[/metrics HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 9000, b"431 Request Header Fields Too Large"),
    ],
)
def test_what_is_no_request_for_metrics_is_refused(port: int, request_: bytes, status: bytes) -> None:
    with connect(port) as client:
        client.sendall(request_)
        assert client.recv(1000).startswith(b"HTTP/1.1 " + status + b"\r\n")
    assert "collections" in scrape(port)
