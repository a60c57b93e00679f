"""Encrypted values: any of the keys decrypts them, in their own place only."""

from uuid import UUID

import pytest
from cryptography.fernet import Fernet
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.errors import DecryptionError
from worker.storage.encryption import Encryption

ROW = UUID("01890000-0000-7000-8000-000000000001")
OTHER_ROW = UUID("01890000-0000-7000-8000-000000000002")
OLD_KEY, NEW_KEY, OTHER_KEY = (Fernet.generate_key().decode() for _ in range(3))
MARK = "Geheimnis"


@pytest.mark.parametrize("content", [b"", b"x", b'{"a": 1}', bytes(range(256)), b"x" * 300_000, "🎟️".encode()])
def test_an_encrypted_value_can_be_decrypted(content: bytes) -> None:
    encryption = Encryption([OLD_KEY])

    encrypted = encryption.encrypt(ROW, "body", content)

    assert encryption.decrypt(ROW, "body", encrypted) == content
    assert encryption.decrypt(ROW, "body", memoryview(encrypted)) == content  # type: ignore[arg-type] # as drivers return it
    assert len(content) < 2 or content not in encrypted


def test_equal_values_have_different_ciphertexts() -> None:
    encryption = Encryption([OLD_KEY])

    assert encryption.encrypt(ROW, "body", b"x") != encryption.encrypt(ROW, "body", b"x")


def test_text_is_encrypted_as_utf_8_and_none_stays_none() -> None:
    encryption = Encryption([OLD_KEY])
    encrypted = encryption.encrypt_text(ROW, "coi_url", "Größe")

    assert encrypted is not None
    assert encryption.decrypt(ROW, "coi_url", encrypted).decode() == "Größe"
    assert encryption.encrypt_text(ROW, "coi_url", None) is None


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.text(alphabet=st.characters(codec=None)))
def test_any_text_can_be_encrypted(text: str) -> None:
    encryption = Encryption([OLD_KEY])
    encrypted = encryption.encrypt_text(ROW, "rest", text)

    assert encrypted is not None
    assert encryption.decrypt(ROW, "rest", encrypted).decode("utf-8", "surrogatepass") == text


@pytest.mark.parametrize(
    ("row", "column"),
    [(OTHER_ROW, "body"), (ROW, "person"), (ROW, "bod"), (ROW, "body:"), (ROW, ""), (OTHER_ROW, "person")],
)
def test_a_value_moved_to_another_place_cannot_be_decrypted(row: UUID, column: str) -> None:
    encryption = Encryption([OLD_KEY])
    encrypted = encryption.encrypt(ROW, "body", MARK.encode())

    with pytest.raises(DecryptionError, match="encrypted for another place") as raised:
        encryption.decrypt(row, column, encrypted)
    assert str(row) in str(raised.value)
    assert MARK not in str(raised.value)


def test_after_a_rotation_old_values_decrypt_and_new_values_need_the_new_key() -> None:
    before, after = Encryption([OLD_KEY]), Encryption([NEW_KEY, OLD_KEY])
    old, new = before.encrypt(ROW, "body", b"old"), after.encrypt(ROW, "body", b"new")

    assert (after.decrypt(ROW, "body", old), after.decrypt(ROW, "body", new)) == (b"old", b"new")
    assert Encryption([NEW_KEY]).decrypt(ROW, "body", new) == b"new"
    with pytest.raises(DecryptionError, match="no key of DATA_KEYS"):
        before.decrypt(ROW, "body", new)


@pytest.mark.parametrize(
    "damage",
    [
        lambda encrypted: Encryption([OTHER_KEY]).encrypt(ROW, "body", b"x"),
        lambda encrypted: encrypted[:-1],
        lambda encrypted: encrypted[1:],
        lambda encrypted: encrypted[:50] + (b"A" if encrypted[50:51] != b"A" else b"B") + encrypted[51:],
        lambda encrypted: b"",
        lambda encrypted: b"\xff\x00",
        lambda encrypted: MARK.encode(),
    ],
    ids=["other key", "end cut off", "start cut off", "one character changed", "empty", "no text", "not encrypted"],
)
def test_a_decryption_error_names_the_remedy(damage: object) -> None:
    assert callable(damage)
    encryption = Encryption([OLD_KEY])
    encrypted = encryption.encrypt(ROW, "body", MARK.encode())

    with pytest.raises(DecryptionError) as raised:
        encryption.decrypt(ROW, "body", damage(encrypted))

    assert str(raised.value) == (
        f"body of confirmation {ROW} opens with no key of DATA_KEYS; add the key that was in use when it was stored"
    )


def test_only_the_first_key_is_current() -> None:
    before, after = Encryption([OLD_KEY]), Encryption([NEW_KEY, OLD_KEY])

    assert after.is_current(after.encrypt(ROW, "body", b"x"))
    assert not after.is_current(before.encrypt(ROW, "body", b"x"))
    assert not after.is_current(b"")


def test_the_case_of_an_email_does_not_change_its_hash() -> None:
    encryption = Encryption([OLD_KEY])
    hashes = {encryption.email_hash(email) for email in ("ada@example.com", " Ada@Example.COM\n", "ADA@EXAMPLE.COM")}

    assert len(hashes) == 1
    assert encryption.email_hash("bda@example.com") not in hashes
    assert {len(hash_) for hash_ in hashes} == {32}


def test_an_email_has_a_hash_for_each_key() -> None:
    old, new = (Encryption([key]).email_hash("ada@example.com") for key in (OLD_KEY, NEW_KEY))

    assert old != new
    assert Encryption([NEW_KEY, OLD_KEY]).email_hashes("ada@example.com") == [new, old]
    assert Encryption([NEW_KEY, OLD_KEY]).email_hash("ada@example.com") == new


def test_an_email_that_an_earlier_version_stored_is_looked_for_in_its_form_too() -> None:
    """It compared by small letters, with no regard to Unicode and domains."""
    encryption = Encryption([NEW_KEY, OLD_KEY])
    composed, decomposed = "rené@bücher.example", "rene\u0301@bücher.example"

    assert encryption.email_hash(composed) == encryption.email_hash(decomposed)
    assert encryption.email_hashes(composed)[0] == encryption.email_hash(composed)
    assert len(encryption.email_hashes(composed)) == 4
    assert encryption.email_hashes(composed)[2:] != encryption.email_hashes(decomposed)[2:]
