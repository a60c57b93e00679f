"""The errors of this program, as one small tree. Codes of XoneError are stable: docs/consumers.md lists them.

ConfirmOfferError
├── SettingsError           a setting is missing or wrong: exit code 2
├── BrokerError             the broker is not set up as it must be, or did not take a message
├── DecryptionError         encrypted data can't be decrypted with DATA_KEYS
├── EnqueueError            a file of jobs can't be read
├── RefreshError            a booking can't be looked at
├── ResolveError            a person's answer to needs_review can't be taken
└── XoneError               no booking came out of a call; code, http_status, detail
    ├── NotSent             nothing reached XONE             connect
    ├── Busy                XONE did not book, try later     http-423, http-429, http-503;
    │                                                    a web page: http-403, http-404, http-405
    ├── BadCredentials      XONE did not book                credentials
    │   └── WrongPath       nor has it ever here             path
    ├── Refused             XONE refused for good            http-4xx, redirect
    ├── AlreadyBooked       a booking exists                 already-booked
    ├── OrderEnded          no call is made any more         expired, withdrawn
    └── Unknown             XONE may have booked             timeout, connection-lost, bad-answer, wrong-offer,
        │                                                    too-large, http-408, http-425, http-5xx
        ├── NotXone         the answer is no JSON at all     bad-answer
        ├── Oversized       its answer can't be stored       too-large
        └── Poison          workers die on it                poison
"""

import re
import traceback
from types import TracebackType
from typing import TYPE_CHECKING

from models.states import ERROR_CODES

if TYPE_CHECKING:
    from models.booking import Booking  # pydantic, which a command that only reads the database does not need


class ConfirmOfferError(Exception):
    """Base of all errors that this program decides about."""


class SettingsError(ConfirmOfferError):
    """One line that names the setting and says what it should be."""


class BrokerError(ConfirmOfferError):
    """The broker is not set up as it must be, or refused a message. The text says what to do."""


class EnqueueError(ConfirmOfferError):
    """A file of jobs can't be read. The text says where and why, and contains nothing of a job."""


class DecryptionError(ConfirmOfferError):
    """Encrypted data can't be decrypted with DATA_KEYS, or belongs to another row or column."""


class ResolveError(ConfirmOfferError):
    """A person's answer to ``needs_review`` can't be recorded. The text says why."""


class RefreshError(ConfirmOfferError):
    """A booking can't be looked at. The text says why."""


class XoneError(ConfirmOfferError):
    """An answer without a booking, or no answer.

    code: stable, listed in docs/consumers.md. detail: for people, without personal data. answer: the body, to be stored
    encrypted. retry_after: seconds that XONE asked for.
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
    """XONE did not book and asks to be called again later."""


class BadCredentials(XoneError):
    """XONE does not accept the client id and secret, or the token it gave for them. No fault of the offer."""


class WrongPath(BadCredentials):
    """XONE answered nothing but 404 and 405, and no offer was ever confirmed here: XONE_CONFIRM_PATH is wrong."""


class Refused(XoneError):
    """XONE refused this offer for good."""


class AlreadyBooked(XoneError):
    """XONE says that a booking of this offer exists. ``booking``: set if the answer contained it."""

    booking: "Booking | None" = None


class OrderEnded(XoneError):
    """The order has ended before its offer was booked: no confirm call is made any more. code: of ORDER_ENDED."""

    def __init__(self, code: str) -> None:
        super().__init__(code, ORDER_ENDED[code])


EXPIRED, WITHDRAWN = "expired", "withdrawn"
ORDER_ENDED = {
    EXPIRED: "not booked by the job's confirm_by",
    WITHDRAWN: "the order was withdrawn before it was booked",
}


class Unknown(XoneError):
    """XONE may have booked."""


class NotXone(Unknown):
    """The answer is no JSON at all, such as a page about maintenance: something stands before XONE."""


class Oversized(Unknown):
    """XONE answered with a booking, probably, that is too large to be stored. A person has to look at it."""


class Poison(Unknown):
    """Several workers in a row died on this confirmation. XONE may have booked."""


def is_code(text: str) -> bool:
    """Whether a confirmation can have failed with this code: docs/consumers.md lists them."""
    return text in ERROR_CODES or re.fullmatch(r"http-[1-9]\d\d", text) is not None


def describe(error: BaseException) -> str:
    """The type of an exception, with its text if it is of this program: those contain no personal data."""
    name = type(error).__name__
    return f"{name}: {error}" if isinstance(error, ConfirmOfferError) else name


def where(trace: TracebackType | None) -> list[str]:
    """The last eight frames, each as ``file:line function``, without code and values."""
    frames = traceback.extract_tb(trace)[-8:]
    return [f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno} {frame.name}" for frame in frames]


class ShuttingDown(Exception):
    """The process stops while a thread waits. Another process will do the work."""
