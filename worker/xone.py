"""XONE: token, confirm and read-back, and the one place that turns an answer into a booking or an error.

Facts about XONE: its Confirm Offer page (path, body, response, bearer token by client credentials), and observation of
its older API where that page is silent (token path and body, idempotency key, list of bookings, 409 and 422).
"""

import json
import re
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, urljoin, urlsplit
from uuid import UUID

import requests
from pydantic import ValidationError
from urllib3.exceptions import ConnectTimeoutError

from models.booking import Booking
from models.exact_json import read_exact
from worker import metrics, tracing
from worker.errors import AlreadyBooked, BadCredentials, Busy, NotSent, Refused, Unknown, XoneError
from worker.gate import Gate
from worker.http import AnswerTooLarge, Http, NoTls
from worker.readback import ReadBack
from worker.settings import XoneSettings
from worker.token import DEFAULT_LIFETIME, Token, TokenCache, issued
from worker.wording import wording

MAX_RETRY_AFTER = 3600.0  # seconds
MAX_PAGES = 50  # of the list of bookings
REFUSALS = frozenset({400, 402, 403, 404, 405, 406, 410, 413, 414, 415, 422})
LATER = frozenset({423, 429, 503})


@dataclass(frozen=True)
class Confirmed:
    """A booking that XONE returned, and the status of the answer."""

    booking: Booking
    http_status: int


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Any
    body: bytes

    def json(self) -> Any:
        """The body, decimals exact. None where it is no JSON."""
        try:
            return read_exact(self.body)
        except (ValueError, RecursionError):
            return None


