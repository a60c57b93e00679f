"""Whether a refusal may mean that the offer is booked already.

XONE's page documents no refusals. Its older API says "Booking already exists … INS number: …"; others say it in their
own words or by a code. Such a refusal is settled by the list of bookings before it is believed. So this looks for what
may mean a booking, and leaves out what surely means something else: an offer that has already expired, an e-mail that
is already registered.
"""

import json
import re
from collections.abc import Iterator
from html import unescape
from itertools import islice
from typing import Any, NamedTuple

MAX_BODY = 64 * 1024  # bytes; a longer one is no message to people
MAX_DEPTH, MAX_DEPTH_SENT = 12, 40  # levels of the answer, and of the request
MAX_LEAVES = 1000
MAX_TEXT, MAX_PATH = 2000, 200  # characters of one text, and of its keys

_SUBJECT = (
    r"(?:offers?|quot(?:e|ation)s?|bookings?|polic(?:y|ies)(?!\s*holder)|orders?|confirmations?|purchases?|insurances?"
    r"|certificates?|covers?|coverage|protection|transactions?|payments?)"
)
_BOOKING = r"(?:booking|policy|purchase|confirmation|certificate|order)"
_CONFIRMED = r"(?:(?:re\s*)?confirmed|(?:re)?booked|purchased|bought|sold)"
_DONE = (
    rf"(?:{_CONFIRMED}|issued|bound|converted|consumed|redeemed|accepted|paid|captured|completed?|finali[sz]ed|processed"
    r"|activated|active|insured|covered|fulfilled|taken\s+up|turned\s+into)"
)
_MADE = (
    rf"(?:{_DONE}|made|created|generated|placed|submitted|handled|sent|used|taken(?!\s+place)|registered|recorded|received"
    r"|present|executed|performed|settled|charged|signed|turned|gone\s+through|in\s+(?:progress|use|force|flight)|concluded|live|exist(?:s|ing)?)"
)
_BEING = r"(?:(?:has|have|had|is|are|was|were|be|been|being|just|once|successfully)\s+)*"
_AGAIN = r"(?:second|another|multiple|repeat(?:ed)?|concurrent|simultaneous|parallel|double)"
_MEANS_BOOKED = re.compile(
    "|".join(
        (
            rf"\balready\s+{_BEING}{_MADE}\b",
            rf"\b{_SUBJECT}\s+(?:is|are)\s+(?:currently\s+)?being\s+(?:confirmed|booked|processed)\b",
            rf"\b{_DONE}\s+(?:already|twice)\b",
            rf"\b(?<!be\s){_MADE}\s+(?:before|previously|earlier)\b",
            rf"\b(?:previously|earlier)\s+{_BEING}{_MADE}\b",
            rf"\b{_SUBJECT}\s+{_BEING}(?:used|in\s+use)\b",
            rf"\balready\s+(?:has|have|had|holds?|is|there|an?|existing)\s[^.;!?]{{0,40}}\b{_SUBJECT}\b",
            rf"\b(?:has|have|is)\s+(?:an?\s+)?(?:\w+\s+)?{_SUBJECT}\s+already\b",
            rf"\b(?:existing|duplicated?)\s+(?:\w+\s+)?{_SUBJECT}\b(?!\s+(?:ids|ids?\s+(?:in|inside|within)|in|inside|within)\b)",
            rf"\b{_AGAIN}\s+(?:requests?|{_BOOKING}s?|policies)\b(?!\s+[a-z]+er\b)",
            rf"\b(?:only|just)\s+(?:one|1|a\s+single)\s+{_BOOKING}\b|\bre\s*(?:confirm|book)(?:ed|ation)?\b",
            rf"\b(?:{_BOOKING}|resource|record|entity)\b[^.;!?]{{0,40}}\b(?:exists|found|duplicated?)\b",
            r"\bduplicated?\s+(?:request|submission|idempotency|key|entry|record|resource)\b",
            r"\bunique\s+(?:constraint|set)\b|(?<!\binsured)(?<!\bids)\s+must\s+be\s+unique\b|^must\s+be\s+unique\b",
            r"\bidempotency\s+key\b[^.;!?]{0,30}\b(?:re)?used\b|\bidempotent\s+replay\b",
            rf"\b(?:offer|quote|booking)\s+{_BEING}{_CONFIRMED}\b(?!\s*(?:only|by|before|within|until))",
            rf"\b(?:offer|quot(?:e|ation)|{_BOOKING})\s+(?:has|is|was)\s+{_BEING}{_DONE}\b"
            r"(?!\s*(?:only|by|before|within|until|for|in)\b)",
            rf"\b(?:offer|quot(?:e|ation))\s+(?:has\s+been|was)\s+{_CONFIRMED}\b|\b{_CONFIRMED}\s+(?:offer|quote)s?\b",
            rf"\b{_BOOKING}\s+(?:has\s+been|was)\s+{_BEING}{_MADE}\b(?!\s*(?:only|by|before|within|until|in)\b)",
            rf"\b{_BOOKING}\s+(?:is\s+)?(?:pending|under\s*way|in\s+progress)\b|\ban?\s+(?:active|live)\s+{_BOOKING}\b",
            rf"\b(?:linked|attached|assigned|associated)\s+(?:to|with)\s+(?:(?:an?|the)\s+)?{_BOOKING}\b",
            rf"\b(?:{_BOOKING}|insurance)\s+(?:numbers?|no|nr|id|reference|ref|uuid)\b\W*(?:is\s+)?(?:[a-z]{{1,5}}\s)?[a-z]*\d"
            r"(?![^.;!?]*\b(?:invalid|unknown|wrong|must|missing|malformed|denied)\b)",
            rf"(?<!until)(?<!after)(?<!before)(?<!unless)(?<!if)\s+it\s+(?:has\s+been|was)\s+{_CONFIRMED}\b|^\W*it\s+is\s+{_CONFIRMED}\W*$",
            rf"\bas\s+it\s+(?:has\s+been|is|was)\s+{_CONFIRMED}\b",
            rf"(?<!be\s)\b{_CONFIRMED}\s+(?:at|on)\W+\d",
            rf"[(:]\s*{_CONFIRMED}\W*$",
            rf"\b(?:status|state)\W+(?:is\W+)?(?:already\W+)?{_DONE}\b(?!\s+(?:error|fail\w*|rejected))",
            rf"\b(?:status|state|transition)\b[^.;!?]{{0,60}}\b(?:is|was|from|found|got|currently)\W+(?:\w+\W+)?{_DONE}\b",
            r"\b(?:confirm|book|purchase|buy|use)(?:ed|d)?\W+(?:\w+\W+){0,4}(?:twice|(?:only\W+)?once)\b",
            r"\bonly\s+be\s+\w+\s+once\b|\bsingle\s+use\b",
            r"(?:not|n't)\s[^.;!?]{0,20}\b(?:confirm|book|purchase|buy)(?:ed)?\W+(?:\w+\W+){0,4}again\b",
            # An error code or a key by itself.
            rf"^\W*(?:(?:is|was)\s+)?{_CONFIRMED}\W*$",
            rf"^\W*(?:offer|quote)\s+{_DONE}\W*$",
            r"^\W*(?:(?:is|e\w*)\s+)?duplicated?\W*$",
            r"^\W*(?:already\s+done|unique|(?:resource\s+)?conflict)\W*$",
        )
    )
)
# What is said not to be, such as "no booking found". Not "can't be confirmed twice".
_DENIED = re.compile(
    r"(?:\b(?:no|not|never|nor|without)|n't)\s+(?:(?:an?|any|such|yet|already|been|being|existing|previously)\s+)*"
    rf"(?:{_SUBJECT}\s+{_BEING}(?:exists?|found)\b|{_SUBJECT}\b|{_MADE}\b|exists?\b|found\b)"
)
# What else may exist already. It is what a text is about, unless that names the offer or a booking too.
_SOMETHING_ELSE = re.compile(
    r"\b(?:e ?mails?|accounts?|users?|customers?|clients?|phones?|mobiles?|policyholders?|holders?|address(?:es)?"
    r"|names?|persons?|people|travell?ers?|passengers?|drivers?|insureds|logins?|cards?|claims?|vouchers?"
    r"|coupons?|promo(?:tion)?s?|discounts?|trips?|flights?|journeys?|events?|tokens?|sessions?|nonces?)\b"
)
_NAMES_SUBJECT = re.compile(rf"\b{_SUBJECT}\b")
# Keys whose value says what an error is about: {"field": "policyholder.email", "message": "already exists"}.
_FIELD_KEYS = frozenset({"field", "path", "pointer", "param", "parameter", "property", "loc", "attribute", "source"})
_PERSON_FIELD = re.compile(r"\b(?:policyholder|insured|e ?mail|phone)\b")

