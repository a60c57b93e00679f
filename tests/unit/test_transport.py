"""The transport, against raw sockets: one deadline for the whole call, one bound on the answer, reused connections."""

import gzip
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
import requests

from tests.support.certificates import Authority, Certificate
from worker.xone.transport import MAX_ANSWER, AnswerTooLarge, TlsError, Transport

TIMEOUT = 0.3
GENEROUS = 3 * TIMEOUT
DRIP_SECONDS = 20.0  # length of a dripped answer; far longer than a test may wait
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"

Behave = Callable[[socket.socket, threading.Event], None]


class Server:
    """Accepts connections, and lets ``behave`` answer each request. ``closed`` is set at the end."""

    def __init__(self, behave: Behave, certificate: Certificate | None = None) -> None:
        self._behave = behave
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.closed = threading.Event()
        self.connections = 0
        self.requests: list[bytes] = []
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{self._listening.getsockname()[1]}/"
        if certificate:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(certificate.chain, certificate.key)
            self._listening = tls.wrap_socket(self._listening, server_side=True)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, suppress(OSError):
            while head := read_request(connection):
                self.requests.append(head)
                self._behave(connection, self.closed)

    def close(self) -> None:
        self.closed.set()
        self._listening.close()


def read_request(connection: socket.socket) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received:
        more = connection.recv(65536)
        if not more:
            return b""
        received += more
    return received


@contextmanager
def serving(behave: Behave, certificate: Certificate | None = None) -> Iterator[Server]:
    server = Server(behave, certificate)
    try:
        yield server
    finally:
        server.close()


def get(server: Server, http: Transport | None = None) -> tuple[int, bytes]:
    status, _, body = (http or Transport(4, TIMEOUT, TIMEOUT)).send("GET", server.url, {})
    return status, body


def drip(connection: socket.socket, closed: threading.Event, content: bytes) -> None:
    interval = DRIP_SECONDS / len(content)
    for position in range(len(content)):
        connection.sendall(content[position : position + 1])
        if closed.wait(interval):
            return


# --- The deadline ---


def answer_never(_: socket.socket, closed: threading.Event) -> None:
    closed.wait(DRIP_SECONDS)


def drip_head(connection: socket.socket, closed: threading.Event) -> None:
    drip(connection, closed, HEAD.replace(b"\r\n\r\n", b"\r\nX: " + b"x" * 200 + b"\r\n\r\n"))


def drip_headers(connection: socket.socket, closed: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for number in range(90):
        connection.sendall(b"X-%d: x\r\n" % number)
        if closed.wait(DRIP_SECONDS / 90):
            return


def drip_body(connection: socket.socket, closed: threading.Event) -> None:
    connection.sendall(HEAD)
    drip(connection, closed, b"x" * 1000)


def drip_chunks(connection: socket.socket, closed: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    drip(connection, closed, b"1\r\nx\r\n" * 100)


def drip_without_length(connection: socket.socket, closed: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    drip(connection, closed, b"x" * 1000)


def stall_in_head(connection: socket.socket, closed: threading.Event) -> None:
    connection.sendall(HEAD[:20])
    closed.wait(DRIP_SECONDS)


def stall_in_body(connection: socket.socket, closed: threading.Event) -> None:
    connection.sendall(HEAD + b"x" * 500)
    closed.wait(DRIP_SECONDS)


def answer_100_repeatedly(connection: socket.socket, closed: threading.Event) -> None:
    while not closed.wait(0.02):
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")


@pytest.mark.parametrize(
    "behave",
    [
        answer_never,
        drip_head,
        drip_headers,
        drip_body,
        drip_chunks,
        drip_without_length,
        stall_in_head,
        stall_in_body,
        answer_100_repeatedly,
    ],
)
def test_the_timeout_covers_the_whole_call(behave: Behave) -> None:
    with serving(behave) as server:
        started = time.monotonic()
        with pytest.raises(requests.RequestException, match=r"(?i)time.?out|timed out"):
            get(server)
        duration = time.monotonic() - started

    assert TIMEOUT * 0.9 <= duration < GENEROUS


def test_a_late_stall_gets_only_the_remaining_time() -> None:
    def stall_late(connection: socket.socket, closed: threading.Event) -> None:
        connection.sendall(HEAD)
        closed.wait(0.9)
        connection.sendall(b"x")
        closed.wait(DRIP_SECONDS)

    with serving(stall_late) as server:
        started = time.monotonic()
        with pytest.raises(requests.RequestException):
            get(server, Transport(4, 1, 1))
        duration = time.monotonic() - started

    assert 0.95 <= duration < 1.7  # it would take 1.9 if each read had its own second


def test_each_call_has_its_own_deadline() -> None:
    """On a reused connection, each call has the whole time."""

    timeout = 1.0

    def answer_slowly(connection: socket.socket, closed: threading.Event) -> None:
        closed.wait(timeout * 0.6)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")

    http = Transport(4, timeout, timeout)
    with serving(answer_slowly) as server:
        answers = [get(server, http) for _ in range(3)]

    assert answers == [(200, b"x")] * 3
    assert server.connections == 1


def test_a_connection_that_is_not_accepted_ends_with_the_connect_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        fillers = [socket.socket() for _ in range(8)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        started = time.monotonic()
        with pytest.raises(requests.ConnectTimeout):
            Transport(4, TIMEOUT, 30).send("GET", f"http://127.0.0.1:{address[1]}/", {})
        duration = time.monotonic() - started
        for filler in fillers:
            filler.close()

    assert duration < GENEROUS


# --- The bound ---


def of_length(length: int) -> Behave:
    def behave(connection: socket.socket, _: threading.Event) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + b"x" * length)

    return behave


def chunked_of(length: int, chunk: int = 64 * 1024) -> Behave:
    def behave(connection: socket.socket, _: threading.Event) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for sent in range(0, length, chunk):
            part = b"x" * min(chunk, length - sent)
            connection.sendall(b"%x\r\n%b\r\n" % (len(part), part))
        connection.sendall(b"0\r\n\r\n")

    return behave


def zipped_of(length: int) -> Behave:
    def behave(connection: socket.socket, _: threading.Event) -> None:
        body = gzip.compress(b"x" * length)
        head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body)

    return behave


@pytest.mark.parametrize("answer", [of_length, chunked_of, zipped_of])
def test_an_answer_of_more_than_5_mib_is_not_read(answer: Callable[[int], Behave]) -> None:
    http = Transport(4, 5, 10)
    with serving(answer(MAX_ANSWER)) as server:
        status, body = get(server, http)
    with serving(answer(MAX_ANSWER + 1)) as server, pytest.raises(AnswerTooLarge):
        get(server, http)

    assert (status, len(body)) == (200, MAX_ANSWER)


def test_an_endless_answer_is_abandoned() -> None:
    with serving(chunked_of(1 << 50)) as server, pytest.raises(AnswerTooLarge):
        get(server, Transport(4, 5, 10))


# --- Incomplete answers ---


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"HTTP/1.1 20",
        HEAD,
        HEAD + b"x" * 999,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope",
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x00\x00",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    ],
    ids=lambda content: content[-24:],
)
def test_an_incomplete_answer_is_an_error(content: bytes) -> None:
    def behave(connection: socket.socket, _: threading.Event) -> None:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_RDWR)

    with serving(behave) as server, pytest.raises(requests.RequestException):
        get(server, Transport(4, 5, 5))


