"""The client of XONE: each answer, and each missing answer, becomes a booking or the right error."""

import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from urllib3.exceptions import MaxRetryError, SSLError

from tests.support.system import until
from worker.errors import AlreadyBooked, BadCredentials, Busy, NotSent, NotXone, Oversized, Refused, Unknown, XoneError
from worker.sandbox.faults import FAULTS
from worker.sandbox.server import Sandbox
from worker.settings import XoneSettings
from worker.xone import answers
from worker.xone import client as xone_client
from worker.xone.answers import retry_after
from worker.xone.booking_list import MAX_LISTED
from worker.xone.call_control import CallControl
from worker.xone.circuit_breaker import CallsSuspended
from worker.xone.client import Xone
from worker.xone.transport import Transport

KEY = UUID("01890000-0000-4000-8000-000000000001")
MARK = "Geheimnis"  # represents personal data, which no error may repeat
BODY = json.dumps(
    {
        "quotes": [{"id": "quote-1"}, {"id": "quote-2"}],
        "policyholder": {"first_name": MARK, "last_name": MARK, "country": "GB", "email": f"{MARK}@example.com"},
    }
).encode()
QUOTES = frozenset({"quote-1", "quote-2"})


def client_of(base_url: str, has_ever_confirmed: Callable[[], bool] = lambda: True, **changes: Any) -> Xone:
    defaults = {
        "XONE_BASE_URL": base_url,
        "XONE_CLIENT_ID": "sandbox",
        "XONE_CLIENT_SECRET": "sandbox-secret",
        "XONE_CONNECT_TIMEOUT": 1,
        "XONE_TIMEOUT": 10,
    }
    return Xone(XoneSettings(**{**defaults, **changes}), has_ever_confirmed=has_ever_confirmed)


@pytest.fixture(scope="module")
def shared_sandbox() -> Iterator[Sandbox]:
    """One sandbox for all tests that only need its faults."""
    with Sandbox() as running:
        yield running


@pytest.fixture
def client(sandbox: Sandbox) -> Xone:
    return client_of(sandbox.url)


def confirm(client: Xone, offer_id: str = "o-1", **options: Any) -> answers.BookingReceived:
    return client.confirm("P-1", offer_id, BODY, KEY, **options)


def failure(call: Callable[[], Any]) -> XoneError:
    with pytest.raises(XoneError) as raised:
        call()
    assert MARK not in str(raised.value)
    return raised.value


# --- A scripted XONE, for answers that the sandbox does not give ---


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Reply(NamedTuple):
    status: int
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012


TOKEN = Reply(200, b'{"access_token": "t-1", "token_type": "Bearer", "expires_in": 300}')


class Scripted:
    """Answers each path with the replies of the test. The last reply of a list is repeated."""

    def __init__(self, replies: dict[str, list[Reply]]) -> None:
        self.replies = {"/api/oauth/token": [TOKEN], **replies}
        self.requests: list[Request] = []
        self.connections: list[socket.socket] = []
        self.url = ""

    def reply(self, request: Request) -> Reply:
        self.requests.append(request)
        replies = self.replies[request.path]
        return replies.pop(0) if len(replies) > 1 else replies[0]

    def paths(self) -> list[str]:
        return [request.path for request in self.requests]


@contextmanager
def scripted(replies: dict[str, list[Reply]]) -> Iterator[Scripted]:
    script = Scripted(replies)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            script.connections.append(self.connection)

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            reply = script.reply(Request(self.command, self.path, dict(self.headers), body))
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply.body)

        do_GET = do_POST = answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    script.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()


def as_json(content: Any) -> bytes:
    return json.dumps(content).encode()


CONFIRM_PATH = "/api/partners/P-1/offers/o-1"
BOOKINGS_PATH = "/api/partners/P-1/bookings"


# --- Confirm ---


def test_a_confirmed_offer_returns_its_booking(sandbox: Sandbox, client: Xone) -> None:
    confirmed = confirm(client)

    listed = sandbox.bookings["P-1", "o-1"]
    assert confirmed.http_status == 201
    assert (confirmed.booking.id, confirmed.booking.offer_id) == (listed["id"], "o-1")
    assert str(confirmed.booking.price) == str(listed["price"])
    assert confirmed.booking.leftovers() == {"sandbox": True}


def test_the_call_is_authorized_json_with_the_key_and_the_exact_body(sandbox: Sandbox, client: Xone) -> None:
    confirm(client)
    with scripted({CONFIRM_PATH: [Reply(422)]}) as script:
        failure(lambda: confirm(client_of(script.url)))

    assert [(call.idempotency_key, call.body) for call in sandbox.calls] == [(str(KEY), BODY)]
    asked, called = script.requests
    assert (asked.method, asked.headers["Content-Type"]) == ("POST", "application/json")
    assert json.loads(asked.body) == {
        "grant_type": "client_credentials",
        "client_id": "sandbox",
        "client_secret": "sandbox-secret",
    }
    assert (called.method, called.body) == ("POST", BODY)
    assert {name: called.headers[name] for name in ("Authorization", "Content-Type", "Accept")} == {
        "Authorization": "Bearer t-1",
        "Content-Type": "application/json",
        "Accept": "application/json",
    }
    assert called.headers["x-idempotency-key"] == str(KEY)


