"""Valid jobs, and contents that are not a job."""

import json
from typing import Any

from hypothesis import strategies as st

from models.job import MAX_BYTES

MARK = "Geheimnis"  # represents personal data, which no rejection may repeat
PERSON = {
    "first_name": "Ada",
    "last_name": "Example",
    "country": "GB",
    "email": "ada@example.com",
    "phone": "+44 1632 960001",
    "address1": "1 High Street",
    "city": "Bath",
    "region": "Somerset",
    "postcode": "BA1 1AA",
}
MINIMAL: dict[str, Any] = {
    "partner_id": "P-100",
    "offer_id": "5c7e.A_b~1",
    "quotes": [{"id": "q-1"}],
    "policyholder": {"first_name": "Ada", "last_name": "Example", "country": "GB", "email": "ada@example.com"},
}
FULL: dict[str, Any] = {
    "partner_id": "P-100",
    "offer_id": "5c7e",
    "order_reference": "SO-1001 / Größe",
    "quotes": [
        {
            "id": "q-1",
            "brightwrite_details": {"bw_experiment_id": "e", "bw_variant_id": "v", "bw_device_id": "d"},
            "insured": [PERSON],
        }
    ],
    "policyholder": PERSON,
    "metadata": {"channel": "web", "note": "two\nlines"},
}
PASSED_ON = {
    "unknown": [1, -2.5, 10**30, True, None, {"nested": {"日本語": "🎟️", "": "NUL \x00 is text here"}}],
    "model_config": {"not": "ours"},
    "__class__": "x",
}


def to_bytes(content: Any) -> bytes:
    return json.dumps(content).encode()


def changed(place: str, value: Any, job: dict[str, Any] = MINIMAL) -> dict[str, Any]:
    """A copy of the job with one value set. place: such as ``policyholder.email`` or ``quotes.0.id``."""
    job = json.loads(json.dumps(job))
    *parents, last = place.split(".")
    node = job
    for step in parents:
        node = node[int(step)] if isinstance(node, list) else node.setdefault(step, {})
    node[int(last) if isinstance(node, list) else last] = value
    return job


def without(place: str) -> dict[str, Any]:
    job = json.loads(json.dumps(MINIMAL))
    *parents, last = place.split(".")
    node = job
    for step in parents:
        node = node[int(step)] if isinstance(node, list) else node[step]
    del node[last]
    return job


ACCEPTED = {
    "white space around": b" \r\n\t" + to_bytes(MINIMAL) + b"\n",
    "128 characters": to_bytes(changed("offer_id", "x" * 128)),
    "three dots": to_bytes(changed("offer_id", "...")),
    "dot and letter": to_bytes(changed("partner_id", ".a")),
    "tilde at the end": to_bytes(changed("offer_id", "o~drop-after~2")),
    "100 quotes": to_bytes(changed("quotes", [{"id": str(number)} for number in range(100)])),
    "100 insured": to_bytes(changed("quotes.0.insured", [{}] * 100)),
    "200 insured in all": to_bytes(
        changed("quotes", [{"id": str(number), "insured": [{}] * 20} for number in range(10)])
    ),
    "20 metadata": to_bytes(changed("metadata", {str(number): "" for number in range(20)})),
    "no order reference": to_bytes(changed("order_reference", None)),
    "insured null": to_bytes(changed("quotes.0.insured", None)),
    "confirm_by null": to_bytes(changed("confirm_by", None)),
    "confirm_by in UTC": to_bytes(changed("confirm_by", "2026-01-31T18:00:00Z")),
    "confirm_by in small letters": to_bytes(changed("confirm_by", "2026-01-31t18:00:00z")),
    "confirm_by with a fraction": to_bytes(changed("confirm_by", "2026-01-31T18:00:00.123456789+05:30")),
    "confirm_by at the beginning": to_bytes(changed("confirm_by", "1000-01-01T00:00:00+23:59")),
    "confirm_by at the end": to_bytes(changed("confirm_by", "2999-12-31T23:59:59-23:59")),
    "no insured": to_bytes(changed("quotes.0.insured", [])),
    "phone null": to_bytes(changed("policyholder.phone", None)),
    "whole surrogate pair": to_bytes(changed("policyholder.last_name", "🎟️")),
    "32 levels": to_bytes(changed("quotes.0.deep", json.loads("[" * 29 + "]" * 29))),
    "as large as may be": to_bytes(MINIMAL) + b" " * (MAX_BYTES - len(to_bytes(MINIMAL))),
}


A_MOMENT = "must be a time of RFC 3339 with a zone, such as 2026-01-31T18:00:00Z"
IDS = "must be 1 to 128 of A-Z a-z 0-9 . _ ~ - and not . or .."


