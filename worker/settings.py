"""Settings, from the environment and a ``.env`` file in the working folder. No other module reads them.

They come in sections, so that a command needs only the settings that it uses: ``read(DatabaseSettings)``.
"""

import os
import re
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

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

from models.states import BookingStatuses
from worker.errors import SettingsError
from worker.setting_types import (
    CollectorUrl,
    base_url,
    broker_options,
    broker_url,
    data_keys,
    database_url,
    is_to_loopback,
    none_if_empty,
    one_line,
    path_with,
    person,
    sentry_dsn,
    url_with,
)

_FROM_FILES = frozenset(
    {"XONE_CLIENT_ID", "XONE_CLIENT_SECRET", "DATA_KEYS", "BROKER_URL", "DATABASE_URL", "SENTRY_DSN"}
)  # settings whose values often come from files


class Section(BaseSettings):
    """A group of settings. The text below a setting is its description in docs/configuration.md."""

    model_config = SettingsConfigDict(
        env_file=".env", extra="ignore", frozen=True, allow_inf_nan=False, hide_input_in_errors=True, defer_build=True
    )

    @model_validator(mode="before")
    @classmethod
    def _without_line_ends(cls, values: Any) -> Any:
        """Strips line ends around secrets and what comes with them: a file that ``echo`` wrote ends with one."""
        if not isinstance(values, dict):
            return values
        from_files = {
            name: value.strip("\r\n")
            for name, value in values.items()
            if name in _FROM_FILES and isinstance(value, str)
        }
        return {**values, **from_files}


SectionType = TypeVar("SectionType", bound=Section)