def test_ids_are_quoted_into_the_path() -> None:
    path = "/v2/a%2F..%3Fx%3D1%23/o%2F%20%C3%A4%25/confirm"
    with scripted({path: [Reply(404)]}) as script:
        client = client_of(f"{script.url}/", XONE_CONFIRM_PATH="/v2/{partner_id}/{offer_id}/confirm")
        error = failure(lambda: client.confirm("a/..?x=1#", "o/ ä%", BODY, KEY))

    assert error.code == "http-404"
    assert script.paths() == ["/api/oauth/token", path]


EXPECTED: dict[str, tuple[type[XoneError], str, int | None] | None] = {
    "pending": None,
    "pending-cancelled": None,
    "pending-failed": None,
    "failed-payment": None,
    "capitals": None,
    "busy": (Busy, "http-429", 429),
    "unavailable": (Busy, "http-503", 503),
    "maintenance": (Busy, "http-503", 503),
    "redirect": (Refused, "redirect", 307),
    "html": (NotXone, "bad-answer", 200),
    "html-not-booked": (NotXone, "bad-answer", 200),
    "truncated": (Unknown, "connection-lost", None),
    "no-id": (Unknown, "bad-answer", 200),
    "other-offer": (Unknown, "wrong-offer", 200),
    "errors-beside": (Unknown, "bad-answer", 200),
    "drop-before": (Unknown, "connection-lost", None),
    "drop-after": (Unknown, "connection-lost", None),
    "reset-mid": (Unknown, "connection-lost", None),
    "slow": (Unknown, "timeout", None),
    "slow-headers": (Unknown, "timeout", None),
    "drip": (Unknown, "timeout", None),
    "huge": (Unknown, "too-large", None),
    "blocked": (Busy, "http-403", 403),
    "booked": (AlreadyBooked, "already-booked", 409),
    "booked-with-body": (AlreadyBooked, "already-booked", 409),
    "booked-text": (AlreadyBooked, "already-booked", 422),
    "booked-words": (AlreadyBooked, "already-booked", 400),
    "booked-code": (AlreadyBooked, "already-booked", 422),
    "booked-nowhere": (AlreadyBooked, "already-booked", 422),
    "odd-types": None,
    "minimal": None,
    "many-policies": (Oversized, "too-large", 201),
    "unicode": None,
}
REFUSALS = (400, 402, 403, 404, 405, 406, 410, 413, 414, 415, 422)
EXPECTED |= {f"http-{status}": (Refused, f"http-{status}", status) for status in REFUSALS}
EXPECTED |= {f"http-{status}": (Refused, "redirect", status) for status in (300, 301, 302, 303, 304, 307, 308)}
EXPECTED |= {f"http-{status}": (Busy, f"http-{status}", status) for status in (423, 429, 503)}
EXPECTED |= {
    f"http-{status}": (Unknown, f"http-{status}", status)
    for status in (407, 408, 418, 425, 451, 499, 500, 501, 502, 504, 505, 520, 599)
}
EXPECTED |= {f"http-{status}": (Unknown, "bad-answer", status) for status in (200, 201, 202)}
EXPECTED |= {"http-204": (NotXone, "bad-answer", 204)}  # no body, and so no JSON
EXPECTED |= {"http-401": (BadCredentials, "credentials", 401), "http-409": (AlreadyBooked, "already-booked", 409)}


@pytest.mark.parametrize(("fault", "expected"), EXPECTED.items(), ids=EXPECTED.keys())
def test_each_fault_of_xone_has_its_error(
    shared_sandbox: Sandbox, fault: str, expected: tuple[type[XoneError], str, int | None] | None
) -> None:
    times_out = expected is not None and expected[1] == "timeout"
    client = client_of(shared_sandbox.url, XONE_TIMEOUT=0.3 if times_out else 10.0)
    if expected is None:
        assert confirm(client, f"o-1~{fault}").booking.offer_id.lower() == f"o-1~{fault}"
        return

    error = failure(lambda: confirm(client, f"o-1~{fault}"))

    assert (type(error), error.code, error.http_status) == expected


def test_each_fault_of_the_sandbox_is_in_the_table() -> None:
    assert set(FAULTS) - {"http-NNN"} <= set(EXPECTED)


def test_a_second_confirmation_is_recognized_by_its_text(client: Xone) -> None:
    booked = confirm(client).booking

    error = failure(lambda: confirm(client))

    assert isinstance(error, AlreadyBooked)
    assert error.detail == f"XONE says that a booking exists as {booked.id}"
    assert error.booking is None


