"""Connecting to the broker, and what its errors mean."""

from ssl import CERT_REQUIRED, SSLCertVerificationError
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from amqp.exceptions import AccessRefused, AMQPError, NotAllowed, NotFound
from amqp.serialization import PROPERTY_CLASSES, decode_properties_basic
from amqp.spec import Basic
from kombu import Connection
from kombu.exceptions import OperationalError

from worker import gevent_support

# Bounds on operations that would otherwise hang while RabbitMQ has an alarm or a connection is half dead.
_SOCKET_LIMITS = {"connect_timeout": 5, "read_timeout": 60, "write_timeout": 60}


def connect(url: str) -> Connection:
    """A lazy connection for publishing and declaring; close it after use."""
    options = {"polling_interval": 0.01} if url.startswith("memory") else dict(_SOCKET_LIMITS)
    plain_url, tls = with_tls(url)
    return Connection(plain_url, ssl=tls, transport_options=options, heartbeat=0 if url.startswith("memory") else 60)


def with_tls(url: str) -> tuple[str, dict[str, Any] | bool]:
    """A URL without its option ``ssl_ca_certs``, and the argument ``ssl`` of a connection; False without TLS.

    Neither kombu nor py-amqp checks by itself that a certificate is for the host that was asked for, and py-amqp does
    not know the options as kombu reads them from a URL.
    """
    if not url.startswith("amqps:"):
        return url, False
    plain_url, _, options = url.partition("?")
    return plain_url, {
        "cert_reqs": CERT_REQUIRED,
        "ca_certs": dict(parse_qsl(options)).get("ssl_ca_certs"),  # none: those that the system trusts
        "server_hostname": urlsplit(plain_url).hostname or "localhost",
    }


def apply_socket_limits(connection: Connection) -> None:
    """Puts the bounds on a connection that stands where py-amqp's have no effect: on sockets of gevent."""
    if gevent_support.is_active() and connection.transport.driver_type == "amqp":
        socket: Any = connection.connection.transport.sock
        socket.settimeout((connection.transport_options or {})["read_timeout"])


def _readable(buffer: Any, offset: int) -> tuple[dict[str, Any], int]:
    """The properties of a message; none of them where one can't be read, such as an id that is not UTF-8.

    RabbitMQ passes on whatever bytes a publisher wrote, and py-amqp's error would end the program.
    """
    try:
        properties: tuple[dict[str, Any], int] = decode_properties_basic(buffer, offset)
    except Exception:
        return {}, len(buffer)
    return properties


PROPERTY_CLASSES[Basic.CLASS_ID] = _readable

_AWAY = (OSError, OperationalError, AMQPError)


def is_away(error: Exception) -> bool:
    """Whether the broker could not be reached, or the connection or channel broke."""
    return isinstance(error, _AWAY)


def lacks_queues(error: Exception) -> bool:
    """Whether an exchange or queue is missing: nobody has declared them."""
    return isinstance(error, NotFound)


def refuses(error: Exception) -> str | None:
    """What the broker says, where it refuses the user of the URL, or what this user asked for."""
    return str(error.reply_text) if isinstance(error, AccessRefused | NotAllowed) else None


def distrusts(error: Exception) -> str | None:
    """Why the broker's certificate was refused, where that is what went wrong."""
    return str(error.verify_message).rstrip(".") if isinstance(error, SSLCertVerificationError) else None
