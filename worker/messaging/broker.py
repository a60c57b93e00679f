"""Connections to the broker, and what their errors mean."""

import random
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ssl import CERT_REQUIRED, SSLCertVerificationError
from threading import Timer
from traceback import walk_tb
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from amqp.exceptions import AccessRefused, AMQPError, ContentTooLarge, NotAllowed, NotFound, PreconditionFailed
from amqp.serialization import PROPERTY_CLASSES, decode_properties_basic
from amqp.spec import Basic
from kombu import Connection
from kombu import connection as kombu_connection
from kombu.exceptions import OperationalError

from worker import gevent_support

# Seconds. Without them, operations hang while RabbitMQ has an alarm or a connection is half dead.
_SOCKET_TIMEOUTS = {"connect_timeout": 5, "read_timeout": 60, "write_timeout": 60}


HEARTBEAT = 8  # seconds; agreed with RabbitMQ for the connection that consumes: both send something as often
MAX_SILENCE = 2 * HEARTBEAT - 1.0  # seconds; RabbitMQ closes a connection after two to three heartbeats of silence


class AnyHost(Connection):
    """A connection to any of the hosts of a URL: it tries each once, beginning with the one that answered last.

    kombu's own tries two, always from the first, which with three hosts reaches the third one never. Each process has
    its own order, so that workers spread over the hosts, also those that a host which died has left.
    """

    def __init__(self, url: str, *args: Any, **kwargs: Any) -> None:
        self._url = url
        self._hosts = _hosts_in_order(url)
        super().__init__(";".join(self._hosts), *args, **kwargs)  # type: ignore[no-untyped-call]
        self._try(self._hosts[0])

    def switch(self, conn_str: str) -> None:
        del self.port, self.virtual_host  # else kombu keeps those of the last host where this one names none
        super().switch(conn_str)  # type: ignore[no-untyped-call]
        self._try(conn_str)

    def _try(self, host: str) -> None:
        self._tried = host
        if isinstance(self.ssl, dict):
            # Unless told the name, neither kombu nor py-amqp checks that the certificate is for that host.
            self.ssl = {**self.ssl, "server_hostname": urlsplit(host).hostname or "localhost"}

    def _ensure_connection(self, errback: Any = None, max_retries: Any = None, *args: Any, **kwargs: Any) -> Any:
        if len(self._hosts) > 1 and max_retries == 1:  # of connect() and of operations that need a connection
            max_retries = len(self._hosts) - 1
        return super()._ensure_connection(errback, max_retries, *args, **kwargs)  # type: ignore[no-untyped-call]

    def _connection_factory(self) -> Any:
        connection = super()._connection_factory()  # type: ignore[no-untyped-call]
        _order[self._url] = [self._tried, *self._others()]
        return connection

    def try_last(self) -> None:
        """This connection was lost: the next ones of this process try the other hosts first."""
        _order[self._url] = [*self._others(), self._tried]

    def _others(self) -> list[str]:
        return [host for host in _hosts_in_order(self._url) if host != self._tried]

    @property
    def host_url(self) -> str:
        """The URL of the host that was tried last: where it is connected, of that one."""
        return self._tried


_order: dict[str, list[str]] = {}  # by URL: its hosts, in the order in which this process tries them


def _hosts_in_order(url: str) -> list[str]:
    if url not in _order:
        hosts = url.split(";")
        random.shuffle(hosts)
        _order[url] = hosts
    return _order[url]


class Peer:
    """The broker at the other end of an open connection with heartbeats. Watched by another thread than its own."""

    def __init__(self, connection: Connection) -> None:
        self._amqp = connection.connection
        self._socket = self._amqp.sock  # py-amqp connects anew if it is asked for it after a connection was lost
        self._received, self._heard_at = -1, 0.0

    def seconds_silent(self) -> float:
        """Seconds for which nothing has come, as of the last calls. What came and was not read yet counts, too."""
        if self._amqp.bytes_recv != self._received or self._has_unread():
            self._received, self._heard_at = self._amqp.bytes_recv, time.monotonic()
        return time.monotonic() - self._heard_at

    def _has_unread(self) -> bool:
        with suppress(OSError, ValueError):  # it has just been closed
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            return bool(poll.poll(0))
        return False

    def hang_up(self) -> None:
        """Ends the connection for the thread that uses it, also in the middle of reading or writing."""
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # that of SSLSocket is for its own thread only


