"""The job: what a checkout publishes, and how it is read."""

import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches
from typing import Annotated, Any, NoReturn, Self
from uuid import uuid4

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from models.exact_json import depth_exceeds
from models.same import canonical_id

MAX_BYTES = 256 * 1024
MAX_QUOTES = 100
MAX_INSURED = 100  # of a quote
MAX_INSURED_OF_JOB = 200  # each has an e-mail, of which a hash is stored
MAX_DEPTH = 32


DEAD_LETTER_CODES = ("invalid-json", "invalid-job", "too-large", "conflicting-job", "poison")


class JobRejected(Exception):
    """A message that can't be accepted. code: of DEAD_LETTER_CODES; detail: what is wrong and where, with no value."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


# $ alone accepts a newline at the end. JSON Schema knows (?!\n), but not \Z.
_PATH_ID = r"^(?!\.{1,2}$)[A-Za-z0-9._~-]{1,128}$(?!\n)"
PathId = Annotated[str, StringConstraints(pattern=_PATH_ID)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$(?!\n)")]
LabelValue = Annotated[str, StringConstraints(max_length=1024, pattern=r"^[^\x00]*$")]
Name = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Country = Annotated[str, StringConstraints(pattern=r"^[A-Z]{2}$(?!\n)")]
# \s matches different characters in different languages. Naming those makes the pattern mean the same in all.
_EMAIL_PART = "[^@\\s\\x1c-\\x1f\\x85\ufeff]+"
Email = Annotated[str, StringConstraints(max_length=320, pattern=rf"^{_EMAIL_PART}@{_EMAIL_PART}$(?!\n)")]
OptionalText = Annotated[str, StringConstraints(max_length=2048)] | None


def _is_moment(text: str) -> str:
    read_moment(text)  # a pattern does not know how many days a month has
    return text


_MOMENT = (
    r"^[12][0-9]{3}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
    r"[Tt]([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?"
    r"([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$(?!\n)"
)
Moment = Annotated[
    str,
    StringConstraints(pattern=_MOMENT),
    AfterValidator(_is_moment),
    Field(json_schema_extra={"format": "date-time"}),
]


def read_moment(text: str) -> datetime:
    """A time of RFC 3339 with its zone, in UTC and whole microseconds. Raises ValueError."""
    return datetime.fromisoformat(text.upper()).astimezone(UTC)


def is_path_id(value: object) -> bool:
    """Whether a value is a valid id of a partner or an offer."""
    return isinstance(value, str) and re.search(_PATH_ID, value) is not None


class _PassedOn(BaseModel):
    """Part of the request to XONE. Known keys are checked; unknown keys are passed on unchanged."""

    model_config = ConfigDict(strict=True, extra="allow", regex_engine="python-re")

    def __repr_args__(self) -> list[tuple[str, str]]:
        """Nothing: all fields are personal data."""
        return []


class BrightwriteDetails(_PassedOn):
    """The experiment that the quote was shown in."""

    bw_experiment_id: OptionalText = None
    bw_variant_id: OptionalText = None
    bw_device_id: OptionalText = None


class Insured(_PassedOn):
    """A person who is insured. Unknown keys go to XONE untouched."""

    first_name: OptionalText = None
    last_name: OptionalText = None
    country: OptionalText = None
    email: OptionalText = None
    phone: OptionalText = None
    address1: OptionalText = None
    city: OptionalText = None
    region: OptionalText = None
    postcode: OptionalText = None


class Quote(_PassedOn):
    """A quote of the offer. Unknown keys go to XONE untouched."""

    id: Annotated[str, StringConstraints(min_length=1, max_length=128)] = Field(description="The quote's id at XONE.")
    brightwrite_details: BrightwriteDetails | None = None
    insured: Annotated[list[Insured], Field(max_length=MAX_INSURED)] | None = Field(
        None, description="Those who are insured by this quote."
    )


class Policyholder(_PassedOn):
    """Who buys the insurance. Unknown keys go to XONE untouched."""

    first_name: Name
    last_name: Name
    country: Country = Field(description="ISO 3166-1 alpha-2, in capitals.", examples=["GB"])
    email: Email = Field(examples=["ada@example.com"])
    phone: OptionalText = None
    address1: OptionalText = None
    city: OptionalText = None
    region: OptionalText = None
    postcode: OptionalText = None


class Job(BaseModel):
    """One offer to be confirmed. An unknown key at the top level is an error: it is a typo."""

    model_config = ConfigDict(strict=True, extra="forbid", regex_engine="python-re")

    partner_id: PathId = Field(description="The partner's id at XONE.", examples=["P-100"])
    offer_id: PathId = Field(
        description="The offer's id at XONE. With partner_id it identifies the confirmation.", examples=["offer-1"]
    )
    order_reference: Label | None = Field(
        None, description="Comes back in every event, in clear: no personal data.", examples=["SO-1001"]
    )
    quotes: Annotated[list[Quote], Field(min_length=1, max_length=MAX_QUOTES)]
    policyholder: Policyholder
    metadata: Annotated[dict[Label, LabelValue], Field(max_length=20)] = Field(
        {}, description="Comes back in every event, in clear: no personal data.", examples=[{"channel": "web"}]
    )

    confirm_by: Moment | None = Field(
        None,
        description="RFC 3339 with a zone. After it no confirm call is made any more; what was not booked by then fails"
        " with the code expired.",
        examples=["2026-01-31T18:00:00Z"],
    )

    @model_validator(mode="after")
    def _limit_insured(self) -> Self:
        if sum(len(quote.insured or ()) for quote in self.quotes) > MAX_INSURED_OF_JOB:
            limit = f"at most {MAX_INSURED_OF_JOB} insured in all quotes together"
            raise PydanticCustomError("too_many_insured", "{limit}", {"limit": limit})
        return self

    def __repr_args__(self) -> list[tuple[str, str]]:
        """The ids, and nothing personal."""
        return [("partner_id", self.partner_id), ("offer_id", self.offer_id)]

    @property
    def confirm_by_time(self) -> datetime | None:
        """``confirm_by`` as a time, in UTC."""
        return read_moment(self.confirm_by) if self.confirm_by is not None else None

    def canonical_quote_ids(self) -> list[str]:
        """The ids of the quotes in the form to compare them by, without repeats."""
        return _canonical(quote.id for quote in self.quotes)

    def request_body(self) -> bytes:
        """The body of the confirm call, as compact JSON: {"quotes": …, "policyholder": …}.

        Numbers have the digits that they came with.
        """
        passed_on = self.model_dump(include={"quotes", "policyholder"}, exclude_unset=True)
        return _write(passed_on)


def has_same_content(one: bytes, other: bytes) -> bool:
    """Whether two request bodies mean the same, whatever the order of keys and the form of UUIDs of quotes.

    Numbers are compared by value, exactly: 1 is 1.0 and not true; 9007199254740993.0 is not 9007199254740992.0.
    """
    return one == other or _comparable(one) == _comparable(other)


def as_rounded_before(body: bytes) -> bytes:
    """A request body with its numbers rounded, as it was stored before `quote_ids` was."""
    return json.dumps(json.loads(body), ensure_ascii=False, separators=(",", ":")).encode()


def _comparable(body: bytes) -> Any:
    request = json.loads(body, parse_int=_exact, parse_float=_exact)
    for quote in request["quotes"]:
        quote["id"] = canonical_id(quote["id"])
    return request


def _exact(text: str) -> tuple[str, Decimal | str]:
    """A number by its exact value; it is equal to nothing that is no number."""
    try:
        return "number", Decimal(text)
    except InvalidOperation:  # its exponent has 20 digits
        return "number", text


def quote_ids(body: bytes) -> list[str]:
    """The ids of the quotes in a request body, in the form to compare them by."""
    return _canonical(quote["id"] for quote in json.loads(body)["quotes"])


def _canonical(ids: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(map(canonical_id, ids)))


def read_job(body: bytes, names_keys: bool = False) -> Job:
    """The job in a message's body. Raises JobRejected: ``too-large``, ``invalid-json`` or ``invalid-job``.

    names_keys: its detail names unknown keys. They may be personal data, so only for those whose file it is.
    """
    if len(body) > MAX_BYTES:
        raise JobRejected("too-large", f"{len(body)} bytes; at most {MAX_BYTES} are accepted")
    content = _read_json(body)
    try:
        return Job.model_validate(content)
    except ValidationError as error:
        raise JobRejected("invalid-job", _describe(error, names_keys)) from None


def _read_json(body: bytes) -> Any:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JobRejected("invalid-json", f"not UTF-8 at byte {error.start}") from None
    if text.startswith("\ufeff"):
        raise JobRejected("invalid-json", "starts with a byte order mark; plain UTF-8 is expected")
    try:
        content = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        raise JobRejected("invalid-json", f"{what} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise JobRejected("invalid-json", f"nested deeper than {MAX_DEPTH}") from None
    if depth_exceeds(content, MAX_DEPTH):
        raise JobRejected("invalid-json", f"nested deeper than {MAX_DEPTH}")
    if "\\u" in text:
        _refuse_lone_surrogates(content)
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise JobRejected("invalid-json", "an object has the same key twice")
    return content


def _no_constant(_: str) -> NoReturn:
    raise JobRejected("invalid-json", "NaN and Infinity are no JSON")


class _Number:
    """A number that Python would write with other digits: ``0.1234567890123456789012``, ``1e-400``, ``1.10``."""

    def __init__(self, text: str) -> None:
        self.text = text


def _finite(text: str) -> float | _Number:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise JobRejected("invalid-json", "a number is too large")
    return number if repr(number) == text else _Number(text)


def _integer(text: str) -> int | _Number:
    if len(text) > 64:
        raise JobRejected("invalid-json", "a number is too large")
    number = int(text)
    return number if str(number) == text else _Number(text)


def _write(content: Any) -> bytes:
    """Compact JSON in UTF-8, with numbers as they came."""
    mark, numbers = f"\ue000{uuid4().hex}", list[str]()  # no text holds the mark

    def marked(value: Any) -> str:
        if not isinstance(value, _Number):
            raise TypeError(f"{type(value).__name__} has no JSON form")
        numbers.append(value.text)
        return mark

    written = json.dumps(content, ensure_ascii=False, separators=(",", ":"), default=marked)
    if numbers:
        parts = written.split(f'"{mark}"')
        written = parts[0] + "".join(number + part for number, part in zip(numbers, parts[1:], strict=True))
    return written.encode()


def _refuse_lone_surrogates(content: Any) -> None:
    try:
        _write(content)
    except UnicodeEncodeError:
        raise JobRejected("invalid-json", "a text holds half of a surrogate pair") from None


def _describe(error: ValidationError, names_keys: bool = False, most: int = 5) -> str:
    """The first problems, each as ``place: what is wrong``. Contains names of known keys only, and no value."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    lines = [f"{_place(problem['loc'], names_keys)}: {_reason(problem)}" for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"and {len(problems) - most} more")
    return "; ".join(lines)


