"""Faults, which the end of an offer id asks for, and switches, which change the whole sandbox."""

import math
import re
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any, NamedTuple

from worker.sandbox.answers import Answer, Json, already_booked, answer, any_status, refusal
from worker.sandbox.bookings import (
    confirmed,
    in_capitals,
    many_policies,
    many_scripts,
    minimal,
    odd_types,
    pending,
    with_status,
)
from worker.sandbox.sending import (
    Connection,
    dripping_body,
    dripping_head,
    dropped,
    huge,
    late,
    reset,
    truncated,
    whole,
)

Send = Callable[[Connection, Answer], None]
Reply = Callable[[Json], Answer]  # from the booking


class Fault(NamedTuple):
    """description: for the page; shape: changes the booking that is stored and listed.

    becomes: changes it once more, as soon as the list has shown it as many times as the fault is asked for.
    """

    description: str
    books: bool = True
    reply: Reply | None = None  # None: 201 with the booking, or 422 for an offer that is booked already
    send: Send = whole
    shape: Callable[[Json], Json] = dict
    becomes: Callable[[Json], Json] | None = None


NO_FAULT = Fault("")


def always(status: int, message: str, **headers: str) -> Reply:
    return lambda _booking: refusal(status, message, **headers)


def booking_with(status: int, without: str = "", beside: Json | None = None, **changes: Any) -> Reply:
    def reply(booking: Json) -> Answer:
        data = {name: value for name, value in (booking | changes).items() if name != without}
        return answer(status, {"data": data} | (beside or {}))

    return reply


def gateway_page(_booking: Json) -> Answer:
    return Answer(200, b"<html><body><h1>Welcome</h1></body></html>", {"Content-Type": "text/html"})


def blocked(_booking: Json) -> Answer:
    return Answer(403, b"<html><body><h1>Forbidden</h1></body></html>", {"Content-Type": "text/html; charset=utf-8"})


def booked_code(_booking: Json) -> Answer:
    return answer(422, {"errors": [{"code": "OFFER_ALREADY_CONFIRMED"}]})


def maintenance(_booking: Json) -> Answer:
    return refusal(503, "Maintenance.", Retry_After=formatdate(time.time() + 2, usegmt=True))


ALREADY_CONFIRMED = "Offer has already been confirmed."
BUSY = always(429, "Too many requests.", Retry_After="1")
UNAVAILABLE = always(503, "Unavailable.", Retry_After="1")
MOVED = always(307, "Moved.", Location="/api/partners/moved/offers/moved")
ERRORS = {"errors": [{"message": "Something went wrong."}]}
BOOKED, NOT_BOOKED = True, False