_NUMBER = r"(?:[A-Z0-9-]*[0-9][A-Z0-9-]*|(?<=[:#=])[A-Z0-9-]{2,64}|(?<=[:#=] )[A-Z0-9-]{2,64})"
_LABELLED = re.compile(
    rf"\b(?:(?i:INS[\s_-]*(?:number|no|nr|num|reference|ref|id)\b\.?\s*(?:is\b)?\s?[:#=]?\s?)|INS\s?[:#=]\s?)"
    rf"({_NUMBER})(?![a-z])"
)
_BARE = re.compile(r"\bINS-?(?:\d[A-Z0-9-]{2,60}|(?<=-)(?=[A-Z0-9-]*\d|[A-Z0-9]{3})[A-Z0-9-]{2,60})\b")
_REFERENCE_KEYS = re.compile(
    r"ins(number|no|id|reference)?|(existing)?bookings?(id|number|reference|uuid)|bookedas|policy(id|number|reference)"
)
_REFERENCE = re.compile(
    r"(?!(?i:required|invalid|missing|unknown|null|none|blank|empty)$)(?=.*[A-Z0-9])[A-Za-z0-9-]{1,64}"
)
_HUMPS = re.compile(r"(?<=[a-z])(?=[A-Z])")


def may_mean_booked(body: bytes, request: bytes = b"") -> bool:
    """Whether a refusal may mean that the offer is booked. request: what it answers; XONE may echo parts of it."""
    return any(_says_booked(leaf) for leaf in _own_leaves(body, request)) or reference_in(body, request) is not None


