"""Answers of the sandbox: status, body and headers."""

import json
import re
from typing import Any, NamedTuple

Json = dict[str, Any]


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]


def to_json(value: Any) -> bytes:
    """JSON in UTF-8. A Decimal keeps its digits: 20.00 stays 20.00."""
    text = json.dumps(value, ensure_ascii=False, default=lambda number: f"\0{number}\0")
    return re.sub(r'"\\u0000([0-9.]+)\\u0000"', r"\1", text).encode()


def parsed(body: bytes) -> Json:
    """The JSON object of a body; an empty one where it is no JSON object."""
    try:
        value = json.loads(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def answer(status: int, content: Any, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, to_json(content), {"Content-Type": "application/json"} | named)


def refusal(status: int, message: str, **headers: str) -> Answer:
    return answer(status, {"errors": [{"message": message}]}, **headers)


def unauthorized() -> Answer:
    return refusal(401, "The bearer token is missing, unknown or past its time.", WWW_Authenticate="Bearer")


def already_booked(booking: Json) -> Answer:
    return refusal(422, f"Booking already exists for this offer. INS number: {booking['id']}")


def any_status(status: int) -> Answer:
    if status < 200 or status in (204, 304):  # statuses without a body
        return Answer(status, b"", {})
    message = "This offer has expired." if status == 422 else f"The sandbox was asked to answer {status}."
    return refusal(status, message)


def invalid_job(job: Json) -> Answer | None:
    """The refusal of a body that is no valid confirm request; None for a valid one."""
    quotes, policyholder = job.get("quotes"), job.get("policyholder")
    if not isinstance(quotes, list) or not quotes:
        return refusal(400, "The body must be a JSON object with at least one quote.")
    names = ("first_name", "last_name", "country", "email")
    required = [("policyholder", policyholder, name) for name in names]
    required += [(f"quotes.{index}", item, "id") for index, item in enumerate(quotes)]
    errors = [
        {"field": f"{where}.{name}", "message": "This field is required."}
        for where, part, name in required
        if not isinstance(part, dict) or not part.get(name)
    ]
    return answer(422, {"errors": errors}) if errors else None