@pytest.mark.parametrize(
    ("body", "is_shown"),
    [
        ({"data": {"id": "INS-1", "offer_id": "o-1"}}, True),
        ({"id": "INS-1", "offer_id": "o-1"}, True),
        ({"data": {"id": "INS-1", "offer_id": "another"}}, False),
        ({"id": "INS-1", "offer_id": "another"}, False),
        ({"data": {"offer_id": "o-1"}}, False),
        ({"data": None}, False),
        ({"errors": [{"message": "The offer has lapsed."}]}, False),
        (["INS-1"], False),
    ],
)
def test_a_409_is_a_success_only_with_the_booking_of_this_offer(body: Any, is_shown: bool) -> None:
    for status in (409, 400, 422):
        with scripted({CONFIRM_PATH: [Reply(status, as_json(body))]}) as script:
            error = failure(lambda: confirm(client_of(script.url)))

        assert isinstance(error, AlreadyBooked) is (is_shown or status == 409)
        assert (getattr(error, "booking", None) is not None) is is_shown


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", NotXone),
        (b"null", Unknown),
        (b"[]", Unknown),
        (b'"INS-1"', Unknown),
        (b'{"message": "Accepted."}', Unknown),
        (b'{"data": null}', Unknown),
        (b'{"data": []}', Unknown),
        (b'{"data": "INS-1"}', Unknown),
        (b'{"data": {"id": "INS-1"}}', Unknown),
        (b'{"data": {"id": "", "offer_id": "o-1"}}', Unknown),
        (b'{"id": "INS-1"}', Unknown),
        (b'{"data": {"id": "INS-1", "offer_id": "o-1"}, "errors": "one"}', Unknown),
        (b'{"data": {"id": "INS-1", "offer_id": "o-1"}', NotXone),
        (b"<html>Back soon</html>", NotXone),
        (b"[" * 100_000, NotXone),
        ("{'data': {}}".encode("utf-16"), NotXone),
        (b"\xff\xfe\x00", NotXone),
    ],
)
def test_a_2xx_without_a_booking_is_unknown_and_stored(body: bytes, kind: type[XoneError]) -> None:
    """Only what is no JSON counts as XONE being down: the rest uses up attempts, and stops no other calls."""
    with scripted({CONFIRM_PATH: [Reply(200, body)]}) as script:
        client = client_of(script.url)
        error = failure(lambda: confirm(client))
        for _ in range(5):
            with suppress(CallsSuspended):
                failure(lambda: confirm(client))

    assert (type(error), error.code, error.http_status, error.answer) == (kind, "bad-answer", 200, body)
    assert (client.calls.wait() > 0) is (kind is NotXone)


def test_a_bare_booking_is_read() -> None:
    with scripted(
        {CONFIRM_PATH: [Reply(200, as_json({"id": "INS-1", "offer_id": "o-1", "status": "CONFIRMED"}))]}
    ) as x:
        assert confirm(client_of(x.url)).booking.id == "INS-1"


@pytest.mark.parametrize("status", [404, 405])
def test_refusals_that_only_a_wrong_path_explains_stop_calls(status: int) -> None:
    with scripted({CONFIRM_PATH: [Reply(status, b"{}")]}) as script:
        client = client_of(script.url, has_ever_confirmed=lambda: False)
        codes = [failure(lambda: confirm(client)).code for _ in range(3)]
        of_others = client_of(script.url)
        for _ in range(5):
            failure(lambda: confirm(of_others))

    assert codes == [f"http-{status}", f"http-{status}", "path"]
    assert client.calls.circuit_breaker.open_reason == "path"
    assert of_others.calls.wait() == 0


def test_an_answer_of_another_kind_shows_that_the_path_is_right() -> None:
    replies = [Reply(status, b"{}") for status in (404, 404, 422, 404, 404)]
    with scripted({CONFIRM_PATH: replies}) as script:
        client = client_of(script.url, has_ever_confirmed=lambda: False)

        assert [failure(lambda: confirm(client)).code for _ in range(5)] == [
            "http-404", "http-404", "http-422", "http-404", "http-404",
        ]  # fmt: skip
        assert client.calls.wait() == 0


def booking_with(**fields: Any) -> bytes:
    return as_json({"data": {"id": "INS-1", "offer_id": "o-1", **fields}})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (booking_with(policies=[{}] * 1_000_000), "is larger than 512 KiB"),
        (booking_with(policies=[{}] * 20_000), "has more than 20000 values"),
        (booking_with(policies=[{}] * 1001), "has 1001 policies; at most 1000 can be stored"),
        (booking_with(status="x" * 600_000), "is larger than 512 KiB"),
        (booking_with(odd=json.loads("[" * 70 + "]" * 70)), "is nested deeper than 64"),
        (booking_with(odd=0).replace(b"0", b"[" * 5000 + b"]" * 5000), "is nested deeper than 64"),
        (b"\xef\xbb\xbf" + booking_with(policies=[{}] * 20_000), "has more than 20000 values"),
    ],
)
def test_a_booking_that_is_too_large_is_kept_whole_for_a_person(body: bytes, reason: str) -> None:
    with scripted({CONFIRM_PATH: [Reply(200, body)]}) as script:
        error = failure(lambda: confirm(client_of(script.url)))

    assert (type(error), error.code, error.answer) == (Oversized, "too-large", body)
    assert error.detail == f"XONE's answer (200) {reason}"


def test_a_listed_booking_that_is_too_large_is_kept_for_a_person() -> None:
    listed = {"id": "INS-1", "offer_id": "o-1", "policies": [{}] * 1001}
    with scripted({BOOKINGS_PATH: [Reply(200, as_json({"data": [listed]}))]}) as script:
        error = failure(lambda: client_of(script.url).find_booking("P-1", "o-1", frozenset()))

    assert (type(error), error.code) == (Oversized, "too-large")
    assert error.answer == as_json(listed).replace(b" ", b"")