@contextmanager
def answering_within(seconds: float, connection: Connection) -> Iterator[None]:
    """Hangs up if the block takes longer, which raises the connection's error there.

    py-amqp waits for an answer as long as the broker sends something, be it heartbeats.
    """
    if connection.transport.driver_type != "amqp":
        yield
        return
    connection.connect()
    timer = Timer(seconds, Peer(connection).hang_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def connect(url: str) -> Connection:
    """A connection for publishing and declaring. url: amqp:, amqps: or memory:. It connects at first use; close it.

    It agrees on no heartbeats, as nothing would send them while it is idle; TCP's keep-alive finds a dead peer.
    """
    options = {"polling_interval": 0.01} if url.startswith("memory") else dict(_SOCKET_TIMEOUTS)
    plain_url, tls = with_tls(url)
    return AnyHost(plain_url, ssl=tls, transport_options=options, heartbeat=0)


def with_tls(url: str) -> tuple[str, dict[str, Any] | bool]:
    """Splits a URL into one without the option ``ssl_ca_certs`` and kombu's argument ``ssl`` (False without TLS).

    url: of one host, or of several, separated by semicolons, with the same option. py-amqp does not know the options
    that kombu reads from a URL.
    """
    if not url.startswith("amqps:"):
        return url, False
    hosts = [host.partition("?") for host in url.split(";")]
    options = dict(parse_qsl(hosts[0][2]))
    plain_url = ";".join(plain for plain, _, _ in hosts)
    # None: the authorities that the system trusts
    return plain_url, {"cert_reqs": CERT_REQUIRED, "ca_certs": options.get("ssl_ca_certs")}


def apply_socket_limits(connection: Connection) -> None:
    """Sets the read timeout on an open connection under gevent, whose sockets ignore py-amqp's timeouts."""
    if gevent_support.is_active() and connection.transport.driver_type == "amqp":
        sock: Any = connection.connection.transport.sock
        sock.settimeout((connection.transport_options or {})["read_timeout"])


def _decode_properties(buffer: Any, offset: int) -> tuple[dict[str, Any], int]:
    """Decodes the properties of a message; none of them if one is malformed, such as an id that is not UTF-8.

    RabbitMQ passes on whatever bytes a publisher wrote, and py-amqp's error would end the worker.
    """
    try:
        properties: tuple[dict[str, Any], int] = decode_properties_basic(buffer, offset)
    except Exception:
        return {}, len(buffer)
    return properties


PROPERTY_CLASSES[Basic.CLASS_ID] = _decode_properties

# KOMBU_LOG_DEBUG and KOMBU_LOG_CHANNEL would write whole messages, personal data included, to standard error.
kombu_connection._log_channel = kombu_connection._log_connection = False

CONNECTION_ERRORS = (OSError, OperationalError, AMQPError)


def is_away(error: Exception) -> bool:
    """Whether the broker can't be reached, or the connection or channel broke."""
    return isinstance(error, CONNECTION_ERRORS)


def raised(error: Exception) -> bool:
    """Whether kombu or py-amqp raised an error, or the system did so within them: others meet an OSError, too."""
    if isinstance(error, OperationalError | AMQPError):
        return True
    modules = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
    return isinstance(error, OSError) and any(name.split(".")[0] in ("kombu", "amqp") for name in modules)


def lacks_queues(error: Exception) -> bool:
    """Whether an exchange or queue is not declared."""
    return isinstance(error, NotFound)


def refusal_of_message(error: Exception) -> str | None:
    """The broker's reply where it closed the channel because of one message, else None.

    Such as "message size 200 larger than configured max size 100", or a topic that the user has no right to.
    """
    if isinstance(error, PreconditionFailed | ContentTooLarge):
        return str(error.reply_text)
    if isinstance(error, AccessRefused) and "access to topic" in str(error.reply_text):
        return str(error.reply_text)
    return None


def refuses(error: Exception) -> str | None:
    """The broker's reply where it refuses the user or the user's request, else None."""
    return str(error.reply_text) if isinstance(error, AccessRefused | NotAllowed) else None


def distrusts(error: Exception) -> str | None:
    """Why the broker's certificate was refused; None where that is not the error."""
    return str(error.verify_message).rstrip(".") if isinstance(error, SSLCertVerificationError) else None