class Xone:
    """A client for one process; threads share it."""

    def __init__(self, settings: XoneSettings, connections: int = 64) -> None:
        self._settings = settings
        self._http = Http(connections, settings.XONE_CONNECT_TIMEOUT, settings.XONE_TIMEOUT)
        self.tokens = TokenCache(self._request_token)
        self.gate = Gate()
        self._read_back = ReadBack()
        base = urlsplit(settings.XONE_BASE_URL)
        self._server: dict[str, str | int] = {
            "server.address": base.hostname or "",
            "server.port": base.port or (443, 80)[base.scheme == "http"],
        }

    @property
    def can_list_bookings(self) -> bool:
        return bool(self._settings.XONE_BOOKINGS_PATH)

    def confirm(
        self,
        partner_id: str,
        offer_id: str,
        body: bytes,
        idempotency_key: UUID,
        before_call: Callable[[], None] = lambda: None,
    ) -> Confirmed:
        """Confirms an offer and returns its booking. Raises XoneError, and Held where no call may be made now.

        before_call: called before anything is sent; what it raises stops the call.
        """
        template = self._settings.XONE_CONFIRM_PATH
        path = template.format(partner_id=quote(partner_id, safe=""), offer_id=quote(offer_id, safe=""))
        headers = {"Content-Type": "application/json", "x-idempotency-key": str(idempotency_key)}
        with self.gate.passing():
            answer = self._authorized("confirm", "POST", template, self._url(path), headers, body, before_call)
            return read_confirm_answer(answer, offer_id)

    def find_booking(
        self,
        partner_id: str,
        offer_id: str,
        quote_ids: frozenset[str],
        before_call: Callable[[], None] = lambda: None,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> Booking | None:
        """The booking of an offer from the partner's list of bookings, or None. Raises XoneError and Held.

        before_call: as in confirm, before each page. while_waiting: called every second while another thread reads.
        """

        def reading() -> Generator[dict[str, Any], None, None]:
            with self.gate.passing(proves=False):
                yield from self._bookings(partner_id, before_call)

        listed = self._read_back.find(partner_id, offer_id, quote_ids, reading, while_waiting)
        if listed is None:
            return None
        try:
            return Booking.model_validate({**listed, "offer_id": offer_id})
        except ValidationError:
            raise Unknown("bad-answer", "the list of bookings holds this offer without a booking id") from None

    def _bookings(self, partner_id: str, before_call: Callable[[], None]) -> Iterator[dict[str, Any]]:
        template = self._settings.XONE_BOOKINGS_PATH
        url = self._url(template.format(partner_id=quote(partner_id, safe="")))
        for _ in range(MAX_PAGES):
            answer = self._authorized("bookings", "GET", template, url, {}, None, before_call)
            if answer.status != 200:
                raise _failure(answer)
            content = answer.json()
            if not isinstance(content, dict) or not isinstance(content.get("data"), list):
                raise Unknown("bad-answer", "the list of bookings is not as expected", answer.status)
            yield from (listed for listed in content["data"] if isinstance(listed, dict))
            following = content["links"].get("next") if isinstance(content.get("links"), dict) else None
            if not following:
                return
            try:
                next_url = urljoin(url, following)
                is_same_host = urlsplit(next_url)[:2] == urlsplit(url)[:2]
            except (TypeError, ValueError):
                raise Unknown("bad-answer", "the list of bookings has a next page that is no URL") from None
            if not is_same_host:
                raise Unknown("bad-answer", "the list of bookings goes on at another host, which gets no token of ours")
            url = next_url
        raise Refused("too-large", f"the list of bookings has more than {MAX_PAGES} pages")

    def _authorized(
        self,
        call: str,
        method: str,
        template: str,
        url: str,
        headers: dict[str, str],
        body: bytes | None,
        before_call: Callable[[], None],
    ) -> Answer:
        """The answer to a call with the bearer token; on a 401 once more with a new one."""
        answer = None
        for _ in range(2):
            token = self.tokens.get()
            before_call()
            answer = self._send(call, method, template, url, {**headers, "Authorization": f"Bearer {token}"}, body)
            if answer.status != 401:
                return answer
            self.tokens.drop(token)
        raise BadCredentials("credentials", "XONE does not accept the token it gave (401)", 401)

    def _request_token(self) -> Token:
        credentials = {
            "grant_type": "client_credentials",
            "client_id": self._settings.XONE_CLIENT_ID,
            "client_secret": self._settings.XONE_CLIENT_SECRET.get_secret_value(),
        }
        asked_at = time.monotonic()
        try:
            answer = self._send(
                "token",
                "POST",
                self._settings.XONE_TOKEN_PATH,
                self._url(self._settings.XONE_TOKEN_PATH),
                {"Content-Type": "application/json"},
                json.dumps(credentials).encode(),
            )
        except Unknown as error:  # no offer was sent yet
            raise NotSent(error.code, f"token: {error.detail}") from None
        if answer.status in LATER:
            detail = f"token: XONE answered {answer.status}"
            wait = retry_after(answer.headers.get("Retry-After"))
            raise Busy(f"http-{answer.status}", detail, answer.status, retry_after=wait)
        if answer.status >= 500:
            raise NotSent(f"http-{answer.status}", f"token: XONE answered {answer.status}", answer.status)
        content = answer.json()
        if not 200 <= answer.status < 300:
            raise BadCredentials("credentials", f"XONE gives no token ({answer.status})", answer.status)
        token = content.get("access_token") if isinstance(content, dict) else None
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):  # what a header can hold
            raise NotSent("bad-answer", "token: the answer holds no access_token", answer.status)
        return issued(token, _lifetime(content.get("expires_in")), asked_at)

    def _send(
        self, call: str, method: str, template: str, url: str, headers: dict[str, str], body: bytes | None
    ) -> Answer:
        headers = {"Accept": "application/json", "User-Agent": "confirm-offer", **headers}
        with metrics.calling(call), tracing.call(method, template, self._server):
            try:
                answer = Answer(*self._http.send(method, url, headers, body))
            except AnswerTooLarge:
                raise Unknown("too-large", "the answer is larger than 5 MiB") from None
            except requests.RequestException as error:
                raise _transport_failure(error) from None
            tracing.answered(answer.status)
            return answer

    def _url(self, path: str) -> str:
        return self._settings.XONE_BASE_URL.rstrip("/") + path