def test_a_number_that_is_too_long_costs_no_booking() -> None:
    body = booking_with(price="-", note="-").replace(b'"-"', b"9" * 5000)
    with scripted({CONFIRM_PATH: [Reply(200, body)]}) as script:
        booking = confirm(client_of(script.url)).booking

    assert (booking.id, booking.price) == ("INS-1", None)
    assert booking.leftovers() == {"price": "9" * 5000, "note": "9" * 5000}


def test_a_409_with_a_booking_that_is_too_large_is_settled_by_the_list() -> None:
    with scripted({CONFIRM_PATH: [Reply(409, booking_with(policies=[{}] * 1001))]}) as script:
        error = failure(lambda: confirm(client_of(script.url)))

    assert isinstance(error, AlreadyBooked)
    assert error.booking is None


@pytest.mark.parametrize("errors", [[], None, {}, ""])
def test_empty_errors_beside_a_booking_are_ignored(errors: Any) -> None:
    body = as_json({"data": {"id": "INS-1", "offer_id": "o-1"}, "errors": errors})
    with scripted({CONFIRM_PATH: [Reply(202, body)]}) as script:
        assert confirm(client_of(script.url)).http_status == 202


def test_money_is_read_exactly() -> None:
    body = b'{"data": {"id": "INS-1", "offer_id": "o-1", "price": 19.90, "odd": 1e99999999999999999999}}'
    with scripted({CONFIRM_PATH: [Reply(200, body)]}) as script:
        booking = confirm(client_of(script.url)).booking

    assert str(booking.price) == str(Decimal("19.90"))
    assert booking.leftovers() == {"odd": "1e99999999999999999999"}


HTML = {"Content-Type": "text/html; charset=utf-8"}
PAGE = b"<!doctype html><title>Not here</title>"


@pytest.mark.parametrize("status", [403, 404, 405])
def test_a_web_page_that_refuses_is_of_something_before_xone(status: int) -> None:
    with scripted({CONFIRM_PATH: [Reply(status, PAGE, HTML)]}) as script:
        error = failure(lambda: confirm(client_of(script.url)))
    with scripted({CONFIRM_PATH: [Reply(status, b"{}", {"Content-Type": "application/json"})]}) as script:
        refused = failure(lambda: confirm(client_of(script.url)))
    with scripted({"/api/oauth/token": [Reply(status, PAGE, HTML)]}) as script:
        without_token = failure(lambda: confirm(client_of(script.url)))

    assert (type(error), error.code) == (Busy, f"http-{status}")
    assert (type(refused), refused.code) == (Refused, f"http-{status}")
    assert (type(without_token), without_token.code) == (NotSent, f"http-{status}")


def test_web_pages_on_all_calls_open_the_circuit_breaker() -> None:
    with scripted({CONFIRM_PATH: [Reply(403, PAGE, HTML)]}) as script:
        client = client_of(script.url)
        for _ in range(5):
            failure(lambda: confirm(client))

        assert client.calls.wait() > 0
        assert client.calls.circuit_breaker.open_reason == "http-403"


def test_a_list_of_bookings_that_is_a_web_page_is_refused() -> None:
    """XONE may not have that path. It says nothing about confirming."""
    with scripted({BOOKINGS_PATH: [Reply(404, PAGE, HTML)]}) as script:
        client = client_of(script.url)

        assert isinstance(failure(lambda: client.find_booking("P-1", "o-1", QUOTES)), Refused)


def test_a_redirect_is_not_followed() -> None:
    with scripted({"/stolen": [Reply(200)]}) as elsewhere:
        moved = Reply(307, b"", {"Location": f"{elsewhere.url}/stolen"})
        with scripted({CONFIRM_PATH: [moved]}) as script:
            error = failure(lambda: confirm(client_of(script.url)))

    assert (type(error), error.code) == (Refused, "redirect")
    assert script.paths() == ["/api/oauth/token", CONFIRM_PATH]
    assert elsewhere.requests == []


def test_an_error_raised_before_the_call_prevents_it(sandbox: Sandbox, client: Xone) -> None:
    class LeaseLost(Exception):
        pass

    def fail() -> None:
        raise LeaseLost

    with pytest.raises(LeaseLost):
        confirm(client, before_call=fail)

    assert (sandbox.calls, sandbox.bookings) == ([], {})
    assert confirm(client).booking.offer_id == "o-1"


def test_before_call_is_called_before_each_call_that_may_book(sandbox: Sandbox, client: Xone) -> None:
    confirm(client)
    sandbox.revoke_tokens()
    calls_before: list[int] = []

    confirm(client, "o-2", before_call=lambda: calls_before.append(len(sandbox.calls)))

    assert calls_before == [1, 2]


# --- The connection ---


def closed_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextmanager
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_refused_connection_was_not_sent() -> None:
    error = failure(lambda: confirm(client_of(f"http://127.0.0.1:{closed_port()}")))

    assert (type(error), error.code) == (NotSent, "connect")


def test_an_unknown_host_was_not_sent() -> None:
    error = failure(lambda: confirm(client_of("https://xone.invalid")))

    assert (type(error), error.code) == (NotSent, "connect")


def test_a_failure_of_tls_was_not_sent(sandbox: Sandbox) -> None:
    error = failure(lambda: confirm(client_of(sandbox.url.replace("http:", "https:"))))

    assert (type(error), error.code) == (NotSent, "connect")
    assert "TLS" in error.detail


