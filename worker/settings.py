"""Settings, read from the environment and a ``.env`` file in the working folder. The only place that reads them.

They come in sections, so that a command asks only for what it uses: ``read(DatabaseSettings)``.
"""

import re
import ssl
from functools import cached_property
from importlib.metadata import version
from ipaddress import ip_address
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import parse_qsl, urlsplit

from dotenv import dotenv_values
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict
from sentry_sdk.utils import Dsn
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from worker.errors import SettingsError


class Section(BaseSettings):
    """What is set together. The text below a setting is its description in docs/configuration.md."""

    model_config = SettingsConfigDict(
        env_file=".env", extra="ignore", frozen=True, hide_input_in_errors=True, use_attribute_docstrings=True
    )


SectionType = TypeVar("SectionType", bound=Section)


def read(section: type[SectionType], **given: Any) -> SectionType:
    """A section of the settings; ``given`` (from the command line) goes before the environment.

    Raises SettingsError with one line that names what is missing or wrong, and holds no value.
    """
    try:
        return section(**given)
    except ValidationError as error:
        raise SettingsError("; ".join(_problem(dict(problem)) for problem in error.errors())) from None


def _problem(problem: dict[str, Any]) -> str:
    name = ".".join(str(step) for step in problem["loc"])
    if problem["type"] == "missing":
        return f"{name} is not set"
    if problem["type"] in ("string_too_short", "too_short"):
        return f"{name} is empty"
    message = re.sub(r"^(Value error|Assertion failed), ", "", problem["msg"])
    return f"{name}: {message[0].lower()}{message[1:]}" if name else message


def _none_if_empty(value: Any) -> Any:
    return None if value == "" else value


def _url_with(*schemes: str) -> AfterValidator:
    def check(value: SecretStr) -> SecretStr:
        scheme = value.get_secret_value().split(":", 1)[0]
        if scheme not in schemes:
            raise ValueError(f"should begin with {' or '.join(f'{scheme}:' for scheme in schemes)}")
        return value

    return AfterValidator(check)


def _is_url(url: str) -> bool:
    """Whether its host and port can be read."""
    try:
        urlsplit(url).port  # noqa: B018 - raises where it is none
    except ValueError:
        return False
    return True


def _base_url(value: str) -> str:
    if not re.fullmatch(r"https?://[^/?#\s]+[^?#\s]*", value) or not _is_url(value):
        raise ValueError("should be a URL such as https://api.xone.xcover.com, without query")
    return value


def _broker_url(value: SecretStr) -> SecretStr:
    if not all(_is_url(url) for url in value.get_secret_value().split(";")):
        raise ValueError(
            "should be amqp://user:password@host:port/vhost, with letters that mean something in a URL percent-encoded"
        )
    return value


def _broker_tls(value: SecretStr) -> SecretStr:
    url = value.get_secret_value()
    options = dict(parse_qsl(url.partition("?")[2], keep_blank_values=True))
    if "amqps:" not in url:
        if any(name.startswith("ssl") for name in options):
            raise ValueError("should begin with amqps: where it has options of TLS")
        return value
    if ";" in url:
        raise ValueError("should name one broker where it begins with amqps:")
    if options.keys() - {"ssl_ca_certs"}:
        raise ValueError("should have no option but ssl_ca_certs; certificates are always verified")
    if "ssl_ca_certs" in options:
        try:
            ssl.create_default_context(cafile=options["ssl_ca_certs"])
        except OSError:
            raise ValueError("ssl_ca_certs should be a file of certificates (PEM)") from None
    return value


def _database_url(value: SecretStr) -> SecretStr:
    try:
        url = make_url(value.get_secret_value())
    except (ArgumentError, ValueError):
        raise ValueError("should be a database URL, such as postgresql+psycopg://host/database") from None
    if url.drivername not in ("postgresql", "postgresql+psycopg", "sqlite"):
        raise ValueError("should be a PostgreSQL or SQLite URL, with no other driver than psycopg")
    if url.drivername == "sqlite" and url.database in (None, "", ":memory:"):
        raise ValueError("should name a file, such as sqlite:///confirm-offer.db")
    return value


def _data_keys(value: SecretStr) -> SecretStr:
    for key in value.get_secret_value().split(","):
        if not re.fullmatch(r"[A-Za-z0-9_-]{43}=", key.strip()):  # Fernet itself overlooks what stands behind the =
            raise ValueError("should be Fernet keys, separated by commas ('confirm-offer keygen' prints one)")
    return value


