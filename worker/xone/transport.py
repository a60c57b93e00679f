"""HTTP to XONE: pooled connections, one deadline for the whole call, and a limit on the size of the answer.

The deadline covers look-up of the name, connecting, TLS, request and answer. A socket's timeout is for one operation,
so an answer that trickles in outlasts it. Here the remaining time is set again before each write and each read.

A request that is cut off is given up for good: its connection is reset, so that the system sends nothing of it later.
"""

import http.client
import io
import math
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import RLock
from typing import Any, NamedTuple

import requests
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, Timeout
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, SSLError
from urllib3.util.ssl_match_hostname import CertificateError

from worker.xone.connector import Connector, SocketOption

MAX_ANSWER = 5 * 1024 * 1024  # bytes
CHUNK = 64 * 1024  # bytes
LARGE = 256 * 1024  # bytes; longer answers are counted
MAX_LARGE_ANSWERS = 64 * 1024 * 1024  # bytes of all answers of this process that are large, until they are dealt with
CHECK_AFTER = 0.005  # seconds after which it is looked at again whether a connection is still there
READ_AHEAD = 16 * 1024  # bytes, for each call in flight: most answers fit
TIME_TO_BEGIN = 0.5  # share of the whole time within which a request must begin: the rest is for its answer

# Seconds without traffic until the system asks whether the other end is there, and between two such questions. Routers
# and load balancers then do not forget a connection while XONE thinks about an answer.
KEEP_ALIVE_AFTER, KEEP_ALIVE_INTERVAL = 10, 5
KEEP_ALIVE_TRIES = 3
DEFAULT_IDLE_TIMEOUT = 30.0  # seconds

# After a connection failed that had been idle, half of that time is the limit for a while, if it is shorter.
LEARNED_FOR = 600.0  # seconds
MIN_LEARNED_TIMEOUT = 1.0  # seconds: under load, connections are never idle for so long

IS_LINUX = sys.platform == "linux"
TCP_INFO_LENGTH = 160  # bytes


class AnswerTooLarge(Exception):
    """The body of an answer is larger than MAX_ANSWER, or than what other large answers leave."""


class TooLate(Exception):
    """Nothing was sent: when ``before_send`` returned, too little time was left to read an answer."""


class TlsError(NewConnectionError):
    """The TLS handshake failed: nothing was sent."""


class NotDelivered(NewConnectionError):
    """The other end had closed the connection before any byte of the request reached it."""


@dataclass
class _Call:
    """What the connection has to know of the call that it is used for. Times in monotonic seconds."""

    connect_until: float
    begin_until: float
    deadline: float  # of the head; also of the body, unless it is a stream
    before_send: Callable[[], None]
    timeout: float  # seconds of the whole call; in a stream, without a byte
    stream_until: float | None  # if the body is a stream

    @classmethod
    def starting_now(
        cls, connect_timeout: float, timeout: float, before_send: Callable[[], None], stream_until: float | None
    ) -> "_Call":
        now = time.monotonic()
        if stream_until is not None:
            timeout = max(min(timeout, stream_until - now), 0.001)
        begin_until = now + timeout * TIME_TO_BEGIN
        connect_until = min(now + connect_timeout, begin_until)
        return cls(connect_until, begin_until, now + timeout, before_send, timeout, stream_until)


class _CallTimeout(Timeout):
    """Carries the call through urllib3 to the connection."""

    call: _Call

    @classmethod
    def of(cls, call: _Call) -> "_CallTimeout":
        timeout = cls(total=max(call.deadline - time.monotonic(), 0.001))
        timeout.call = call
        return timeout

    def clone(self) -> "_CallTimeout":
        """As of Timeout, without checking the numbers again: it is called twice for each call."""
        timeout = _CallTimeout.__new__(_CallTimeout)
        timeout.__dict__.update(self.__dict__, _start_connect=None)
        return timeout


class _UntilDeadline(io.RawIOBase):
    """A socket's bytes until a deadline (monotonic seconds). Raises TimeoutError after it."""

    def __init__(self, source: io.RawIOBase, sock: socket.socket, deadline: float) -> None:
        self._source = source
        self._sock = sock
        self.deadline = deadline
        self.max_silence = math.inf  # seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(min(_left(self.deadline), self.max_silence))
        return self._source.readinto(buffer)

    def close(self) -> None:
        self._source.close()
        super().close()


