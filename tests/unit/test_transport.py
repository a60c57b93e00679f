"""The transport, against raw sockets: one deadline for the whole call, one bound on the answer, reused connections."""

import gzip
import select
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
import requests

from tests.support.certificates import Authority, Certificate
from tests.support.system import until
from worker.xone import name_lookup, transport
from worker.xone.connector import ATTEMPT_DELAY, Connector
from worker.xone.name_lookup import NameLookup
from worker.xone.transport import LARGE, MAX_ANSWER, AnswerTooLarge, NotDelivered, TlsError, TooLate, Transport

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


def answers_103_as_fast_as_it_can(connection: socket.socket, gone: threading.Event) -> None:
    while not gone.is_set():
        connection.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n" * 50)


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
        answers_103_as_fast_as_it_can,
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


# --- The deadline: before the connection stands ---


class Resolver:
    """Stands in for ``socket.getaddrinfo``: knows one name, and answers when it is let to."""

    def __init__(self, addresses: list[tuple[str, int]]) -> None:
        self.addresses = addresses
        self.asked = 0
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.fails = False

    def __call__(self, host: str, port: int, **options: Any) -> Any:
        if options.get("flags") == socket.AI_NUMERICHOST or host != "xone.example":
            return SYSTEM_RESOLVER(host, port, **options)
        may_answer = self.may_answer
        self.asked += 1
        may_answer.wait(DRIP_SECONDS)
        if self.fails:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", address) for address in self.addresses]


SYSTEM_RESOLVER = socket.getaddrinfo


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolver]:
    standing_in = Resolver([])
    monkeypatch.setattr(socket, "getaddrinfo", standing_in)
    yield standing_in
    standing_in.may_answer.set()


def get_by_name(http: Transport, server: Server) -> int:
    status, _, _ = http.send("GET", server.url.replace("127.0.0.1", "xone.example"), {})
    return status


def address_of(server: Server) -> tuple[str, int]:
    return "127.0.0.1", int(server.url.split(":")[-1].strip("/"))


def test_a_name_that_is_looked_up_late_ends_the_call_in_time_and_serves_the_next(resolver: Resolver) -> None:
    http = Transport(4, TIMEOUT, 10)
    with serving(of_length(1)) as server:
        resolver.addresses = [address_of(server)]
        resolver.may_answer.clear()
        started = time.monotonic()
        with pytest.raises(requests.ConnectTimeout):
            get_by_name(http, server)
        took = time.monotonic() - started
        assert (server.connections, server.requests) == (0, [])

        resolver.may_answer.set()
        assert get_by_name(http, server) == 200

    assert TIMEOUT * 0.9 <= took < GENEROUS
    assert resolver.asked == 1


def test_connecting_takes_no_more_than_half_of_the_whole_time(resolver: Resolver) -> None:
    resolver.may_answer.clear()
    with serving(of_length(1)) as server:
        started = time.monotonic()
        with pytest.raises(requests.ConnectTimeout):
            get_by_name(Transport(4, 10, 2 * TIMEOUT), server)
        took = time.monotonic() - started

    assert took < GENEROUS / 2 + TIMEOUT


def test_threads_share_a_look_up_and_its_answer_for_a_while(resolver: Resolver) -> None:
    now = 100.0
    lookup = NameLookup(lambda: now)
    resolver.addresses = [("127.0.0.1", 1)]
    resolver.may_answer.clear()
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(len(lookup.addresses("xone.example", 443, 10)))) for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    resolver.may_answer.set()
    for thread in threads:
        thread.join(10)
    assert (found, resolver.asked) == ([1] * 20, 1)

    now += name_lookup.FRESH_FOR - 0.1
    lookup.addresses("xone.example", 443, 10)
    assert resolver.asked == 1
    now += 0.2
    lookup.addresses("xone.example", 443, 10)
    assert resolver.asked == 2