def test_a_tls_handshake_that_is_not_answered_was_not_sent() -> None:
    with silent_port() as port:
        error = failure(lambda: confirm(client_of(f"https://127.0.0.1:{port}", XONE_CONNECT_TIMEOUT=0.2)))

    assert (type(error), error.code) == (NotSent, "connect")


def test_a_failure_of_tls_after_the_handshake_has_an_unknown_outcome() -> None:
    broken = requests.exceptions.SSLError(MaxRetryError(None, "/", SSLError("bad record mac")))  # type: ignore[arg-type]

    error = answers.transport_failure(broken)

    assert (type(error), error.code) == (Unknown, "connection-lost")


def test_a_request_for_a_connection_that_xone_has_closed_was_not_sent() -> None:
    booking = Reply(200, as_json({"data": {"id": "INS-1", "offer_id": "o-1"}}))
    with scripted({CONFIRM_PATH: [booking]}) as script:
        client = client_of(script.url)
        confirm(client)
        (connection,) = script.connections

        error = failure(lambda: confirm(client, before_send=lambda: connection.shutdown(socket.SHUT_RDWR)))

        assert (type(error), error.code) == (NotSent, "connect")
        assert script.paths().count(CONFIRM_PATH) == 1
        assert confirm(client).booking.id == "INS-1"


def test_a_call_that_could_not_begin_in_time_is_put_off(sandbox: Sandbox) -> None:
    client = client_of(sandbox.url, XONE_TIMEOUT=0.4)
    client.tokens.get()
    begun = time.monotonic()

    with pytest.raises(CallsSuspended):
        confirm(client, before_send=lambda: until(lambda: time.monotonic() > begun + 0.3))

    assert (sandbox.calls, sandbox.bookings) == ([], {})
    assert client.calls.wait() == 0, "it says nothing about XONE"


def test_before_send_comes_when_the_connection_stands_before_anything_is_sent() -> None:
    seen: list[tuple[str, int, int]] = []
    with scripted({CONFIRM_PATH: [Reply(422)], BOOKINGS_PATH: [Reply(403)]}) as script:
        client = client_of(script.url)

        def note(name: str) -> Callable[[], None]:
            return lambda: seen.append((name, len(script.connections), len(script.requests)))

        def note_connected() -> None:
            until(lambda: script.connections)
            note("send")()

        client.tokens.get()
        client._http = Transport(1, 5, 5)  # with no connection yet
        script.connections.clear()
        failure(lambda: confirm(client, before_call=note("call"), before_send=note_connected))
        failure(lambda: client.find_booking("P-1", "o-1", QUOTES, note("call"), note_connected))

    assert seen == [("call", 0, 1), ("send", 1, 1), ("call", 1, 2), ("send", 1, 2)]


@pytest.mark.parametrize("fault", ["drop-after", "slow", "drip"])
def test_the_client_works_after_a_lost_answer(sandbox: Sandbox, fault: str) -> None:
    client = client_of(sandbox.url, XONE_TIMEOUT=0.3)
    failure(lambda: confirm(client, f"o-1~{fault}"))

    assert confirm(client, "o-2").booking.offer_id == "o-2"


# --- Credentials ---


def test_after_a_401_one_call_is_made_with_a_new_token(sandbox: Sandbox, client: Xone) -> None:
    confirm(client)
    sandbox.revoke_tokens()

    assert confirm(client, "o-2").booking.offer_id == "o-2"
    assert sandbox.token_requests == 2
    assert [call.status for call in sandbox.calls] == [201, 401, 201]


def test_a_second_401_means_wrong_credentials(sandbox: Sandbox, client: Xone) -> None:
    error = failure(lambda: confirm(client, "o-1~http-401"))

    assert (type(error), error.code, error.http_status) == (BadCredentials, "credentials", 401)
    assert (sandbox.token_requests, len(sandbox.calls)) == (2, 2)


def test_a_changed_secret_means_wrong_credentials_until_it_is_corrected(sandbox: Sandbox, client: Xone) -> None:
    confirm(client)
    sandbox.rotate_secret("new")
    sandbox.revoke_tokens()

    assert type(failure(lambda: confirm(client, "o-2"))) is BadCredentials
    sandbox.rotate_secret("sandbox-secret")
    client.calls = CallControl()  # as if the breaker had closed
    assert confirm(client, "o-2").booking.offer_id == "o-2"


@pytest.mark.parametrize(
    ("reply", "kind", "code"),
    [
        (Reply(400), BadCredentials, "credentials"),
        (Reply(401), BadCredentials, "credentials"),
        (Reply(403, MARK.encode()), BadCredentials, "credentials"),
        (Reply(307, b"", {"Location": "/elsewhere"}), BadCredentials, "credentials"),
        (Reply(429), Busy, "http-429"),
        (Reply(500, MARK.encode()), NotSent, "http-500"),
        (Reply(503), Busy, "http-503"),
        (Reply(200), NotSent, "bad-answer"),
        (Reply(200, b"<html>"), NotSent, "bad-answer"),
        (Reply(200, b"[]"), NotSent, "bad-answer"),
        (Reply(200, b'{"token": "t"}'), NotSent, "bad-answer"),
        (Reply(200, b'{"access_token": null}'), NotSent, "bad-answer"),
        (Reply(200, b'{"access_token": 5}'), NotSent, "bad-answer"),
        (Reply(200, b'{"access_token": ""}'), NotSent, "bad-answer"),
        (Reply(200, b'{"access_token": "a\\r\\nX: b"}'), NotSent, "bad-answer"),
        (Reply(200, '{"access_token": "€"}'.encode()), NotSent, "bad-answer"),
    ],
    ids=lambda value: f"{value.status}-{value.body[:20]!r}" if isinstance(value, Reply) else None,
)
def test_without_a_token_no_confirm_is_sent(reply: Reply, kind: type[XoneError], code: str) -> None:
    with scripted({"/api/oauth/token": [reply]}) as script:
        error = failure(lambda: confirm(client_of(script.url)))

    assert (type(error), error.code) == (kind, code)
    assert script.paths() == ["/api/oauth/token"]