def _left(deadline: float) -> float:
    """Seconds until the deadline. Raises TimeoutError after it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the whole call took too long")
    return left


class _Traffic(NamedTuple):
    """What the system knows of a connection's packets: see TCP_INFO in tcp(7), and linux/tcp.h for the places."""

    bytes_acked: int  # by the other end
    segments_sent: int  # with data, repeats included

    @classmethod
    def of(cls, info: bytes) -> "_Traffic | None":
        """None where the system does not tell. info: from _tcp_info."""
        if len(info) < TCP_INFO_LENGTH:
            return None
        return cls(struct.unpack_from("Q", info, 120)[0], struct.unpack_from("I", info, 156)[0])


def _tcp_info(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_LENGTH) if IS_LINUX else b""


class _Connection(HTTPConnection):
    """A connection that knows its call, and since when it is idle."""

    call: _Call
    connector: Connector
    idle_since: float | None = None  # monotonic seconds; None if it was not used yet
    idle_for = 0.0  # seconds, before the call
    taken_at = 0.0  # monotonic seconds: for the call, when urllib3 looked whether it is still connected
    _peer: Any = None  # its address
    is_answer_due = False  # something of a request may have been sent, and no head of an answer has come
    _request: list[bytes]  # head and body, which are sent as one
    _info_before = b""  # of the system, before the request
    _wrote_all = False

    def response_class(self, sock: socket.socket, *args: Any, **kwargs: Any) -> "_Response":  # type: ignore[override]
        return _Response(self, sock, *args, **kwargs)

    def _new_conn(self) -> socket.socket:
        self.idle_since = None
        try:
            sock = self.connector.connect(self._dns_host.strip("[]"), self.port, self.call.connect_until)
            self._peer = sock.getpeername()
            sock.settimeout(_left(self.call.connect_until))  # for the TLS handshake
        except TimeoutError as error:
            raise ConnectTimeoutError(self, f"no connection to {self.host} in time") from error
        except OSError as error:
            raise NewConnectionError(self, f"no connection to {self.host}: {type(error).__name__}") from error
        return sock

    def request(self, *args: Any, **kwargs: Any) -> None:
        """Sends a request, unless ``before_send`` raises or leaves too little time."""
        call = self.call
        call.before_send()
        if time.monotonic() > call.begin_until:
            raise TooLate
        took_long = time.monotonic() - self.taken_at > CHECK_AFTER
        if self.idle_since is not None and took_long and not self.is_connected:
            raise NotDelivered(self, "the connection was closed meanwhile")
        self._request = []
        super().request(*args, **kwargs)
        self._info_before, self._wrote_all = _tcp_info(self.sock), False
        self.sock.settimeout(_left(call.deadline))
        self.is_answer_due = True
        try:
            self.sock.sendall(b"".join(self._request))
        except OSError as error:
            if self._has_sent_nothing():
                raise NotDelivered(self, "the connection was closed meanwhile") from error
            raise
        self._wrote_all = True

    def send(self, data: Any) -> None:
        self._request.append(data)

    def _has_sent_nothing(self) -> bool:
        before, after = _Traffic.of(self._info_before), _Traffic.of(_tcp_info(self.sock))
        return before is not None and after is not None and after.segments_sent == before.segments_sent

    def was_closed_before_request(self) -> bool:
        """Whether the other end, which has closed the connection without an answer, had done so before the request.

        Each packet from the other end acknowledges what it has received by then. So if nothing of the request is
        acknowledged, it was closed before anything of the request had come.
        """
        if not self._wrote_all:  # the connection was reset meanwhile, which does not show what was received
            return False
        before, after = _Traffic.of(self._info_before), _Traffic.of(_tcp_info(self.sock))
        return before is not None and after is not None and after.bytes_acked == before.bytes_acked

    def close(self) -> None:
        """Closes the connection. Resets it if an answer is due: the system then sends nothing of the request later."""
        if self.is_answer_due and self.sock is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.is_answer_due = False
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, connection: _Connection, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._connection: _Connection | None = connection
        self._source = _UntilDeadline(self.fp.detach(), sock, connection.call.deadline)
        self.fp = io.BufferedReader(self._source, READ_AHEAD)

    def begin(self) -> None:
        connection = self._connection
        if connection is None:  # it has begun already
            return
        try:
            super().begin()
        except http.client.RemoteDisconnected as error:
            if connection.was_closed_before_request():
                raise NotDelivered(connection, "the connection was closed meanwhile") from error
            raise
        connection.is_answer_due = False
        self._connection = None
        if connection.call.stream_until is not None:
            self._source.deadline, self._source.max_silence = connection.call.stream_until, connection.call.timeout

    def _read_status(self) -> tuple[str, int, str]:
        """The status line of the final answer. Skips informational ones (1xx, RFC 9110, section 15.2)."""
        while True:
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if not 100 <= status < 200:
                return version, status, reason
            http.client.parse_headers(self.fp)


