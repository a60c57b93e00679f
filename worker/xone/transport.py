"""HTTP to XONE: pooled connections, with a deadline for the whole call and a limit on the size of the answer.

A socket's timeout is for one operation, so an answer that trickles in outlasts it. Here the remaining time is set again
before each read, headers included.
"""

import http.client
import io
import socket
import time
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, Timeout
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, NewConnectionError, SSLError
from urllib3.util.ssl_match_hostname import CertificateError

MAX_ANSWER = 5 * 1024 * 1024  # bytes
CHUNK = 64 * 1024  # bytes
READ_AHEAD = 16 * 1024  # bytes, for each call in flight: most answers fit


class AnswerTooLarge(Exception):
    """The body of an answer is larger than MAX_ANSWER."""


class TlsError(NewConnectionError):
    """The TLS handshake failed: nothing was sent."""


class _UntilDeadline(io.RawIOBase):
    """A socket's bytes until a deadline (monotonic seconds). Raises TimeoutError after it."""

    def __init__(self, source: io.RawIOBase, sock: socket.socket, deadline: float) -> None:
        self._source = source
        self._sock = sock
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the whole call took too long")
        self._sock.settimeout(left)
        return self._source.readinto(buffer)

    def close(self) -> None:
        self._source.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        deadline = time.monotonic() + (sock.gettimeout() or 0)  # urllib3 has set what is left of the total
        raw = self.fp.detach()
        self.fp = io.BufferedReader(_UntilDeadline(raw, sock, deadline), READ_AHEAD)


class _Connection(HTTPConnection):
    response_class = _Response


class _SecureConnection(HTTPSConnection):
    response_class = _Response

    def connect(self) -> None:
        try:
            super().connect()
        except (
            OSError,
            SSLError,
            CertificateError,
        ) as error:  # after the handshake, the same errors do not show what was sent
            raise TlsError(self, f"no TLS connection: {type(error).__name__}") from error


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}

    def build_response(self, req: requests.PreparedRequest, resp: Any) -> requests.Response:
        """Status, headers and the body to be read: no cookies, and no history."""
        response = requests.Response()
        response.status_code, response.headers, response.raw = resp.status, CaseInsensitiveDict(resp.headers), resp
        return response


class Transport:
    """A pool of connections. Follows no redirect, keeps no cookie, reads no .netrc. Threads share it."""

    def __init__(self, connections: int, connect_timeout: float, timeout: float) -> None:
        """connections: how many are kept open; connect_timeout, timeout: seconds, the second for the whole call."""
        self._connect_timeout = connect_timeout
        self._timeout = timeout
        self._adapter = _Adapter(pool_connections=2, pool_maxsize=connections, max_retries=0)

    def send(
        self, method: str, url: str, headers: dict[str, str], body: bytes | None = None
    ) -> tuple[int, CaseInsensitiveDict[str], bytes]:
        """Sends a request and returns status, headers and whole body of the answer.

        Raises requests.RequestException, also if the body breaks off or outlasts the deadline, and AnswerTooLarge.
        """
        request = requests.PreparedRequest()
        request.method, request.body = method, body
        request.prepare_url(url, None)
        length = {"Content-Length": str(len(body))} if body is not None else {}
        request.headers = CaseInsensitiveDict({**headers, **length})
        timeout = Timeout(connect=min(self._connect_timeout, self._timeout), total=self._timeout)
        response = self._adapter.send(request, stream=True, timeout=timeout, verify=True)  # type: ignore[arg-type]
        with response:
            return response.status_code, response.headers, _read(response)


def _read(response: requests.Response) -> bytes:
    body = bytearray()
    try:
        for chunk in response.raw.stream(CHUNK, decode_content=True):
            body += chunk
            if len(body) > MAX_ANSWER:
                response.raw.close()
                raise AnswerTooLarge
    except (HTTPError, OSError, http.client.HTTPException) as error:
        raise requests.ConnectionError(f"the answer broke off: {type(error).__name__}") from error
    return bytes(body)