def test_a_token_endpoint_that_is_down_recovers(sandbox: Sandbox, client: Xone) -> None:
    sandbox.token_down = True
    error = failure(lambda: confirm(client))
    sandbox.token_down = False

    assert (type(error), error.code) == (Busy, "http-503")
    assert sandbox.calls == []
    assert confirm(client).booking.offer_id == "o-1"


def test_a_timeout_of_the_token_request_means_not_sent() -> None:
    with silent_port() as port:
        error = failure(lambda: confirm(client_of(f"http://127.0.0.1:{port}", XONE_TIMEOUT=0.2)))

    assert (type(error), error.code) == (NotSent, "timeout")


@pytest.mark.parametrize(
    ("expires_in", "lifetime"),
    [(3600, 3600), ("3600", 3600), (0.5, 0.5), (None, 300), ("soon", 300), (0, 300), (-1, 300), (10**400, 300)],
)
def test_the_lifetime_of_a_token_is_read_or_assumed(expires_in: Any, lifetime: float) -> None:
    token = Reply(200, as_json({"access_token": "t", "expires_in": expires_in}))
    with scripted({"/api/oauth/token": [token]}) as script:
        before = time.monotonic()
        good_until = client_of(script.url)._request_token().good_until

    assert before + lifetime <= good_until <= time.monotonic() + lifetime


def test_many_threads_share_one_token_request(sandbox: Sandbox, client: Xone) -> None:
    barrier = threading.Barrier(50)
    booked: list[str] = []

    def work(number: int) -> None:
        barrier.wait(10)
        booked.append(confirm(client, f"o-{number}").booking.offer_id)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert len(set(booked)) == 50
    assert sandbox.token_requests == 1


# --- The list of bookings ---


def find(client: Xone, offer_id: str = "o-1", quotes: frozenset[str] = frozenset()) -> str | None:
    booking = client.find_booking("P-1", offer_id, quotes)
    return booking.id if booking else None


def test_a_booking_is_found_on_any_page(sandbox: Sandbox, client: Xone) -> None:
    ids = {f"o-{number}": confirm(client, f"o-{number}").booking.id for number in range(5)}
    sandbox.page_size = 2

    assert {offer_id: find(client, offer_id) for offer_id in ids} == ids
    assert find(client, "o-99") is None


def test_a_booking_of_another_partner_is_not_found(client: Xone) -> None:
    confirm(client)

    assert client.find_booking("P-2", "o-1", QUOTES) is None


def test_a_forbidden_list_is_a_refusal(sandbox: Sandbox, client: Xone) -> None:
    sandbox.bookings_mode = "forbidden"

    error = failure(lambda: find(client))

    assert (type(error), error.code) == (Refused, "http-403")


def test_a_list_that_answers_401_with_a_token_that_confirms_is_a_refusal() -> None:
    booking = Reply(200, as_json({"data": {"id": "INS-1", "offer_id": "o-1"}}))
    with scripted({CONFIRM_PATH: [booking], BOOKINGS_PATH: [Reply(401)]}) as script:
        client = client_of(script.url)
        confirm(client)
        errors = [failure(lambda: find(client)) for _ in range(3)]

        assert [(type(error), error.code) for error in errors] == [(Refused, "http-401")] * 3
        assert confirm(client).booking.id == "INS-1"
        assert script.paths().count("/api/oauth/token") == 2, "a new token is tried once"


def test_a_list_is_read_with_a_new_token_if_the_old_one_ended(sandbox: Sandbox, client: Xone) -> None:
    booked = confirm(client).booking
    sandbox.revoke_tokens()

    assert find(client) == booked.id


def test_a_list_that_answers_401_stops_no_calls_and_is_settled_by_the_next_confirm_call() -> None:
    with scripted({CONFIRM_PATH: [Reply(401)], BOOKINGS_PATH: [Reply(401)]}) as script:
        client = client_of(script.url)
        unknown = failure(lambda: find(client))
        assert client.calls.wait() == 0

        wrong = failure(lambda: confirm(client))
        assert client.calls.wait() > 0

    assert (type(unknown), unknown.code) == (Unknown, "http-401")
    assert type(wrong) is BadCredentials


def test_an_empty_path_turns_the_list_off(sandbox: Sandbox, client: Xone) -> None:
    assert client.can_list_bookings
    assert not client_of(sandbox.url, XONE_BOOKINGS_PATH="").can_list_bookings


