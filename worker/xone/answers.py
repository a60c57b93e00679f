"""What an answer of XONE means: a booking, or an error. The only place that decides this.

XONE's Confirm Offer page documents the successful answer. The meaning of refusals follows RFC 9110 (HTTP), and that of
409 and "booking already exists" the observation of XONE's older API.
"""

import re
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

import requests
from pydantic import ValidationError
from urllib3.exceptions import ConnectTimeoutError

from models.booking import MAX_BOOKING_BYTES, MAX_DEPTH, Booking, excess
from models.exact_json import read_exact
from models.job import quote_ids
from models.same import differs_in_case_only, holds_id, is_same_id
from worker.errors import AlreadyBooked, Busy, NotSent, NotXone, Oversized, Refused, Unknown, XoneError
from worker.xone.booked_before import may_mean_booked, reference_in
from worker.xone.refusal_text import refusal_text
from worker.xone.transport import NotDelivered, TlsError

MAX_RETRY_AFTER = 3600.0  # seconds
MAX_VALUES = 20_000  # in one answer
SMALL = 16 * 1024  # bytes of an answer that can't be too long when it is written again
_OBJECT = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*\{")  # how one begins; a byte order mark may come first
# Statuses; any other one may mean that XONE has booked.
REFUSALS = frozenset({400, 402, 403, 404, 405, 406, 410, 413, 414, 415, 422})
LATER = frozenset({423, 429, 503})
# With a web page, these are of something before XONE (gateway, firewall), which has not passed the call on.
BEFORE_XONE = frozenset({403, 404, 405})


@dataclass(frozen=True)
class BookingReceived:
    """A booking that XONE returned, with the HTTP status of the answer."""

    booking: Booking
    http_status: int


@dataclass(frozen=True)
class HttpAnswer:
    """An answer that came whole."""

    status: int
    headers: Any
    body: bytes

    def json(self, max_values: int = MAX_VALUES) -> Any:
        """The body as JSON with exact decimals; None if it is no JSON, or may hold more values than ``max_values``."""
        if self.count_values() > max_values:
            return None
        try:
            return read_exact(self.body)
        except (ValueError, RecursionError):
            return None

    def count_values(self) -> int:
        """How many values the body holds at most, if it is JSON. Each is an object in memory, 20 times its size."""
        return sum(map(self.body.count, (b",", b"[", b"{")))


def read_confirm_answer(answer: HttpAnswer, offer_id: str, request: bytes = b"") -> BookingReceived:
    """The booking in an answer to confirm. Raises XoneError for any other answer. request: its body."""
    if not 200 <= answer.status < 300:
        raise failure_of(answer, offer_id, request)
    content = _read_object(answer)
    if content.get("errors"):
        raise _unreadable(answer, "errors beside the data")
    data = _booking_in(content)
    if not _is_small(answer) and (reason := excess(data)) is not None:
        raise _oversized(answer, reason)
    booking = _booking(data)
    if booking is None:
        raise _unreadable(answer, "no booking id and offer id")
    if not _is_of(booking, offer_id, request):
        raise Unknown("wrong-offer", "XONE answered with the booking of another offer", answer.status, answer.body)
    return BookingReceived(booking, answer.status)


def _booking_in(content: dict[str, Any]) -> Any:
    """What should be a booking: as in XONE's page below ``data``, or bare, as bodies of the older API have it."""
    return content.get("data", content)


def _is_of(booking: Booking, offer_id: str, request: bytes) -> bool:
    """Whether a booking is of the offer. If the offer ids differ in case only, the quote decides."""
    if is_same_id(booking.offer_id, offer_id):
        return True
    quote = booking.quote.uuid if booking.quote else None
    return differs_in_case_only(booking.offer_id, offer_id) and bool(request) and holds_id(quote_ids(request), quote)


def _booking(data: Any) -> Booking | None:
    try:
        return Booking.model_validate(data)
    except ValidationError:
        return None


def _read_object(answer: HttpAnswer) -> dict[str, Any]:
    """The JSON object that an answer is. Raises Unknown, and Oversized before anything large is built."""
    if not _OBJECT.match(answer.body):
        if answer.json() is not None or answer.body.strip() == b"null":
            raise _unreadable(answer, "no JSON object")
        raise _not_xone(answer)
    if len(answer.body) > MAX_BOOKING_BYTES:
        raise _oversized(answer, f"is larger than {MAX_BOOKING_BYTES // 1024} KiB")
    if answer.count_values() > MAX_VALUES:
        raise _oversized(answer, f"has more than {MAX_VALUES} values")
    try:
        content: dict[str, Any] = read_exact(answer.body)
    except RecursionError:
        raise _oversized(answer, f"is nested deeper than {MAX_DEPTH}") from None
    except ValueError:
        raise _not_xone(answer) from None
    return content


def _is_small(answer: HttpAnswer) -> bool:
    """Whether an answer can't hold a booking beyond the limits: it saves to count again what has been read."""
    return len(answer.body) <= SMALL and answer.body.count(b"[") + answer.body.count(b"{") <= MAX_DEPTH


def _oversized(answer: HttpAnswer, reason: str) -> Oversized:
    return Oversized("too-large", f"XONE's answer ({answer.status}) {reason}", answer.status, answer.body)


def _unreadable(answer: HttpAnswer, what: str) -> Unknown:
    return Unknown("bad-answer", f"the answer ({answer.status}) is no booking: {what}", answer.status, answer.body)


def _not_xone(answer: HttpAnswer) -> NotXone:
    detail = f"the answer ({answer.status}) is no booking: no JSON"
    return NotXone("bad-answer", detail, answer.status, answer.body)


def failure_of(answer: HttpAnswer, offer_id: str | None = None, request: bytes = b"") -> XoneError:
    """The error that an answer with another status than 2xx means."""
    status, code, text = answer.status, f"http-{answer.status}", refusal_text(answer.body)
    detail = f"XONE answered {status} {_reason_phrase(status)}".strip() + (f": {text}" if text else "")
    may_say_so = status in REFUSALS or status == HTTPStatus.LOCKED
    if status == 409 or (may_say_so and offer_id is not None and _may_be_booked(answer, offer_id, request)):
        return _already_booked(answer, offer_id, request)
    if 300 <= status < 400:
        return Refused("redirect", f"XONE answered with a redirect ({status}), which is not followed", status)
    if status in LATER:
        return Busy(code, detail, status, answer.body, retry_after(answer.headers.get("Retry-After")))
    if is_page_before_xone(answer) and offer_id is not None:
        detail = f"something before XONE answered {status} {_reason_phrase(status)} with a web page"
        return Busy(code, detail, status, answer.body, retry_after(answer.headers.get("Retry-After")))
    if status in REFUSALS:
        return Refused(code, detail, status, answer.body)
    return Unknown(code, detail, status, answer.body)


def is_page_before_xone(answer: HttpAnswer) -> bool:
    """Whether an answer is a web page that refuses the call before it has reached XONE, which speaks JSON."""
    content_type = str(answer.headers.get("Content-Type") or "").partition(";")[0].strip().lower()
    return answer.status in BEFORE_XONE and content_type in ("text/html", "application/xhtml+xml")


def _may_be_booked(answer: HttpAnswer, offer_id: str, request: bytes) -> bool:
    """Whether a refusal may mean that the offer is booked: it says so, or shows the booking."""
    return may_mean_booked(answer.body, request) or _booking_shown(answer, offer_id, request) is not None


def _booking_shown(answer: HttpAnswer, offer_id: str, request: bytes) -> Booking | None:
    """The booking of the offer in the body of a refusal."""
    content = answer.json()
    data = _booking_in(content) if isinstance(content, dict) else None
    booking = _booking(data) if excess(data) is None else None
    return booking if booking is not None and _is_of(booking, offer_id, request) else None


def _already_booked(answer: HttpAnswer, offer_id: str | None, request: bytes) -> AlreadyBooked:
    reference = reference_in(answer.body, request)
    known_as = f" as {reference}" if reference and any(map(str.isdigit, reference)) else ""  # else it may be a name
    error = AlreadyBooked("already-booked", f"XONE says that a booking exists{known_as}", answer.status, answer.body)
    if offer_id is not None:
        error.booking = _booking_shown(answer, offer_id, request)
    return error


def transport_failure(error: requests.RequestException) -> XoneError:
    """The error that a failed call means. Name, connection, TLS: nothing was sent. Later: XONE may have booked."""
    cause: BaseException | None = error.args[0] if error.args and isinstance(error.args[0], BaseException) else error
    cause = getattr(cause, "reason", None) or cause
    if isinstance(cause, TlsError):
        return NotSent("connect", "no TLS connection to XONE: its certificate or protocol is not accepted")
    if isinstance(cause, NotDelivered):
        return NotSent("connect", "XONE had closed the connection before the request reached it")
    if isinstance(cause, ConnectTimeoutError):  # also the base of the error of a refused connection, or of no such name
        return NotSent("connect", _why_not_connected(cause))
    if isinstance(error, requests.Timeout) or "Timeout" in str(error):
        return Unknown("timeout", "no whole answer within XONE_TIMEOUT")
    return Unknown("connection-lost", "the connection broke before the answer was whole")


def _why_not_connected(error: ConnectTimeoutError) -> str:
    cause = error.__cause__
    if isinstance(cause, ConnectionRefusedError):
        return "the host of XONE_BASE_URL refuses the connection"
    if isinstance(cause, TimeoutError):
        return "the host of XONE_BASE_URL takes no connection within XONE_CONNECT_TIMEOUT"
    is_name_unknown = cause is not None and isinstance(cause.__cause__, socket.gaierror)
    return "no machine has the name in XONE_BASE_URL" if is_name_unknown else "XONE can't be reached"


def retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a Retry-After header asks for, at most an hour; None if it is invalid or missing.

    The value is a number of seconds or a date (RFC 9110, section 10.2.3).
    """
    if not value:
        return None
    try:
        seconds = float(int(value))
    except (ValueError, OverflowError):
        try:
            seconds = (parsedate_to_datetime(value) - (now or datetime.now(UTC))).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)


def _reason_phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""
