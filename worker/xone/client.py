"""The client of XONE: token, confirm, and the list of bookings.

What is known of XONE, and from where: its Confirm Offer page documents path, body and response, and a bearer token by
client credentials. Observation of its older API shows the path and body for tokens, the idempotency key, the list of
bookings, and the meaning of 409 and 422.
"""

import json
import re
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urljoin, urlsplit
from uuid import UUID

import requests
from pydantic import ValidationError

from models.booking import Booking, excess
from models.exact_json import write_exact
from worker.errors import BadCredentials, Busy, NotSent, Oversized, Refused, Unknown, XoneError
from worker.observability import metrics, tracing
from worker.settings import XoneSettings
from worker.xone.answers import (
    LATER,
    REFUSALS,
    BookingReceived,
    HttpAnswer,
    failure_of,
    is_page_before_xone,
    read_confirm_answer,
    retry_after,
    transport_failure,
)
from worker.xone.booking_list import Listed, read_page
from worker.xone.call_control import CallControl
from worker.xone.circuit_breaker import CallsSuspended
from worker.xone.oauth_token import DEFAULT_LIFETIME, Token, TokenCache, issued
from worker.xone.path_check import PathCheck
from worker.xone.read_back import WAIT, ReadBack
from worker.xone.transport import AnswerTooLarge, OpenAnswer, TooLate, Transport

MAX_PAGES = 2000  # of the list of bookings
LIST_TIMEOUTS = 3  # XONE_TIMEOUTs that a reading of a whole list may take, however many pages it has
TOO_LATE_DELAY = 1.0  # seconds until a call is tried again for which too little time was left


