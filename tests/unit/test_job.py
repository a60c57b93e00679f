"""Jobs that are accepted, and the reason why a message is rejected."""

import json
import math
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.job import MAX_BYTES, Job, JobRejected, has_same_content, read_job
from tests.support.jobs import (
    ACCEPTED,
    ANY_JSON,
    FULL,
    MARK,
    MINIMAL,
    NOT_A_JOB,
    PASSED_ON,
    changed,
    to_bytes,
)


def rejection(body: bytes) -> JobRejected:
    with pytest.raises(JobRejected) as raised:
        read_job(body)
    return raised.value


# --- Accepted ---


def test_the_minimal_job_is_read() -> None:
    job = read_job(to_bytes(MINIMAL))

    assert (job.partner_id, job.offer_id, job.order_reference, job.metadata) == ("P-100", "5c7e.A_b~1", None, {})
    assert json.loads(job.request_body()) == {name: MINIMAL[name] for name in ("quotes", "policyholder")}


def test_the_full_job_is_read() -> None:
    job = read_job(to_bytes(FULL))

    assert (job.order_reference, job.metadata) == (FULL["order_reference"], FULL["metadata"])
    assert json.loads(job.request_body()) == {name: FULL[name] for name in ("quotes", "policyholder")}


@pytest.mark.parametrize("place", ["quotes.0", "quotes.0.brightwrite_details", "policyholder"])
def test_unknown_keys_are_passed_on_untouched(place: str) -> None:
    job = MINIMAL
    for name, value in PASSED_ON.items():
        job = changed(f"{place}.{name}", value, job)

    sent = json.loads(read_job(to_bytes(job)).request_body())

    assert sent == {name: job[name] for name in ("quotes", "policyholder")}


def test_unknown_keys_of_the_insured_are_passed_on_untouched() -> None:
    job = changed("quotes.0.insured", [{"email": "ada@example.com", **PASSED_ON}, PASSED_ON])

    assert json.loads(read_job(to_bytes(job)).request_body())["quotes"] == job["quotes"]


@pytest.mark.parametrize("number", ["1", "-0", "19.9", "1e2", "123456789012345678901234567890", "0.1", "true", "null"])
def test_values_of_unknown_keys_keep_their_kind(number: str) -> None:
    body = to_bytes(changed("quotes.0.extra", "HERE")).replace(b'"HERE"', number.encode())

    sent = json.loads(read_job(body).request_body())["quotes"][0]["extra"]

    assert (type(sent), sent) == (type(json.loads(number)), json.loads(number))


def test_the_request_body_is_compact_utf_8() -> None:
    body = read_job(to_bytes(changed("policyholder.first_name", "Größe 日本"))).request_body()

    assert "Größe 日本".encode() in body
    assert b'": ' not in body
    assert b"\\u" not in body


