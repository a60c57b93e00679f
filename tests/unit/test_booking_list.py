"""A list of bookings is read as a stream: exactly, in any form, in pieces of any size, in little memory."""

import json
import tracemalloc
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.exact_json import read_exact
from worker.errors import Unknown
from worker.xone import booking_list
from worker.xone.booking_list import MAX_LISTED, Listed, read_page

ONE = {"id": "INS-1", "price": 1, "note": 'ü€😀 \\ " ]}'}


def read(*chunks: bytes) -> tuple[list[Listed], Any]:
    """The bookings of a page, and its next page."""
    bookings: list[Listed] = []

    def following() -> Iterator[Listed]:
        result.append((yield from read_page(chunks)))

    result: list[Any] = []
    bookings.extend(following())
    return bookings, result[0]


@pytest.mark.parametrize(
    ("content", "bookings", "following"),
    [
        ("[]", [], None),
        (' \n[{"id": 1} , {"id": 2}]\n', [{"id": 1}, {"id": 2}], None),
        ('\ufeff{"data": [{"id": 1}]}', [{"id": 1}], None),
        ('{"count": 1, "next": "?p=2", "previous": null, "results": [{"id": 1}]}', [{"id": 1}], "?p=2"),
        ('{"data": [], "links": {"next": "?p=2"}, "meta": {"total": [1]}}', [], "?p=2"),
        ('{"links": {"next": null}, "next": null, "data": []}', [], None),
        ('{"links": ["x"], "data": []}', [], None),
        ('{"links": {"next": {"href": "x"}}, "data": []}', [], {"href": "x"}),
        ('{"data": [1, null, "x", [{"id": 9}], 1.5, {"id": 1}]}', [{"id": 1}], None),
        ('{"data": [{"a": 19.90, "b": 1e999, "c": NaN, "d": 12}]}',
         [{"a": Decimal("19.90"), "b": "1e999", "c": "NaN", "d": 12}], None),
        ('{"data": [{"a": "\\ud800"}]}', [{"a": "\ud800"}], None),
        ('{"data": [{"a": %s}]}' % ("9" * 5000), [{"a": "9" * 5000}], None),
    ],
)  # fmt: skip
def test_forms_of_a_page(content: str, bookings: list[Listed], following: Any) -> None:
    assert read(content.encode()) == (bookings, following)


@pytest.mark.parametrize(
    "content",
    ["", " ", "7", '"x"', "null", "{}", '{"data": {}}', '{"data": null}', '{"bookings": []}', "<html>", "[1,]", "[1 2]",
     '{"data": []', '{"data": [{"id": 1}', '{"data": []} x', '{"data": [],}', '{1: [], "data": []}', '{"data" []}',
     "[" * 100_000, '[{"a": \x01}]', '["\xff'],
)  # fmt: skip
def test_what_is_no_list_of_bookings_is_an_error(content: str) -> None:
    with pytest.raises(Unknown) as raised:
        read(content.encode("latin-1"))
    assert raised.value.code == "bad-answer"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from([1.5, -0.25, 1e20]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(JSON, max_size=6), st.sampled_from(["data", "results", None]), st.integers(1, 9), st.booleans())
def test_a_list_means_the_same_in_pieces_of_any_size(
    listed: list[Any], key: str | None, size: int, ascii: bool
) -> None:
    text = json.dumps(listed if key is None else {"meta": 12, key: listed, "z": 3.5}, ensure_ascii=ascii).encode()
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    whole = read_exact(text)

    expected = [item for item in (whole if key is None else whole[key]) if isinstance(item, dict)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(booking_list, "MIN_PIECE", 1)
        assert read(*pieces) == (expected, None)


def test_a_long_list_takes_little_memory() -> None:
    booking = json.dumps({"id": "INS-1", "offer_id": "o" * 36, "policies": [{"text": "x" * 100}] * 20}).encode()
    count = 20_000  # 56 MB
    body = (b"[" if at == 0 else b"," if at <= count else b"]" for at in range(count + 2))
    chunks = (part + booking if part != b"]" else part for part in body)

    tracemalloc.start()
    try:
        seen = sum(1 for _ in read_page(chunks))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen == count + 1
    assert peak < 2 * 1024 * 1024


def test_a_booking_and_any_other_value_has_a_bound() -> None:
    for content in (b'[{"a": "', b'{"meta": "', b'{"data": [1, [['):
        endless = (content if at == 0 else b"[" * 50_000 for at in range(10_000))
        with pytest.raises(Unknown) as raised:
            list(read_page(endless))
        assert raised.value.code in ("too-large", "bad-answer")
        assert 10_000 - sum(1 for _ in endless) < 3 * MAX_LISTED / 50_000