LISTED = {"id": "INS-1", "offer_id": "o-1"}


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        (LISTED, "INS-1"),
        ({"id": "INS-1", "quote": {"uuid": "quote-2"}}, "INS-1"),
        ({"id": "INS-1", "offer_id": None, "quote": {"uuid": "quote-1"}}, "INS-1"),
        ({"id": "INS-1", "offer_id": "another", "quote": {"uuid": "quote-1"}}, None),
        ({"id": "INS-1", "quote": {"uuid": "quote-9"}}, None),
        ({"id": "INS-1", "quote": {"uuid": ["quote-1"]}}, None),
        ({"id": "INS-1", "quote": "quote-1"}, None),
        ({"id": "INS-1", "quote": None}, None),
        ({"id": "INS-1"}, None),
        ("INS-1", None),
    ],
)
def test_a_booking_is_matched_by_offer_or_else_by_quote(listed: Any, found: str | None) -> None:
    with scripted({BOOKINGS_PATH: [Reply(200, as_json({"data": [7, {}, listed]}))]}) as script:
        client = client_of(script.url)
        booking = client.find_booking("P-1", "o-1", QUOTES)

    assert (booking.id if booking else None) == found
    assert booking is None or booking.offer_id == "o-1"


@pytest.mark.parametrize(
    ("status", "content", "kind", "code"),
    [
        (200, 7, Unknown, "bad-answer"),
        (200, {"data": {}}, Unknown, "bad-answer"),
        (200, {"bookings": []}, Unknown, "bad-answer"),
        (200, {"data": [{"offer_id": "o-1"}]}, Unknown, "bad-answer"),
        (200, {"data": [], "links": {"next": {"href": "x"}}}, Unknown, "bad-answer"),
        (200, {"data": [], "links": {"next": 5}}, Unknown, "bad-answer"),
        (200, {"data": [], "links": {"next": "http://[x"}}, Unknown, "bad-answer"),
        (204, None, Unknown, "http-204"),
        (307, None, Refused, "redirect"),
        (404, None, Refused, "http-404"),
        (500, None, Unknown, "http-500"),
        (503, None, Busy, "http-503"),
        (401, None, Unknown, "http-401"),
    ],
)
def test_an_unreadable_list_is_an_error(status: int, content: Any, kind: type[XoneError], code: str) -> None:
    body = b"" if status == 204 else as_json(content)
    with scripted({BOOKINGS_PATH: [Reply(status, body)]}) as script:
        error = failure(lambda: find(client_of(script.url)))

    assert (type(error), error.code) == (kind, code)


@pytest.mark.parametrize("links", [None, [], ["x"], "x", {}, {"next": None}, {"next": ""}])
def test_a_list_without_a_next_page_ends(links: Any) -> None:
    with scripted({BOOKINGS_PATH: [Reply(200, as_json({"data": [], "links": links}))]}) as script:
        assert find(client_of(script.url)) is None
        assert script.paths().count(BOOKINGS_PATH) == 1


@pytest.mark.parametrize(
    "following", ["?page=2", "/api/partners/P-1/bookings?page=2", "{url}" + BOOKINGS_PATH + "?page=2"]
)
def test_the_next_page_may_be_an_absolute_or_relative_url(following: str) -> None:
    with scripted({BOOKINGS_PATH + "?page=2": [Reply(200, as_json({"data": [LISTED]}))]}) as script:
        links = {"next": following.replace("{url}", script.url)}
        script.replies[BOOKINGS_PATH] = [Reply(200, as_json({"data": [], "links": links}))]

        assert find(client_of(script.url)) == "INS-1"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"results": [], "next": "?page=2"}, {"results": [LISTED], "next": None}),
        ({"links": {"next": "?page=2"}, "data": []}, [LISTED]),
        ({"next": "?page=2", "data": []}, {"meta": {"total": 1}, "data": [LISTED], "links": {}}),
    ],
)
def test_a_list_has_one_of_three_forms(first: Any, second: Any) -> None:
    with scripted({BOOKINGS_PATH: [Reply(200, as_json(first))]}) as script:
        script.replies[BOOKINGS_PATH + "?page=2"] = [Reply(200, as_json(second))]

        assert find(client_of(script.url)) == "INS-1"


def test_a_list_is_read_no_further_than_to_what_was_looked_for() -> None:
    pages = {BOOKINGS_PATH: [Reply(200, as_json({"data": [LISTED, {"id": "INS-2"}], "links": {"next": "?page=2"}}))]}
    with scripted(pages) as script:
        assert find(client_of(script.url)) == "INS-1"
        assert script.paths() == ["/api/oauth/token", BOOKINGS_PATH]


def test_a_booking_that_no_stream_may_hold_is_an_error_and_what_comes_before_is_found() -> None:
    huge = {"id": "INS-2", "offer_id": "o-2", "note": "x" * (MAX_LISTED + 100_000)}
    with scripted({BOOKINGS_PATH: [Reply(200, as_json({"data": [LISTED, huge]}))]}) as script:
        client = client_of(script.url)
        assert find(client) == "INS-1"
        error = failure(lambda: find(client, "o-2"))

    assert (type(error), error.code) == (Unknown, "too-large")


