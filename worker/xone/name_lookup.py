"""Looks up the addresses of a name within a time limit.

``getaddrinfo`` has no limit of its own and can't be interrupted, so it runs in a thread. All that ask for a name
meanwhile wait for the same look-up, each until its own deadline. What comes late still serves those who ask next.
"""

import socket
import time
from collections.abc import Callable
from threading import Event, Lock, Thread
from typing import Any

FRESH_FOR = 5.0  # seconds that an answer is used again
HANGS_AFTER = 10.0  # seconds: then those who ask start another look-up beside one that does not end
MAX_RUNNING = 4  # look-ups at the same time, over all names

Address = tuple[Any, Any, int, str, Any]  # as getaddrinfo returns it: family, type, protocol, canonical name, address


class _Lookup:
    """A look-up of one name, under way or ended."""

    def __init__(self, host: str, port: int, clock: Callable[[], float]) -> None:
        self._host, self._port, self._clock = host, port, clock
        self.started_at = clock()
        self.ended_at: float | None = None
        self.ended = Event()
        self.addresses: list[Address] = []
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.addresses = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except Exception as error:  # reaches those who wait
            self.error = error
        self.end()

    def end(self) -> None:
        self.ended_at = self._clock()
        self.ended.set()

    def is_usable(self, now: float) -> bool:
        """Whether those who ask now take the answer of this look-up, or wait for it."""
        if self.ended_at is None:
            return now - self.started_at < HANGS_AFTER
        return self.error is None and now - self.ended_at < FRESH_FOR


class NameLookup:
    """Looks up names for one process. Threads share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: monotonic seconds."""
        self._clock = clock
        self._lock = Lock()
        self._latest: dict[tuple[str, int], _Lookup] = {}
        self._running: list[Thread] = []

    def addresses(self, host: str, port: int, seconds: float) -> list[Address]:
        """The addresses of a name or numeric address, as ``socket.getaddrinfo`` orders them.

        seconds: how long to wait. Raises TimeoutError after it, and OSError if there is no such name.
        """
        try:
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        except (socket.gaierror, UnicodeError):
            lookup = self._lookup(host, port)
        if not lookup.ended.wait(max(seconds, 0.0)):
            raise TimeoutError("the name was not looked up in time")
        if lookup.error is not None:
            raise OSError(f"the name can't be looked up: {type(lookup.error).__name__}") from lookup.error
        return lookup.addresses

    def forget(self, host: str, port: int) -> None:
        """Looks the name up anew when it is next asked for: none of its addresses could be connected to."""
        with self._lock:
            lookup = self._latest.get((host, port))
            if lookup is not None and lookup.ended.is_set():
                del self._latest[host, port]

    def _lookup(self, host: str, port: int) -> _Lookup:
        with self._lock:
            latest = self._latest.get((host, port))
            if latest is not None and latest.is_usable(self._clock()):
                return latest
            self._running = [thread for thread in self._running if thread.is_alive()]
            if len(self._running) >= MAX_RUNNING:
                if latest is not None:
                    return latest
                raise OSError("too many names are being looked up")
            lookup = _Lookup(host, port, self._clock)
            thread = Thread(target=self._run, args=(lookup, (host, port)), name="name-lookup", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise OSError("no thread to look the name up") from error
            self._running.append(thread)
            self._latest[host, port] = lookup
            return lookup

    def _run(self, lookup: _Lookup, name: tuple[str, int]) -> None:
        lookup.run()
        with self._lock:
            latest = self._latest.get(name)
            if latest is not None and not latest.ended.is_set() and lookup.error is None:
                latest.addresses = lookup.addresses  # those who wait for it need not wait longer
                latest.end()
