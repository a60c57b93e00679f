"""Masking: personal data can be distinguished, but not read."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.privacy.reveal import in_short, mask


@pytest.mark.parametrize(
    ("value", "masked"),
    [
        ("Ada Lovelace", "A•• L•••••••"),
        ("ada@example.com", "a••@e••••••.com"),
        ("ada.lovelace@mail.example.org", "a••.l•••••••@m•••.e••••••.org"),
        ("+44 7700 900123", "+•• •••• ••••••"),
        ("1815-12-10", "••••-••-••"),
        ("O'Brien-Smith", "•'B••••-S••••"),
        ("A", "•"),
        ("李明", "李•"),
        ("Adae\u0301", "A••••"),
        ("Ada <ada@example.com>", "A•• <a••@e••••••.c••>"),
        ("", ""),
    ],
)
def test_each_value_is_masked(value: str, masked: str) -> None:
    assert mask(value) == masked


@settings(max_examples=300, deadline=None)
@given(st.text("aZé1٣李\u0301 -'.:@<", max_size=40))
def test_only_the_first_letter_of_each_word_survives(value: str) -> None:
    masked = mask(value.replace("@", " "))

    assert not any(character.isdigit() for character in masked)
    assert not re.search(r"\w\w|\w\u0301|•[^\W•]", masked)


@pytest.mark.parametrize(
    ("person", "line"),
    [
        ({"first_name": "Ada", "last_name": "Lovelace", "country": "GB"}, "A•• L•••••••  GB"),
        ({"last_name": "Lovelace", "email": "ada@example.com", "country": "Ada"}, "L•••••••  a••@e••••••.com"),
        ({"first_name": 5, "city": "London", "nick": "Countess"}, "•"),
        ({}, "(no name)"),
    ],
)
def test_a_person_is_masked_in_one_line(person: dict[str, object], line: str) -> None:
    assert in_short(person) == line
