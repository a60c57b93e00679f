"""Encryption of personal data and secrets: Fernet with the keys of DATA_KEYS, bound to row and column.

An encrypted value contains the name of its place, so a value that was moved to another row or column is not decrypted.
E-mails that must be found again are hashed with HMAC-SHA-256, under keys that HKDF (RFC 5869) derives from DATA_KEYS.
"""

import hmac
from base64 import urlsafe_b64decode
from uuid import UUID

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from models.same import canonical_email
from worker.errors import DecryptionError


def new_key() -> str:
    """A new random key for DATA_KEYS."""
    return Fernet.generate_key().decode()


class Encryption:
    """Encrypts with the first key and decrypts with any of them."""

    def __init__(self, keys: list[str]) -> None:
        self._first = Fernet(keys[0])
        self._fernet = MultiFernet([Fernet(key) for key in keys])
        self._hash_keys = [_hash_key(key) for key in keys]

    def encrypt(self, confirmation_id: UUID, column: str, content: bytes) -> bytes:
        return self._fernet.encrypt(_place(confirmation_id, column) + content)

    def encrypt_text(self, confirmation_id: UUID, column: str, content: str | None) -> bytes | None:
        """As ``encrypt``, for a text. None stays None."""
        if content is None:
            return None
        return self.encrypt(confirmation_id, column, content.encode("utf-8", "surrogatepass"))

    def decrypt(self, confirmation_id: UUID, column: str, sealed: bytes) -> bytes:
        """Raises DecryptionError if no key fits or the value belongs to another row or column."""
        place = _place(confirmation_id, column)
        try:
            content = self._fernet.decrypt(bytes(sealed))
        except InvalidToken:
            raise DecryptionError(
                f"{column} of confirmation {confirmation_id} opens with no key of DATA_KEYS; "
                "add the key that was in use when it was stored"
            ) from None
        if not content.startswith(place):
            raise DecryptionError(f"{column} of confirmation {confirmation_id} was encrypted for another place")
        return content[len(place) :]

    def is_current(self, sealed: bytes) -> bool:
        """Whether the first key decrypts a value. The value itself does not name its key."""
        try:
            self._first.decrypt(bytes(sealed))
        except InvalidToken:
            return False
        return True

    def email_hash(self, email: str) -> bytes:
        """The keyed hash that an e-mail is found by, however it is written: 32 bytes, under the first key."""
        return hmac.digest(self._hash_keys[0], _encoded(canonical_email(email)), "sha256")

    def email_hashes(self, email: str) -> list[bytes]:
        """The hashes that an e-mail may be stored under: of each key, and of the forms that versions compared it by."""
        forms = dict.fromkeys((canonical_email(email), email.strip().lower()))
        return [hmac.digest(key, _encoded(form), "sha256") for form in forms for key in self._hash_keys]


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _hash_key(key: str) -> bytes:
    return HKDF(SHA256(), length=32, salt=None, info=b"confirm-offer email hash").derive(urlsafe_b64decode(key))


def _place(confirmation_id: UUID, column: str) -> bytes:
    return f"{confirmation_id}:{column}:".encode()
