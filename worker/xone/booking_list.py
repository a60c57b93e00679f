"""A list of bookings as a stream: however long it is, no more than one booking and one piece of it are in memory.

The list is ``{"data": [booking, …]}``, ``{"results": [booking, …]}``, or only ``[booking, …]``. A page of it may name
the next one, as ``links.next`` or as ``next``.

The standard library reads one value at a time, with the rules of ``read_exact``. A parser of streams is no faster, and
has rules of its own for odd numbers and texts.
"""

import codecs
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from models.exact_json import read_exact_at
from worker.errors import Unknown

LISTS = frozenset({"data", "results"})  # keys of the list
MAX_LISTED = 1024 * 1024  # characters of a booking, and of anything else in a page: twice what can be stored
MIN_PIECE = 64 * 1024  # characters, so that a booking that is cut is not read again for each packet
WHITESPACE = " \t\r\n"
DELIMITERS = frozenset(",]}" + WHITESPACE)

Listed = dict[str, Any]


def read_page(chunks: Iterable[bytes]) -> Generator[Listed, None, Any]:
    """Yields the bookings of a page, and returns what it names as the next one; None if it names none.

    chunks: the body. Raises Unknown where it stops being a list of bookings.
    """
    try:
        return (yield from _Page(chunks).read())
    except (ValueError, RecursionError):
        raise Unknown("bad-answer", "the list of bookings is not as expected", 200) from None


class _Page:
    """JSON of which only the part is in memory that is being read."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogatepass").decode
        self._text, self._at = "", 0
        self._has_ended = False

    def read(self) -> Generator[Listed, None, Any]:
        following = None
        if self._next() == "[":
            yield from self._bookings()
        else:
            has_list = False
            for key in self._keys():
                if key in LISTS:
                    has_list = True
                    yield from self._bookings()
                else:
                    value = self._value()
                    if key == "links":
                        value = value.get("next") if isinstance(value, dict) else None
                    if key in ("links", "next"):
                        following = following or value
            if not has_list:
                raise ValueError("no list")
        if self._next():
            raise ValueError("more than one value")
        return following

    def _bookings(self) -> Iterator[Listed]:
        self._take("[")
        if self._next() != "]":
            yield from self._booking()
            while self._next() == ",":
                self._take(",")
                yield from self._booking()
        self._take("]")

    def _booking(self) -> Iterator[Listed]:
        value = self._value()
        if isinstance(value, dict):
            yield value

    def _keys(self) -> Iterator[str]:
        """The keys of an object. Whoever asks for them reads the value of each."""
        self._take("{")
        if self._next() != "}":
            yield self._key()
            while self._next() == ",":
                self._take(",")
                yield self._key()
        self._take("}")

    def _key(self) -> str:
        key = self._value()
        if not isinstance(key, str):
            raise ValueError("a key is no text")
        self._take(":")
        return key

    def _next(self) -> str:
        """The next character that is no white space, which is not taken; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in WHITESPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._read_on():
                return ""

    def _take(self, expected: str) -> None:
        if self._next() != expected:
            raise ValueError(f"no {expected}")
        self._at += 1

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = read_exact_at(self._text, self._at)
            except ValueError:
                if not self._read_on():
                    raise
                continue
            has_ended = self._text[end - 1] in '"]}' or self._text[end : end + 1] in DELIMITERS  # a number may go on
            if has_ended or not self._read_on():
                self._at = end
                return value

    def _read_on(self) -> bool:
        """Reads the next piece. Returns whether there was one."""
        pieces, length = [self._text[self._at :]], 0
        if len(pieces[0]) > MAX_LISTED:
            raise Unknown("too-large", f"the list of bookings holds one of more than {MAX_LISTED // 1024} KiB", 200)
        while length < MIN_PIECE and not self._has_ended:
            chunk = next(self._chunks, None)
            self._has_ended = chunk is None
            pieces.append(self._decode(chunk or b"", final=self._has_ended))
            length += len(pieces[-1])
        self._text, self._at = "".join(pieces), 0
        return length > 0
