"""Shows jobs without personal data: ids, and the structure with its values replaced. Prepares bodies for an editor."""

import json
import re
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from models.job import KNOWN_KEYS, MAX_BYTES, MAX_DEPTH, Label, is_path_id

MAX_READ = 4 * MAX_BYTES  # longer bodies are not read at all

_label = TypeAdapter(Label, config=ConfigDict(regex_engine="python-re"))


@dataclass(frozen=True)
class Ids:
    """Ids of a job. Each is None unless it has a valid form, as any other text could be personal data."""

    partner_id: str | None = None
    offer_id: str | None = None
    order_reference: str | None = None


def ids_of(body: bytes) -> Ids:
    return _ids(_content(body))


def masked(body: bytes) -> Any:
    """The structure of a job with all values but its ids replaced; None where the body is no JSON, or too large."""
    content = _content(body)
    if content is None:
        return None
    ids = {name: value for name, value in vars(_ids(content)).items() if value is not None}
    result = _masked(content)
    if isinstance(result, dict):
        result.update((name, ids[name]) for name in result.keys() & ids.keys())
    return result


def _content(body: bytes) -> Any:
    """The JSON of a body, whether or not it is a job; None where it is no JSON, or too large."""
    if len(body) > MAX_READ:
        return None
    try:
        return json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _ids(content: Any) -> Ids:
    if not isinstance(content, dict):
        return Ids()
    partner, offer, order = (content.get(name) for name in ("partner_id", "offer_id", "order_reference"))
    return Ids(
        partner if is_path_id(partner) else None,
        offer if is_path_id(offer) else None,
        order if _is_label(order) else None,
    )


def _is_label(value: Any) -> bool:
    try:
        _label.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _masked(content: Any, depth: int = 0) -> Any:
    if depth >= MAX_DEPTH:
        return "<deeper>"
    match content:
        case dict():
            result: dict[str, Any] = {}
            for key, value in content.items():
                result[_masked_key(key, result)] = _masked(value, depth + 1)
            return result
        case list():
            return [_masked(item, depth + 1) for item in content]
        case None:
            return None
        case bool():
            return "<true or false>"
        case int() | float():
            return "<number>"
        case _:
            return "<text>" if content else "<empty text>"


def _masked_key(key: str, siblings: dict[str, Any]) -> str:
    """An unknown key may hold personal data: it is replaced, by a name that is unique among its siblings."""
    if key in KNOWN_KEYS:
        return key
    number = sum(1 for other in siblings if other.startswith("<key")) + 1
    return "<key>" if number == 1 else f"<key {number}>"


def for_editor(body: bytes) -> bytes:
    """The body indented, if indenting changes only white space; else the body itself.

    It stays unchanged where a key stands twice, or a number would be written in another form.
    """
    try:
        content = json.loads(
            body,
            object_pairs_hook=_unchanged_object,
            parse_float=_unchanged_float,
            parse_int=_unchanged_int,
            parse_constant=_no_constant,
        )
        return json.dumps(content, ensure_ascii=False, indent=2).encode() + b"\n"
    except (ValueError, RecursionError):
        return body


def _unchanged_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("the same key twice")
    return dict(pairs)


def _unchanged_float(text: str) -> float:
    if repr(float(text)) != text:
        raise ValueError("would be written otherwise")
    return float(text)


def _unchanged_int(text: str) -> int:
    if not re.fullmatch(r"-?[1-9][0-9]{0,300}|0", text):
        raise ValueError("would be written otherwise")
    return int(text)


def _no_constant(text: str) -> float:
    raise ValueError(text)