NOT_A_JOB: dict[str, tuple[Any, str]] = {
    "list": ([], "the job: should be"),
    "number": (5, "the job: should be"),
    "text": (MARK, "the job: should be"),
    "true": (True, "the job: should be"),
    "null": (None, "the job: should be"),
    "no key": ({}, "partner_id: field required; offer_id: field required; quotes: field required; policyholder: field"),
    "no partner_id": (without("partner_id"), "partner_id: field required"),
    "no offer_id": (without("offer_id"), "offer_id: field required"),
    "no quotes": (without("quotes"), "quotes: field required"),
    "no quote id": (without("quotes.0.id"), "quotes[0].id: field required"),
    "no policyholder": (without("policyholder"), "policyholder: field required"),
    "no first_name": (without("policyholder.first_name"), "policyholder.first_name: field required"),
    "no last_name": (without("policyholder.last_name"), "policyholder.last_name: field required"),
    "no country": (without("policyholder.country"), "policyholder.country: field required"),
    "no email": (without("policyholder.email"), "policyholder.email: field required"),
    "partner_id a number": (changed("partner_id", 100), "partner_id: should be a valid string"),
    "partner_id null": (changed("partner_id", None), "partner_id: should be a valid string"),
    "partner_id true": (changed("partner_id", True), "partner_id: should be a valid string"),
    "partner_id a list": (changed("partner_id", [MARK]), "partner_id: should be a valid string"),
    "partner_id empty": (changed("partner_id", ""), f"partner_id: {IDS}"),
    "partner_id a dot": (changed("partner_id", "."), f"partner_id: {IDS}"),
    "offer_id two dots": (changed("offer_id", ".."), f"offer_id: {IDS}"),
    "offer_id dot and newline": (changed("offer_id", ".\n"), f"offer_id: {IDS}"),
    "offer_id 129": (changed("offer_id", "x" * 129), f"offer_id: {IDS}"),
    "offer_id slash": (changed("offer_id", f"a/{MARK}"), f"offer_id: {IDS}"),
    "offer_id space": (changed("offer_id", f"a {MARK}"), f"offer_id: {IDS}"),
    "offer_id newline at end": (changed("offer_id", f"{MARK}\n"), f"offer_id: {IDS}"),
    "offer_id newline before": (changed("offer_id", f"\n{MARK}"), f"offer_id: {IDS}"),
    "offer_id NUL": (changed("offer_id", "a\x00"), f"offer_id: {IDS}"),
    "offer_id percent": (changed("offer_id", "a%2Fb"), f"offer_id: {IDS}"),
    "offer_id question mark": (changed("offer_id", "a?b"), f"offer_id: {IDS}"),
    "offer_id other digits": (changed("offer_id", "١٢"), f"offer_id: {IDS}"),
    "offer_id umlaut": (changed("offer_id", "ä"), f"offer_id: {IDS}"),
    "order_reference empty": (changed("order_reference", ""), "order_reference: should have at least 1 character"),
    "order_reference 129": (changed("order_reference", "x" * 129), "order_reference: should have at most 128"),
    "order_reference newline": (changed("order_reference", f"{MARK}\n"), "order_reference: has a character"),
    **{
        f"confirm_by {what}": (changed("confirm_by", text), f"confirm_by: {A_MOMENT}")
        for what, text in {
            "empty": "",
            "a word": MARK,
            "without zone": "2026-01-31T18:00:00",
            "a date": "2026-01-31",
            "with a space": "2026-01-31 18:00:00Z",
            "at 24 h": "2026-01-31T24:00:00Z",
            "a leap second": "2026-01-31T23:59:60Z",
            "newline": "2026-01-31T18:00:00Z\n",
            "before our time": "0999-12-31T23:59:59Z",
        }.items()
    },
    "confirm_by a number": (changed("confirm_by", 1769882400), "confirm_by: should be a valid string"),
    "order_reference a number": (changed("order_reference", 7), "order_reference: should be a valid string"),
    "quotes empty": (changed("quotes", []), "quotes: list should have at least 1 item"),
    "101 quotes": (changed("quotes", [{"id": MARK}] * 101), "quotes: list should have at most 100 items"),
    "quotes an object": (changed("quotes", {"id": MARK}), "quotes: should be a valid list"),
    "quotes null": (changed("quotes", None), "quotes: should be a valid list"),
    "quote a text": (changed("quotes", [MARK]), "quotes[0]: should be a valid dictionary"),
    "quote id empty": (changed("quotes.0.id", ""), "quotes[0].id: should have at least 1 character"),
    "quote id 129": (changed("quotes.0.id", MARK * 15), "quotes[0].id: should have at most 128 characters"),
    "quote id a number": (changed("quotes.0.id", 1), "quotes[0].id: should be a valid string"),
    "brightwrite_details a text": (
        changed("quotes.0.brightwrite_details", MARK),
        "quotes[0].brightwrite_details: should be a valid dictionary",
    ),
    "bw_device_id a number": (
        changed("quotes.0.brightwrite_details", {"bw_device_id": 1}),
        "quotes[0].brightwrite_details.bw_device_id: should be a valid string",
    ),
    "insured an object": (changed("quotes.0.insured", {}), "quotes[0].insured: should be a valid list"),
    "101 insured": (changed("quotes.0.insured", [{}] * 101), "quotes[0].insured: list should have at most 100"),
    "insured a text": (changed("quotes.0.insured", [{}, MARK]), "quotes[0].insured[1]: should be a valid dict"),
    "insured email a number": (
        changed("quotes.0.insured", [{}, {"email": 1}]),
        "quotes[0].insured[1].email: should be a valid string",
    ),
    "insured city too long": (
        changed("quotes.0.insured", [{"city": MARK * 300}]),
        "quotes[0].insured[0].city: should have at most 2048 characters",
    ),
    "policyholder a list": (changed("policyholder", [MARK]), "policyholder: should be a valid dictionary"),
    "policyholder null": (changed("policyholder", None), "policyholder: should be a valid dictionary"),
    "first_name empty": (changed("policyholder.first_name", ""), "policyholder.first_name: should have at least 1"),
    "first_name null": (changed("policyholder.first_name", None), "policyholder.first_name: should be a valid string"),
    "last_name 513": (changed("policyholder.last_name", MARK * 57), "policyholder.last_name: should have at most 512"),
    "last_name an object": (changed("policyholder.last_name", {MARK: 1}), "policyholder.last_name: should be a valid"),
    "country small": (changed("policyholder.country", "gb"), "policyholder.country: must be two capital letters"),
    "country of three": (changed("policyholder.country", "GBR"), "policyholder.country: must be two capital letters"),
    "country a name": (changed("policyholder.country", MARK), "policyholder.country: must be two capital letters"),
    "country newline": (changed("policyholder.country", "GB\n"), "policyholder.country: must be two capital letters"),
    "country cyrillic": (changed("policyholder.country", "ОВ"), "policyholder.country: must be two capital letters"),
    "email no at": (changed("policyholder.email", MARK), "policyholder.email: must be an e-mail address"),
    "email two at": (changed("policyholder.email", f"{MARK}@a@b"), "policyholder.email: must be an e-mail address"),
    "email nobody": (changed("policyholder.email", f"@{MARK}"), "policyholder.email: must be an e-mail address"),
    "email nowhere": (changed("policyholder.email", f"{MARK}@"), "policyholder.email: must be an e-mail address"),
    "email space": (changed("policyholder.email", f"{MARK} @b"), "policyholder.email: must be an e-mail address"),
    "email newline": (changed("policyholder.email", f"{MARK}@b\n"), "policyholder.email: must be an e-mail address"),
    "email too long": (changed("policyholder.email", f"{MARK * 40}@b"), "policyholder.email: should have at most 320"),
    "email empty": (changed("policyholder.email", ""), "policyholder.email: must be an e-mail address"),
    "phone a number": (changed("policyholder.phone", 44), "policyholder.phone: should be a valid string"),
    "postcode too long": (changed("policyholder.postcode", "x" * 2049), "policyholder.postcode: should have at most"),
    "metadata a list": (changed("metadata", [MARK]), "metadata: should be a valid dictionary"),
    "metadata null": (changed("metadata", None), "metadata: should be a valid dictionary"),
    "21 metadata": (changed("metadata", {f"{MARK}{n}": MARK for n in range(21)}), "metadata: dictionary should"),
    "metadata a number": (changed("metadata", {MARK: 1}), "metadata.<key>: should be a valid string"),
    "metadata nested": (changed("metadata", {MARK: {MARK: MARK}}), "metadata.<key>: should be a valid string"),
    "metadata null value": (changed("metadata", {MARK: None}), "metadata.<key>: should be a valid string"),
    "metadata NUL": (changed("metadata", {MARK: f"{MARK}\x00"}), "metadata.<key>: has a character that is not allowed"),
    "metadata too long": (changed("metadata", {MARK: MARK * 200}), "metadata.<key>: should have at most 1024"),
    "metadata key empty": (changed("metadata", {"": MARK}), "should have at least 1 character"),
    "metadata key newline": (changed("metadata", {f"{MARK}\n": ""}), "has a character that is not allowed"),
    "unknown key": (changed(MARK, MARK), "<key>: unknown key"),
    "typo": (changed("order_referense", MARK), "<key>: unknown key; did you mean order_reference?"),
    "typo in a required key": (changed("partnerid", MARK), "did you mean partner_id?"),
    "country at the top": (changed("country", MARK), "country: unknown key"),
    "six problems": ({"a": 1, "b": 2}, "and 1 more"),
}


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=10), children, max_size=4),
    max_leaves=12,
)