def read_confirm_answer(answer: Answer, offer_id: str) -> Confirmed:
    """The booking in an answer to confirm. Raises the XoneError that the answer means."""
    if not 200 <= answer.status < 300:
        raise _failure(answer, offer_id)
    content = answer.json()
    if content is None:
        raise _unreadable(answer, "no JSON")
    if not isinstance(content, dict):
        raise _unreadable(answer, "no JSON object")
    if content.get("errors"):
        raise _unreadable(answer, "errors beside the data")
    booking = _booking(content.get("data"))
    if booking is None:
        raise _unreadable(answer, "no booking id and offer id")
    if booking.offer_id != offer_id:
        raise Unknown("wrong-offer", "XONE answered with the booking of another offer", answer.status, answer.body)
    return Confirmed(booking, answer.status)


def _booking(data: Any) -> Booking | None:
    try:
        return Booking.model_validate(data)
    except ValidationError:
        return None


def _unreadable(answer: Answer, what: str) -> Unknown:
    return Unknown("bad-answer", f"the answer ({answer.status}) is no booking: {what}", answer.status, answer.body)


def _failure(answer: Answer, offer_id: str | None = None) -> XoneError:
    """The error that a status other than 2xx means."""
    status, code, said = answer.status, f"http-{answer.status}", wording(answer.body)
    detail = f"XONE answered {status} {_reason_phrase(status)}".strip() + (f": {said}" if said else "")
    if status == 409 or (status == 422 and _BOOKED_TEXT.search(answer.body)):
        return _already_booked(answer, offer_id)
    if 300 <= status < 400:
        return Refused("redirect", f"XONE answered with a redirect ({status}), which is not followed", status)
    if status in LATER:
        return Busy(code, detail, status, answer.body, retry_after(answer.headers.get("Retry-After")))
    if status in REFUSALS:
        return Refused(code, detail, status, answer.body)
    return Unknown(code, detail, status, answer.body)


_BOOKED_TEXT = re.compile(rb"booking\s+already\s+exists", re.IGNORECASE)
_REFERENCE = re.compile(rb"INS number:\s*([A-Za-z0-9-]{1,64})", re.IGNORECASE)


def _already_booked(answer: Answer, offer_id: str | None) -> AlreadyBooked:
    reference = _REFERENCE.search(answer.body)
    known_as = f" as {reference[1].decode()}" if reference else ""
    error = AlreadyBooked("already-booked", f"XONE says that a booking exists{known_as}", answer.status, answer.body)
    content = answer.json()
    booking = _booking(content.get("data")) if isinstance(content, dict) else None
    if booking is not None and booking.offer_id == offer_id:
        error.booking = booking
    return error


def _transport_failure(error: requests.RequestException) -> XoneError:
    """Connect, TLS and name failures: nothing was sent. Anything later: XONE may have booked."""
    cause: BaseException | None = error.args[0] if error.args and isinstance(error.args[0], BaseException) else error
    cause = getattr(cause, "reason", None) or cause
    if isinstance(cause, NoTls):
        return NotSent("connect", "no TLS connection to XONE: its certificate or protocol is not accepted")
    if isinstance(cause, ConnectTimeoutError):  # its kinds: refused, no such name, no answer in time
        return NotSent("connect", "XONE can't be reached")
    if isinstance(error, requests.Timeout) or "Timeout" in str(error):
        return Unknown("timeout", "no whole answer within XONE_TIMEOUT")
    return Unknown("connection-lost", "the connection broke before the answer was whole")


def retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date; bounded to an hour. None where it is neither."""
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


def _lifetime(expires_in: Any) -> float:
    try:
        seconds = float(expires_in)
    except (TypeError, ValueError, OverflowError):
        return DEFAULT_LIFETIME
    return seconds if 0 < seconds < 1e9 else DEFAULT_LIFETIME


def _reason_phrase(status: int) -> str:
    from http import HTTPStatus

    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""
