"""The text of a refusal, without personal data that it may repeat."""

import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.errors import Refused
from worker.xone.answers import HttpAnswer, read_confirm_answer
from worker.xone.refusal_text import MAX_BODY, MAX_LENGTH, VOCABULARY, refusal_text

TABLE: list[tuple[Any, str]] = [
    (
        {"errors": [{"field": "policyholder.email", "message": "This field is required."}]},
        "policyholder.email: this field is required",
    ),
    ({"detail": "Not found."}, "not found"),
    ({"message": "Offer expired"}, "offer expired"),
    (
        {"errors": {"policyholder": {"email": ["Enter a valid email address."]}}},
        "policyholder.email: enter a valid email address",
    ),
    ({"error": "invalid_grant"}, "invalid_grant"),
    ({"error": "invalid_grant", "error_description": "The token expired 5 days ago"}, "the token expired … days …"),
    ({"error": {"code": "OFFER_EXPIRED", "message": "The offer has expired."}}, "the offer has expired"),
    ({"error": {"code": "OFFER_EXPIRED", "message": "Angebot abgelaufen"}}, "offer_expired"),
    ({"errors": [{"code": "offerExpired"}]}, "offer_expired"),
    ({"email": ["Enter a valid email address."]}, "email: enter a valid email address"),
    ({"errors": {"policyholder": {"email": "is invalid"}}}, "policyholder.email: is invalid"),
    ({"errors": {"non_field_errors": ["The quote's price changed."]}}, "the quote price changed"),
    ({"errors": {"quotes": [{}, {"id": ["unknown quote"]}]}}, "quotes.id: unknown quote"),
    (
        {"message": "The given data was invalid.", "errors": {"phone": ["too long"]}},
        "the given data was invalid; phone: too long",
    ),
    (
        {"detail": [{"loc": ["body", "quotes", 0, "id"], "msg": "field required", "type": "value_error"}]},
        "body.quotes.id: field required",
    ),
    (
        {"errors": [{"source": {"pointer": "/data/attributes/country"}, "detail": "Country is not supported."}]},
        "data.attributes.country: country is not supported",
    ),
    (
        {"status": 422, "error": "Unprocessable Entity", "message": "Price changed", "path": "/api/offers/1"},
        "price changed",
    ),
    ("Offer expired", "offer expired"),
    (["Offer expired."], "offer expired"),
    ([{"message": "Offer expired. Create a new quote!"}], "offer expired. create a new quote"),
    # the same cause has the same text for all offers
    ({"message": "Price changed from 19.99 EUR to 21.50 EUR"}, "price changed from … to …"),
    ({"message": "offer 5c7e0b1d-77 expired at 2026-01-01T10:00:00Z"}, "offer … expired at …"),
    ({"message": "Ensure this has no more than 64 characters."}, "ensure this has no more than … characters"),
    ({"errors": [{"field": f"quotes[{n}].insured[0].email", "message": "Required."} for n in range(9)]},
     "quotes.insured.email: required"),
    # personal data is removed
    ({"message": "'ada@example.com' is not a valid e-mail address"}, "… is not a valid e-mail address"),
    ({"message": "Ada Lovelace, 12 St James's Square, London: not supported"}, "… not supported"),
    ({"message": "email=ada@example.com invalid"}, "… invalid"),
    ({"message": "Required for López-Ångström 李明 Adaé"}, "required for …"),
    ({"errors": {"ada@example.com": ["already exists"]}}, "already exists"),
    ({"errors": {"policyholder": {"Ada Lovelace": ["already exists"]}}}, "policyholder.…: already exists"),
    ({"errors": [{"field": "policyholder.email", "message": "Ada"}]}, "policyholder.email: …"),
    ({"message": "Ada Lovelace"}, ""),
    ({"message": "The Lovelace was asked to go there"}, ""),
    ({"field": "email", "message": "The Lovelace was asked to go"}, "email: …"),
    # no messages
    ({"policyholder": {"first_name": "Ada", "email": "required"}}, ""),
    ({"data": {"id": "INS-1", "offer_id": "offer"}}, ""),
    ({}, ""), ([], ""), (None, ""), (True, ""), (422, ""), ("", ""), ({"errors": None}, ""), ({"detail": {}}, ""),
    ({"errors": [None, 5, "", {}, []]}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("body", "text"), TABLE, ids=lambda value: str(value)[:50])
def test_each_body_has_its_text(body: Any, text: str) -> None:
    assert refusal_text(json.dumps(body).encode()) == text


@pytest.mark.parametrize("body", [b"", b"<html><h1>Offer expired</h1></html>", b"\xff\xfe\x00", b"{'message': 'x'}"])
def test_a_body_that_is_no_json_has_no_text(body: bytes) -> None:
    assert refusal_text(body) == ""


NESTED = '{"errors":' * 400 + '"required"' + "}" * 400
LARGE: dict[str, bytes] = {
    "deep": b"[" * MAX_BODY,
    "deep-objects": NESTED.encode(),
    "deep-lists": b'{"errors":' + b"[" * 400 + b'"required"' + b"]" * 400 + b"}",
    "huge": json.dumps({"message": "required " * MAX_BODY}).encode(),
    "huge-number": b'{"message": ' + b"9" * 5000 + b"}",
    "truncated": json.dumps({"message": "required"}).encode()[:-1],
}


@pytest.mark.parametrize("body", LARGE.values(), ids=LARGE)
def test_huge_and_deep_bodies_have_no_text_and_are_fast(body: bytes) -> None:
    started = time.process_time()

    assert refusal_text(body) == ""
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize(
    "content",
    [
        {"message": "required " * 5000},
        {"errors": ["a-" * 20 + " " + "b" * 60000]},
        {"errors": {f"email{number}": ["required"] for number in range(1500)}},
        {"errors": {"policyholder." * 3000: ["required"]}},
        {"errors": [{"field": "email", "message": "invalid " * number} for number in range(100)]},
    ],
)
def test_a_long_text_is_cut_at_a_word_and_fast(content: Any) -> None:
    started = time.process_time()
    text = refusal_text(json.dumps(content).encode())

    assert 0 < len(text) <= MAX_LENGTH
    assert is_of_vocabulary(text)
    assert time.process_time() - started < 0.5


def is_of_vocabulary(text: str) -> bool:
    """Whether all words, or parts of words (``offer_expired``, ``price/tax``), are in the vocabulary."""
    words = [word for word in re.split(r"[ .,:;…]+", text) if word]
    return all(word in VOCABULARY or VOCABULARY.issuperset(re.split(r"[_/-]", word)) for word in words)


names = st.text("aeiounrstADLÅéßøŁıłжЯ李明אあ\u0301\u200d'-. ", min_size=3, max_size=16)
latin = st.sampled_from(
    ["Ada", "Lovelace", "Grace Hopper", "OLIVER", "mcDonald", "Anna-Maria", "O'Brien", "Smith Jones"]
)
emails = st.builds("{}@{}.com".format, latin, latin)
phones = st.text("0123456789+() -", min_size=6, max_size=12)
personal = st.one_of(names, latin, emails, phones)
phrases = st.sampled_from(
    [
        "This field is required.",
        "{} is not a valid email address",
        "'{}' already exists",
        "({})",
        "offer {} expired",
        "{}",
        "email:{}",
        "{}_email",
        "required{}",
        "a.{}.b",
        "price/{}",
        "{0} {0}",
        "x={},y",
        "invalid\t{}\n",
        "“{}”",
    ]
)
keys = st.sampled_from(
    ["errors", "error", "message", "detail", "field", "policyholder", "email", "code", "loc", "path", "title", "source"]
)


def bodies(leaf: st.SearchStrategy[Any], key: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaf, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(key, inner, max_size=4), max_leaves=8
    )


@st.composite
def echoes(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Any:
    """Any body with personal values in any place, also as keys."""
    value = personal
    text = st.builds(lambda phrase, filling: phrase.format(filling), phrases, value)
    place = st.builds(lambda field, filling: f"{field}.{filling}", keys, value)
    leaf = st.one_of(text, value, place, st.none(), st.integers())
    body = draw(bodies(leaf, st.one_of(keys, value, place)))
    return draw(st.sampled_from([body, {"errors": body}, {"errors": [{"field": body, "message": body}]}]))


@settings(max_examples=150, deadline=None)
@given(echoes())
def test_no_personal_word_survives(body: Any) -> None:
    text = refusal_text(json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass"))

    assert len(text) <= MAX_LENGTH
    assert is_of_vocabulary(text)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_read_or_ignored(body: bytes) -> None:
    assert len(refusal_text(body)) <= MAX_LENGTH


@pytest.mark.parametrize(
    "name", ["Ada", "Will", "May", "Mark", "Grant", "Rose", "Page", "Young", "Bill", "Frank", "Lee"]
)
def test_common_names_are_not_in_the_vocabulary(name: str) -> None:
    assert refusal_text(json.dumps({"message": f"{name} is required"}).encode()) == "… is required"


def test_the_detail_of_a_refusal_has_the_reason() -> None:
    body = {"errors": [{"field": "policyholder.email", "message": "This field is required."}]}

    with pytest.raises(Refused) as refused:
        read_confirm_answer(HttpAnswer(422, {}, json.dumps(body).encode()), "offer-1")
    with pytest.raises(Refused) as silent:
        read_confirm_answer(HttpAnswer(404, {}, b"<html>Ada Lovelace</html>"), "offer-1")

    reason = refused.value.detail.split(":")[0]
    assert reason in ("XONE answered 422 Unprocessable Entity", "XONE answered 422 Unprocessable Content")
    assert refused.value.detail == f"{reason}: policyholder.email: this field is required"
    assert silent.value.detail == "XONE answered 404 Not Found"
