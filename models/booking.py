"""The booking as XONE answers it. Source: the Confirm Offer page of XONE's reference, "Responses".

What is stored in clear is known by name and has the form of its field; all else is encrypted. Only ``id`` and
``offer_id`` are required. A booking is never refused for a detail: the values of unknown fields, and values that do not
fit their field, are kept as they came (``leftovers``). It is refused for its size only: every broker has to take its
event.
"""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.exact_json import depth_exceeds, write_exact

MAX_BOOKING_BYTES = 512 * 1024  # as JSON. Its event is in ASCII, and at most six times as long
MAX_POLICIES = 1000
MAX_DEPTH = 64
MAX_LINK, MAX_ID = 8192, 255  # characters
ID = r"^[A-Za-z0-9_.:/~+-]+$"
CODE = r"^[A-Za-z0-9_.:/+ -]*$"
_REFERENCE = r"^([A-Za-z0-9][A-Za-z0-9_.:/+-]*)?[0-9][A-Za-z0-9_.:/+-]*$"  # with a digit, which hardly a name has


def excess(booking: Any) -> str | None:
    """Why a booking, read from JSON, is too large to be stored and announced; None if it is not."""
    policies = booking.get("policies") if isinstance(booking, dict) else None
    if isinstance(policies, list) and len(policies) > MAX_POLICIES:
        return f"has {len(policies)} policies; at most {MAX_POLICIES} can be stored"
    if depth_exceeds(booking, MAX_DEPTH):
        return f"is nested deeper than {MAX_DEPTH}"
    if len(write_exact(booking)) > MAX_BOOKING_BYTES:
        return f"is larger than {MAX_BOOKING_BYTES // 1024} KiB"
    return None


def is_id(text: str) -> bool:
    """Whether a text can be the id of a booking."""
    return len(text) <= MAX_ID and re.fullmatch(ID, text) is not None


def _storable(text: str) -> str:
    text.encode()  # half of a surrogate pair has no UTF-8
    if "\x00" in text:
        raise ValueError("a NUL can't be stored as text")
    return text


def _with_zone(moment: datetime) -> datetime:
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    try:
        moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("in UTC it is beyond the years 1 to 9999") from None
    return moment


def _without_email(text: str) -> str:
    if "@" in text:
        raise ValueError("it may hold an e-mail address")
    return _storable(text)


# Stored in clear, and partly published:
Words = Annotated[str, AfterValidator(_without_email)]  # that are the same for all customers
Code = Annotated[str, Field(max_length=255, pattern=CODE)]  # such as a status
Id = Annotated[str, Field(max_length=MAX_ID, pattern=ID, coerce_numbers_to_str=True)]
Reference = Annotated[str, Field(max_length=255, pattern=_REFERENCE, coerce_numbers_to_str=True)]
PublicUrl = Annotated[str, Field(max_length=2048, pattern=r"^https?://[A-Za-z0-9._~:/+-]+$"), AfterValidator(_storable)]
# Encrypted:
Text = Annotated[str, AfterValidator(_storable)]
Link = Annotated[str, Field(max_length=MAX_LINK), AfterValidator(_storable)]  # published with EVENT_LINKS=on
Email = Annotated[str, Field(max_length=320)]
Time = Annotated[datetime, AfterValidator(_with_zone)]
Amount = Annotated[Decimal, Field(max_digits=32)]


class Received(BaseModel):
    """Part of an answer. ``model_extra`` holds unknown fields, and values that do not fit their field."""

    model_config = ConfigDict(extra="allow", frozen=True)

    def __repr_args__(self) -> list[tuple[str, Any]]:
        """The id, and nothing personal."""
        return [("id", self.id)] if hasattr(self, "id") else []

    def misfits(self) -> set[str]:
        """The names of known fields whose values did not fit."""
        return type(self).model_fields.keys() & (self.model_extra or {}).keys()

    @model_validator(mode="wrap")
    @classmethod
    def _set_misfits_aside(cls, data: Any, validate: Callable[[Any], Self]) -> Self:
        try:
            return validate(data)
        except ValidationError as error:
            misfits = {problem["loc"][0] for problem in error.errors() if problem["loc"]}
            if not isinstance(data, dict) or not misfits:
                raise
            model = validate({key: value for key, value in data.items() if key not in misfits})
            if model.model_extra is not None:
                model.model_extra.update({str(key): data[key] for key in misfits if key in data})
            return model


