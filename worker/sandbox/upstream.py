"""XONE's state and decisions: tokens, bookings, switches, and a record of the calls."""

import math
import secrets
import socket
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from urllib.parse import quote

from models.same import canonical_id
from worker.sandbox.answers import (
    Answer,
    Json,
    already_booked,
    answer,
    any_status,
    invalid_job,
    parsed,
    refusal,
    unauthorized,
)
from worker.sandbox.bookings import new_booking
from worker.sandbox.faults import NO_FAULT, SWITCHES, Fault, Send, requested_fault
from worker.sandbox.sending import whole

Key = tuple[str, str]  # partner id, offer id


@dataclass(frozen=True)
class Call:
    """A confirm request. started, ended: of time.monotonic(); status: None where no answer was sent."""

    partner_id: str
    offer_id: str
    idempotency_key: str | None
    body: bytes
    started: float
    ended: float
    status: int | None


class Upstream:
    """XONE without its server. Times are in seconds.

    The attributes named in SWITCHES may be set at any time. `bookings` holds the `data` of each booking, with amounts
    as Decimal; hold `lock` to change it. `calls` are in the order of their ends. `overlapping` holds the offers of
    which two confirm calls were in flight at the same time; a call whose client has hung up is not in flight.
    """

    def __init__(self, latency: float, client_id: str, client_secret: str, token_lifetime: int) -> None:
        self.client_id, self.client_secret, self.token_lifetime = client_id, client_secret, token_lifetime
        self.down = False
        self.status_for_all: int | None = None
        self.latency, self.latency_jitter, self.slow_seconds = latency, 0.0, 60.0
        self.bookings_mode, self.bookings_lag, self.page_size = "on", 60.0, 100
        self.token_down = False
        self.rate: float | None = None

        self.lock = threading.RLock()
        self.bookings: dict[Key, Json] = {}
        self.calls: list[Call] = []
        self.overlapping: set[Key] = set()
        self.token_requests = 0
        self.double_bookings = 0  # stays 0: a second booking is refused
        self._booked_at: dict[Key, float] = {}
        self._in_flight: dict[Key, list[socket.socket]] = {}
        self._strikes: Counter[Key] = Counter()
        self._shown: Counter[Key] = Counter()  # in lists
        self._tokens: dict[str, float] = {}
        self._recent: deque[float] = deque()

    def revoke_tokens(self) -> None:
        with self.lock:
            self._tokens.clear()

    def rotate_secret(self, new: str) -> None:
        self.client_secret = new

    def switch(self, values: Json) -> None:
        """Sets switches by name, all or none. Raises ValueError for an unknown name or an invalid value."""
        if not values:
            raise ValueError("The body must be a JSON object with the switches to set.")
        for name, value in values.items():
            if name not in SWITCHES or not SWITCHES[name].accepts(value):
                raise ValueError(f"No such switch or value: {name}.")
        for name, value in values.items():
            setattr(self, name, value)

    def state(self) -> Json:
        with self.lock:
            return {
                "bookings": len(self.bookings),
                "calls": len(self.calls),
                "overlapping": len(self.overlapping),
                "double_bookings": self.double_bookings,
                "token_requests": self.token_requests,
                "switches": {name: getattr(self, name) for name in SWITCHES},
            }

    def token(self, body: bytes) -> Answer:
        with self.lock:
            self.token_requests += 1
        if self.token_down:
            return refusal(503, "The token endpoint is switched off.")
        request = parsed(body)
        if request.get("grant_type") != "client_credentials":
            return answer(400, {"error": "unsupported_grant_type"})
        if (request.get("client_id"), request.get("client_secret")) != (self.client_id, self.client_secret):
            return answer(401, {"error": "invalid_client"})
        token = secrets.token_urlsafe(24)
        with self.lock:
            self._tokens[token] = time.monotonic() + self.token_lifetime
        return answer(200, {"access_token": token, "token_type": "Bearer", "expires_in": self.token_lifetime})

    def knows(self, authorization: str) -> bool:
        scheme, _, token = authorization.partition(" ")
        return scheme == "Bearer" and time.monotonic() < self._tokens.get(token, 0)

    def call_begins(self, key: Key, connection: socket.socket) -> None:
        key = _canonical(key)
        with self.lock:
            others = self._in_flight.setdefault(key, [])
            if any(not hung_up(other) for other in others):
                self.overlapping.add(key)
            others.append(connection)

    def call_ends(self, call: Call, connection: socket.socket) -> None:
        with self.lock:
            self._in_flight[_canonical((call.partner_id, call.offer_id))].remove(connection)
            self.calls.append(call)

    def confirm(self, key: Key, authorization: str, body: bytes) -> tuple[Answer, Send]:
        """Books the offer unless a fault prevents it. Returns the answer and the way to send it."""
        key = _canonical(key)
        if not self.knows(authorization):
            return unauthorized(), whole
        if self._too_fast():
            return refusal(429, "Too many requests.", Retry_After="1"), whole
        if self.status_for_all:
            return any_status(self.status_for_all), whole
        job = parsed(body)
        if invalid := invalid_job(job):
            return invalid, whole
        with self.lock:
            fault = self._fault(key)
            before = self.bookings.get(key)
            booking = before or fault.shape(new_booking(*key, job))
            if fault.books and before is None:
                self.bookings[key] = booking
                self._booked_at[key] = time.monotonic()
        if fault.reply:
            return fault.reply(booking), fault.send
        return already_booked(booking) if before else answer(201, {"data": booking}), fault.send

    def _too_fast(self) -> bool:
        with self.lock:
            now = time.monotonic()
            while self._recent and self._recent[0] <= now - 1:
                self._recent.popleft()
            if self.rate is not None and len(self._recent) >= self.rate:
                return True
            self._recent.append(now)
            return False

    def _fault(self, key: Key) -> Fault:
        fault, times = requested_fault(key[1])
        self._strikes[key] += 1
        return fault if self._strikes[key] <= times else NO_FAULT

    def listed(self, partner_id: str, page: int, base_url: str) -> Answer:
        if self.bookings_mode == "forbidden":
            return refusal(403, "The scope bookings:view is missing.")
        if self.bookings_mode == "unauthorized":
            return refusal(401, "The token is not accepted here.")
        if self.bookings_mode == "busy":
            return refusal(429, "Too many requests for lists.")
        if self.bookings_mode == "failing":
            return refusal(503, "The list of bookings is switched off.")
        booked_before = time.monotonic() - (self.bookings_lag if self.bookings_mode == "lagging" else 0)
        with self.lock:
            if page == 1:
                self._let_become(partner_id)
            listed = [
                booking
                for key, booking in self.bookings.items()
                if key[0] == partner_id and self._booked_at.get(key, 0) <= booked_before
            ]
        if self.bookings_mode == "nameless":
            listed = [{name: value for name, value in booking.items() if name != "offer_id"} for booking in listed]
        pages = max(1, math.ceil(len(listed) / self.page_size))
        following = f"{base_url}/api/partners/{quote(partner_id)}/bookings?page={page + 1}"
        content = {
            "data": listed[(page - 1) * self.page_size : page * self.page_size],
            "links": {"next": following if page < pages else None},
            "meta": {"page": page, "pages": pages, "total": len(listed)},
        }
        return answer(200, content)

    def _let_become(self, partner_id: str) -> None:
        """Changes bookings that the list has shown as often as their fault says."""
        for key, booking in self.bookings.items():
            fault, times = requested_fault(key[1])
            if key[0] == partner_id and fault.becomes is not None and self._shown[key] <= times:
                if self._shown[key] == times:
                    self.bookings[key] = fault.becomes(booking)
                self._shown[key] += 1


def _canonical(key: Key) -> Key:
    """XONE knows an offer by its UUID, however the URL writes it."""
    return key[0], canonical_id(key[1])


def hung_up(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
