"""Ids and e-mails that are written differently and mean the same."""

import re
import unicodedata
from collections.abc import Collection
from uuid import UUID

import idna

_HEX = r"(?:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32})"
_UUID = re.compile(rf"(?:urn:uuid:)?{_HEX}|\{{{_HEX}\}}", re.IGNORECASE | re.ASCII)


def as_uuid(text: str) -> UUID | None:
    """The UUID that a text is, or None: small letters or capitals, with or without hyphens, in braces, as a URN."""
    return UUID(text.lower()) if _UUID.fullmatch(text) else None


def canonical_id(text: str) -> str:
    """An id in the form to compare it by: a UUID as RFC 9562 writes it, any other id as it is."""
    uuid = as_uuid(text)
    return text if uuid is None else str(uuid)


def spellings(text: str) -> list[str]:
    """An id as it is written, and the usual other forms of a UUID."""
    uuid = as_uuid(text)
    if uuid is None:
        return [text]
    forms = (text, str(uuid), str(uuid).upper(), uuid.hex, uuid.hex.upper())
    return list(dict.fromkeys(forms))


def is_same_id(one: str, other: str) -> bool:
    """Whether two ids are equal. UUIDs are compared as UUIDs, other ids character by character."""
    return one == other or canonical_id(one) == canonical_id(other)


def differs_in_case_only(one: str, other: str) -> bool:
    """Whether two ids differ in small letters and capitals only. Then they may mean the same, or not."""
    return canonical_id(one).casefold() == canonical_id(other).casefold()


def holds_id(ids: Collection[str], searched: str | None) -> bool:
    """Whether an id is among others, in whatever form."""
    return searched is not None and any(is_same_id(id_, searched) for id_ in ids)


def canonical_email(email: str) -> str:
    """An e-mail in the form to compare it by: as a mail system would, and with no regard to case.

    Unicode is compatibility-composed and case-folded (UAX 15, and Unicode 3.13 D146). A domain has the form in which
    DNS looks it up (IDNA 2008, mapped by UTS 46): ``Ada@BÜCHER.example`` gives ``ada@xn--bcher-kva.example``.
    """
    if email.isascii():
        return _unquoted(email.strip().lower().rstrip("."))
    folded = _folded(email).strip()
    local, at, _ = folded.rpartition("@")
    # The domain is mapped from what was written: case-folding turns "ß" into "ss", which is another domain.
    written = unicodedata.normalize("NFKC", email).strip().rpartition("@")[2]
    return _unquoted(local + at + _ascii_domain(written)) if at else folded


def _unquoted(email: str) -> str:
    """An e-mail without needless quotes: ``"ada"@example.com`` is the same mailbox (RFC 5321, section 4.1.2)."""
    return _NEEDLESS_QUOTES.sub(r"\1", email)


def _folded(text: str) -> str:
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", text).casefold())
    return unicodedata.normalize("NFKC", text.casefold())


_NEEDLESS_QUOTES = re.compile(r'\A"([^\s"\\(),.:;<>@\[\]]+(?:\.[^\s"\\(),.:;<>@\[\]]+)*)"(?=@[^"@]*\Z)')
_DOTS = re.compile("[.\u3002\uff0e\uff61]")  # what UTS 46 takes as a dot


def _ascii_domain(domain: str) -> str:
    return ".".join(_ascii_label(label) for label in _DOTS.split(domain)).rstrip(".")


def _ascii_label(label: str) -> str:
    """A label as DNS has it. One that IDNA does not allow, such as an emoji, is written in the same way."""
    if label.isascii():
        return label.lower()
    try:
        return idna.encode(label, uts46=True).decode()
    except (idna.IDNAError, UnicodeError):
        folded = _folded(label)
    try:
        return folded if folded.isascii() else "xn--" + folded.encode("punycode").decode()
    except UnicodeError:  # half of a surrogate pair
        return folded