@pytest.mark.parametrize("body", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_a_job_within_the_bounds_is_accepted(body: bytes) -> None:
    assert read_job(body).partner_id


# --- Rejected ---

JSON, JOB, LARGE = "invalid-json", "invalid-job", "too-large"
NOT_JSON = {
    "empty": (b"", JSON, "line 1 column 1"),
    "blank": (b"  \n", JSON, "Expecting value"),
    "words": (MARK.encode(), JSON, "Expecting value at line 1 column 1"),
    "cut off": (to_bytes(changed("offer_id", MARK))[:-9], JSON, "at line 1 column"),
    "cut off in a text": (b'{"offer_id": "' + MARK.encode(), JSON, "Unterminated string starting at line 1 column 14"),
    "two values": (to_bytes(MINIMAL) * 2, JSON, "Extra data"),
    "comma at the end": (b'{"partner_id": "' + MARK.encode() + b'",}', JSON, "double quotes"),
    "single quotes": (b"{'a': 1}", JSON, "double quotes"),
    "comment": (b"// x\n{}", JSON, "Expecting value"),
    "newline in a text": (b'{"a": "x\ny"}', JSON, "control character"),
    "unknown escape": (b'{"a": "\\x41"}', JSON, "escape"),
    "byte order mark": (b"\xef\xbb\xbf" + to_bytes(MINIMAL), JSON, "byte order mark"),
    "latin-1": ('{"a": "Größe"}'.encode("latin-1"), JSON, "not UTF-8 at byte 9"),
    "utf-16": (json.dumps(MINIMAL).encode("utf-16"), JSON, "not UTF-8 at byte 0"),
    "utf-16 without mark": (json.dumps(MINIMAL).encode("utf-16-le"), JSON, "line 1 column 2"),
    "bytes": (b"\x00\xff\xfe", JSON, "not UTF-8"),
    "overlong": (b'{"a": "\xc0\xaf"}', JSON, "not UTF-8"),
    "surrogate as bytes": (b'{"a": "\xed\xa0\x80"}', JSON, "not UTF-8"),
    "gzip": (b"\x1f\x8b\x08\x00", JSON, "not UTF-8 at byte 1"),
    "NaN": (b'{"a": NaN}', JSON, "NaN and Infinity"),
    "Infinity": (b'{"a": Infinity}', JSON, "NaN and Infinity"),
    "-Infinity": (b'{"a": [-Infinity]}', JSON, "NaN and Infinity"),
    "1e999": (b'{"a": 1e999}', JSON, "a number is too large"),
    "-1e999": (b'{"a": -1e999}', JSON, "a number is too large"),
    "integer of 65 digits": (b'{"a": ' + b"9" * 65 + b"}", JSON, "a number is too large"),
    "integer of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", JSON, "a number is too large"),
    "leading zero": (b'{"a": 01}', JSON, "line 1 column 8"),
    "same key twice": (b'{"offer_id": "a", "offer_id": "b"}', JSON, "same key twice"),
    "same key twice, escaped": (b'{"offer_id": 1, "\\u006fffer_id": 2}', JSON, "same key twice"),
    "same key twice, inside": (b'{"quotes": [{"id": 1, "id": 1}]}', JSON, "same key twice"),
    "half a surrogate pair": (to_bytes(changed("policyholder.last_name", "\ud83c")), JSON, "surrogate"),
    "half a surrogate pair as key": (to_bytes(changed("quotes.0.\udf9f", 1)), JSON, "surrogate"),
    "33 levels": (to_bytes(changed("quotes.0.deep", json.loads("[" * 31 + "]" * 31))), JSON, "deeper than 32"),
    "500 levels": (b"[" * 500 + b"]" * 500, JSON, "deeper than 32"),
    "100,000 levels": (b"[" * 100_000, JSON, "deeper than 32"),
    "100,000 objects": (b'{"a":' * 40_000, JSON, "deeper than 32"),
    "too large": (b" " * (MAX_BYTES + 1), LARGE, f"{MAX_BYTES + 1} bytes; at most {MAX_BYTES}"),
    "too large by far": (to_bytes(changed("offer_id", MARK * 50_000)), LARGE, f"at most {MAX_BYTES}"),
}

MALFORMED = {
    **NOT_JSON,
    **{name: (to_bytes(content), JOB, detail) for name, (content, detail) in NOT_A_JOB.items()},
}


def test_the_insured_of_all_quotes_together_are_limited() -> None:
    quotes = [{"id": str(number), "insured": [{}] * 67} for number in range(3)]

    with pytest.raises(JobRejected, match="the job: at most 200 insured in all quotes together") as rejected:
        read_job(to_bytes(changed("quotes", quotes)))
    assert rejected.value.code == "invalid-job"