class PolicyContent(Received):
    """What the customer was told of the product: words that are the same for all."""

    title: Words | None = None
    header: Words | None = None
    description: Words | None = None
    optout_msg: Words | None = None
    inclusions: list[Words] | None = None
    exclusions: list[Words] | None = None
    disclaimer: Words | None = None
    disclaimer_html: Words | None = None
    payment_disclaimer: Words | None = None
    in_path_disclaimer: Words | None = None
    extra_content: list[Words] | None = None


class ExtraFields(Received):
    seller_entity: Words | None = None
    event_datetime: Time | None = None
    event_cost: Amount | None = None
    retail_price: Amount | None = None
    uw_fee: Amount | None = None
    reinsurer_fee: Amount | None = None
    partner_commission: Amount | None = None
    coverage_group: Words | None = None
    cg_booking_fee: Amount | None = None


class Policy(Received):
    id: Id | None = None
    parent_id: Id | None = None
    status: Code | None = None
    policy_type: Code | None = None
    policy_code: Code | None = None
    policy_version: Code | None = None
    policy_start_date: Time | None = None
    policy_start_date_tz_offset: Code | None = None
    policy_end_date: Time | None = None
    policy_end_date_tz_offset: Code | None = None
    price: Amount | None = None
    tax: Amount | None = None
    commission: Amount | None = None
    cover_amount: Amount | None = None
    claim_selector_id: Reference | None = None
    pds_url: PublicUrl | None = None
    confirmed_at: Time | None = None
    cancelled_at: Time | None = None
    created_at: Time | None = None
    updated_at: Time | None = None
    policy_content: PolicyContent | None = None
    extra_fields: ExtraFields | None = None


class Person(Received):
    """The policyholder's personal data. All of it is encrypted where it is stored."""

    first_name: str | None = None
    last_name: str | None = None
    email: Email | None = None
    phone: str | None = None
    country: str | None = None
    birth_date: str | None = None
    address1: str | None = None
    address2: str | None = None
    city: str | None = None
    region: str | None = None
    postcode: str | None = None


class Policyholder(Person):
    id: Reference | None = None
    created_at: Time | None = None
    updated_at: Time | None = None


class QuoteRef(Received):
    uuid: Reference | None = None


class Coi(Received):
    """Certificate of insurance."""

    url: Link | None = None
    pdf: Link | None = None


class Booking(Received):
    id: Id
    offer_id: Id
    provider_reference: Reference | None = None
    language: Code | None = None
    provider_customer_id: Reference | None = None
    status: Code | None = None
    currency: Code | None = None
    price: Amount | None = None
    security_token: Text | None = None
    created_at: Time | None = None
    updated_at: Time | None = None
    is_instant_booking: bool | None = None
    payment_status: Code | None = None
    policies: list[Policy] = []
    policyholder: Policyholder | None = None
    quote: QuoteRef | None = None
    coi: Coi | None = None
    account_url: Link | None = None
    fnol_link: Link | None = None
    sign_up_url: Link | None = None

    def leftovers(self) -> dict[str, Any]:
        """Values without a column, by their path: ``{"new_field": …, "policies[0].tax": …}``."""
        return dict(_leftovers(self, ""))


def _leftovers(node: Any, path: str) -> list[tuple[str, Any]]:
    leftovers: list[tuple[str, Any]] = []
    if isinstance(node, Received):
        prefix = f"{path}." if path else ""
        leftovers += [(prefix + name, value) for name, value in (node.model_extra or {}).items()]
        for name, value in node.__dict__.items():  # the known fields
            if isinstance(value, Received | list):
                leftovers += _leftovers(value, prefix + name)
    elif isinstance(node, list):
        for index, item in enumerate(node):
            leftovers += _leftovers(item, f"{path}[{index}]")
    return leftovers
