"""Checks the settings: whether each is valid, and whether they fit together."""

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from worker.doctor.finding import Finding, safe_part
from worker.errors import SettingsError
from worker.settings import (
    NAMES,
    SECTIONS,
    RetentionSettings,
    Section,
    XoneSettings,
    names_in_environment,
    names_in_file,
    read,
)

CHECK = "settings"
COMPOSE_SETTINGS = ("RABBITMQ_PASSWORD", "POSTGRES_PASSWORD")
CONSUMER_TIMEOUT = 1800.0  # seconds; RabbitMQ's default limit on an unacknowledged delivery
MIN_DELETE_AFTER_DAYS = 7.0  # below it, a repeat of a job is likely to come after the deletion
CALLS_PER_DELIVERY = 4  # at most, of XONE_TIMEOUT each: token, confirm, and both again after a 401

Valid = TypeVar("Valid", bound=Section)


def valid(section: type[Valid]) -> Valid | None:
    """A section of the settings; None where one of its settings is missing or invalid."""
    try:
        return read(section)
    except SettingsError:
        return None


def check() -> Iterator[Finding]:
    problems = list(_problems())
    yield from problems
    yield from _misspelt()
    if not problems:
        given = {name for section in SECTIONS for name in read(section).model_fields_set}
        yield Finding.ok(CHECK, f"all {len(NAMES)} are valid; {len(given)} are set, the others at default")
    if (xone := valid(XoneSettings)) is not None:
        yield from _combinations(xone)
    if (retention := valid(RetentionSettings)) is not None:
        yield from _deletion(retention)


def _problems() -> Iterator[Finding]:
    for section in SECTIONS:
        try:
            read(section)
        except SettingsError as error:
            yield Finding.error(CHECK, str(error), _remedy(str(error)))


def _remedy(problem: str) -> str:
    if "DATA_KEYS" in problem:
        return "set DATA_KEYS; for a new system 'confirm-offer keygen' prints a key, else take the workers'"
    if "is not set" in problem and not Path(".env").exists():
        return "run this where the workers' .env is, or with their environment"
    return "set it in .env or the environment: docs/configuration.md"


def _misspelt() -> Iterator[Finding]:
    """Names that are nearly those of settings. In the environment other programs have theirs: they must be closer."""
    in_file = names_in_file()
    for names, place, cutoff in ((in_file, ".env", 0.8), (names_in_environment() - in_file, "the environment", 0.9)):
        for name in sorted(names - set(COMPOSE_SETTINGS)):
            close = get_close_matches(name.upper(), NAMES, n=1, cutoff=cutoff)
            if close and name.upper() not in NAMES:
                remedy = f"write {close[0]}, if that is what is meant"
                yield Finding.warning(CHECK, f"{safe_part(name)} in {place} is no setting", remedy)


def _combinations(xone: XoneSettings) -> Iterator[Finding]:
    if "XONE_CONNECT_TIMEOUT" in xone.model_fields_set and xone.XONE_CONNECT_TIMEOUT > xone.XONE_TIMEOUT:
        yield Finding.warning(
            "time-outs",
            f"XONE_CONNECT_TIMEOUT is {xone.XONE_CONNECT_TIMEOUT:g} s, but XONE_TIMEOUT ends the whole call "
            f"after {xone.XONE_TIMEOUT:g} s",
            "set XONE_CONNECT_TIMEOUT below XONE_TIMEOUT",
        )
    elif CALLS_PER_DELIVERY * xone.XONE_TIMEOUT > CONSUMER_TIMEOUT:
        yield Finding.warning(
            "time-outs",
            f"with XONE_TIMEOUT={xone.XONE_TIMEOUT:g} a job may be held for longer than RabbitMQ allows (30 min)",
            f"set XONE_TIMEOUT to {CONSUMER_TIMEOUT / CALLS_PER_DELIVERY:g} or less, "
            "or raise consumer_timeout of RabbitMQ",
        )
    else:
        yield Finding.ok("time-outs", f"{xone.XONE_TIMEOUT:g} s for a call, {xone.lease_seconds:g} s for a lease")
    if xone.is_plain_to_others:
        yield Finding.warning(
            "encryption",
            f"tokens and personal data go to {urlsplit(xone.XONE_BASE_URL).hostname} in clear",
            "set XONE_BASE_URL to one that begins with https:, and XONE_ALLOW_PLAIN_HTTP=off",
        )


def _deletion(retention: RetentionSettings) -> Iterator[Finding]:
    rows, personal = retention.DELETE_AFTER_DAYS, retention.RETENTION_DAYS
    if rows is not None and rows < MIN_DELETE_AFTER_DAYS:
        yield Finding.warning(
            "deletion",
            f"with DELETE_AFTER_DAYS={rows:g} a job that is published again after that is called again",
            "set it to longer than any checkout, person or backup may repeat a job",
        )
    elif rows is not None and personal is not None and personal >= rows:
        yield Finding.warning(
            "deletion",
            f"RETENTION_DAYS={personal:g} has no effect, for rows are deleted after {rows:g} days",
            "leave it out, or set it below DELETE_AFTER_DAYS",
        )
