"""Settings: defaults, the environment, .env, and one line for each wrong setting, without its value."""

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from models.states import BookingStatuses
from tasks.decide import RetryPolicy
from tests.support.settings import KEY, OTHER_KEY, REQUIRED
from worker.errors import SettingsError
from worker.settings import (
    NAMES,
    SECTIONS,
    BrokerSettings,
    DatabaseSettings,
    EncryptionSettings,
    EventSettings,
    FollowUpSettings,
    LogSettings,
    RetentionSettings,
    RetrySettings,
    Section,
    SentrySettings,
    TracingSettings,
    WorkerSettings,
    XoneSettings,
    read,
)

MARK = "Geheimnis"  # represents a value, which no message may repeat


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without settings and .env file, except those that the test sets."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.upper() in NAMES:
            monkeypatch.delenv(name)


@pytest.fixture
def _required(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in REQUIRED.items():
        monkeypatch.setenv(name, value)


def plain(value: Any) -> Any:
    return value.get_secret_value() if isinstance(value, SecretStr) else value


# --- Defaults ---


@pytest.mark.usefixtures("_required")
@pytest.mark.parametrize(
    ("section", "name", "default"),
    [
        (BrokerSettings, "BROKER_URL", "amqp://guest:guest@localhost:5672//"),
        (DatabaseSettings, "DATABASE_URL", "postgresql+psycopg://localhost/confirm_offer"),
        (XoneSettings, "XONE_BASE_URL", "https://api.xone.xcover.com"),
        (XoneSettings, "XONE_ALLOW_PLAIN_HTTP", "off"),
        (XoneSettings, "XONE_TOKEN_PATH", "/api/oauth/token"),
        (XoneSettings, "XONE_CONFIRM_PATH", "/api/partners/{partner_id}/offers/{offer_id}"),
        (XoneSettings, "XONE_BOOKINGS_PATH", "/api/partners/{partner_id}/bookings"),
        (XoneSettings, "XONE_CONNECT_TIMEOUT", 5),
        (XoneSettings, "XONE_TIMEOUT", 30),
        (XoneSettings, "XONE_IDLE_TIMEOUT", 30),
        (XoneSettings, "XONE_AFTER_UNKNOWN", "resend"),
        (XoneSettings, "XONE_RATE_LIMIT", None),
        (XoneSettings, "XONE_CONFIRMED_STATUSES", "CONFIRMED,ACTIVE"),
        (RetrySettings, "RETRY_MAX_ATTEMPTS", 12),
        (FollowUpSettings, "FOLLOW_UP_INTERVAL", 300),
        (FollowUpSettings, "FOLLOW_UP_MAX_AGE", 2592000),
        (RetrySettings, "RETRY_MAX_AGE", 86400),
        (RetrySettings, "RETRY_BASE_DELAY", 2),
        (RetrySettings, "RETRY_MAX_DELAY", 300),
        (WorkerSettings, "WORKER_CONCURRENCY", 64),
        (WorkerSettings, "METRICS_PORT", None),
        (EventSettings, "EVENT_LINKS", "off"),
        (RetentionSettings, "RETENTION_DAYS", None),
        (RetentionSettings, "DELETE_AFTER_DAYS", None),
        (RetentionSettings, "DELETE_EVENTS_AFTER_DAYS", None),
        (SentrySettings, "SENTRY_DSN", None),
        (LogSettings, "LOG_LEVEL", "INFO"),
        (LogSettings, "LOG_FORMAT", "json"),
        (SentrySettings, "SENTRY_ENVIRONMENT", "production"),
        (SentrySettings, "SENTRY_RELEASE", None),
        (SentrySettings, "SENTRY_TRACES_SAMPLE_RATE", 0),
        (SentrySettings, "SENTRY_CRON_MONITOR", None),
        (TracingSettings, "OTEL_EXPORTER_OTLP_ENDPOINT", None),
    ],
)
def test_defaults(section: type[Section], name: str, default: Any) -> None:
    assert plain(getattr(read(section), name)) == default


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (EncryptionSettings, "DATA_KEYS is not set"),
        (XoneSettings, "XONE_CLIENT_ID is not set; XONE_CLIENT_SECRET is not set"),
    ],
)
def test_missing_settings_are_named(section: type[Section], message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        read(section)

    assert str(raised.value) == message


@pytest.mark.usefixtures("_required")
def test_the_retry_policy_has_the_same_defaults() -> None:
    assert RetryPolicy.of(read(RetrySettings), read(XoneSettings)) == RetryPolicy()


# --- Sources ---


@pytest.mark.parametrize(
    "section", [section for section in SECTIONS if section not in (EncryptionSettings, XoneSettings)]
)
def test_a_section_needs_no_setting_of_another_section(section: type[Section], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(NAMES) - set(section.model_fields):
        monkeypatch.setenv(name, "wrong in any case \x01")

    assert read(section)


def test_the_environment_takes_precedence_over_the_env_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        f"# a comment\nRETRY_MAX_ATTEMPTS=3\nRETRY_MAX_AGE=60\nDATA_KEYS='{KEY}'\nSOMETHING_ELSE=1\n"
    )
    monkeypatch.setenv("RETRY_MAX_AGE", "70")

    retry = read(RetrySettings)

    assert (retry.RETRY_MAX_ATTEMPTS, retry.RETRY_MAX_AGE) == (3, 70)
    assert read(EncryptionSettings).keys == [KEY]


def test_the_command_line_takes_precedence_over_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("WORKER_CONCURRENCY=1\n")
    monkeypatch.setenv("WORKER_CONCURRENCY", "2")

    assert read(WorkerSettings, WORKER_CONCURRENCY=3).WORKER_CONCURRENCY == 3


def test_a_mistake_in_the_env_file_is_named_without_its_value(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"DATA_KEYS={MARK}\n")

    with pytest.raises(SettingsError, match="DATA_KEYS: should be Fernet keys") as raised:
        read(EncryptionSettings)
    assert MARK not in str(raised.value)


# --- Values ---


@pytest.mark.usefixtures("_required")
@pytest.mark.parametrize(
    ("section", "name", "value", "kept"),
    [
        (XoneSettings, "XONE_RATE_LIMIT", "", None),
        (XoneSettings, "XONE_RATE_LIMIT", "0.5", 0.5),
        (XoneSettings, "XONE_BOOKINGS_PATH", "", ""),
        (XoneSettings, "XONE_TIMEOUT", "0.25", 0.25),
        (XoneSettings, "XONE_BASE_URL", "http://127.0.0.1:8080/base", "http://127.0.0.1:8080/base"),
        (XoneSettings, "XONE_BASE_URL", "http://127.7.7.7", "http://127.7.7.7"),
        (XoneSettings, "XONE_BASE_URL", "http://LOCALHOST:8080", "http://LOCALHOST:8080"),
        (XoneSettings, "XONE_BASE_URL", "http://[::1]:8080", "http://[::1]:8080"),
        (SentrySettings, "SENTRY_DSN", "https://key@sentry.example/1", "https://key@sentry.example/1"),
        (
            XoneSettings,
            "XONE_CONFIRM_PATH",
            "/v2/{offer_id}/{partner_id}/confirm",
            "/v2/{offer_id}/{partner_id}/confirm",
        ),
        (XoneSettings, "XONE_AFTER_UNKNOWN", "review", "review"),
        (SentrySettings, "SENTRY_DSN", "", None),
        (SentrySettings, "SENTRY_RELEASE", "confirm-offer@1.2.3+abc", "confirm-offer@1.2.3+abc"),
        (SentrySettings, "SENTRY_TRACES_SAMPLE_RATE", "0.05", 0.05),
        (SentrySettings, "SENTRY_CRON_MONITOR", "confirm-offer-scheduler", "confirm-offer-scheduler"),
        (SentrySettings, "SENTRY_CRON_MONITOR", "", None),
        (TracingSettings, "OTEL_EXPORTER_OTLP_ENDPOINT", "", None),
        (LogSettings, "LOG_FORMAT", "console", "console"),
        (WorkerSettings, "METRICS_PORT", "", None),
        (WorkerSettings, "METRICS_PORT", "9100", 9100),
        (EventSettings, "EVENT_LINKS", "on", "on"),
        (RetentionSettings, "RETENTION_DAYS", "90", 90),
        (RetentionSettings, "RETENTION_DAYS", "", None),
        (DatabaseSettings, "DATABASE_URL", "sqlite:///file.db", "sqlite:///file.db"),
        (DatabaseSettings, "DATABASE_URL", "postgresql://host/db", "postgresql://host/db"),
        (BrokerSettings, "BROKER_URL", "amqps://host/vhost", "amqps://host/vhost"),
        (BrokerSettings, "BROKER_URL", "memory://", "memory://"),
        (BrokerSettings, "BROKER_URL", "amqp://a:1/v;amqp://b:2/v", "amqp://a:1/v;amqp://b:2/v"),
        (BrokerSettings, "BROKER_URL", "amqps://a/v;amqps://b/v", "amqps://a/v;amqps://b/v"),
    ],
)
def test_values_are_read(
    section: type[Section], name: str, value: str, kept: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)

    assert plain(getattr(read(section), name)) == kept


def test_data_keys_are_one_or_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_KEYS", f" {KEY} ,{OTHER_KEY}")

    assert read(EncryptionSettings).keys == [KEY, OTHER_KEY]


@pytest.mark.usefixtures("_required")
@pytest.mark.parametrize(
    ("value", "statuses"),
    [("confirmed, Active", {"CONFIRMED", "ACTIVE"}), ("ISSUED", {"ISSUED"}), ("ISSUED,", {"ISSUED"}), ("", set())],
)
def test_statuses_are_in_capitals_and_in_one_list(
    value: str, statuses: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XONE_CONFIRMED_STATUSES", value)
    assert read(XoneSettings).booking_statuses == BookingStatuses(confirmed=frozenset(statuses))

    monkeypatch.setenv("XONE_CANCELLED_STATUSES", f"void,{value}")
    if statuses:
        with pytest.raises(SettingsError, match="both hold"):
            read(XoneSettings)
    else:
        assert read(XoneSettings).booking_statuses.cancelled == {"VOID"}


@pytest.mark.usefixtures("_required")
@pytest.mark.parametrize("timeout", ["0.1", "1", "30", "600"])
def test_a_lease_outlasts_a_call(timeout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XONE_TIMEOUT", timeout)

    assert read(XoneSettings).lease_seconds >= float(timeout) + 5


def test_the_short_name_of_postgresql_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://u:p%40w@h:5433/db?sslmode=require")

    assert read(DatabaseSettings).url == "postgresql://u:p%40w@h:5433/db?sslmode=require"


@pytest.mark.parametrize("parts", ["tasks", "relay, scheduler", "tasks,scheduler,relay"])
def test_parts_of_a_worker_are_read(parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_PARTS", parts)

    assert read(WorkerSettings).parts == set(parts.replace(" ", "").split(","))


WRONG: list[tuple[type[Section], str, list[str]]] = [
    (BrokerSettings, "BROKER_URL", ["", MARK, f"http://{MARK}", f"redis://{MARK}@host"]),
    (
        BrokerSettings,
        "BROKER_URL",
        [f"amqp://u:{MARK}@h:port//", f"amqp://u:{MARK}@h:65536", f"amqp://a;amqp://[{MARK}"],
    ),
    (BrokerSettings, "BROKER_URL", [f"amqp://u:12{mark}{MARK}@h//" for mark in "@/?#"]),
    (DatabaseSettings, "DATABASE_URL", [f"postgresql://u:12@{MARK}@h/db", f"postgres://u:12@{MARK}@h/db"]),
    (BrokerSettings, "BROKER_URL", [f"amqps://a:{MARK}@a//;amqp://b//", f"amqp://a//;amqps://a:{MARK}@b//"]),
    (BrokerSettings, "BROKER_URL", [f"amqp://a//;redis://{MARK}@b", f"amqp://{MARK};", f"amqp://a;{MARK}:5672"]),
    (BrokerSettings, "BROKER_URL", [f"amqp://u:{MARK}@h?heartbeat=60", f"amqp://a//;amqp://u:{MARK}@b?heartbeat=0"]),
    (BrokerSettings, "BROKER_URL", [f"amqps://h/?ssl_ca_certs=/no/{MARK}", f"amqps://h/?ssl_ca_certs={__file__}"]),
    (BrokerSettings, "BROKER_URL", [f"amqps://u:{MARK}@h;amqps://h/?ssl_ca_certs=/etc/hosts"]),
    (BrokerSettings, "BROKER_URL", [f"amqps://u:{MARK}@h/?ssl_cert_reqs=none", f"amqp://h/?ssl_ca_certs={MARK}"]),
    (
        BrokerSettings,
        "BROKER_URL",
        [f"amqp://u:{MARK}@h/v?heartbeat=5", f"amqp://h/v?{MARK}=1", f"amqp://u:1?{MARK}@h"],
    ),
    (BrokerSettings, "BROKER_URL", [f"amqp://a//;{MARK}:5672", f"amqp://a//; amqp://{MARK}//", f"amqp://u:1#{MARK}@h"]),
    (BrokerSettings, "BROKER_URL", [f"amqp://{MARK}//;", f"amqp://a//;redis://{MARK}", f"amqp://{MARK}//#vhost"]),
    (
        BrokerSettings,
        "BROKER_URL",
        [f"amqp://{MARK}// ;amqp://b//", f"memory://;amqp://{MARK}//", "amqps://h/?ssl_ca_certs="],
    ),
    (
        DatabaseSettings,
        "DATABASE_URL",
        ["", MARK, f"mysql://u:{MARK}@host/db", f"postgresql://host:{MARK}/db", f"http://{MARK}"],
    ),
    (DatabaseSettings, "DATABASE_URL", [f"postgresql://u:{MARK}@host/db?replication=true"]),
    (DatabaseSettings, "DATABASE_URL", [f"postgresql+asyncpg://{MARK}/db", f"sqlite+aiosqlite:///{MARK}.db"]),
    (DatabaseSettings, "DATABASE_URL", [f"postgresql://h1:1,h2:{MARK}/db", f"postgresql://u:{MARK}@[::1,h2/db"]),
    (
        DatabaseSettings,
        "DATABASE_URL",
        [f"postgresql:///{MARK}?host=a,b&port=1", f"postgresql:///{MARK}?host=a:x&host=b"],
    ),
    (DatabaseSettings, "DATABASE_URL", ["sqlite://", "sqlite:///", "sqlite:///:memory:"]),
    (EncryptionSettings, "DATA_KEYS", ["", MARK, f"{KEY},{MARK}", f"{KEY},", "é" + MARK, f"{KEY};{OTHER_KEY}"]),
    (XoneSettings, "XONE_BASE_URL", ["", MARK, f"ftp://{MARK}", f"https://host/?{MARK}", f"https://host/#{MARK}"]),
    (XoneSettings, "XONE_BASE_URL", [f"https://{MARK} .host", f"https:/{MARK}", f"https://{MARK}\n"]),
    (XoneSettings, "XONE_BASE_URL", [f"https://{MARK}:port", f"https://{MARK}:99999/", f"https://[{MARK}"]),
    (XoneSettings, "XONE_BASE_URL", [f"http://{MARK}", f"http://localhost@{MARK}/", f"http://localhost.{MARK}:8080"]),
    (XoneSettings, "XONE_BASE_URL", [f"http://10.0.0.1/{MARK}", f"http://[::2]/{MARK}", f"http://[{MARK}"]),
    (XoneSettings, "XONE_ALLOW_PLAIN_HTTP", ["", MARK, "true"]),
    (XoneSettings, "XONE_TOKEN_PATH", ["", MARK, f"/{MARK}/{{partner_id}}"]),
    (
        XoneSettings,
        "XONE_CONFIRM_PATH",
        [
            "",
            f"/{MARK}",
            f"/{MARK}/{{partner_id}}",
            f"{MARK}/{{partner_id}}/{{offer_id}}",
            f"/{MARK}/{{partner_id}}/{{offer_id}}/{{}}",
            f"/{MARK}/{{partner_id}}/{{offer_id}}/{{id}}",
            f"/{MARK}/{{partner_id}}/{{offer_id}}/}}",
            f"/{MARK}/{{partner_id}}/{{offer_id}}/{{",
        ],
    ),
    (XoneSettings, "XONE_BOOKINGS_PATH", [f"/{MARK}", f"{MARK}/{{partner_id}}", f"/{{partner_id}}/{{{MARK}}}"]),
    (XoneSettings, "XONE_CLIENT_ID", [""]),
    (XoneSettings, "XONE_CLIENT_SECRET", [""]),
    (XoneSettings, "XONE_CONNECT_TIMEOUT", ["", MARK, "0", "-1", "601", "inf", "nan"]),
    (XoneSettings, "XONE_IDLE_TIMEOUT", ["", MARK, "0", "-1", "601", "inf", "nan"]),
    (XoneSettings, "XONE_TIMEOUT", ["", MARK, "0", "-1", "601", "inf", "nan", "5s"]),
    (XoneSettings, "XONE_AFTER_UNKNOWN", ["", MARK, "RESEND"]),
    (XoneSettings, "XONE_RATE_LIMIT", [MARK, "0", "-2", "nan"]),
    (FollowUpSettings, "FOLLOW_UP_INTERVAL", [MARK, "0", "-1", "nan", "86401"]),
    (FollowUpSettings, "FOLLOW_UP_MAX_AGE", ["", MARK, "0", "nan"]),
    (RetrySettings, "RETRY_MAX_ATTEMPTS", ["", MARK, "0", "-1", "1.5"]),
    (RetrySettings, "RETRY_MAX_AGE", ["", MARK, "0", "nan"]),
    (RetrySettings, "RETRY_BASE_DELAY", ["", MARK, "0", "-1", "nan", "301"]),
    (RetrySettings, "RETRY_MAX_DELAY", ["", MARK, "0", "1", "nan"]),
    (WorkerSettings, "WORKER_CONCURRENCY", ["", MARK, "0", "2001"]),
    (WorkerSettings, "WORKER_POOL", ["", MARK]),
    (WorkerSettings, "WORKER_PARTS", ["", MARK, f"tasks,{MARK}", "tasks,"]),
    (WorkerSettings, "METRICS_PORT", [MARK, "-1", "65536"]),
    (EventSettings, "EVENT_LINKS", ["", MARK, "true"]),
    (RetentionSettings, "RETENTION_DAYS", [MARK, "0", "-1", "nan", "36501"]),
    (LogSettings, "LOG_LEVEL", ["", MARK, "TRACE"]),
    (LogSettings, "LOG_FORMAT", ["", MARK]),
    (SentrySettings, "SENTRY_DSN", [MARK, f"https://{MARK}/1", f"https://{MARK}@host/", f"{MARK}://key@host/1"]),
    (SentrySettings, "SENTRY_ENVIRONMENT", ["", f"{MARK} a", f"{MARK}/a"]),
    (SentrySettings, "SENTRY_RELEASE", [f"{MARK} a", f"{MARK}/a", MARK * 100]),
    (SentrySettings, "SENTRY_TRACES_SAMPLE_RATE", ["", MARK, "-0.1", "1.1", "nan"]),
    (SentrySettings, "SENTRY_CRON_MONITOR", [MARK, "a b"]),
    (TracingSettings, "OTEL_EXPORTER_OTLP_ENDPOINT", [MARK, f"grpc://{MARK}", "http://"]),
]


@pytest.mark.parametrize(
    ("given", "endpoint"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, "http://collector:4318/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318/base/"}, "http://collector:4318/base/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector/spans"}, "http://collector/spans"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_SDK_DISABLED": "True"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"}, None),
    ],
    ids=["nothing", "base", "base with a path", "of traces", "disabled", "no exporter"],
)
def test_traces_are_exported_as_the_variables_of_opentelemetry_say(
    given: dict[str, str], endpoint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)

    assert read(TracingSettings).endpoint == endpoint


