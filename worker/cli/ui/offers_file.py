"""A file of offers: a line each, or CSV or JSON Lines with names."""

import csv
import json
from collections.abc import Iterable, Iterator
from io import StringIO
from typing import Any, BinaryIO

from models.job import is_path_id
from worker.cli.ui.console import UsageError
from worker.formatting import from_spreadsheet

Offer = tuple[str | None, str]  # partner (None: any) and offer id


def read_offers(file: BinaryIO) -> tuple[Offer, ...]:
    """The offers of a file, each once, in its order. Raises UsageError for a line that names none.

    The first line decides the form: JSON Lines if it begins with ``{``, CSV if it is a header with ``offer_id``, else
    ``OFFER``, ``PARTNER OFFER`` or ``PARTNER,OFFER``. Columns and keys other than ``partner_id`` and ``offer_id`` are
    ignored.
    """
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError("the file of offers is no UTF-8") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        return ()
    first = lines[0][1]
    if first.startswith("{"):
        named: Iterator[tuple[int, Any, Any]] = _of_json(lines)
    elif "offer_id" in _cells(first):
        named = _of_csv(text)
    else:
        named = _of_words(lines)
    return tuple(dict.fromkeys(_checked(*line) for line in named))


def _checked(number: int, partner: Any, offer: Any) -> Offer:
    if not is_path_id(offer) or not (is_path_id(partner) or not partner):
        raise UsageError(f"line {number} of the file of offers names no offer")
    return partner or None, offer


def _of_json(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Any, Any]]:
    for number, line in lines:
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise UsageError(f"line {number} of the file of offers is no JSON object")
        yield number, content.get("partner_id"), content.get("offer_id")


def _of_csv(text: str) -> Iterator[tuple[int, Any, Any]]:
    reader = csv.DictReader(StringIO(text, newline=""), skipinitialspace=True)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
    for row in reader:
        partner, offer = (from_spreadsheet((row.get(name) or "").strip()) for name in ("partner_id", "offer_id"))
        yield reader.line_num, partner, offer


def _of_words(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Any, Any]]:
    for number, line in lines:
        *partner, offer = line.replace(",", " ").split() or [""]
        yield number, " ".join(partner), offer


def _cells(header: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([header], skipinitialspace=True))]
