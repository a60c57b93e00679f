"""Are the settings there, and do they fit together?"""

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from worker.doctor.finding import Finding, ok, warning, wrong
from worker.errors import SettingsError
from worker.settings import NAMES, SECTIONS, Section, XoneSettings, names_in_file, read

CHECK = "settings"
FOR_COMPOSE = ("RABBITMQ_PASSWORD", "POSTGRES_PASSWORD")
CONSUMER_TIMEOUT = 1800.0  # seconds that RabbitMQ by default lets a delivery be held
CALLS = 4  # of XONE_TIMEOUT each, that one delivery may be held for: token, confirm, both again after a 401

Valid = TypeVar("Valid", bound=Section)


def valid(section: type[Valid]) -> Valid | None:
    """A section; None where something in it is missing or wrong."""
    try:
        return read(section)
    except SettingsError:
        return None


def look() -> Iterator[Finding]:
    problems = list(_problems())
    yield from problems
    yield from _unknown()
    if not problems:
        given = {name for section in SECTIONS for name in read(section).model_fields_set}
        yield ok(CHECK, f"all {len(NAMES)} are valid; {len(given)} are set, the others at default")
    if (xone := valid(XoneSettings)) is not None:
        yield from _fit(xone)


def _problems() -> Iterator[Finding]:
    for section in SECTIONS:
        try:
            read(section)
        except SettingsError as error:
            yield wrong(CHECK, str(error), _mend(str(error)))


def _mend(problem: str) -> str:
    if "DATA_KEYS" in problem:
        return "set DATA_KEYS; for a new system 'confirm-offer keygen' prints a key, else take the workers'"
    if "is not set" in problem and not Path(".env").exists():
        return "run this where the workers' .env is, or with their environment"
    return "set it in .env or the environment: docs/configuration.md"


def _unknown() -> Iterator[Finding]:
    for name in sorted(names_in_file() - set(NAMES) - set(FOR_COMPOSE)):
        meant = get_close_matches(name.upper(), NAMES, n=1, cutoff=0.8)
        if meant:
            yield warning(CHECK, f"{name} in .env is no setting", f"write {meant[0]}, if that is what is meant")


def _fit(xone: XoneSettings) -> Iterator[Finding]:
    if "XONE_CONNECT_TIMEOUT" in xone.model_fields_set and xone.XONE_CONNECT_TIMEOUT > xone.XONE_TIMEOUT:
        yield warning(
            "time-outs",
            f"XONE_CONNECT_TIMEOUT is {xone.XONE_CONNECT_TIMEOUT:g} s, but XONE_TIMEOUT ends the whole call "
            f"after {xone.XONE_TIMEOUT:g} s",
            "set XONE_CONNECT_TIMEOUT below XONE_TIMEOUT",
        )
    elif CALLS * xone.XONE_TIMEOUT > CONSUMER_TIMEOUT:
        yield warning(
            "time-outs",
            f"with XONE_TIMEOUT={xone.XONE_TIMEOUT:g} a job may be held for longer than RabbitMQ allows (30 min)",
            f"set XONE_TIMEOUT to {CONSUMER_TIMEOUT / CALLS:g} or less, or raise consumer_timeout of RabbitMQ",
        )
    else:
        yield ok("time-outs", f"{xone.XONE_TIMEOUT:g} s for a call, {xone.lease_seconds:g} s for a lease")
    if xone.is_plain_to_others:
        yield warning(
            "encryption",
            f"tokens and personal data go to {urlsplit(xone.XONE_BASE_URL).hostname} in clear",
            "set XONE_BASE_URL to one that begins with https:, and XONE_ALLOW_PLAIN_HTTP=off",
        )