def read(section: type[SectionType], **given: Any) -> SectionType:
    """Reads a section of the settings. ``given``, from the command line, goes before the environment.

    Raises SettingsError with one line that names what is missing or wrong, and contains no value.
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


class BrokerSettings(Section):
    """RabbitMQ"""

    BROKER_URL: Annotated[
        SecretStr,
        AfterValidator(one_line),
        url_with("amqp", "amqps", "pyamqp", "memory"),
        AfterValidator(broker_url),
        AfterValidator(broker_options),
    ] = SecretStr("amqp://guest:guest@localhost:5672//")
    """`amqp://user:password@host:5672/vhost`, or `amqps:` for [TLS](tls.md). Characters with a meaning in a URL are
    percent-encoded. For a cluster, the URLs of its nodes, separated by semicolons: each worker begins with another, and
    goes on with the next if one is down or silent."""

    @property
    def url(self) -> str:
        return self.BROKER_URL.get_secret_value()


class DatabaseSettings(Section):
    """Database"""

    DATABASE_URL: Annotated[SecretStr, AfterValidator(one_line), AfterValidator(database_url)] = SecretStr(
        "postgresql+psycopg://localhost/confirm_offer"
    )
    """PostgreSQL, or `sqlite:///file.db` for one machine. Options of libpq (`?sslmode=verify-full`,
    `?options=-csearch_path%3Dapp`, `connect_timeout`, …), its form for several hosts
    (`//user@h1:5432,h2:5432/database?target_session_attrs=read-write`) and its environment variables hold; where they
    say nothing, connecting may take 5 s, and a machine that is silent for 30 s is gone. Workers set
    `lock_timeout` (3 s), `statement_timeout` and `idle_in_transaction_session_timeout` (30 s), unless this URL,
    the role or the database does. SQLite knows the option `timeout`, in seconds."""

    @property
    def url(self) -> str:
        return self.DATABASE_URL.get_secret_value()


class EncryptionSettings(Section):
    """Personal data"""

    DATA_KEYS: Annotated[SecretStr, AfterValidator(data_keys)]
    """Fernet keys, separated by commas: the first encrypts, all decrypt. `confirm-offer keygen` prints one."""

    @property
    def keys(self) -> list[str]:
        """The first encrypts, all decrypt."""
        return [key.strip() for key in self.DATA_KEYS.get_secret_value().split(",")]


def _capitals(listed: str) -> frozenset[str]:
    return frozenset(status.strip().upper() for status in listed.split(",") if status.strip())


class StatusSettings(Section):
    """XONE"""

    XONE_CONFIRMED_STATUSES: str = "CONFIRMED,ACTIVE"
    """Statuses, separated by commas, that make a booking `booking.confirmed`. Case does not count. A status of neither
    list makes it `booking.pending`."""
    XONE_CANCELLED_STATUSES: str = "CANCELLED,DELETED,FAILED,REJECTED,VOID"
    """Statuses that end a booking without cover: `booking.cancelled`."""

    @model_validator(mode="after")
    def _statuses_differ(self) -> Self:
        if both := self.booking_statuses.confirmed & self.booking_statuses.cancelled:
            raise ValueError(f"XONE_CONFIRMED_STATUSES and XONE_CANCELLED_STATUSES both hold {min(both)}")
        return self

    @cached_property
    def booking_statuses(self) -> BookingStatuses:
        return BookingStatuses(_capitals(self.XONE_CONFIRMED_STATUSES), _capitals(self.XONE_CANCELLED_STATUSES))


class XoneSettings(StatusSettings):
    """XONE"""

    XONE_BASE_URL: Annotated[str, AfterValidator(base_url)] = "https://api.xone.xcover.com"
    """URL of XONE."""
    XONE_ALLOW_PLAIN_HTTP: Literal["on", "off"] = "off"
    """`on`: `XONE_BASE_URL` may begin with `http:` even if it is another machine. Tokens and personal data then cross
    the network unencrypted."""
    XONE_TOKEN_PATH: Annotated[str, Field(min_length=1), path_with()] = "/api/oauth/token"  # noqa: S105 - a path
    """Path that tokens are requested from."""
    XONE_CONFIRM_PATH: Annotated[str, Field(min_length=1), path_with("partner_id", "offer_id")] = (
        "/api/partners/{partner_id}/offers/{offer_id}"
    )
    """Path that confirms an offer. On XONE's newer public page it is
    `/api/partners/{partner_id}/offers/{offer_id}/confirm`. With the wrong one XONE answers 404 or 405 to every offer:
    until one was confirmed, that stops calls, with code `path`, and jobs wait."""
    XONE_BOOKINGS_PATH: Annotated[str, path_with("partner_id")] = "/api/partners/{partner_id}/bookings"
    """Path of a partner's list of bookings, read if a booking may exist already. Empty: never read."""
    XONE_CLIENT_ID: Annotated[str, Field(min_length=1)]
    """Id of the OAuth client at XONE."""
    XONE_CLIENT_SECRET: Annotated[SecretStr, Field(min_length=1), AfterValidator(one_line)]
    """Secret of the OAuth client."""
    XONE_CONNECT_TIMEOUT: Annotated[PositiveFloat, Field(le=600)] = 5
    """Seconds until a connection stands: look-up of the name, all its addresses, and TLS. It never takes more than half
    of `XONE_TIMEOUT`, so that time is left for the answer."""
    XONE_TIMEOUT: Annotated[PositiveFloat, Field(le=600)] = 30
    """Seconds for a whole call, from the look-up of the name to the last byte of the answer. A list of bookings, which
    may be long, has three times as many for all its pages. A lease is half as long again, and at least 5 s longer."""
    XONE_IDLE_TIMEOUT: Annotated[PositiveFloat, Field(le=600)] = 30
    """Seconds. A connection that was not used for so long is not used again. Keep it below the time after which load
    balancers, proxies and firewalls on the way to XONE forget an idle connection: often 60 s."""
    XONE_AFTER_UNKNOWN: Literal["resend", "review"] = "resend"
    """What follows an unknown answer. `resend`: look at the list of bookings first, then send the same request with the
    same key. `review`: look at the list, else `needs_review`; never a second call."""
    XONE_RATE_LIMIT: Annotated[PositiveFloat | None, Field(ge=0.0001, le=100000), BeforeValidator(none_if_empty)] = None
    """Calls a second, over all workers together. Empty: no limit."""

    @model_validator(mode="after")
    def _https_to_others(self) -> "XoneSettings":
        if self.is_plain_to_others and self.XONE_ALLOW_PLAIN_HTTP == "off":
            raise ValueError("XONE_BASE_URL should begin with https: (XONE_ALLOW_PLAIN_HTTP=on allows http:)")
        return self

    @property
    def is_plain_to_others(self) -> bool:
        """Whether tokens and personal data cross a network unencrypted."""
        return self.XONE_BASE_URL.startswith("http:") and not is_to_loopback(self.XONE_BASE_URL)

    @property
    def lease_seconds(self) -> float:
        """Seconds that a lease runs: one call with room to spare. See call_guard.ensure_lease for its renewal."""
        return self.XONE_TIMEOUT + max(5.0, self.XONE_TIMEOUT / 2)