def test_look_ups_that_hang_are_few_and_do_not_keep_others_from_an_answer(resolver: Resolver) -> None:
    now = 100.0
    lookup = NameLookup(lambda: now)
    resolver.may_answer.clear()
    for _ in range(3 * name_lookup.MAX_RUNNING):
        with pytest.raises(TimeoutError):
            lookup.addresses("xone.example", 443, 0)
        now += name_lookup.HANGS_AFTER

    assert resolver.asked <= name_lookup.MAX_RUNNING
    assert len(lookup.addresses("127.0.0.1", 443, 0)) == 1, "a numeric address needs no look-up"


def test_a_look_up_that_takes_longer_than_any_wait_for_it_serves_those_who_wait_then(resolver: Resolver) -> None:
    """Such as one that always takes twelve seconds: the second starts before the first ends."""
    now = 100.0
    lookup = NameLookup(lambda: now)
    first, second = threading.Event(), threading.Event()
    resolver.addresses, resolver.may_answer = [("127.0.0.1", 1)], first
    with pytest.raises(TimeoutError):
        lookup.addresses("xone.example", 443, 0)
    now += name_lookup.HANGS_AFTER
    until(lambda: resolver.asked == 1)
    resolver.may_answer = second
    found: list[int] = []
    waiting = threading.Thread(target=lambda: found.append(len(lookup.addresses("xone.example", 443, 10))))
    waiting.start()
    until(lambda: resolver.asked == 2)
    first.set()
    waiting.join(10)

    assert found == [1]
    second.set()


def test_a_name_that_does_not_exist_is_asked_for_again(resolver: Resolver) -> None:
    lookup = NameLookup()
    resolver.addresses, resolver.fails = [("127.0.0.1", 1)], True
    with pytest.raises(OSError, match="gaierror"):
        lookup.addresses("xone.example", 443, 10)
    resolver.fails = False

    assert lookup.addresses("xone.example", 443, 10)


@contextmanager
def dead_addresses(number: int) -> Iterator[list[tuple[str, int]]]:
    """Addresses that neither take nor refuse a connection: their queues are full."""
    with ExitStack() as stack:
        addresses = []
        for at in range(number):
            full = stack.enter_context(socket.create_server((f"127.0.0.{at + 2}", 0), backlog=0))
            addresses.append(full.getsockname())
            for _ in range(8):
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(full.getsockname())
        yield addresses