FAULTS = {
    "pending": Fault(
        "The booking has the status PENDING; with a number, CONFIRMED once the list has shown it so many times.",
        BOOKED,
        shape=pending,
        becomes=confirmed,
    ),
    "pending-cancelled": Fault(
        "As pending, but it becomes CANCELLED.", BOOKED, shape=pending, becomes=with_status("CANCELLED")
    ),
    "pending-failed": Fault("As pending, but it becomes FAILED.", BOOKED, shape=pending, becomes=with_status("FAILED")),
    "failed-payment": Fault("The booking has the status FAILED.", BOOKED, shape=with_status("FAILED")),
    "http-NNN": Fault("Any status of three digits, here 500.", NOT_BOOKED),
    "busy": Fault("429 with Retry-After: 1.", NOT_BOOKED, BUSY),
    "unavailable": Fault("503 with Retry-After: 1.", NOT_BOOKED, UNAVAILABLE),
    "maintenance": Fault("503 with a date in Retry-After, two seconds ahead.", NOT_BOOKED, maintenance),
    "redirect": Fault("307 to partner “moved”, offer “moved”, on this host.", NOT_BOOKED, MOVED),
    "blocked": Fault("403 with an HTML page, as of a gateway.", NOT_BOOKED, blocked),
    "html": Fault("200 with an HTML page.", BOOKED, gateway_page),
    "html-not-booked": Fault("200 with an HTML page.", NOT_BOOKED, gateway_page),
    "truncated": Fault("Half of the body that Content-Length promises.", BOOKED, send=truncated),
    "no-id": Fault("200 with a booking that has no id.", BOOKED, booking_with(200, without="id")),
    "other-offer": Fault("200 with another offer's booking.", NOT_BOOKED, booking_with(200, offer_id="another")),
    "errors-beside": Fault("200 with a booking and errors beside it.", BOOKED, booking_with(200, beside=ERRORS)),
    "drop-before": Fault("Hangs up without an answer.", NOT_BOOKED, send=dropped),
    "drop-after": Fault("Hangs up without an answer.", BOOKED, send=dropped),
    "reset-mid": Fault("Half of the body, then the connection is reset.", BOOKED, send=reset),
    "slow": Fault("Books at once, answers after slow_seconds.", BOOKED, send=late),
    "slow-headers": Fault("The head drips, a byte each 0.2 s for slow_seconds.", BOOKED, send=dripping_head),
    "drip": Fault("The body drips, a byte each 0.2 s for slow_seconds.", BOOKED, send=dripping_body),
    "huge": Fault("A body of 40 MB, chunked.", BOOKED, send=huge),
    "booked": Fault("409 that does not show the booking.", BOOKED, always(409, "Conflict.")),
    "booked-with-body": Fault("409 that shows the booking.", BOOKED, booking_with(409)),
    "booked-text": Fault("422 that names the booking.", BOOKED, already_booked),
    "booked-words": Fault("400 that says in other words that it is booked.", BOOKED, always(400, ALREADY_CONFIRMED)),
    "booked-code": Fault("422 that says by a code that it is booked.", BOOKED, booked_code),
    "booked-nowhere": Fault("422 that names a booking which no list shows.", NOT_BOOKED, already_booked),
    "odd-types": Fault("A price and a time are words, a tax is a list.", BOOKED, shape=odd_types),
    "minimal": Fault("The booking has an id, an offer_id and a status, no more.", BOOKED, shape=minimal),
    "capitals": Fault("The booking names the offer in capitals.", BOOKED, shape=in_capitals),
    "many-policies": Fault("The booking has 2,000 policies.", BOOKED, shape=many_policies),
    "unicode": Fault("A long policy_content in many scripts.", BOOKED, shape=many_scripts),
}


def requested_fault(offer_id: str) -> tuple[Fault, float]:
    """The fault that the end of an offer id asks for, and to how many calls of this offer it applies."""
    match = re.search(r"~(?P<name>[a-z0-9-]+)(?:~(?P<times>\d+))?$", offer_id)
    if not match:
        return NO_FAULT, 0
    fault = FAULTS.get(match["name"], NO_FAULT)
    if status := re.fullmatch(r"http-(\d{3})", match["name"]):
        fault = FAULTS["http-NNN"]._replace(reply=lambda _booking: any_status(int(status[1])))
    return fault, int(match["times"]) if match["times"] else math.inf


class Switch(NamedTuple):
    """description: for the page; accepts: whether a value is valid."""

    description: str
    accepts: Callable[[Any], bool]


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def is_mode(value: Any) -> bool:
    return value in ("on", "forbidden", "unauthorized", "busy", "failing", "lagging", "nameless")


def is_page_size(value: Any) -> bool:
    return type(value) is int and value > 0


def is_status_or_null(value: Any) -> bool:
    return value is None or (type(value) is int and 100 <= value <= 999)


def is_rate_or_null(value: Any) -> bool:
    return value is None or (is_number(value) and value > 0)


SWITCHES = {
    "down": Switch("Every connection to /api is closed without an answer.", is_flag),
    "status_for_all": Switch("Every confirm answers this status, unbooked. null: off.", is_status_or_null),
    "latency": Switch("Seconds before a confirm answers; it books at once.", is_number),
    "latency_jitter": Switch("Up to so many seconds more, at random.", is_number),
    "slow_seconds": Switch("Seconds that the faults slow, slow-headers and drip take.", is_number),
    "bookings_mode": Switch(
        "List of bookings: “on”, “forbidden” (403), “unauthorized” (401), “busy” (429), “failing” (503), “lagging” or"
        " “nameless” (no offers).",
        is_mode,
    ),
    "bookings_lag": Switch("Seconds until a lagging list shows a booking.", is_number),
    "page_size": Switch("Bookings on one page of the list.", is_page_size),
    "token_down": Switch("The token endpoint answers 503.", is_flag),
    "rate": Switch("Confirm calls a second; those above it get 429. null: no limit.", is_rate_or_null),
}
