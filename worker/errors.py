"""What can go wrong, as one small tree with stable codes.

ConfirmOfferError
├── SettingsError           a setting is missing or wrong: exit code 2
├── BrokerError             the broker does not have what it must, or did not take a message
├── SealError               sealed data can't be opened with DATA_KEYS
├── EnqueueError            a file of jobs can't be read
├── ResolveError            a person's answer to needs_review can't be taken
└── XoneError               no booking came out of a call; code, http_status, detail
    ├── NotSent             nothing reached XONE             connect
    ├── Busy                XONE did not book, try later     http-423, http-429, http-503
    ├── BadCredentials      XONE did not book                credentials
    ├── Refused             XONE said no for good            http-4xx, redirect
    ├── AlreadyBooked       a booking exists                 already-booked
    └── Unknown             XONE may have booked             timeout, connection-lost, bad-answer, wrong-offer,
        │                                                    too-large, http-408, http-425, http-5xx
        └── Poison          its workers die                  poison
"""

import traceback
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.booking import Booking  # pydantic, which a command that only reads the database does not need


class ConfirmOfferError(Exception):
    """Base of all errors that this program decides about."""


class SettingsError(ConfirmOfferError):
    """One line that names the setting and says what it should be."""


class BrokerError(ConfirmOfferError):
    """The broker is not as it must be, or refused a message; the text says what to do."""


class EnqueueError(ConfirmOfferError):
    """A file of jobs can't be read; the text says where and why, and holds nothing of a job."""


class DecryptionError(ConfirmOfferError):
    """Sealed data could not be opened."""


class ResolveError(ConfirmOfferError):
    """What a person answered to ``needs_review`` can't be recorded; the text says why."""


class XoneError(ConfirmOfferError):
    """An answer, or the lack of one, that is no booking.

    code: stable, one of those in the README; detail: for people, free of personal data;
    answer: the body that came, for a sealed column; retry_after: seconds that XONE asked for.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        http_status: int | None = None,
        answer: bytes | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.http_status = http_status
        self.answer = answer
        self.retry_after = retry_after


class NotSent(XoneError):
    """Nothing reached XONE."""


class Busy(XoneError):
    """XONE did not book and asks to come again later."""


class BadCredentials(XoneError):
    """XONE does not accept our client id and secret, or the token they gave. No fault of the offer."""


class Refused(XoneError):
    """XONE refused this offer for good."""


class AlreadyBooked(XoneError):
    """XONE says that a booking of this offer exists. ``booking`` where the answer held it."""

    booking: "Booking | None" = None


class Unknown(XoneError):
    """XONE may have booked."""


class Poison(Unknown):
    """Workers die on this confirmation again and again. Nobody knows whether XONE has booked."""


def describe(error: BaseException) -> str:
    """The type of an exception, and the text only of our own, which are written without personal data."""
    name = type(error).__name__
    return f"{name}: {error}" if isinstance(error, ConfirmOfferError) else name


def where(trace: TracebackType | None) -> list[str]:
    """``file:line function`` of the last frames, without the code and without any value."""
    frames = traceback.extract_tb(trace)[-8:]
    return [f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno} {frame.name}" for frame in frames]


class ShuttingDown(Exception):
    """The process stops while something waited; it goes on elsewhere."""