class RetrySettings(Section):
    """Retries"""

    RETRY_MAX_ATTEMPTS: Annotated[PositiveInt, Field(le=32767)] = 12
    """Attempts at most. The last one ends the retries."""
    RETRY_MAX_AGE: Annotated[PositiveFloat, Field(le=315360000)] = 86400
    """Seconds after the job was accepted, without the time of pauses. Later it is not put back or tried again."""
    RETRY_BASE_DELAY: Annotated[PositiveFloat, Field(le=31536000)] = 2
    """Seconds. The delay after the n-th attempt is random between this and this times 2^n."""
    RETRY_MAX_DELAY: Annotated[PositiveFloat, Field(le=31536000)] = 300
    """Seconds. No delay is longer, unless XONE asks for one."""

    @model_validator(mode="after")
    def _base_below_max(self) -> "RetrySettings":
        if self.RETRY_BASE_DELAY > self.RETRY_MAX_DELAY:
            raise ValueError("RETRY_BASE_DELAY should not exceed RETRY_MAX_DELAY")
        return self


class FollowUpSettings(Section):
    """Following up"""

    FOLLOW_UP_INTERVAL: Annotated[PositiveFloat | None, Field(le=86400), BeforeValidator(none_if_empty)] = 300
    """Seconds between looks at a partner's list of bookings while some of its bookings are pending. They grow with the
    time for which the youngest of these has been so, to a tenth of it, and at most to an hour. Empty: no looks."""
    FOLLOW_UP_MAX_AGE: Annotated[PositiveFloat, Field(le=315360000)] = 2592000
    """Seconds. A booking that is still pending then needs review, code `still-pending`."""


class EventSettings(Section):
    """Events"""

    EVENT_LINKS: Literal["on", "off"] = "off"
    """`on`: booking events carry the customer's links (`coi`, `account_url`, `fnol_link`, `sign_up_url`), which may
    contain a token."""


class RetentionSettings(Section):
    """Personal data"""

    RETENTION_DAYS: Annotated[PositiveFloat | None, Field(le=36500), BeforeValidator(none_if_empty)] = None
    """Days after a confirmation has ended until workers erase its personal data. Empty: never."""
    DELETE_AFTER_DAYS: Annotated[PositiveFloat | None, Field(le=36500), BeforeValidator(none_if_empty)] = None
    """Days after a confirmation has ended until workers delete it, with its attempts, booking, policies and events. A
    job that is published again later is called again. Empty: never."""
    DELETE_EVENTS_AFTER_DAYS: Annotated[PositiveFloat | None, Field(le=36500), BeforeValidator(none_if_empty)] = None
    """Days after an event was published until workers delete it: `events replay` finds no older one. Empty: never,
    unless its confirmation is deleted."""


class OperatorSettings(Section):
    """Commands"""

    CONFIRM_OFFER_USER: Annotated[str | None, BeforeValidator(none_if_empty), AfterValidator(person)] = None
    """Who uses the commands, for the audit, where the system's user says little: in a container all are `root@pod`.
    The option `--by` goes before it."""


