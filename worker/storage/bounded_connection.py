"""Connections to PostgreSQL whose waits end when the server has gone silent, though its machine answers.

TCP notices a machine that is gone (``tcp_user_timeout``, keepalives). It does not notice a server that is frozen while
its kernel goes on: a statement would wait for as long as that lasts, also when a standby has been promoted meanwhile.
"""

from contextlib import suppress
from typing import Any, Self

import psycopg
from psycopg.abc import PQGen
from psycopg.errors import _WaitTimeout

PROBE_TIMEOUT = 5  # seconds to connect, and again for the answer


class BoundedConnection(psycopg.Connection[Any]):
    """After ``silence`` seconds without an answer, asks on another connection whether the same server still answers.

    If it does, this one waits on: a long statement has the server's own limit, and a commit that waits for a
    synchronous standby is not made twice. If not, the server is frozen or another one is at its address: the
    connection is closed, and what waits raises OperationalError.
    """

    silence: float
    _parameters: tuple[tuple[Any, ...], dict[str, Any]]
    _server: Any = None  # when it started: another server has another time. Until it is known, ``silence`` ends a wait

    @classmethod
    def open(cls, silence: float, *args: Any, **parameters: Any) -> Self:
        """Connects as ``psycopg.connect`` does. silence: seconds."""
        connection = cls.connect(*args, **parameters)
        connection.silence, connection._parameters = silence, (args, parameters)
        connection.autocommit = True
        connection._server = connection.execute(_SERVER).fetchone()
        connection.autocommit = False
        return connection

    def wait(self, gen: PQGen[Any], interval: float = 0.1, timeout: float | None = None) -> Any:
        if timeout is not None:
            return super().wait(gen, interval, timeout)
        while True:
            try:
                return super().wait(gen, interval, self.silence)
            except _WaitTimeout:
                if not self._is_served():
                    self.close()
                    raise psycopg.OperationalError("the server does not answer any more") from None

    def _is_served(self) -> bool:
        if self._server is None:
            return False
        args, parameters = self._parameters
        with suppress(psycopg.Error):
            other = self.open(PROBE_TIMEOUT, *args, **{**parameters, "connect_timeout": PROBE_TIMEOUT})
            other.close()
            return bool(other._server == self._server)
        return False


_SERVER = "SELECT extract(epoch from pg_postmaster_start_time())::numeric"
