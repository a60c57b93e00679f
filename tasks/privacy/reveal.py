"""The encrypted data of a confirmation: decrypted with DATA_KEYS, or masked."""

import json
import re
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, select

from models.tables import Attempt, Booking, Confirmation, Policyholder
from worker.storage.encryption import Encryption


@dataclass(frozen=True)
class PolicyholderVersions:
    """The policyholder as the checkout sent it and as XONE returned it. None where there is none, or it was purged."""

    sent: dict[str, Any] | None
    returned: dict[str, Any] | None


@dataclass(frozen=True)
class Persons:
    """Whom a confirmation is about, in clear. insured: as sent, each with its ``quote_id``."""

    policyholder: PolicyholderVersions
    insured: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class CoiLinks:
    """Links to the certificate of insurance."""

    url: str | None
    pdf: str | None


@dataclass(frozen=True)
class CustomerLinks:
    """The customer's own links of a booking."""

    coi: CoiLinks
    account_url: str | None
    fnol_link: str | None
    sign_up_url: str | None


@dataclass(frozen=True)
class KeptAnswer:
    """An answer of XONE that was kept. attempt: its number; body: as text."""

    attempt: int
    body: str


@dataclass(frozen=True)
class Secrets:
    """What else is encrypted, in clear. other_fields: fields of the booking that have no column, by path."""

    links: CustomerLinks
    security_token: str | None
    other_fields: dict[str, Any]
    answers: tuple[KeptAnswer, ...]


def persons(connection: Connection, encryption: Encryption, confirmation_id: UUID) -> Persons:
    """The policyholder and the insured of a confirmation, decrypted. Raises DecryptionError."""
    body = _decrypt(connection, encryption, confirmation_id, Confirmation, "body")
    returned = _decrypt(connection, encryption, confirmation_id, Policyholder, "person")
    request = json.loads(body) if body is not None else {}
    return Persons(
        PolicyholderVersions(request.get("policyholder"), json.loads(returned) if returned is not None else None),
        tuple(
            {"quote_id": quote["id"], **insured}
            for quote in request.get("quotes", [])
            for insured in quote.get("insured") or []
        ),
    )


def secrets(connection: Connection, encryption: Encryption, confirmation_id: UUID) -> Secrets:
    """Customers' links, security token, other fields of the booking and kept answers, decrypted.

    Raises DecryptionError.
    """

    def decrypt(column: str) -> str | None:
        return _decrypt(connection, encryption, confirmation_id, Booking, column)

    rest = decrypt("rest")
    answers = connection.execute(
        select(Attempt.number, Attempt.sealed_answer)
        .where(Attempt.confirmation_id == confirmation_id, Attempt.sealed_answer.is_not(None))
        .order_by(Attempt.number)
    )
    return Secrets(
        links=CustomerLinks(
            CoiLinks(decrypt("coi_url"), decrypt("coi_pdf")),
            decrypt("account_url"),
            decrypt("fnol_link"),
            decrypt("sign_up_url"),
        ),
        security_token=decrypt("security_token"),
        other_fields=json.loads(rest) if rest is not None else {},
        answers=tuple(
            KeptAnswer(number, _text(encryption.decrypt(confirmation_id, f"answer {number}", sealed)))
            for number, sealed in answers
            if sealed is not None
        ),
    )


def _decrypt(
    connection: Connection, encryption: Encryption, confirmation_id: UUID, table: Any, column: str
) -> str | None:
    """The text in the column ``sealed_<column>`` of a table; None if it is empty."""
    id_column = Confirmation.id if table is Confirmation else table.confirmation_id
    sealed = connection.execute(
        select(table.__table__.c[f"sealed_{column}"]).where(id_column == confirmation_id)
    ).scalar_one_or_none()
    return _text(encryption.decrypt(confirmation_id, column, sealed)) if sealed is not None else None


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace")


def mask(value: str) -> str:
    """``Ada Lovelace`` → ``A•• L•••••••``; ``ada@example.com`` → ``a••@e••••••.com``; digits never show."""
    local, at, domain = value.rpartition("@")
    if not at or " " in value:
        return _WORD.sub(_first_letter_only, value)
    name, dot, top = domain.rpartition(".")
    masked = _WORD.sub(_first_letter_only, f"{local}@{name or top}")
    return masked + (f".{top}" if dot and name and top.isalpha() else "")


_WORD = re.compile(r"[^\s!-/:-@\[-`{-~]+")  # letters, digits, marks of any script: all but space and ASCII punctuation


def _first_letter_only(word: re.Match[str]) -> str:
    first, length = word[0][0], len(word[0])
    return first + "•" * (length - 1) if first.isalpha() and length > 1 else "•" * length


def in_short(person: dict[str, Any]) -> str:
    """A person in one masked line: name, e-mail, phone and country."""
    name = " ".join(mask(str(person[part])) for part in ("first_name", "last_name") if person.get(part))
    facts = [name, *(mask(str(person[part])) for part in ("email", "phone") if person.get(part))]
    country = person.get("country")
    return "  ".join(fact for fact in [*facts, country if _is_country(country) else ""] if fact) or "(no name)"


def _is_country(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Z]{2}", value) is not None