@pytest.mark.parametrize(("body", "code", "detail"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_message_is_rejected(body: bytes, code: str, detail: str) -> None:
    rejected = rejection(body)

    assert rejected.code == code
    assert detail in rejected.detail
    assert MARK.lower() not in str(rejected).lower()
    assert "\n" not in rejected.detail


def _paths(job: Any) -> list[tuple[Any, ...]]:
    """The paths of all values of a job."""
    paths: list[tuple[Any, ...]] = []
    for step, child in job.items() if isinstance(job, dict) else enumerate(job) if isinstance(job, list) else ():
        paths += [(step,), *((step, *rest) for rest in _paths(child))]
    return paths


BAD_VALUES = [1, MARK * 300, [MARK], {MARK: MARK}, [{MARK: [MARK, 1]}]]


@settings(max_examples=170, deadline=None, derandomize=True)
@given(st.sampled_from(_paths(FULL)), st.sampled_from(BAD_VALUES))
def test_no_rejection_repeats_a_value_or_an_unknown_key(path: tuple[Any, ...], bad: Any) -> None:
    job = _marked(FULL)
    job[MARK] = MARK  # an unknown top-level key: the job is rejected in any case
    node = job
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = bad

    assert MARK.lower() not in str(rejection(to_bytes(job))).lower()


def _marked(content: Any) -> Any:
    """The content with the mark in each text, and as one more key in each object."""
    if isinstance(content, dict):
        return {name: _marked(value) for name, value in content.items()} | {f"{MARK}-key": MARK}
    return [_marked(item) for item in content] if isinstance(content, list) else f"{content}{MARK}"


# --- Fuzzed ---

FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
PLACES = ["partner_id", "offer_id", "order_reference", "quotes", "policyholder", "metadata", "quotes.0.id"]
PLACES += ["quotes.0.insured", "quotes.0.brightwrite_details", "policyholder.email", "policyholder.country", "other"]


def check(body: bytes) -> None:
    """Asserts that read_job returns a job whose request can be sent, or rejects with a known code."""
    try:
        read: Job | JobRejected = read_job(body)
    except JobRejected as rejected:
        read = rejected
    if isinstance(read, JobRejected):
        assert read.code in {JSON, JOB, LARGE}
        assert read.detail
    else:
        content = json.loads(body)
        assert json.loads(read.request_body()) == {name: content[name] for name in ("quotes", "policyholder")}


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_rejected(body: bytes) -> None:
    check(body)


@FUZZ
@given(st.text(alphabet='{}[]":,.\\u0dec81-+eE NaInftrulsxyz\n', max_size=60))
def test_any_text_like_json_is_read_or_rejected(text: str) -> None:
    check(text.encode())


@FUZZ
@given(ANY_JSON)
def test_any_json_is_read_or_rejected(content: Any) -> None:
    check(json.dumps(content).encode())


@FUZZ
@given(st.sampled_from(PLACES), ANY_JSON)
def test_a_job_with_any_value_at_one_place_is_read_or_rejected(place: str, value: Any) -> None:
    check(to_bytes(changed(place, value)))


@FUZZ
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_passed_on_unchanged(number: float) -> None:
    sent = json.loads(read_job(to_bytes(changed("quotes.0.number", number))).request_body())

    assert math.copysign(1, sent["quotes"][0]["number"]) == math.copysign(1, number)
    assert sent["quotes"][0]["number"] == number


NUMBERS = [
    "0.1234567890123456789012", "1e-400", "9007199254740993.0", "1.10", "-0", "-0.0", "1E5", "1e+05", "0.0", "100",
    "123456789012345678901234567890", "1.0e-0",
]  # fmt: skip


def with_number(number: str) -> bytes:
    unknown = f'"quotes":[{{"id":"q-1","price":{number},"deep":[{{"of":{number}}}]}}]'
    return to_bytes(MINIMAL).replace(b'"quotes": [{"id": "q-1"}]', unknown.encode())


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_in_unknown_keys_keep_their_digits(number: str) -> None:
    body = read_job(with_number(number)).request_body().decode()

    assert f'"price":{number},"deep":[{{"of":{number}}}]' in body


json_numbers = st.from_regex(r"-?(0|[1-9][0-9]{0,20})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,2})?", fullmatch=True)


@given(st.lists(json_numbers, min_size=1, max_size=5), st.text())
def test_any_number_is_passed_on_as_it_came(numbers: list[str], text: str) -> None:
    unknown = f'"quotes":[{{"id":"q-1","n":[{",".join(numbers)}],"t":{json.dumps([text, *numbers])}}}]'
    read = read_job(to_bytes(MINIMAL).replace(b'"quotes": [{"id": "q-1"}]', unknown.encode()))

    written = json.loads(read.request_body(), parse_float=str, parse_int=str)["quotes"][0]
    assert (written["n"], written["t"]) == (numbers, [text, *numbers])


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("1.0", "1.00", True),
        ("1", "1.0", True),
        ("100", "1e2", True),
        ("9007199254740993.0", "9007199254740992.0", False),
        ("0.1234567890123456789012", "0.12345678901234568", False),
        ("1e-400", "0", False),
        ("1", "true", False),
        ("0", "false", False),
        ("1", '"1"', False),
        ("1e-99999999999999999999", "1e-99999999999999999998", False),
    ],
)
def test_numbers_are_compared_exactly(one: str, other: str, is_same: bool) -> None:
    bodies = [read_job(with_number(number)).request_body() for number in (one, other)]

    assert has_same_content(*bodies) is is_same


def test_a_day_that_no_month_has_is_no_confirm_by() -> None:
    """A pattern does not know it: the schema says it by ``format``."""
    with pytest.raises(JobRejected, match="confirm_by: must be a time of RFC 3339"):
        read_job(to_bytes(changed("confirm_by", "2026-02-30T18:00:00Z")))


def test_confirm_by_is_read_as_an_instant_and_not_sent_to_xone() -> None:
    job = read_job(to_bytes(changed("confirm_by", "2026-01-31T23:30:00.5+05:30")))

    assert job.confirm_by_time == datetime(2026, 1, 31, 18, 0, 0, 500_000, UTC)
    assert set(json.loads(job.request_body())) == {"quotes", "policyholder"}