class Xone:
    """The client of one process. Threads share it."""

    def __init__(
        self, settings: XoneSettings, connections: int = 64, has_ever_confirmed: Callable[[], bool] = lambda: True
    ) -> None:
        """has_ever_confirmed: whether a booking is stored, by which the path of confirm calls is right."""
        self._settings = settings
        self._path = PathCheck(has_ever_confirmed)
        self._http = Transport(
            connections, settings.XONE_CONNECT_TIMEOUT, settings.XONE_TIMEOUT, settings.XONE_IDLE_TIMEOUT
        )
        self.tokens = TokenCache(self._request_token)
        self.calls = CallControl()
        self._read_back = ReadBack()
        self._credentials_confirm = False  # as the last confirm call showed that was answered
        self._token_without_list: str | None = None  # new when the list of bookings answered it with 401
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
        before_send: Callable[[], None] = lambda: None,
    ) -> BookingReceived:
        """Confirms an offer and returns its booking. Raises XoneError, and CallsSuspended if no call may be made now.

        body: JSON. idempotency_key: the same for the same body, so that XONE books once. before_call: called before
        a connection is looked for. before_send: called when the connection stands, before the first byte of the request
        goes out. What they raise ends the call, and nothing was sent.
        """
        template = self._settings.XONE_CONFIRM_PATH
        path = template.format(partner_id=quote(partner_id, safe=""), offer_id=quote(offer_id, safe=""))
        headers = {"Content-Type": "application/json", "x-idempotency-key": str(idempotency_key)}
        with self.calls.guard():
            url = self._url(path)
            with self._authorized("confirm", "POST", template, url, headers, body, before_call, before_send) as answer:
                whole = HttpAnswer(answer.status, answer.headers, answer.read())
            try:
                received = read_confirm_answer(whole, offer_id, body)
            except XoneError as error:
                self._path.failed(error)
                raise
            self._path.confirmed()
            return received

    def find_booking(
        self,
        partner_id: str,
        offer_id: str,
        quote_ids: frozenset[str],
        before_call: Callable[[], None] = lambda: None,
        before_send: Callable[[], None] = lambda: None,
        while_waiting: Callable[[], None] = lambda: None,
        may_be_anothers: Callable[[str], bool] = lambda _: False,
    ) -> Booking | None:
        """The booking of an offer in the partner's list of bookings, or None. Raises XoneError and CallsSuspended.

        quote_ids: of the offer, for a list that does not name offers. before_call, before_send: as in confirm, for each
        page. while_waiting: called every second while the list is read, by this thread or another. may_be_anothers:
        tells by its id whether a booking that names no offer may belong to another offer.
        """

        def reading() -> Generator[Listed, None, None]:
            return self.list_bookings(partner_id, before_call, before_send, while_waiting)

        if (wait := self.calls.wait_for_lookup(partner_id)) > 0:  # instead of waiting for another thread's reading
            raise CallsSuspended(wait)
        listed = self._read_back.find(partner_id, offer_id, quote_ids, reading, while_waiting, may_be_anothers)
        if listed is None:
            return None
        if (reason := excess(listed)) is not None:
            raise Oversized(
                "too-large", f"the booking in the list of bookings {reason}", 200, write_exact(listed).encode()
            )
        try:
            return Booking.model_validate({**listed, "offer_id": offer_id})
        except ValidationError:
            raise Unknown("bad-answer", "the list of bookings holds this offer without a booking id") from None

    def list_bookings(
        self,
        partner_id: str,
        before_call: Callable[[], None] = lambda: None,
        before_send: Callable[[], None] = lambda: None,
        while_reading: Callable[[], None] = lambda: None,
    ) -> Generator[Listed, None, None]:
        """Yields the bookings of a partner as they are listed: a stream, of which one booking is in memory at a time.

        Whoever has seen enough closes the generator. before_call, before_send: as in confirm, for each page.
        while_reading: called every second. Raises XoneError and CallsSuspended, also after bookings were yielded: a
        list that was not read to its end does not show that a booking is missing.
        """
        with self.calls.guard_lookup(partner_id):
            yield from self._pages(partner_id, before_call, before_send, while_reading)

    def _pages(
        self,
        partner_id: str,
        before_call: Callable[[], None],
        before_send: Callable[[], None],
        while_reading: Callable[[], None],
    ) -> Generator[Listed, None, None]:
        template = self._settings.XONE_BOOKINGS_PATH
        url = self._url(template.format(partner_id=quote(partner_id, safe="")))
        until = time.monotonic() + LIST_TIMEOUTS * self._settings.XONE_TIMEOUT
        for _ in range(MAX_PAGES):
            with self._authorized("bookings", "GET", template, url, {}, None, before_call, before_send, until) as page:
                if page.status != 200:
                    raise failure_of(HttpAnswer(page.status, page.headers, page.read()))
                following = yield from read_page(_each_second(page.stream(), while_reading))
            if not following:
                return
            try:
                next_url = urljoin(url, following)
                is_same_host = urlsplit(next_url)[:2] == urlsplit(url)[:2]
            except (TypeError, ValueError):
                raise Unknown("bad-answer", "the list of bookings has a next page that is no URL") from None
            if not is_same_host:
                raise Unknown("bad-answer", "the list of bookings goes on at another host, which gets no token of ours")
            if time.monotonic() > until:
                raise Unknown("timeout", f"the list of bookings takes longer than {LIST_TIMEOUTS} times XONE_TIMEOUT")
            url = next_url
        raise Refused("too-large", f"the list of bookings has more than {MAX_PAGES} pages")

    @contextmanager
    def _authorized(
        self,
        call: str,
        method: str,
        template: str,
        url: str,
        headers: dict[str, str],
        body: bytes | None,
        before_call: Callable[[], None],
        before_send: Callable[[], None],
        stream_until: float | None = None,
    ) -> Iterator[OpenAnswer]:
        """The answer to a call with the bearer token. After a 401, calls once more with a new token.

        Only a confirm call shows whether the credentials are accepted. The list of bookings needs a scope of its own,
        so its 401 means as little as a 403 where confirm calls pass.
        """
        confirms = call == "confirm"
        for is_last in (False, True):
            token = self.tokens.get()
            before_call()
            authorized = {**headers, "Authorization": f"Bearer {token}"}
            with self._open(call, method, template, url, authorized, body, before_send, stream_until) as answer:
                if answer.status != 401:
                    if confirms and (answer.status < 300 or answer.status in REFUSALS):
                        self._credentials_confirm = True
                    yield answer
                    return
                answer.read()  # the connection serves again
            if not confirms and (is_last or token == self._token_without_list):
                self._token_without_list = token  # is good for confirm calls all the same
                break
            self.tokens.drop(token)
        if not confirms and self._credentials_confirm:
            raise Refused("http-401", "XONE gives no access to the list of bookings (401)", 401)
        if not confirms:
            raise Unknown("http-401", "XONE does not accept the token for the list of bookings (401)", 401)
        self._credentials_confirm = False
        raise BadCredentials("credentials", "XONE does not accept the token it gave (401)", 401)

    def _request_token(self) -> Token:
        credentials = {
            "grant_type": "client_credentials",
            "client_id": self._settings.XONE_CLIENT_ID,
            "client_secret": self._settings.XONE_CLIENT_SECRET.get_secret_value(),
        }
        asked_at = time.monotonic()
        try:
            path = self._settings.XONE_TOKEN_PATH
            body, headers = json.dumps(credentials).encode(), {"Content-Type": "application/json"}
            with self._open("token", "POST", path, self._url(path), headers, body) as opened:
                answer = HttpAnswer(opened.status, opened.headers, opened.read())
        except Unknown as error:  # no offer was sent yet
            raise NotSent(error.code, f"token: {error.detail}") from None
        if answer.status in LATER:
            detail = f"token: XONE answered {answer.status}"
            wait = retry_after(answer.headers.get("Retry-After"))
            raise Busy(f"http-{answer.status}", detail, answer.status, retry_after=wait)
        if answer.status >= 500:
            raise NotSent(f"http-{answer.status}", f"token: XONE answered {answer.status}", answer.status)
        if is_page_before_xone(answer):
            detail = f"token: something before XONE answered {answer.status} with a web page"
            raise NotSent(f"http-{answer.status}", detail, answer.status)
        content = answer.json()
        if not 200 <= answer.status < 300:
            raise BadCredentials("credentials", f"XONE gives no token ({answer.status})", answer.status)
        token = content.get("access_token") if isinstance(content, dict) else None
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]{1,16384}", token):  # what a header can hold
            raise NotSent("bad-answer", "token: the answer holds no access_token", answer.status)
        return issued(token, _lifetime(content.get("expires_in")), asked_at)

    @contextmanager
    def _open(
        self,
        call: str,
        method: str,
        template: str,
        url: str,
        headers: dict[str, str],
        body: bytes | None,
        before_send: Callable[[], None] = lambda: None,
        stream_until: float | None = None,
    ) -> Iterator[OpenAnswer]:
        """The answer to a call, whose body is still to be read. Failures while it is read become XoneError as well."""
        headers = {"Accept": "application/json", "User-Agent": "confirm-offer", **headers}
        with metrics.calling(call), tracing.call(method, template, self._server):
            try:
                with self._http.open(method, url, headers, body, before_send, stream_until) as answer:
                    tracing.answered(answer.status)
                    yield answer
            except AnswerTooLarge:
                raise Unknown(
                    "too-large", "the answer is larger than 5 MiB, or than other large answers leave room for"
                ) from None
            except TooLate:
                raise CallsSuspended(TOO_LATE_DELAY) from None
            except requests.RequestException as error:
                raise transport_failure(error) from None

    def _url(self, path: str) -> str:
        return self._settings.XONE_BASE_URL.rstrip("/") + path


def _each_second(chunks: Iterator[bytes], do: Callable[[], None]) -> Iterator[bytes]:
    """The chunks; calls ``do`` between two of them when a second has passed."""
    done_at = time.monotonic()
    for chunk in chunks:
        if time.monotonic() - done_at >= WAIT:
            do()
            done_at = time.monotonic()
        yield chunk


def _lifetime(expires_in: Any) -> float:
    try:
        seconds = float(expires_in)
    except (TypeError, ValueError, OverflowError):
        return DEFAULT_LIFETIME
    return seconds if 0 < seconds < 1e9 else DEFAULT_LIFETIME