@pytest.mark.usefixtures("_required")
@pytest.mark.parametrize("name", {name: None for _, name, _ in WRONG})
def test_a_wrong_value_is_named_in_one_line_without_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for section, value in [(section, value) for section, of, values in WRONG if of == name for value in values]:
        monkeypatch.setenv(name, value)

        with pytest.raises(SettingsError) as raised:
            read(section)

        message = str(raised.value)
        assert name in message, value
        assert "\n" not in message, value
        assert MARK.lower() not in message.lower(), value
        assert KEY not in message, value


@pytest.mark.usefixtures("_required")
def test_plain_http_to_another_host_must_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XONE_BASE_URL", "http://xone.example")
    with pytest.raises(SettingsError, match=r"^XONE_BASE_URL should .*XONE_ALLOW_PLAIN_HTTP=on"):
        read(XoneSettings)

    monkeypatch.setenv("XONE_ALLOW_PLAIN_HTTP", "on")
    assert read(XoneSettings).XONE_BASE_URL == "http://xone.example"


@pytest.mark.usefixtures("_required")
def test_all_wrong_values_of_a_section_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XONE_TIMEOUT", MARK)
    monkeypatch.setenv("XONE_AFTER_UNKNOWN", MARK)

    with pytest.raises(SettingsError, match=r"^XONE_TIMEOUT: .+; XONE_AFTER_UNKNOWN: .+'resend' or 'review'$"):
        read(XoneSettings)