def _sentry_dsn(value: SecretStr | None) -> SecretStr | None:
    if value is not None:
        try:
            Dsn(value.get_secret_value())
        except ValueError:
            raise ValueError("should be a DSN of Sentry, such as https://key@host/1") from None
    return value


def _is_to_loopback(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _path_with(*names: str) -> AfterValidator:
    def check(value: str) -> str:
        held = {name for _, name, _, _ in Formatter().parse(value) if name is not None}
        if value and (not value.startswith("/") or held != set(names)):
            places = " and ".join(f"{{{name}}}" for name in names)
            raise ValueError(f"should be a path that begins with / and holds {places or 'no {}'}")
        return value

    return AfterValidator(check)


class BrokerSettings(Section):
    """RabbitMQ"""

    BROKER_URL: Annotated[
        SecretStr,
        _url_with("amqp", "amqps", "pyamqp", "memory"),
        AfterValidator(_broker_url),
        AfterValidator(_broker_tls),
    ] = SecretStr("amqp://guest:guest@localhost:5672//")
    """`amqp://user:password@host:5672/vhost`, or `amqps:` for [TLS](tls.md). Letters that mean something in a
    URL are percent-encoded."""

    @property
    def url(self) -> str:
        return self.BROKER_URL.get_secret_value()


class DatabaseSettings(Section):
    """Database"""

    DATABASE_URL: Annotated[SecretStr, AfterValidator(_database_url)] = SecretStr(
        "postgresql+psycopg://localhost/confirm_offer"
    )
    """PostgreSQL, or `sqlite:///file.db` for one machine."""

    @property
    def url(self) -> str:
        return self.DATABASE_URL.get_secret_value()


class VaultSettings(Section):
    """Personal data"""

    DATA_KEYS: Annotated[SecretStr, AfterValidator(_data_keys)]
    """Fernet keys, separated by commas: the first encrypts, all decrypt. `confirm-offer keygen` prints one."""

    @property
    def keys(self) -> list[str]:
        """The first encrypts, all decrypt."""
        return [key.strip() for key in self.DATA_KEYS.get_secret_value().split(",")]


class StatusSettings(Section):
    """XONE"""

    XONE_CONFIRMED_STATUSES: str = "CONFIRMED,ACTIVE"
    """Statuses, separated by commas, that make a booking `booking.confirmed`; any other makes it `booking.pending`.
    Case does not count."""

    @cached_property
    def confirmed_statuses(self) -> frozenset[str]:
        """In capitals."""
        statuses = (status.strip().upper() for status in self.XONE_CONFIRMED_STATUSES.split(","))
        return frozenset(status for status in statuses if status)


class XoneSettings(StatusSettings):
    """XONE"""

    XONE_BASE_URL: Annotated[str, AfterValidator(_base_url)] = "https://api.xone.xcover.com"
    """Where XONE is."""
    XONE_ALLOW_PLAIN_HTTP: Literal["on", "off"] = "off"
    """`on`: `XONE_BASE_URL` may begin with `http:` also where it is not this machine. Tokens and personal data then go
    in clear."""
    XONE_TOKEN_PATH: Annotated[str, Field(min_length=1), _path_with()] = "/api/oauth/token"  # noqa: S105 - a path
    """Where a token is asked for."""
    XONE_CONFIRM_PATH: Annotated[str, Field(min_length=1), _path_with("partner_id", "offer_id")] = (
        "/api/partners/{partner_id}/offers/{offer_id}"
    )
    """Where an offer is confirmed."""
    XONE_BOOKINGS_PATH: Annotated[str, _path_with("partner_id")] = "/api/partners/{partner_id}/bookings"
    """The list of bookings, read where a booking may exist already. Empty: never read."""
    XONE_CLIENT_ID: Annotated[str, Field(min_length=1)]
    """Of the OAuth client that XONE knows."""
    XONE_CLIENT_SECRET: Annotated[SecretStr, Field(min_length=1)]
    """Its secret."""
    XONE_CONNECT_TIMEOUT: Annotated[PositiveFloat, Field(le=600)] = 5
    """Seconds until a connection stands."""
    XONE_TIMEOUT: Annotated[PositiveFloat, Field(le=600)] = 30
    """Seconds for a whole call, the body included. A lease runs half as long again, and at least 5 s longer."""
    XONE_AFTER_UNKNOWN: Literal["resend", "review"] = "resend"
    """What follows an unknown answer: `resend` (read back first, then the same request with the same key), or `review`
    (read back, else `needs_review`; never a second call)."""
    XONE_RATE_LIMIT: Annotated[PositiveFloat | None, BeforeValidator(_none_if_empty)] = None
    """Calls a second over all workers together, shared through the database. Empty: no limit."""

    @model_validator(mode="after")
    def _https_to_others(self) -> "XoneSettings":
        if self.is_plain_to_others and self.XONE_ALLOW_PLAIN_HTTP == "off":
            raise ValueError("XONE_BASE_URL should begin with https: (XONE_ALLOW_PLAIN_HTTP=on allows http:)")
        return self

    @property
    def is_plain_to_others(self) -> bool:
        """Whether tokens and personal data cross a network in clear."""
        return self.XONE_BASE_URL.startswith("http:") and not _is_to_loopback(self.XONE_BASE_URL)

    @property
    def lease(self) -> float:
        """Seconds that a lease runs: one call with room to spare. Renewed before a call where too little is left."""
        return self.XONE_TIMEOUT + max(5.0, self.XONE_TIMEOUT / 2)


class RetrySettings(Section):
    """Retries"""

    RETRY_MAX_ATTEMPTS: PositiveInt = 12
    """Attempts, of which the last ends the retries."""
    RETRY_MAX_AGE: PositiveFloat = 86400
    """Seconds since the job was accepted, after which there is no further attempt."""
    RETRY_BASE_DELAY: PositiveFloat = 2
    """Seconds; the pause after the n-th attempt lies between this and this times 2^n."""
    RETRY_MAX_DELAY: PositiveFloat = 300
    """Seconds that a pause lasts at most."""

    @model_validator(mode="after")
    def _base_below_max(self) -> "RetrySettings":
        if self.RETRY_BASE_DELAY > self.RETRY_MAX_DELAY:
            raise ValueError("RETRY_BASE_DELAY should not exceed RETRY_MAX_DELAY")
        return self


class EventSettings(Section):
    """Events"""

    EVENT_LINKS: Literal["on", "off"] = "off"
    """`on`: booking events carry the customer's links (`coi`, `account_url`, `fnol_link`, `sign_up_url`), which may
    hold a token."""


class RetentionSettings(Section):
    """Personal data"""

    RETENTION_DAYS: Annotated[PositiveFloat | None, Field(le=36500), BeforeValidator(_none_if_empty)] = None
    """Days after which workers blank the personal data of a confirmation that has ended. Empty: never."""


class LogSettings(Section):
    """Logs"""

    LOG_LEVEL: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The least that is logged, to standard error."""
    LOG_FORMAT: Literal["json", "console"] = "json"
    """`console` is for people."""


class SentrySettings(Section):
    """Sentry"""

    SENTRY_DSN: Annotated[SecretStr | None, BeforeValidator(_none_if_empty), AfterValidator(_sentry_dsn)] = None
    """Where defects are reported. Empty: nowhere."""
    SENTRY_ENVIRONMENT: Annotated[str, Field(pattern=r"^[^\s/]{1,64}$")] = "production"
    """What the reports are filed under."""
    SENTRY_RELEASE: Annotated[str | None, Field(pattern=r"^[^\s/\\]{1,200}$"), BeforeValidator(_none_if_empty)] = None
    """Empty: `confirm-offer@<version>`."""
    SENTRY_TRACES_SAMPLE_RATE: Annotated[float, Field(ge=0, le=1)] = 0
    """Share of tasks that are sent as transactions."""
    SENTRY_CRON_MONITOR: Annotated[
        str | None, Field(pattern=r"^[a-z0-9_-]{1,50}$"), BeforeValidator(_none_if_empty)
    ] = None
    """Slug of a monitor that hears of the Scheduler once a minute. Empty: none does."""

    @property
    def dsn(self) -> str | None:
        return self.SENTRY_DSN.get_secret_value() if self.SENTRY_DSN else None

    @property
    def release(self) -> str:
        return self.SENTRY_RELEASE or f"confirm-offer@{version('confirm-offer')}"


_CollectorUrl = Annotated[str | None, Field(pattern=r"^https?://[^/?#\s]+\S*$"), BeforeValidator(_none_if_empty)]


class TracingSettings(Section):
    """Tracing"""

    # Of OpenTelemetry's own variables those that are read here; its SDK reads others from the environment itself.
    OTEL_SDK_DISABLED: str = "false"
    """`true` switches tracing off."""
    OTEL_SERVICE_NAME: Annotated[str | None, BeforeValidator(_none_if_empty)] = None
    """What traces are filed under. Empty: `confirm-offer`."""
    OTEL_TRACES_EXPORTER: str = "otlp"
    """`none` switches tracing off."""
    OTEL_EXPORTER_OTLP_ENDPOINT: _CollectorUrl = None
    """A collector of traces, such as `http://collector:4318`; needs `confirm-offer[tracing]`. Empty: no tracing."""
    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT: _CollectorUrl = None
    """The whole address, in place of the one above with `/v1/traces`."""
    OTEL_EXPORTER_OTLP_PROTOCOL: str = ""
    """`http/protobuf` is what there is."""
    OTEL_EXPORTER_OTLP_TRACES_PROTOCOL: str = ""
    """In place of the one above."""

    @property
    def endpoint(self) -> str | None:
        """Where spans are sent; None where tracing is off."""
        if self.OTEL_SDK_DISABLED.strip().lower() == "true" or self.OTEL_TRACES_EXPORTER not in ("otlp", ""):
            return None
        if self.OTEL_EXPORTER_OTLP_TRACES_ENDPOINT:
            return self.OTEL_EXPORTER_OTLP_TRACES_ENDPOINT
        base = self.OTEL_EXPORTER_OTLP_ENDPOINT
        return f"{base.rstrip('/')}/v1/traces" if base else None

    @property
    def protocol(self) -> str:
        return self.OTEL_EXPORTER_OTLP_TRACES_PROTOCOL or self.OTEL_EXPORTER_OTLP_PROTOCOL or "http/protobuf"


class WorkerSettings(Section):
    """Worker"""

    WORKER_CONCURRENCY: Annotated[PositiveInt, Field(le=2000)] = 64
    """Calls in flight in one worker."""
    WORKER_POOL: Literal["threads", "prefork", "gevent"] = "threads"
    """`gevent` has greenlets in place of `threads`, and needs `confirm-offer[gevent]`. `prefork` has one process for
    each call in flight."""
    WORKER_ONE_CORE: Literal["on", "off"] = "on"
    """With `threads`, all threads of a worker stay on one core, and move together to another one where others need it
    too. `off` leaves them to the kernel, which spreads them: a call then takes more than half as much CPU again."""
    WORKER_PARTS: str = "tasks,scheduler,relay"
    """The parts that this process runs: some of `tasks`, `scheduler`, `relay`. Each must run somewhere."""
    METRICS_PORT: Annotated[int | None, Field(ge=0, le=65535), BeforeValidator(_none_if_empty)] = None
    """Serves metrics for Prometheus at `/metrics`, on all addresses. Each worker of a machine needs its own.
    Empty: none."""
    PROMETHEUS_MULTIPROC_DIR: Annotated[Path | None, BeforeValidator(_none_if_empty)] = None
    """With prefork, the folder for files that its processes share. Empty: in the folder for temporary files."""

    @cached_property
    def parts(self) -> frozenset[str]:
        """Which of ``tasks``, ``scheduler`` and ``relay`` this process runs."""
        return frozenset(part.strip() for part in self.WORKER_PARTS.split(","))

    @model_validator(mode="after")
    def _known_parts(self) -> "WorkerSettings":
        if not self.parts or self.parts - {"tasks", "scheduler", "relay"}:
            raise ValueError("WORKER_PARTS should be some of tasks,scheduler,relay")
        return self


SECTIONS: tuple[type[Section], ...] = (
    BrokerSettings,
    DatabaseSettings,
    XoneSettings,
    RetrySettings,
    WorkerSettings,
    EventSettings,
    VaultSettings,
    RetentionSettings,
    LogSettings,
    SentrySettings,
    TracingSettings,
)
NAMES = tuple(name for section in SECTIONS for name in section.model_fields)


def names_in_file() -> set[str]:
    """The names that stand in ``.env``, whether they are settings or not."""
    return set(dotenv_values(".env"))