def reference_in(body: bytes, request: bytes = b"") -> str | None:
    """The number of a booking in a refusal, at most 64 characters of letters, digits and hyphens; or None."""
    for leaf in _own_leaves(body, request):
        keys = ("".join(leaf.path[-depth:])[-MAX_PATH:] for depth in (1, 2))
        if any(_REFERENCE_KEYS.fullmatch(re.sub(r"[\W_]", "", key).lower()) for key in keys):
            if _REFERENCE.fullmatch(leaf.text):
                return leaf.text
        elif found := _LABELLED.search(leaf.text):
            return found[1]
        elif found := _BARE.search(leaf.text):
            return found[0]
    return None


class _Leaf(NamedTuple):
    """A text of an answer. path: its keys, outermost first, with the field that the error beside it names."""

    path: tuple[str, ...]
    text: str


def _says_booked(leaf: _Leaf) -> bool:
    is_about_person = _PERSON_FIELD.search(_words(" ".join(leaf.path)[-MAX_PATH:])) is not None
    key = leaf.path[-1][-MAX_PATH:] if leaf.path else ""
    for sentence in re.split(r"(?<!\b[Nn][or])[.;!?]+(?=\s|$)", leaf.text):
        words = _DENIED.sub(" denied ", _words(sentence))
        if any(_MEANS_BOOKED.search(text) for text in (words, f"{_words(key)}: {words}")):
            is_about_something_else = is_about_person or _SOMETHING_ELSE.search(words) is not None
            if not is_about_something_else or _NAMES_SUBJECT.search(words):
                return True
    return False


def _words(text: str) -> str:
    """A text, or an error code, as words in small letters."""
    spaced = re.sub(r"[_\s/-]+|(?<=\w)\.(?=\w)", " ", _HUMPS.sub(" ", text))
    return spaced.lower().replace("\u2019", "'")


def _own_leaves(body: bytes, request: bytes) -> Iterator[_Leaf]:
    """The texts of an answer, without those that were sent to XONE."""
    if len(body) > MAX_BODY:
        return
    content = _read(body)
    if content is None:
        content = re.sub(r"<[^<>]*>", " ", body.decode(errors="replace"))
    sent = {text for leaf in _leaves((), _read(request), MAX_DEPTH_SENT) for text in (*leaf.path[-1:], leaf.text)}
    for leaf in islice(_leaves((), content, MAX_DEPTH), MAX_LEAVES):
        if leaf.text not in sent:
            yield leaf._replace(text=unescape(leaf.text[:MAX_TEXT]))


def _read(body: bytes) -> Any:
    """JSON; None if it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _leaves(path: tuple[str, ...], node: Any, levels: int) -> Iterator[_Leaf]:
    if levels < 0:
        return
    if isinstance(node, dict):
        fields = tuple(str(value)[:MAX_PATH] for key, value in node.items() if key.lower() in _FIELD_KEYS)
        for name, value in node.items():
            yield from _leaves((*path, *fields, name), value, levels - 1)
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(path, value, levels - 1)
    elif isinstance(node, str):
        yield _Leaf(path, node)
    elif isinstance(node, int) and not isinstance(node, bool):
        yield _Leaf(path, str(node))
    elif node is True and path:  # {"already_confirmed": true}
        yield _Leaf(path[:-1], path[-1])
