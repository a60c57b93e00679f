"""What the doctor finds: how bad it is, what it is, what to do."""

import re
from collections.abc import Iterator
from enum import StrEnum
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple

LIMIT = 10.0  # seconds for one check


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    WRONG = "wrong"


class Finding(NamedTuple):
    """check: what was looked at; found, mend: for people, free of secrets and personal data."""

    check: str
    level: Level
    found: str
    mend: str | None = None


def ok(check: str, found: str) -> Finding:
    return Finding(check, Level.OK, found)


def warning(check: str, found: str, mend: str) -> Finding:
    """It works, but should be looked at."""
    return Finding(check, Level.WARNING, found, mend)


def wrong(check: str, found: str, mend: str) -> Finding:
    """A worker can't do its work so."""
    return Finding(check, Level.WRONG, found, mend)


def bounded(check: str, findings: Iterator[Finding], seconds: float = LIMIT) -> Iterator[Finding]:
    """Findings as they come, each within ``seconds``. They are made in a thread, which is left where it hangs."""
    told: SimpleQueue[Finding | None] = SimpleQueue()

    def look() -> None:
        try:
            for finding in findings:
                told.put(finding)
        except Exception as error:
            told.put(wrong(check, f"it can't be checked ({type(error).__name__})", "look at the server's own log"))
        finally:
            told.put(None)

    Thread(target=look, name=f"doctor-{check}", daemon=True).start()
    try:
        while (finding := told.get(timeout=seconds)) is not None:
            yield finding
    except Empty:
        yield wrong(check, f"no answer within {seconds:g} s", "see whether the server hangs: its own log, its load")


def plain(part: str | None) -> str:
    """A part of a URL for people. A URL that is not written right may have a piece of its password there."""
    return part if part and re.fullmatch(r"[\w.:/\[\]-]{1,64}", part) else "…"
