"""What is sealed of a confirmation: opened with DATA_KEYS, and masked for who need not see it."""

import json
import re
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, select

from models.tables import Attempt, Booking, Confirmation, Policyholder
from worker.storage.encryption import Encryption


def persons(connection: Connection, encryption: Encryption, confirmation_id: UUID) -> dict[str, Any]:
    """The policyholder as sent and as XONE returned it, and the insured. Raises SealError."""
    body, returned = (
        _opened(connection, encryption, confirmation_id, table, column)
        for table, column in ((Confirmation, "body"), (Policyholder, "person"))
    )
    request = json.loads(body) if body is not None else {}
    return {
        "policyholder": {
            "sent": request.get("policyholder"),
            "returned": json.loads(returned) if returned is not None else None,
        },
        "insured": [
            {"quote_id": quote["id"], **insured}
            for quote in request.get("quotes", [])
            for insured in quote.get("insured") or []
        ],
    }


def secrets(connection: Connection, encryption: Encryption, confirmation_id: UUID) -> dict[str, Any]:
    """Customers' links, the security token, fields of the booking without a column, and kept answers of attempts.

    Raises SealError.
    """

    def opened(column: str) -> str | None:
        return _opened(connection, encryption, confirmation_id, Booking, column)

    rest = opened("rest")
    answers = connection.execute(
        select(Attempt.number, Attempt.sealed_answer)
        .where(Attempt.confirmation_id == confirmation_id, Attempt.sealed_answer.is_not(None))
        .order_by(Attempt.number)
    )
    return {
        "links": {
            "coi": {"url": opened("coi_url"), "pdf": opened("coi_pdf")},
            **{name: opened(name) for name in ("account_url", "fnol_link", "sign_up_url")},
        },
        "security_token": opened("security_token"),
        "other_fields": json.loads(rest) if rest is not None else {},
        "answers": [
            {"attempt": number, "body": _text(encryption.decrypt(confirmation_id, f"answer {number}", sealed))}
            for number, sealed in answers
            if sealed is not None
        ],
    }


def _opened(
    connection: Connection, encryption: Encryption, confirmation_id: UUID, table: Any, column: str
) -> str | None:
    """The text of ``sealed_<column>``; None where there is none."""
    its_id = Confirmation.id if table is Confirmation else table.confirmation_id
    sealed = connection.execute(
        select(table.__table__.c[f"sealed_{column}"]).where(its_id == confirmation_id)
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


_WORD = re.compile(r"[^\s!-/:-@\[-`{-~]+")  # letters, digits and marks of any script; all but space and ASCII's signs


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