# --- Connections ---


def test_connections_are_reused() -> None:
    http = Transport(4, 5, 5)
    with serving(of_length(10)) as server:
        for _ in range(20):
            assert get(server, http) == (200, b"x" * 10)

        assert (server.connections, len(server.requests)) == (1, 20)


def test_threads_share_the_connections() -> None:
    http = Transport(8, 5, 5)
    barrier = threading.Barrier(8)
    answers: list[tuple[int, bytes]] = []

    def work() -> None:
        for _ in range(5):
            barrier.wait(10)
            answers.append(get(server, http))

    with serving(chunked_of(10)) as server:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)

        assert answers == [(200, b"x" * 10)] * 40
        assert server.connections <= 8


def test_a_connection_that_the_server_closed_is_replaced() -> None:
    has_hung_up = threading.Event()

    def answer_and_hang_up(connection: socket.socket, _: threading.Event) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")
        connection.shutdown(socket.SHUT_RDWR)
        has_hung_up.set()

    http = Transport(4, 5, 5)
    with serving(answer_and_hang_up) as server:
        for _ in range(3):
            has_hung_up.clear()
            assert get(server, http) == (200, b"x")
            assert has_hung_up.wait(5)

    assert server.connections == 3


def test_a_connection_with_an_incomplete_answer_is_not_reused() -> None:
    http = Transport(4, TIMEOUT, TIMEOUT)
    behaviours = iter([stall_in_body, of_length(3), of_length(4)])

    def behave(connection: socket.socket, closed: threading.Event) -> None:
        next(behaviours)(connection, closed)

    with serving(behave) as server:
        with pytest.raises(requests.RequestException):
            get(server, http)

        assert [get(server, http), get(server, http)] == [(200, b"xxx"), (200, b"xxxx")]
        assert server.connections == 2


# --- What is sent ---


def test_neither_netrc_nor_cookies_nor_proxies_change_a_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    netrc = tmp_path_factory.mktemp("home") / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")

    def set_cookie(connection: socket.socket, _: threading.Event) -> None:
        connection.sendall(b"HTTP/1.1 204 No Content\r\nSet-Cookie: a=b\r\n\r\n")

    http = Transport(4, 5, 5)
    with serving(set_cookie) as server:
        for _ in range(2):
            http.send("POST", server.url, {"Authorization": "Bearer t"}, b"{}")

    for request in server.requests:
        assert b"\r\nAuthorization: Bearer t\r\n" in request
        assert b"cookie" not in request.lower()
    assert len(server.requests) == 2


def test_a_redirect_is_returned() -> None:
    def redirect(connection: socket.socket, _: threading.Event) -> None:
        connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /other\r\nContent-Length: 0\r\n\r\n")

    with serving(redirect) as server:
        status, headers, _ = Transport(4, 5, 5).send("GET", server.url, {})

    assert (status, headers["location"]) == (302, "/other")
    assert len(server.requests) == 1


# --- Certificates ---


def answer_ok(connection: socket.socket, _: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


@pytest.mark.parametrize(
    ("host", "is_trusted", "is_accepted"),
    [("127.0.0.1", True, True), ("127.0.0.1", False, False), ("other.example", True, False)],
)
def test_only_a_certificate_for_this_host_by_a_trusted_authority_is_accepted(
    host: str, is_trusted: bool, is_accepted: bool, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority.file))  # changes nothing
    if is_trusted:  # as if it were a public authority
        monkeypatch.setattr(requests.adapters, "DEFAULT_CA_BUNDLE_PATH", str(authority.file))
    with serving(answer_ok, authority.issue(host)) as server:
        if is_accepted:
            assert get(server) == (200, b"ok")
        else:
            with pytest.raises(requests.ConnectionError) as raised:
                get(server)
            assert isinstance(raised.value.args[0].reason, TlsError)
            assert server.requests == []
