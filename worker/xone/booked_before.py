"""Whether a refusal may mean that the offer is booked already.

XONE's page documents no refusals. Its older API says "Booking already exists … INS number: …"; others say it in their
own words or by a code. Such a refusal is settled by the list of bookings before it is believed. So this looks for what
may mean a booking, and leaves out what surely means something else: an offer that has already expired, an e-mail that
is already registered.
"""

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

MAX_BODY = 64 * 1024  # bytes; a longer one is no message to people
MAX_DEPTH, MAX_DEPTH_SENT = 12, 40  # levels of the answer, and of the request
MAX_LEAVES = 1000
MAX_TEXT = 2000  # characters of one text

_SUBJECT = (
    r"(?:offers?|quotes?|bookings?|polic(?:y|ies)|orders?|confirmations?|purchases?|insurances?|certificates?"
    r"|transactions?)"
)
_DONE = (
    r"(?:confirmed|booked|purchased|bought|issued|bound|sold|converted|redeemed|accepted|paid|completed|finali[sz]ed"
    r"|processed|activated|insured|covered|fulfilled)"
)
_BEING = r"(?:(?:has|have|had|is|are|was|were|been|being|just|once)\s+)*"
_NOT = r"(?<!not )(?<!n't )(?<!never )(?<!nor )"
_MEANS_BOOKED = re.compile(
    "|".join(
        (
            rf"{_NOT}\balready\s+{_BEING}{_DONE}\b",
            rf"{_NOT}\b{_DONE}\s+(?:already|before|previously|earlier|twice|again)\b",
            rf"\b(?:previously|earlier)\s+{_BEING}{_DONE}\b",
            # What exists or is used already must be named: an account may exist, too.
            rf"\b{_SUBJECT}\b[^.;!?]{{0,60}}\balready\s+{_BEING}"
            r"(?:exists?|existing|made|created|used|in use|taken|placed|registered|there|found)\b",
            rf"\balready\s+(?:has|have|had|exists?|made|created|used|placed|an?|existing)\s[^.;!?]{{0,40}}\b{_SUBJECT}\b",
            r"\b(?:existing|duplicated?|double|second|another)\s+(?:\w+\s+)?(?:booking|confirmation|policy|order|purchase|transaction)\b",
            r"\b(?:booking|policy|purchase|confirmation)\s+(?:\w+\s+)?(?:exists|found|duplicated?)\b",
            r"\bduplicated?\s+(?:request|offer|quote|submission|idempotency)\b",
            rf"\b(?:offer|quote|booking)\s+{_BEING}(?:confirmed|booked|purchased|sold)\b(?!\s*(?:only|by|before|within|until))",
            rf"\b(?:status|state)\W+(?:is\W+)?(?:already\W+)?{_DONE}\b",
            r"\b(?:confirm|book|purchase|buy)(?:ed)?\W+(?:\w+\W+){0,4}(?:twice|again)\b",
            r"^\W*(?:duplicated?|already\s+(?:exists|used|done))\W*$",
        )
    )
)
_LABELLED = re.compile(
    r"\bINS[\s_-]*(?:number|no|nr|num|reference|ref|id)\b\.?\s*[:#=]?\s*([A-Z0-9-]{2,64})", re.IGNORECASE
)
_BARE = re.compile(r"\bINS-(?=[A-Z0-9-]*\d|[A-Z0-9]{6})[A-Z0-9-]{2,60}\b")
_REFERENCE_KEYS = re.compile(r"ins(number|no|id|reference)|(existing)?booking(id|number|reference|uuid)|bookedas")
_HUMPS = re.compile(r"(?<=[a-z])(?=[A-Z])")


def may_mean_booked(body: bytes, request: bytes = b"") -> bool:
    """Whether a refusal may mean that the offer is booked. request: what it answers; XONE may echo parts of it."""
    return any(_says_booked(text) for text in _own_texts(body, request)) or reference_in(body, request) is not None


def reference_in(body: bytes, request: bytes = b"") -> str | None:
    """The number of a booking in a refusal, at most 64 characters of letters, digits and hyphens; or None."""
    for key, text in _own_leaves(body, request):
        if _REFERENCE_KEYS.fullmatch(re.sub(r"[\W_]", "", key).lower()):
            if re.fullmatch(r"[A-Za-z0-9-]{1,64}", text):
                return text
        elif found := _LABELLED.search(text):
            return found[1]
        elif found := _BARE.search(text):
            return found[0]
    return None


def _says_booked(text: str) -> bool:
    words = re.sub(r"[_\s/-]+", " ", _HUMPS.sub(" ", text)).lower().replace("’", "'")
    return _MEANS_BOOKED.search(words) is not None


def _own_texts(body: bytes, request: bytes) -> Iterator[str]:
    for key, text in _own_leaves(body, request):
        yield text
        yield f"{key}: {text}"


def _own_leaves(body: bytes, request: bytes) -> Iterator[tuple[str, str]]:
    """The texts of an answer, each with its key; without those that were sent to XONE."""
    if len(body) > MAX_BODY:
        return
    content = _read(body)
    if content is None:
        content = re.sub(r"<[^<>]*>", " ", body.decode(errors="replace"))
    sent = frozenset(text for leaf in _leaves("", _read(request), MAX_DEPTH_SENT) for text in leaf)
    for key, text in islice(_leaves("", content, MAX_DEPTH), MAX_LEAVES):
        if text not in sent:
            yield key, text[:MAX_TEXT]


def _read(body: bytes) -> Any:
    """JSON; None if it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _leaves(key: str, node: Any, levels: int) -> Iterator[tuple[str, str]]:
    if levels < 0:
        return
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(name, value, levels - 1)
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(key, value, levels - 1)
    elif isinstance(node, str):
        yield key, node
    elif isinstance(node, int) and not isinstance(node, bool):
        yield key, str(node)
    elif node is True:  # {"already_confirmed": true}
        yield "", key
