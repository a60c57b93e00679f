"""Opens TCP connections: look-up of the name and all its addresses within one time limit.

The addresses are tried one after another, a quarter of a second apart, and the first that connects is taken ("happy
eyeballs", RFC 8305, in a simple form). So addresses that are dead cost a fraction of a second each. Those that failed
lately are tried last.
"""

import errno
import selectors
import socket
import time
from collections import deque
from collections.abc import Iterable
from threading import Lock
from typing import Any

from worker.xone.name_lookup import Address, NameLookup

ATTEMPT_DELAY = 0.25  # seconds until the next address is tried beside those that have not answered: RFC 8305, section 5
FAILED_FOR = 60.0  # seconds that an address which failed is tried last

SocketOption = tuple[int, int, int]


class Connector:
    """Opens connections for one process. Threads share it."""

    def __init__(self, socket_options: Iterable[SocketOption]) -> None:
        self._options = list(socket_options)
        self._lookup = NameLookup()
        self._lock = Lock()
        self._failed_at: dict[Any, float] = {}  # monotonic seconds, by address

    def connect(self, host: str, port: int, deadline: float) -> socket.socket:
        """A connected socket. deadline: monotonic seconds. Raises TimeoutError after it, and OSError."""
        addresses = self._lookup.addresses(host, port, deadline - time.monotonic())
        try:
            sock, slower = self._race(deque(self._in_order(addresses)), deadline)
        except OSError:
            self._lookup.forget(host, port)
            raise
        self._note(slower)
        return sock

    def note_failure(self, address: Any) -> None:
        """The machine at an address did not do its part, such as the TLS handshake: others are tried first."""
        self._note([address])

    def _in_order(self, addresses: list[Address]) -> list[Address]:
        long_ago = time.monotonic() - FAILED_FOR
        with self._lock:
            return sorted(addresses, key=lambda address: max(self._failed_at.get(address[4], long_ago), long_ago))

    def _note(self, failed: list[Any]) -> None:
        if not failed:
            return
        now = time.monotonic()
        with self._lock:
            recent = {address: at for address, at in self._failed_at.items() if now - at < FAILED_FOR}
            self._failed_at = {**recent, **dict.fromkeys(failed, now)}

    def _race(self, waiting: "deque[Address]", deadline: float) -> tuple[socket.socket, list[Any]]:
        """The first socket that connects, and the addresses that were tried before and had not connected by then."""
        error = OSError("the name has no address")
        tried: list[Any] = []
        with selectors.DefaultSelector() as selector:
            pending: dict[socket.socket, Any] = {}
            try:
                next_at = time.monotonic()
                while waiting or pending:
                    now = time.monotonic()
                    if now >= deadline:
                        error = TimeoutError("no address took the connection in time")
                        break
                    if waiting and (now >= next_at or not pending):
                        address = waiting.popleft()
                        tried.append(address[4])
                        next_at = now + ATTEMPT_DELAY
                        try:
                            sock = self._begin(address)
                        except OSError as failure:
                            error = failure
                            continue
                        pending[sock] = address[4]
                        selector.register(sock, selectors.EVENT_WRITE)
                    until = min(deadline, next_at) if waiting else deadline
                    for key, _ in selector.select(max(until - time.monotonic(), 0.0)):
                        sock = key.fileobj  # type: ignore[assignment]
                        selector.unregister(sock)
                        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                        if number == 0:
                            where = pending.pop(sock)
                            return sock, [at for at in tried if at != where]
                        error = OSError(number, "the connection was not taken")
                        del pending[sock]
                        sock.close()
            finally:
                for sock in pending:
                    sock.close()
        self._note(tried)
        raise error

    def _begin(self, address: Address) -> socket.socket:
        """A socket that begins to connect. Raises OSError if that fails at once, such as without a route."""
        family, kind, protocol, _, where = address
        sock = socket.socket(family, kind, protocol)
        try:
            for option in self._options:
                sock.setsockopt(*option)
            sock.setblocking(False)
            number = sock.connect_ex(where)
            if number not in (0, errno.EINPROGRESS):
                raise OSError(number, "the connection can't be opened")
        except OSError:
            sock.close()
            raise
        return sock
