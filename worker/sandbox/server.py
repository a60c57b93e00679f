"""The sandbox: a stand-in of XONE over HTTP, with tokens, confirm, the list of bookings, and faults on request.

The end of an offer id asks for a fault: `o-1~drop-after` at each call, `o-1~drop-after~2` at its first two calls only
(see FAULTS). Switches change the whole sandbox (see SWITCHES). The page at `/` explains both. No offer is booked twice:
a second call is refused whatever its x-idempotency-key, because XONE does not promise to honour it.

The modules, from the bottom: answers, bookings, sending (ways to send an answer), faults (tables of faults and
switches), upstream (XONE's state and decisions), page (for people), server (all of it over HTTP).
"""

import random
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from worker.sandbox.answers import answer, parsed, refusal, unauthorized
from worker.sandbox.page import page
from worker.sandbox.sending import whole
from worker.sandbox.upstream import Call, Key, Upstream, hung_up

CONFIRM_PATH = "/api/partners/{partner_id}/offers/{offer_id}"
BOOKINGS = re.compile(r"GET /api/partners/([^/]+)/bookings")


def _route(confirm_path: str) -> re.Pattern[str]:
    """Of confirm calls. confirm_path: as XONE_CONFIRM_PATH."""
    parts = re.split(r"(\{partner_id\}|\{offer_id\})", confirm_path)
    names = {"{partner_id}": "(?P<partner>[^/]+)", "{offer_id}": "(?P<offer>[^/]+)"}
    return re.compile("POST " + "".join(names.get(part, re.escape(part)) for part in parts))


class Sandbox(Upstream):
    """`with Sandbox() as xone:` serves at `xone.url` until the block ends.

    port: 0 for a free one, which a later start() takes again; latency: seconds before a confirm answers;
    token_lifetime: seconds. Upstream says which attributes may be set and read while it runs.
    """

    def __init__(
        self,
        port: int = 0,
        host: str = "127.0.0.1",
        latency: float = 0.0,
        client_id: str = "sandbox",
        client_secret: str = "sandbox-secret",  # noqa: S107
        token_lifetime: int = 300,
        confirm_path: str = CONFIRM_PATH,
    ) -> None:
        super().__init__(latency, client_id, client_secret, token_lifetime)
        self.confirm_route = _route(confirm_path)
        self.port, self.host = port, host
        self.stopping = threading.Event()
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}"  # noqa: S104

    def start(self) -> None:
        self.stopping.clear()
        self._server = _Server((self.host, self.port), _Connection)
        self._server.sandbox = self
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), name="sandbox", daemon=True).start()

    def stop(self) -> None:
        """Frees the port and ends every connection. Delayed answers are sent at once."""
        if self._server:
            self.stopping.set()
            self._server.shutdown()
            self._server.server_close()
            for connection in list(self._server.connections):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)  # an answer that is being written is still sent
            self._server = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    sandbox: Sandbox

    def __init__(self, address: tuple[str, int], handler: "type[_Connection]") -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(address, handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may hang up
            super().handle_error(request, client_address)


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server
    call: Call | None = None

    def setup(self) -> None:
        super().setup()
        self.sandbox = self.server.sandbox
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_args: Any) -> None:
        """Requests are not logged: the lines would disturb the terminal that the sandbox shares."""

    def serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        route = f"{self.command} {url.path}"
        base_url = f"http://{self.headers['Host']}" if "Host" in self.headers else self.sandbox.url
        authorization = self.headers.get("Authorization", "")
        if route == "GET /":
            whole(self, page(self.sandbox, base_url))
        elif route == "GET /sandbox/state":
            whole(self, answer(200, self.sandbox.state()))
        elif route == "POST /sandbox/switches":
            try:
                self.sandbox.switch(parsed(body))
            except ValueError as error:
                whole(self, refusal(400, str(error)))
            else:
                whole(self, answer(200, self.sandbox.state()))
        elif self.sandbox.down or self.sandbox.stopping.is_set():
            self.close_connection = True
        elif route == "POST /api/oauth/token":
            whole(self, self.sandbox.token(body))
        elif match := self.sandbox.confirm_route.fullmatch(route):
            self.confirm((unquote(match["partner"]), unquote(match["offer"])), authorization, body)
        elif match := BOOKINGS.fullmatch(route):
            number = parse_qs(url.query).get("page", ["1"])[0]
            if not self.sandbox.knows(authorization):
                whole(self, unauthorized())
            elif not number.isdecimal() or int(number) == 0:
                whole(self, refusal(400, "page must be a number from 1."))
            else:
                whole(self, self.sandbox.listed(unquote(match[1]), int(number), base_url))
        else:
            whole(self, refusal(404, "There is nothing at this path."))

    do_GET = do_POST = serve  # noqa: N815

    @property
    def slow_seconds(self) -> float:
        return self.sandbox.slow_seconds

    def confirm(self, key: Key, authorization: str, body: bytes) -> None:
        now = time.monotonic()
        self.call = Call(*key, self.headers.get("x-idempotency-key"), body, now, now, status=None)
        self.sandbox.call_begins(key, self.connection)
        try:
            reply, send = self.sandbox.confirm(key, authorization, body)
            self.sleep(self.sandbox.latency + random.uniform(0, self.sandbox.latency_jitter))  # noqa: S311
            send(self, reply)
        finally:
            self.ended(None)

    def ended(self, status: int | None) -> None:
        """Ends the current call, if any.

        Just before the last byte of the answer, so that it does not overlap with the client's next call.
        """
        if self.call:
            self.sandbox.call_ends(replace(self.call, ended=time.monotonic(), status=status), self.connection)
            self.call = None

    def sleep(self, seconds: float) -> None:
        """Ends early when the sandbox stops. Raises ConnectionAbortedError if the client hangs up."""
        ends_at = time.monotonic() + seconds
        while (left := ends_at - time.monotonic()) > 0 and not self.sandbox.stopping.wait(min(left, 0.05)):
            if hung_up(self.connection) and not self.sandbox.stopping.is_set():
                raise ConnectionAbortedError