def test_a_list_may_take_longer_than_a_call_and_keeps_its_reader_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece comes in time, and the whole within LIST_TIMEOUTS."""
    monkeypatch.setattr(xone_client, "WAIT", 0.2)
    beats: list[float] = []
    with dripping(b'{"data": [' + b'{"id": "INS-2"}, ' * 14 + as_json(LISTED) + b"]}", pieces=16, pause=0.1) as url:
        client = client_of(url, XONE_TIMEOUT=1)
        booking = client.find_booking("P-1", "o-1", QUOTES, while_waiting=lambda: beats.append(time.monotonic()))

    assert booking is not None
    assert len(beats) >= 2


def test_a_list_that_falls_silent_or_takes_too_long_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = failure(lambda: read_dripping(pieces=2, pause=5, timeout=0.3))
    monkeypatch.setattr(xone_client, "LIST_TIMEOUTS", 1.5)
    slow = failure(lambda: read_dripping(pieces=100, pause=0.05, timeout=0.4))

    assert [(type(error), error.code) for error in (silent, slow)] == [(Unknown, "timeout")] * 2


def read_dripping(pieces: int, pause: float, timeout: float) -> None:
    with dripping(b'{"data": [' + b'{"id": "INS-2"}, ' * 100 + b"{}]}", pieces, pause) as url:
        find(client_of(url, XONE_TIMEOUT=timeout))


def test_a_list_of_100_000_bookings_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one page, of 270 MB. The last booking of it is looked for."""
    monkeypatch.setattr(xone_client, "WAIT", 0.02)
    seen: list[float] = []
    other = as_json({**LISTED, "offer_id": "o" * 36, "policies": [{"id": "p", "text": "x" * 1200}] * 2}) + b","
    with dripping(b"[" + other, 1, 0, then=[other * 100] * 1000 + [as_json(LISTED) + b"]"]) as url:
        client = client_of(url, XONE_TIMEOUT=60)
        client.tokens.get()
        before = memory()
        booking = client.find_booking("P-1", "o-1", QUOTES, while_waiting=lambda: seen.append(memory()))

    assert booking is not None
    assert len(seen) > 5
    assert max(seen) - before < 20


def memory() -> float:
    """MiB of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1024**2


@contextmanager
def dripping(body: bytes, pieces: int, pause: float, then: Sequence[bytes] = ()) -> Iterator[str]:
    """Answers a token, and any GET with the body in pieces."""
    stopped = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(TOKEN.body, 1)

        def do_GET(self) -> None:
            self.answer(body, pieces)

        def answer(self, content: bytes, pieces: int) -> None:
            self.send_response(200)
            more = then if content is body else ()
            self.send_header("Content-Length", str(len(content) + sum(map(len, more))))
            self.end_headers()
            size = -(-len(content) // pieces)
            with suppress(ConnectionError):
                for at in range(0, len(content), size):
                    if at and stopped.wait(pause):
                        return
                    self.wfile.write(content[at : at + size])
                for piece in more:
                    self.wfile.write(piece)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        stopped.set()
        server.shutdown()
        server.server_close()


def test_a_page_on_another_host_is_not_requested() -> None:
    with scripted({BOOKINGS_PATH: [Reply(200, as_json({"data": [LISTED]}))]}) as elsewhere:
        first = Reply(200, as_json({"data": [], "links": {"next": elsewhere.url + BOOKINGS_PATH}}))
        with scripted({BOOKINGS_PATH: [first]}) as script:
            error = failure(lambda: find(client_of(script.url)))

    assert (type(error), error.code) == (Unknown, "bad-answer")
    assert script.paths() == ["/api/oauth/token", BOOKINGS_PATH]
    assert elsewhere.requests == []


def test_an_endless_list_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xone_client, "MAX_PAGES", 20)
    endless = Reply(200, as_json({"data": [], "links": {"next": "?"}}))
    with scripted({BOOKINGS_PATH: [endless], BOOKINGS_PATH + "?": [endless]}) as script:
        error = failure(lambda: find(client_of(script.url)))

    assert (type(error), error.code) == (Refused, "too-large")
    assert len(script.paths()) == 1 + xone_client.MAX_PAGES


# --- Retry-After ---

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0),
        ("1", 1),
        (" 120 ", 120),
        ("3600", 3600),
        ("86400", 3600),
        ("-5", 0),
        ("9" * 400, None),
        ("9" * 5000, None),
        ("Thu, 01 Jan 2026 12:00:30 GMT", 30),
        ("Thu, 01 Jan 2026 13:00:30 +0100", 30),
        ("Thu, 01 Jan 2026 11:59:30 GMT", 0),
        ("Fri, 02 Jan 2026 12:00:00 GMT", 3600),
        ("Thu, 01 Jan 2026 12:00:30 +99999999999999", None),
        ("soon", None),
        ("1.5", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after_is_seconds_or_a_date_bounded_to_an_hour(value: str | None, seconds: float | None) -> None:
    assert retry_after(value, NOW) == seconds


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=40) | st.text(alphabet="0123456789 :+-,JanThuGMT", max_size=40))
def test_any_retry_after_is_read_or_ignored(value: str) -> None:
    seconds = retry_after(value, NOW)

    assert seconds is None or 0 <= seconds <= answers.MAX_RETRY_AFTER


def test_retry_after_reaches_the_error(client: Xone) -> None:
    dated, busy = (failure(lambda name=name: confirm(client, f"o-1~{name}")) for name in ("maintenance", "busy"))

    assert busy.retry_after == 1
    assert dated.retry_after is not None
    assert 0 < dated.retry_after <= 2
