"""A link between clients and a server on 127.0.0.1 that can fall silent, as behind a network that drops packets."""

import socket
from contextlib import suppress
from threading import Event, Thread
from types import TracebackType

from tests.support.servers import free_port


class Link:
    """Passes bytes on both ways. While it is silent, it takes connections and bytes, and passes nothing on."""

    def __init__(self, port: int) -> None:
        """port: of the server."""
        self._server_port = port
        self.port = free_port()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._speaks = Event()
        self._speaks.set()
        self._sockets: list[socket.socket] = []
        Thread(target=self._accept, daemon=True).start()

    @property
    def connections(self) -> int:
        """How many clients have connected, in all."""
        return len(self._sockets) // 2

    def silence(self, after: int = 0) -> None:
        """after: how many bytes, in one direction, it passes on before."""
        self._left = after
        self._speaks.clear()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                self._sockets += [client, server]
                for source, target in (client, server), (server, client):
                    Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if not self._speaks.is_set():
                    passed, self._left = data[: self._left], max(self._left - len(data), 0)
                    target.sendall(passed)
                    self._speaks.wait()
                    data = data[len(passed) :]
                target.sendall(data)
            self._speaks.wait()
            target.shutdown(socket.SHUT_WR)

    def __enter__(self) -> "Link":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for each in self._listener, *self._sockets:
            each.close()
