"""A finding of the doctor: what was checked, how bad it is, what it is, what to do about it."""

import re
from collections.abc import Iterator
from enum import StrEnum
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple, Self

TIMEOUT = 10.0  # seconds for one check


class Level(StrEnum):
    """The values are printed, and public in --json."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "wrong"


class Finding(NamedTuple):
    """message and remedy are for people, and free of secrets and personal data."""

    check: str
    level: Level
    message: str
    remedy: str | None = None

    @classmethod
    def ok(cls, check: str, message: str) -> Self:
        return cls(check, Level.OK, message)

    @classmethod
    def warning(cls, check: str, message: str, remedy: str) -> Self:
        """Workers can work, but somebody should look at it."""
        return cls(check, Level.WARNING, message, remedy)

    @classmethod
    def error(cls, check: str, message: str, remedy: str) -> Self:
        """Workers can't work."""
        return cls(check, Level.ERROR, message, remedy)

    def as_json(self) -> dict[str, str | None]:
        """Under the public names of ``confirm-offer doctor --json``."""
        return {"check": self.check, "level": self.level, "found": self.message, "mend": self.remedy}


def with_timeout(check: str, findings: Iterator[Finding], seconds: float = TIMEOUT) -> Iterator[Finding]:
    """Yields findings as they come, each within ``seconds``; a check that takes longer ends with an error.

    The checks run in a thread of their own. A thread that hangs is abandoned.
    """
    results: SimpleQueue[Finding | None] = SimpleQueue()

    def run() -> None:
        try:
            for finding in findings:
                results.put(finding)
        except Exception as error:
            message = f"it can't be checked ({type(error).__name__})"
            results.put(Finding.error(check, message, "look at the server's own log"))
        finally:
            results.put(None)

    Thread(target=run, name=f"doctor-{check}", daemon=True).start()
    try:
        while (finding := results.get(timeout=seconds)) is not None:
            yield finding
    except Empty:
        remedy = "see whether the server hangs: its own log, its load"
        yield Finding.error(check, f"no answer within {seconds:g} s", remedy)


def safe_part(part: str | None) -> str:
    """A part of a URL for display, or "…": in a malformed URL, a piece of the password may stand in any part."""
    return part if part and re.fullmatch(r"[\w.:/\[\]-]{1,64}", part) else "…"
