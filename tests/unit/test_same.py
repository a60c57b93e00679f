"""Ids and e-mails that are written differently and mean the same."""

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.same import as_uuid, canonical_email, canonical_id, differs_in_case_only, holds_id, is_same_id, spellings

OFFER = "5c7e1f00-0000-4000-8000-00000000abcd"


@given(st.uuids())
def test_a_uuid_is_the_same_in_any_form(uuid: UUID) -> None:
    usual = [str(uuid), str(uuid).upper(), uuid.hex, uuid.hex.upper()]
    forms = [*usual, uuid.urn, uuid.urn.upper(), f"{{{uuid}}}", f"{{{uuid.hex.upper()}}}"]

    assert {canonical_id(form) for form in forms} == {str(uuid)}
    assert all(is_same_id(one, other) for one in forms for other in forms)
    assert all(as_uuid(form) == uuid for form in forms)
    assert all(set(usual) <= set(spellings(form)) for form in forms)


@pytest.mark.parametrize(
    "text",
    ["", "5c7e", f"{OFFER}1", f"{{{OFFER}", f"uuid:{OFFER}", f"urn:uuid:{{{OFFER}}}", f" {OFFER}", f"{OFFER}\n",
     f"{OFFER}~slow", "5c7e1f000000-4000-8000-00000000abcd1", "g" * 32, "٣" * 32],
)  # fmt: skip
def test_what_is_no_uuid_is_compared_character_by_character(text: str) -> None:
    assert as_uuid(text) is None
    assert canonical_id(text) == text
    assert spellings(text) == [text]
    assert is_same_id(text, text)
    assert text == text.upper() or not is_same_id(text, text.upper())


@given(st.text(), st.text())
def test_only_case_and_form_make_ids_alike(one: str, other: str) -> None:
    assert not is_same_id(one, other) or one == other or as_uuid(one) == as_uuid(other) is not None
    assert differs_in_case_only(one, one.upper()) or one.casefold() != one.upper().casefold()


def test_an_id_is_found_among_others() -> None:
    assert holds_id({OFFER, "q"}, OFFER.upper())
    assert not holds_id({OFFER, "q"}, "Q")
    assert not holds_id({"None"}, None)


SAME = [
    ("ada@example.com", " Ada@EXAMPLE.com\n"),
    ("ada@example.com", "ada@example.com."),
    ("ada@example.com", "ａｄａ＠ｅｘａｍｐｌｅ．ｃｏｍ"),
    ("ada.b@example.com", '"Ada.B"@example.com'),
    ("rené@example.com", '"rene\u0301"@example.com'),
    ("rené@example.com", "rene\u0301@example.com"),
    ("rené@example.com", "RENÉ@example.com"),
    ("ada@bücher.example", "ada@BÜCHER.example"),
    ("ada@bücher.example", "ada@bu\u0308cher.example"),
    ("ada@bücher.example", "ada@xn--bcher-kva.example"),
    ("ada@bücher.example", "ada@XN--BCHER-KVA.EXAMPLE"),
    ("ada@bücher.example", "ada@bücher。example"),
    ("ada@例え.テスト", "ada@xn--r8jz45g.xn--zckzah"),
    ("ada@💌.example", "ada@xn--rr8h.example"),
    ("σίσυφος@example.com", "ΣΊΣΥΦΟΣ@example.com"),
    ("straße@example.com", "STRASSE@example.com"),
]
OTHER = [
    ("ada@example.com", "ada+x@example.com"),
    ("ada@example.com", "a.da@example.com"),
    ("ada@example.com", "ada@example.org"),
    ("ada b@example.com", '"ada b"@example.com'),
    ("ada@straße.example", "ada@strasse.example"),  # two domains by IDNA 2008
    ("rené@example.com", "rene@example.com"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_a_mail_system_takes_them_for_one(one: str, other: str) -> None:
    assert canonical_email(one) == canonical_email(other)


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_a_mail_system_takes_them_for_two(one: str, other: str) -> None:
    assert canonical_email(one) != canonical_email(other)


@given(st.text() | st.builds("{}@{}".format, st.text(), st.text()) | st.emails())
def test_the_form_to_compare_by_is_stable_and_never_fails(email: str) -> None:
    form = canonical_email(email)

    assert canonical_email(form) == form
    assert canonical_email(f" {email}\n") == form


@given(st.text(alphabet=st.characters(codec=None)))
def test_half_of_a_surrogate_pair_is_no_obstacle(text: str) -> None:
    canonical_email(f"{text}@{text}")