@pytest.mark.usefixtures("_required")
@pytest.mark.parametrize("section", SECTIONS)
def test_the_repr_of_settings_hides_secrets(section: type[Section], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XONE_CLIENT_SECRET", MARK)
    monkeypatch.setenv("DATABASE_URL", f"postgresql://user:{MARK}@host/db")
    monkeypatch.setenv("BROKER_URL", f"amqp://user:{MARK}@host//")
    monkeypatch.setenv("SENTRY_DSN", f"https://{MARK}@sentry.example/1")

    shown = f"{read(section)!r} {read(section)}"

    assert MARK not in shown
    assert KEY not in shown


# --- Line ends ---


@pytest.mark.usefixtures("_required")
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_a_line_end_around_a_value_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """Files that ``echo`` wrote end with one."""
    for name, value in {**REQUIRED, "BROKER_URL": "amqp://u:p@h//", "DATABASE_URL": "sqlite:///f.db"}.items():
        monkeypatch.setenv(name, value + end)
    monkeypatch.setenv("DATA_KEYS", f"{KEY}{end},{OTHER_KEY}{end}")

    xone = read(XoneSettings)
    assert REQUIRED["XONE_CLIENT_ID"] == xone.XONE_CLIENT_ID
    assert xone.XONE_CLIENT_SECRET.get_secret_value() == REQUIRED["XONE_CLIENT_SECRET"]
    assert read(EncryptionSettings).keys == [KEY, OTHER_KEY]
    assert (read(BrokerSettings).url, read(DatabaseSettings).url) == ("amqp://u:p@h//", "sqlite:///f.db")


@pytest.mark.usefixtures("_required")
@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        (BrokerSettings, "BROKER_URL", f"amqp://u:{MARK}\n@h//"),
        (DatabaseSettings, "DATABASE_URL", f"postgresql://u:{MARK}\n@h/d"),
        (XoneSettings, "XONE_CLIENT_SECRET", f"{MARK}\n{MARK}"),
        (XoneSettings, "XONE_BASE_URL", f"https://h\n{MARK}"),
    ],
)
def test_a_line_break_within_a_value_is_named(
    monkeypatch: pytest.MonkeyPatch, section: type[Section], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(SettingsError, match=f"^{name}: ") as raised:
        read(section)
    assert MARK not in str(raised.value)
