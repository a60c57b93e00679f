"""The proxy of `make cluster-test` fails as it is told to."""

import socket
from collections.abc import Iterator

import pytest

from tests.cluster.proxy import FaultProxy


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)
        yield listening


@pytest.fixture
def proxy(server: socket.socket) -> Iterator[FaultProxy]:
    with FaultProxy(server.getsockname()[1]) as running:
        yield running


@pytest.fixture
def ends(server: socket.socket, proxy: FaultProxy) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection through the proxy."""
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client:
        accepted, _ = server.accept()
        with accepted:
            accepted.settimeout(10)
            yield client, accepted


def test_it_passes_both_directions_and_the_end(ends: tuple[socket.socket, socket.socket]) -> None:
    client, accepted = ends
    client.sendall(b"there")
    assert accepted.recv(100) == b"there"
    accepted.sendall(b"back")
    assert client.recv(100) == b"back"

    client.close()

    assert accepted.recv(100) == b""


def test_a_black_hole_holds_back_until_it_ends(
    server: socket.socket, proxy: FaultProxy, ends: tuple[socket.socket, socket.socket]
) -> None:
    client, accepted = ends
    proxy.black_hole()
    client.sendall(b"held")
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as other:
        other.sendall(b"new")
        for silent in (accepted, server):
            silent.settimeout(0.2)
        with pytest.raises(TimeoutError):
            accepted.recv(100)
        with pytest.raises(TimeoutError):
            server.accept()

        proxy.pass_on()

        for silent in (accepted, server):
            silent.settimeout(10)
        assert accepted.recv(100) == b"held"
        with server.accept()[0] as second:
            assert second.recv(100) == b"new"


def test_a_cut_ends_connections_and_refuses_new_ones(
    server: socket.socket, proxy: FaultProxy, ends: tuple[socket.socket, socket.socket]
) -> None:
    assert proxy.connections == 1
    proxy.cut()

    assert [end.recv(100) for end in ends] == [b"", b""]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port), timeout=10)
    assert proxy.connections == 0

    proxy.pass_on()

    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10), server.accept()[0]:
        assert proxy.connections == 1
