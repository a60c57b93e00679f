"""Types of settings. Each function checks a value and raises ValueError with a text for people, without the value."""

import re
import ssl
from collections.abc import Mapping
from ipaddress import ip_address
from string import Formatter
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
)
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError


def none_if_empty(value: Any) -> Any:
    return None if value == "" else value


MAX_NAME = 100  # characters


def person(name: str | None) -> str | None:
    """A name for the audit, without space around it. Raises ValueError if it is none."""
    if name is not None and not (name.isprintable() and 1 <= len(name.strip()) <= MAX_NAME):
        raise ValueError(f"should be a name of 1 to {MAX_NAME} characters")
    return name.strip() if name is not None else None


def url_with(*schemes: str) -> AfterValidator:
    def check(value: SecretStr) -> SecretStr:
        scheme = value.get_secret_value().split(":", 1)[0]
        if scheme not in schemes:
            raise ValueError(f"should begin with {' or '.join(f'{scheme}:' for scheme in schemes)}")
        return value

    return AfterValidator(check)


def _is_url(url: str) -> bool:
    """Whether the host and port of a URL can be read."""
    try:
        urlsplit(url).port  # noqa: B018 - raises where it is none
    except ValueError:
        return False
    return True


def base_url(value: str) -> str:
    if not re.fullmatch(r"https?://[^/?#\s]+[^?#\s]*", value) or not _is_url(value):
        raise ValueError("should be a URL such as https://api.xone.xcover.com, without query")
    return value


def one_line(value: SecretStr) -> SecretStr:
    """Python drops line breaks within URLs without a word: a password would lose a part, or a host gain one."""
    if re.search(r"[\r\n\t]", value.get_secret_value()):
        raise ValueError("should have no line break or tab in it")
    return value


def broker_url(value: SecretStr) -> SecretStr:
    urls = value.get_secret_value().split(";")
    if not all(_is_url(url) and _has_one_at(url) for url in urls):
        raise ValueError(f"should be amqp://user:password@host:port/vhost; {ENCODED}")
    return value


ENCODED = "characters with a meaning in a URL are percent-encoded: @ is %40, / is %2F, : is %3A, ? is %3F, # is %23"


def _has_one_at(url: str) -> bool:
    """Whether no @ stands where host, port or path would take a part of the password in."""
    parts = urlsplit(url)
    return parts.netloc.count("@") <= 1 and "@" not in parts.path + parts.query + parts.fragment


def broker_tls(value: SecretStr) -> SecretStr:
    url = value.get_secret_value()
    options = dict(parse_qsl(url.partition("?")[2], keep_blank_values=True))
    if "amqps:" not in url:
        if any(name.startswith("ssl") for name in options):
            raise ValueError("should begin with amqps: if it has options of TLS")
        return value
    if ";" in url:
        raise ValueError("should name one broker if it begins with amqps:")
    if options.keys() - {"ssl_ca_certs"}:
        raise ValueError("should have no option but ssl_ca_certs; certificates are always verified")
    if "ssl_ca_certs" in options:
        try:
            ssl.create_default_context(cafile=options["ssl_ca_certs"])
        except OSError:
            raise ValueError("ssl_ca_certs should be a file of certificates (PEM)") from None
    return value


def database_url(value: SecretStr) -> SecretStr:
    try:
        url = make_url(re.sub(r"^postgres:", "postgresql:", value.get_secret_value()))
    except (ArgumentError, ValueError):
        raise ValueError("should be a database URL, such as postgresql+psycopg://host/database") from None
    if url.drivername not in ("postgresql", "postgresql+psycopg", "sqlite"):
        raise ValueError("should be a PostgreSQL or SQLite URL, with no other driver than psycopg")
    if "@" in (url.host or ""):
        raise ValueError(f"should be postgresql://user:password@host:port/database; {ENCODED}")
    if url.drivername == "sqlite" and url.database in (None, "", ":memory:"):
        raise ValueError("should name a file, such as sqlite:///confirm-offer.db")
    if url.drivername == "sqlite":
        if url.query.keys() - {"timeout"} or not _is_number(url.query.get("timeout", "30")):
            raise ValueError("should have no option but timeout (seconds), as it is for SQLite")
    elif url.query:
        _check_libpq_options(url.query)
    return SecretStr(url.render_as_string(hide_password=False))


def _is_number(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch(r"\d{1,5}(\.\d+)?", text) is not None


def _check_libpq_options(options: Mapping[str, Any]) -> None:
    import psycopg  # takes long to import, and few URLs have options
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    known = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}
    if unknown := sorted(options.keys() - known):
        names = ", ".join(name for name in unknown if re.fullmatch(r"\w{1,40}", name)) or "one"
        raise ValueError(f"has an option that libpq does not know: {names}")
    for name in ("connect_timeout", "tcp_user_timeout", "keepalives_idle", "keepalives_interval", "keepalives_count"):
        if name in options and not re.fullmatch(r"\d{1,9}", str(options[name])):
            raise ValueError(f"should have a whole number as its option {name}")
    try:
        conninfo_to_dict(make_conninfo(**{name: value for name, value in options.items() if isinstance(value, str)}))
    except psycopg.Error:
        raise ValueError("has options that libpq can't read") from None


def data_keys(value: SecretStr) -> SecretStr:
    for key in value.get_secret_value().split(","):
        if not re.fullmatch(r"[A-Za-z0-9_-]{43}=", key.strip()):  # Fernet itself ignores what follows the =
            raise ValueError("should be Fernet keys, separated by commas ('confirm-offer keygen' prints one)")
    return value


def sentry_dsn(value: SecretStr | None) -> SecretStr | None:
    if value is not None:
        from sentry_sdk.utils import Dsn  # takes long to import, and only a worker has a DSN

        try:
            Dsn(value.get_secret_value())
        except ValueError:
            raise ValueError("should be a DSN of Sentry, such as https://key@host/1") from None
    return value


def is_to_loopback(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def path_with(*names: str) -> AfterValidator:
    def check(value: str) -> str:
        in_path = {name for _, name, _, _ in Formatter().parse(value) if name is not None}
        if value and (not value.startswith("/") or in_path != set(names)):
            places = " and ".join(f"{{{name}}}" for name in names)
            raise ValueError(f"should be a path that begins with / and holds {places or 'no {}'}")
        return value

    return AfterValidator(check)


CollectorUrl = Annotated[str | None, Field(pattern=r"^https?://[^/?#\s]+\S*$"), BeforeValidator(none_if_empty)]