class LogSettings(Section):
    """Logs"""

    LOG_LEVEL: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The lowest level that is logged, to standard error."""
    LOG_FORMAT: Literal["json", "console"] = "json"
    """`console` is for people."""


class SentrySettings(Section):
    """Sentry"""

    SENTRY_DSN: Annotated[SecretStr | None, BeforeValidator(none_if_empty), AfterValidator(sentry_dsn)] = None
    """Project that defects are reported to. Empty: none."""
    SENTRY_ENVIRONMENT: Annotated[str, Field(pattern=r"^[^\s/]{1,64}$")] = "production"
    """Environment of the reports."""
    SENTRY_RELEASE: Annotated[str | None, Field(pattern=r"^[^\s/\\]{1,200}$"), BeforeValidator(none_if_empty)] = None
    """Release of the reports. Empty: `confirm-offer@<version>`."""
    SENTRY_TRACES_SAMPLE_RATE: Annotated[float, Field(ge=0, le=1)] = 0
    """Share of tasks that are sent as transactions."""
    SENTRY_CRON_MONITOR: Annotated[str | None, Field(pattern=r"^[a-z0-9_-]{1,50}$"), BeforeValidator(none_if_empty)] = (
        None
    )
    """Slug of a monitor that the Scheduler checks in with once a minute. Empty: none."""

    @property
    def dsn(self) -> str | None:
        return self.SENTRY_DSN.get_secret_value() if self.SENTRY_DSN else None

    @property
    def release(self) -> str:
        return self.SENTRY_RELEASE or f"confirm-offer@{version('confirm-offer')}"


class TracingSettings(Section):
    """Tracing"""

    # Those of OpenTelemetry's variables that are read here. Its SDK reads others from the environment itself.
    OTEL_SDK_DISABLED: str = "false"
    """`true` switches tracing off."""
    OTEL_SERVICE_NAME: Annotated[str | None, BeforeValidator(none_if_empty)] = None
    """Name of the service in traces. Empty: `confirm-offer`."""
    OTEL_TRACES_EXPORTER: str = "otlp"
    """`none` switches tracing off."""
    OTEL_EXPORTER_OTLP_ENDPOINT: CollectorUrl = None
    """Collector of traces, such as `http://collector:4318`. Needs `confirm-offer[tracing]`. Empty: no tracing."""
    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT: CollectorUrl = None
    """The whole URL, in place of `OTEL_EXPORTER_OTLP_ENDPOINT` with `/v1/traces`."""
    OTEL_EXPORTER_OTLP_PROTOCOL: str = ""
    """Only `http/protobuf` is supported."""
    OTEL_EXPORTER_OTLP_TRACES_PROTOCOL: str = ""
    """Goes before `OTEL_EXPORTER_OTLP_PROTOCOL`."""

    @property
    def endpoint(self) -> str | None:
        """The URL that spans are sent to; None if tracing is off."""
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
    """`gevent` uses greenlets in place of `threads`, and needs `confirm-offer[gevent]`. `prefork` uses one process for
    each call in flight."""
    WORKER_ONE_CORE: Literal["on", "off"] = "on"
    """With `threads`, all threads of a worker stay on one core, and move together if other processes need it. `off`
    lets the kernel spread them over cores: a call then takes more than half as much CPU again."""
    WORKER_PARTS: str = "tasks,scheduler,relay"
    """The parts that this process runs: some of `tasks`, `scheduler`, `relay`. Each must run somewhere."""
    METRICS_PORT: Annotated[int | None, Field(ge=0, le=65535), BeforeValidator(none_if_empty)] = None
    """Port that serves metrics for Prometheus at `/metrics`, on all addresses. Each worker of a machine needs its own.
    Empty: no metrics."""
    PROMETHEUS_MULTIPROC_DIR: Annotated[Path | None, BeforeValidator(none_if_empty)] = None
    """With `prefork`, where workers create a folder of their own for the files in which processes share metrics. Empty:
    the folder for temporary files."""

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
    FollowUpSettings,
    WorkerSettings,
    EventSettings,
    EncryptionSettings,
    RetentionSettings,
    OperatorSettings,
    LogSettings,
    SentrySettings,
    TracingSettings,
)
NAMES = tuple(name for section in SECTIONS for name in section.model_fields)


def names_in_file() -> set[str]:
    """The names in ``.env``, whether they are settings or not."""
    return set(dotenv_values(".env"))


def names_in_environment() -> set[str]:
    """The names in the environment, but for those of OpenTelemetry, which its SDK reads itself."""
    return {name for name in os.environ if not name.startswith("OTEL_")}