def announces_its_end(connection: socket.socket, _: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx")


def test_dead_addresses_cost_a_fraction_of_a_second_each_and_only_once(resolver: Resolver) -> None:
    http = Transport(4, 3, 10)
    with serving(announces_its_end) as server, dead_addresses(4) as dead, socket.socket() as refusing:
        refusing.bind(("127.0.0.1", 0))
        resolver.addresses = [*dead, refusing.getsockname(), address_of(server)]
        took = []
        for _ in range(2):
            started = time.monotonic()
            assert get_by_name(http, server) == 200
            took.append(time.monotonic() - started)

    assert took[1] < 3 * ATTEMPT_DELAY < took[0]


def test_addresses_that_are_all_dead_end_with_the_connect_time_out(resolver: Resolver) -> None:
    with serving(of_length(1)) as server, dead_addresses(6) as dead:
        resolver.addresses = dead
        started = time.monotonic()
        with pytest.raises(requests.ConnectTimeout):
            get_by_name(Transport(4, 2 * TIMEOUT, 10), server)
        took = time.monotonic() - started

    assert took < 2 * GENEROUS


def test_an_address_whose_tls_stalls_is_left_for_another(
    resolver: Resolver, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests.adapters, "DEFAULT_CA_BUNDLE_PATH", str(authority.file))
    http = Transport(4, TIMEOUT, 10)
    certificate = authority.issue("xone.example")
    with serving(answer_ok, certificate) as server, socket.create_server(("127.0.0.1", 0)) as silent:
        resolver.addresses = [silent.getsockname(), address_of(server)]
        with pytest.raises(requests.ConnectionError) as raised:
            get_by_name(http, server)
        assert isinstance(raised.value.args[0].reason, TlsError)

        assert get_by_name(http, server) == 200


def test_a_tls_handshake_that_drips_ends_with_the_connect_time_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        gone = threading.Event()

        def accept() -> None:
            with suppress(OSError):
                connection, _ = listening.accept()
                with connection:
                    drip(connection, gone, b"\x16\x03\x03\x40\x00" + b"\x02\x00\x3f\xfc" + b"x" * 200)

        threading.Thread(target=accept, daemon=True).start()
        started = time.monotonic()
        with pytest.raises(requests.ConnectionError) as raised:
            Transport(4, TIMEOUT, 10).send("GET", f"https://127.0.0.1:{listening.getsockname()[1]}/", {})
        took = time.monotonic() - started
        gone.set()

    assert isinstance(raised.value.args[0].reason, TlsError)
    assert took < GENEROUS


UNDER_GEVENT = """
from gevent.monkey import patch_all
patch_all()
import socket, sys
import gevent.event
from worker.xone.transport import Transport

url = sys.argv[1]
may_answer = gevent.event.Event()
system = socket.getaddrinfo

def look_up(host, *rest, **options):
    if host != "slow.example" or options.get("flags") == socket.AI_NUMERICHOST:
        return system(host, *rest, **options)
    may_answer.wait(20)
    return system("127.0.0.1", *rest, **options)

socket.getaddrinfo = look_up
http = Transport(8, 3, 10)
late = gevent.spawn(lambda: http.send("GET", url.replace("127.0.0.1", "slow.example"), {}))
fine = [gevent.spawn(lambda: http.send("GET", url.replace("127.0.0.1", "localhost"), {})[0]) for _ in range(8)]
print([greenlet.get(timeout=10) for greenlet in fine], not late.ready())
late.join(10)
print(type(late.exception).__name__)
"""


@pytest.mark.slow
def test_it_works_with_gevent() -> None:
    with serving(of_length(1)) as server:
        run = subprocess.run(
            [sys.executable, "-c", UNDER_GEVENT, server.url], capture_output=True, text=True, timeout=60, check=False
        )

    assert run.stdout.splitlines() == [f"{[200] * 8} True", "ConnectTimeout"], run.stderr


# --- The deadline: before the first byte of the request ---


class Lost(Exception):
    pass


def test_what_is_raised_when_the_connection_stands_ends_the_call_with_nothing_sent() -> None:
    http = Transport(4, 5, 5)
    connected: list[int] = []

    def lose() -> None:
        until(lambda: server.connections == 1)
        connected.append(server.connections)
        raise Lost

    with serving(of_length(1)) as server:
        with pytest.raises(Lost):
            http.send("POST", server.url, {}, b"{}", lose)
        assert (connected, server.requests) == ([1], [])

        assert get(server, http) == (200, b"x")
        assert len(server.requests) == 1


def test_nothing_is_sent_once_too_little_time_is_left_for_an_answer() -> None:
    http = Transport(4, 5, 2 * TIMEOUT)

    def wait() -> None:
        begun = time.monotonic()
        until(lambda: time.monotonic() > begun + 1.1 * TIMEOUT)

    with serving(of_length(1)) as server:
        for _ in range(2):  # on a new connection, and on one that is used again
            with pytest.raises(TooLate):
                http.send("POST", server.url, {}, b"{}", wait)
            assert server.requests == []
        get(server, http)
        with pytest.raises(TooLate):
            http.send("POST", server.url, {}, b"{}", wait)

        assert len(server.requests) == 1


def test_a_request_that_is_cut_off_is_not_sent_to_its_end_later() -> None:
    body = b"x" * 64 * 1024 * 1024
    received: list[int] = []
    ended: list[BaseException | None] = []
    cut_off, read_on = threading.Event(), threading.Event()

    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            connection, _ = listening.accept()
            with connection:
                cut_off.wait(DRIP_SECONDS)
                try:
                    while more := connection.recv(1 << 20):
                        received.append(len(more))
                    ended.append(None)
                except OSError as error:
                    ended.append(error)
            read_on.set()

        threading.Thread(target=accept, daemon=True).start()
        started = time.monotonic()
        with pytest.raises(requests.ConnectionError, match=r"(?i)time.?out|took too long|timed out"):
            Transport(4, TIMEOUT, TIMEOUT).send("POST", f"http://127.0.0.1:{listening.getsockname()[1]}/", {}, body)
        took = time.monotonic() - started
        cut_off.set()
        assert read_on.wait(10)

    assert took < GENEROUS
    assert isinstance(ended[0], ConnectionResetError)
    assert sum(received) < len(body)


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


def test_large_answers_have_a_limit_for_all_of_them_that_are_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_LARGE_ANSWERS", 2 * MAX_ANSWER)
    http = Transport(4, 5, 10)
    with serving(of_length(MAX_ANSWER)) as large, serving(of_length(LARGE)) as small:
        for _ in range(3):  # what they take is given back
            in_use = [get(large, http)[1] for _ in range(2)]
            with pytest.raises(AnswerTooLarge):
                get(large, http)
            assert len(get(small, http)[1]) == LARGE
            in_use.clear()


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


def forgetful(seconds: float) -> Behave:
    def behave(connection: socket.socket, gone: threading.Event) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")
        if not select.select([connection], [], [], seconds)[0]:
            gone.wait(DRIP_SECONDS)

    return behave


def test_a_connection_that_was_idle_for_too_long_is_not_used_again() -> None:
    """Behind something that forgets idle connections, and says nothing to them from then on."""
    forgets_after = 0.4
    http = Transport(4, 5, 5, idle_timeout=forgets_after / 2)
    with serving(forgetful(forgets_after)) as server:
        for _ in range(3):
            started = time.monotonic()
            assert [get(server, http) for _ in range(2)] == [(200, b"x")] * 2
            until(lambda: time.monotonic() > started + 1.5 * forgets_after)  # noqa: B023

        assert server.connections == 3


def test_after_one_forgotten_connection_the_others_are_not_tried() -> None:
    served: dict[int, int] = defaultdict(int)

    def answers_once(connection: socket.socket, gone: threading.Event) -> None:
        served[id(connection)] += 1
        if served[id(connection)] > 1:
            gone.wait(DRIP_SECONDS)
        together.wait(5)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")

    http = Transport(8, TIMEOUT, TIMEOUT)
    together = threading.Barrier(4)
    with serving(answers_once) as server:
        threads = [threading.Thread(target=get, args=(server, http)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert server.connections == 4
        together = threading.Barrier(1)

        with pytest.raises(requests.Timeout):
            get(server, http)
        assert get(server, http) == (200, b"x")
        assert server.connections == 5


def test_a_limit_that_is_too_long_is_learned_from_one_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    forgets_after = 0.4
    monkeypatch.setattr(transport, "MIN_LEARNED_TIMEOUT", forgets_after / 2)
    http = Transport(4, TIMEOUT, TIMEOUT)
    outcomes = []
    with serving(forgetful(forgets_after)) as server:
        for _ in range(4):
            started = time.monotonic()
            try:
                outcomes.append(get(server, http)[0])
            except requests.Timeout:
                outcomes.append(0)
            until(lambda: time.monotonic() > started + 1.5 * forgets_after, every=0.01)  # noqa: B023

    assert outcomes == [200, 0, 200, 200]


def test_idle_connections_are_kept_alive_and_what_is_not_taken_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connector = Connector(transport._socket_options(30.0))
        with connector.connect("127.0.0.1", server.getsockname()[1], time.monotonic() + 5) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == transport.KEEP_ALIVE_AFTER
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000


def closes_after(requests: int, abruptly: bool = False) -> Behave:
    """Answers so many requests of a connection, and closes it."""
    left = defaultdict[int, int](lambda: requests)

    def behave(connection: socket.socket, _: threading.Event) -> None:
        left[id(connection)] -= 1
        if left[id(connection)] >= 0:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")
        if left[id(connection)] <= 0:
            close(connection, abruptly)

    return behave


def close(connection: socket.socket, abruptly: bool) -> None:
    if abruptly:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    else:
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@pytest.mark.parametrize("is_noticed", [True, False], ids=["noticed", "not noticed"])
@pytest.mark.parametrize("abruptly", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("body", [None, b"x" * 500])
def test_a_request_for_a_connection_that_was_closed_before_is_not_delivered(
    is_noticed: bool, abruptly: bool, body: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed at the last moment. Where it is not noticed, the request goes out, and nobody takes it."""
    hangs_up, closed = threading.Event(), threading.Event()

    def answers_once(connection: socket.socket, _: threading.Event) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")
        hangs_up.wait(5)
        close(connection, abruptly)
        closed.set()

    def hang_up() -> None:
        hangs_up.set()
        assert closed.wait(5)

    http = Transport(4, 5, 5)
    with serving(answers_once) as server:
        get(server, http)
        if not is_noticed:
            monkeypatch.setattr(transport._Connection, "is_connected", property(lambda self: self.sock is not None))
        with pytest.raises(requests.ConnectionError) as raised:
            http.send("POST", server.url, {}, body, hang_up)

    assert isinstance(raised.value.args[0].reason, NotDelivered)
    assert len(server.requests) == 1


@pytest.mark.parametrize("is_before", [True, False], ids=["closed before", "closed after"])
def test_with_tls_too_it_is_told_whether_a_request_came_before_the_end(
    is_before: bool, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests.adapters, "DEFAULT_CA_BUNDLE_PATH", str(authority.file))
    monkeypatch.setattr(transport._Connection, "is_connected", property(lambda self: self.sock is not None))
    hangs_up, closed = threading.Event(), threading.Event()

    def answers_once(connection: socket.socket, _: threading.Event) -> None:
        if len(server.requests) == 1:
            answer_ok(connection, _)
            if not is_before:
                return
            hangs_up.wait(5)
        close(connection, abruptly=False)
        closed.set()

    def hang_up() -> None:
        hangs_up.set()
        assert not is_before or closed.wait(5)

    http = Transport(4, 5, 5)
    with serving(answers_once, authority.issue("127.0.0.1")) as server:
        get(server, http)
        with pytest.raises(requests.ConnectionError) as raised:
            http.send("POST", server.url, {}, b"x" * 500, hang_up)

    assert isinstance(getattr(raised.value.args[0], "reason", None), NotDelivered) is is_before


@pytest.mark.parametrize("answered", [0, 1], ids=["new connection", "used again"])
@pytest.mark.parametrize("abruptly", [False, True], ids=["closed", "reset"])
def test_a_request_that_was_received_and_not_answered_may_have_been_delivered(answered: int, abruptly: bool) -> None:
    received = threading.Event()

    def takes_it_and_hangs_up(connection: socket.socket, _: threading.Event) -> None:
        if len(server.requests) <= answered:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")
        else:
            received.set()
            close(connection, abruptly)

    http = Transport(4, 5, 5)
    with serving(takes_it_and_hangs_up) as server:
        for _ in range(answered):
            get(server, http)
        with pytest.raises(requests.ConnectionError) as raised:
            http.send("POST", server.url, {}, b"x" * 500)

    assert received.is_set()
    assert not isinstance(getattr(raised.value.args[0], "reason", None), NotDelivered)


@pytest.mark.parametrize("statuses", [[100], [102], [103], [199], [101], [100, 103, 102] * 3, [103] * 500])
def test_informational_answers_are_skipped_whatever_their_number(statuses: list[int]) -> None:
    def informs(connection: socket.socket, _: threading.Event) -> None:
        for status in statuses:
            connection.sendall(b"HTTP/1.1 %d Info\r\nLink: </style.css>; rel=preload\r\n\r\n" % status)
        connection.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 1\r\n\r\nx")

    http = Transport(4, 5, 5)
    with serving(informs) as server:
        assert [get(server, http) for _ in range(2)] == [(201, b"x")] * 2
        assert server.connections == 1


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
