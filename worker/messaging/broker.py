"""Connections to the broker, and what their errors mean."""

from ssl import CERT_REQUIRED, SSLCertVerificationError
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


class AnyHost(Connection):
    """A connection to any of the hosts of a URL: it tries each once, beginning with the one that answered last.

    kombu's own tries two, always from the first, which with three hosts reaches the third one never.
    """

    def __init__(self, url: str, **kwargs: Any) -> None:
        hosts = url.split(";")
        first = _answered.get(url, 0)
        self._url, self._hosts = url, hosts
        self._tried = hosts[first]
        super().__init__(";".join(hosts[first:] + hosts[:first]), **kwargs)  # type: ignore[no-untyped-call]

    def switch(self, conn_str: str) -> None:
        self._tried = conn_str
        super().switch(conn_str)  # type: ignore[no-untyped-call]

    def _ensure_connection(self, errback: Any = None, max_retries: Any = None, *args: Any, **kwargs: Any) -> Any:
        if len(self._hosts) > 1 and max_retries == 1:  # of connect() and of operations that need a connection
            max_retries = len(self._hosts) - 1
        return super()._ensure_connection(errback, max_retries, *args, **kwargs)  # type: ignore[no-untyped-call]

    def _connection_factory(self) -> Any:
        connection = super()._connection_factory()  # type: ignore[no-untyped-call]
        if len(self._hosts) > 1:
            _answered[self._url] = self._hosts.index(self._tried)
        return connection


_answered: dict[str, int] = {}  # by URL: which of its hosts this process has connected to last


def connect(url: str) -> Connection:
    """A connection for publishing and declaring. url: amqp:, amqps: or memory:. It connects at first use; close it.

    It agrees on no heartbeats, as nothing would send them while it is idle; TCP's keep-alive finds a dead peer.
    """
    options = {"polling_interval": 0.01} if url.startswith("memory") else dict(_SOCKET_TIMEOUTS)
    plain_url, tls = with_tls(url)
    return AnyHost(plain_url, ssl=tls, transport_options=options, heartbeat=0)


def with_tls(url: str) -> tuple[str, dict[str, Any] | bool]:
    """Splits a URL into one without the option ``ssl_ca_certs`` and kombu's argument ``ssl`` (False without TLS).

    Unless told the host name, neither kombu nor py-amqp checks that the certificate is for that host. py-amqp does not
    know the options that kombu reads from a URL.
    """
    if not url.startswith("amqps:"):
        return url, False
    plain_url, _, options = url.partition("?")
    return plain_url, {
        "cert_reqs": CERT_REQUIRED,
        "ca_certs": dict(parse_qsl(options)).get("ssl_ca_certs"),  # None: the authorities that the system trusts
        "server_hostname": urlsplit(plain_url).hostname or "localhost",
    }


def apply_socket_limits(connection: Connection) -> None:
    """Sets the read timeout on an open connection under gevent, whose sockets ignore py-amqp's timeouts."""
    if gevent_support.is_active() and connection.transport.driver_type == "amqp":
        socket: Any = connection.connection.transport.sock
        socket.settimeout((connection.transport_options or {})["read_timeout"])


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