class _SecureConnection(_Connection, HTTPSConnection):
    def connect(self) -> None:
        try:
            super().connect()
        except (
            OSError,
            SSLError,
            CertificateError,
        ) as error:  # after the handshake, the same errors do not show what was sent
            self.connector.note_failure(self._peer)
            raise TlsError(self, f"no TLS connection: {type(error).__name__}") from error


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection

    def __init__(self, *args: Any, connector: Connector, idle_timeout: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._connector = connector
        self._idle_timeout = idle_timeout
        self._suspect_until = 0.0  # monotonic seconds: connections that are idle since before are not used again
        self._learned_timeout, self._learned_at = idle_timeout, 0.0  # from a connection that failed after being idle

    def _new_conn(self) -> Any:
        connection: Any = super()._new_conn()
        connection.connector = self._connector
        return connection

    def _get_conn(self, timeout: float | None = None) -> Any:
        connection: Any = super()._get_conn(timeout)
        if not connection.is_closed:
            now = time.monotonic()
            is_learned = now - self._learned_at < LEARNED_FOR
            idle_timeout = self._learned_timeout if is_learned else self._idle_timeout
            connection.taken_at, connection.idle_for = now, now - connection.idle_since
            if connection.idle_for > idle_timeout or connection.idle_since < self._suspect_until:
                connection.close()
        return connection

    def _put_conn(self, conn: Any) -> None:
        if conn is not None:
            conn.idle_since = time.monotonic()
        super()._put_conn(conn)

    def _validate_conn(self, conn: Any) -> None:
        if conn.is_closed:
            conn.connect()
        super()._validate_conn(conn)

    def _make_request(self, conn: Any, *args: Any, **kwargs: Any) -> Any:
        conn.call = kwargs["timeout"].call
        try:
            return super()._make_request(conn, *args, **kwargs)
        except (OSError, HTTPError):
            if conn.idle_since is not None:
                self._distrust_idle_connections(conn.idle_for)
            raise

    def _distrust_idle_connections(self, idle_for: float) -> None:
        """A connection failed that had been idle: something on the way may forget connections, and this sooner."""
        self._suspect_until = self._learned_at = time.monotonic()
        self._learned_timeout = min(self._learned_timeout, max(idle_for / 2, MIN_LEARNED_TIMEOUT), self._idle_timeout)


class _SecurePool(_Pool, HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class _Adapter(HTTPAdapter):
    def __init__(self, connections: int, connector: Connector, idle_timeout: float) -> None:
        self._connector, self._idle_timeout = connector, idle_timeout
        super().__init__(pool_connections=2, pool_maxsize=connections, max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {
            scheme: partial(pool, connector=self._connector, idle_timeout=self._idle_timeout)
            for scheme, pool in {"http": _Pool, "https": _SecurePool}.items()
        }

    def build_response(self, req: requests.PreparedRequest, resp: Any) -> requests.Response:
        """Status, headers and the body to be read: no cookies, and no history."""
        response = requests.Response()
        response.status_code, response.headers, response.raw = resp.status, CaseInsensitiveDict(resp.headers), resp
        return response


class Transport:
    """A pool of connections. Follows no redirect, keeps no cookie, reads no .netrc. Threads share it."""

    def __init__(
        self, connections: int, connect_timeout: float, timeout: float, idle_timeout: float = DEFAULT_IDLE_TIMEOUT
    ) -> None:
        """connections: how many are kept open. The others in seconds.

        connect_timeout: from the look-up of the name to the end of the TLS handshake. timeout: for the whole call.
        idle_timeout: a connection that was not used for so long is not used again.
        """
        self._connect_timeout = connect_timeout
        self._timeout = timeout
        self._adapter = _Adapter(connections, Connector(_socket_options(timeout)), idle_timeout)

    def send(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        body: bytes | None = None,
        before_send: Callable[[], None] = lambda: None,
    ) -> tuple[int, CaseInsensitiveDict[str], bytes]:
        """Sends a request and returns status, headers and whole body of the answer.

        before_send: called when the connection stands, before the first byte of the request; what it raises ends the
        call. Raises requests.RequestException, also if the body breaks off or outlasts the deadline, AnswerTooLarge,
        and TooLate.
        """
        with self.open(method, url, headers, body, before_send) as answer:
            return answer.status, answer.headers, answer.read()

    @contextmanager
    def open(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        body: bytes | None = None,
        before_send: Callable[[], None] = lambda: None,
        stream_until: float | None = None,
    ) -> Iterator["OpenAnswer"]:
        """As ``send``, but the body is still to be read.

        stream_until: monotonic seconds until which a body may take that is read as a stream. Its head, and each silence
        in it, then has the timeout of a call.
        """
        call = _Call.starting_now(self._connect_timeout, self._timeout, before_send, stream_until)
        request = requests.PreparedRequest()
        request.method, request.body = method, body
        request.prepare_url(url, None)
        length = {"Content-Length": str(len(body))} if body is not None else {}
        request.headers = CaseInsensitiveDict({**headers, **length})
        timeout = _CallTimeout.of(call)
        response = self._adapter.send(request, stream=True, timeout=timeout, verify=True)  # type: ignore[arg-type]
        with response:
            yield OpenAnswer(response)


class OpenAnswer:
    """An answer whose body is still to be read, once: whole, or as a stream."""

    def __init__(self, response: requests.Response) -> None:
        self.status, self.headers = response.status_code, response.headers
        self._response = response

    def read(self) -> bytes:
        """The whole body. Raises AnswerTooLarge, and requests.RequestException if it breaks off."""
        return _read(self._response)

    def stream(self) -> Iterator[bytes]:
        """The body in pieces of up to CHUNK bytes, as they come. Raises requests.RequestException if it breaks off."""
        try:
            while chunk := self._response.raw.read1(CHUNK, decode_content=True):
                yield chunk
        except _BROKEN_OFF as error:
            raise _broken_off(error) from error


def _socket_options(timeout: float) -> list[SocketOption]:
    """For the connections. timeout: seconds after which the system gives up data that the other end does not take."""
    options = [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    ]
    of_linux = {
        "TCP_KEEPIDLE": KEEP_ALIVE_AFTER,
        "TCP_KEEPINTVL": KEEP_ALIVE_INTERVAL,
        "TCP_KEEPCNT": KEEP_ALIVE_TRIES,
        "TCP_USER_TIMEOUT": max(round(timeout * 1000), 1),
    }
    named = [(getattr(socket, name, None), value) for name, value in of_linux.items()]
    return options + [(socket.IPPROTO_TCP, option, value) for option, value in named if option is not None]


def _read(response: requests.Response) -> bytes:
    body = bytearray()
    share = _Share()
    try:
        for chunk in response.raw.stream(CHUNK, decode_content=True):
            body += chunk
            if len(body) > MAX_ANSWER or (len(body) > LARGE and not share.grow(len(body))):
                response.raw.close()
                del body, share  # the error keeps what is local
                raise AnswerTooLarge
    except _BROKEN_OFF as error:
        raise _broken_off(error) from error
    return _LargeBody(body, share) if share.size else bytes(body)


_BROKEN_OFF = (HTTPError, OSError, http.client.HTTPException)


def _broken_off(error: Exception) -> requests.ConnectionError:
    return requests.ConnectionError(f"the answer broke off: {type(error).__name__}")


class _Share:
    """What one large answer takes of MAX_LARGE_ANSWERS, as long as this object lives."""

    _lock = RLock()  # an object may come to its end while the same thread holds it
    _all = 0

    def __init__(self) -> None:
        self.size = 0

    def grow(self, size: int) -> bool:
        """Whether so many bytes are left for this answer."""
        with _Share._lock:
            more = size - self.size
            if _Share._all + more > MAX_LARGE_ANSWERS:
                return False
            _Share._all, self.size = _Share._all + more, size
        return True

    def __del__(self) -> None:
        with _Share._lock:
            _Share._all -= self.size


class _LargeBody(bytes):
    """A body that counts until nothing needs it any more."""

    _share: _Share

    def __new__(cls, body: bytearray, share: _Share) -> "_LargeBody":
        self = super().__new__(cls, body)
        self._share = share
        return self
