"""Sealing of personal data and secrets: Fernet with the keys of DATA_KEYS, bound to the row and column.

A sealed value holds the name of its place, so one that was moved to another row or column does not open.
"""

from uuid import UUID

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from worker.errors import SealError


class Vault:
    """Seals with the first key and opens with any."""

    def __init__(self, keys: list[str]) -> None:
        self._fernet = MultiFernet([Fernet(key) for key in keys])

    def seal(self, confirmation_id: UUID, column: str, content: bytes) -> bytes:
        return self._fernet.encrypt(_place(confirmation_id, column) + content)

    def seal_text(self, confirmation_id: UUID, column: str, content: str | None) -> bytes | None:
        """As ``seal``; nothing stays nothing."""
        if content is None:
            return None
        return self.seal(confirmation_id, column, content.encode("utf-8", "surrogatepass"))

    def open(self, confirmation_id: UUID, column: str, sealed: bytes) -> bytes:
        """Raises SealError where no key fits or the value belongs to another place."""
        place = _place(confirmation_id, column)
        try:
            content = self._fernet.decrypt(bytes(sealed))
        except InvalidToken:
            raise SealError(
                f"{column} of confirmation {confirmation_id} opens with no key of DATA_KEYS; "
                "add the key that was in use when it was stored"
            ) from None
        if not content.startswith(place):
            raise SealError(f"{column} of confirmation {confirmation_id} was sealed for another place")
        return content[len(place) :]


def _place(confirmation_id: UUID, column: str) -> bytes:
    return f"{confirmation_id}:{column}:".encode()
