"""Ways to send an answer: whole, or with a fault on the raw socket."""

import math
import os
import socket
import struct
from email.utils import formatdate
from http import HTTPStatus
from io import BufferedIOBase
from typing import Protocol

from worker.sandbox.answers import Answer

DRIP_INTERVAL = 0.2  # seconds
HUGE_BYTES = 40 * 1024 * 1024


class Connection(Protocol):
    """The part of the server's connection that sending needs."""

    request: socket.socket
    wfile: BufferedIOBase
    close_connection: bool

    @property
    def slow_seconds(self) -> float: ...

    def sleep(self, seconds: float) -> None:
        """Raises ConnectionAbortedError if the client hangs up meanwhile."""

    def ended(self, status: int | None) -> None:
        """To be called just before the last byte of the answer. status: None where there is no answer."""


def head(reply: Answer, framing: str | None = None) -> bytes:
    phrase = HTTPStatus(reply.status).phrase if reply.status in set(HTTPStatus) else "Unknown"
    fields = {"Server": "sandbox", "Date": formatdate(usegmt=True)} | reply.headers
    lines = [f"HTTP/1.1 {reply.status} {phrase}", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, framing or f"Content-Length: {len(reply.body)}", "", ""]).encode("latin-1")


def whole(connection: Connection, reply: Answer) -> None:
    connection.ended(reply.status)
    connection.wfile.write(head(reply) + reply.body)


def truncated(connection: Connection, reply: Answer) -> None:
    connection.ended(reply.status)
    connection.wfile.write(head(reply) + reply.body[: len(reply.body) // 2])
    connection.close_connection = True


def reset(connection: Connection, reply: Answer) -> None:
    connection.wfile.write(head(reply) + reply.body[: len(reply.body) // 2])
    connection.sleep(0.05)  # time to read the half, which the reset discards
    connection.ended(reply.status)
    connection.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(connection.request.detach())  # not close(), which waits for rfile and sends a FIN first
    connection.close_connection = True


def dropped(connection: Connection, _reply: Answer) -> None:
    connection.ended(None)
    connection.close_connection = True


def late(connection: Connection, reply: Answer) -> None:
    connection.sleep(connection.slow_seconds)
    whole(connection, reply)


def dripping(connection: Connection, at_once: bytes, dripped: bytes, status: int) -> None:
    """Sends a byte every DRIP_INTERVAL for slow_seconds, then the rest."""
    connection.wfile.write(at_once)
    drops = min(len(dripped) - 1, math.ceil(connection.slow_seconds / DRIP_INTERVAL))
    for position in range(drops):
        connection.wfile.write(dripped[position : position + 1])
        connection.sleep(DRIP_INTERVAL)
    connection.ended(status)
    connection.wfile.write(dripped[drops:])


def dripping_head(connection: Connection, reply: Answer) -> None:
    dripping(connection, b"", head(reply) + reply.body, reply.status)


def dripping_body(connection: Connection, reply: Answer) -> None:
    dripping(connection, head(reply), reply.body, reply.status)


def huge(connection: Connection, reply: Answer) -> None:
    blanks = b" " * 65536  # white space may follow JSON
    connection.wfile.write(head(reply, "Transfer-Encoding: chunked"))
    for chunk in (reply.body, *[blanks] * (HUGE_BYTES // len(blanks))):
        connection.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
    connection.ended(reply.status)
    connection.wfile.write(b"0\r\n\r\n")