def _place(loc: tuple[str | int, ...], names_keys: bool) -> str:
    """``quotes[0].insured[1].email``. An unknown key is shown as ``<key>``, for it may be personal data."""
    place = ""
    for step in loc:
        if isinstance(step, int):
            place += f"[{step}]"
        else:
            name = step if step in KNOWN_KEYS or names_keys else "<key>"
            place += f".{name}" if place else name
    return place or "the job"


KNOWN_KEYS = frozenset(
    name for model in (Job, Quote, BrightwriteDetails, Insured, Policyholder) for name in model.model_fields
)


_EXPECTED_MOMENT = "must be a time of RFC 3339 with a zone, such as 2026-01-31T18:00:00Z"


def _reason(problem: Any) -> str:
    name = problem["loc"][-1] if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":
        close = get_close_matches(str(name), Job.model_fields, n=1)
        return f"unknown key; did you mean {close[0]}?" if close else "unknown key"
    if problem["type"] == "string_pattern_mismatch":
        return _EXPECTED.get(name, "has a character that is not allowed")
    if problem["type"] == "value_error":  # of a check of ours; its text may hold the value
        return _EXPECTED.get(name, "is not valid")
    return str(problem["msg"]).replace("Input should", "should").replace("String should", "should").lower()


_EXPECTED = {
    "partner_id": "must be 1 to 128 of A-Z a-z 0-9 . _ ~ - and not . or ..",
    "offer_id": "must be 1 to 128 of A-Z a-z 0-9 . _ ~ - and not . or ..",
    "country": "must be two capital letters (ISO 3166-1 alpha-2)",
    "email": "must be an e-mail address",
    "confirm_by": _EXPECTED_MOMENT,
}
