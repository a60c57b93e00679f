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
from sqlalchemy import URL, make_url
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
    """One URL, or several of AMQP with ``;`` between them. kombu takes their options for arguments of its own."""
    url = value.get_secret_value()
    if re.fullmatch(r"memory:[^;\s]*", url):
        return value
    urls = url.split(";")
    if not all(_AMQP.fullmatch(each) and _is_url(each) and _has_one_at(each) for each in urls):
        raise ValueError(f"should be amqp://user:password@host:port/vhost; {ENCODED}")
    if len({each.partition(":")[0] for each in urls}) > 1:
        raise ValueError("should have whole URLs between its semicolons, all with amqp: or all with amqps:")
    return value


_AMQP = re.compile(r"(amqps?|pyamqp)://[^#\s]*")
ENCODED = "characters with a meaning in a URL are percent-encoded: @ is %40, / is %2F, : is %3A, ? is %3F, # is %23"


def _has_one_at(url: str) -> bool:
    """Whether no @ stands where host, port or path would take a part of the password in."""
    parts = urlsplit(url)
    return parts.netloc.count("@") <= 1 and "@" not in parts.path + parts.query + parts.fragment


def broker_options(value: SecretStr) -> SecretStr:
    url = value.get_secret_value()
    options = [dict(parse_qsl(each.partition("?")[2], keep_blank_values=True)) for each in url.split(";")]
    names = {name for each in options for name in each}
    if not url.startswith("amqps:"):
        if any(name.startswith("ssl") for name in names):
            raise ValueError("should begin with amqps: if it has options of TLS")
        if names and not url.startswith("memory:"):
            raise ValueError("should have no options")  # such as a heartbeat, which would undo ours
        return value
    if names - {"ssl_ca_certs"}:
        raise ValueError("should have no option but ssl_ca_certs; certificates are always verified")
    files = {each.get("ssl_ca_certs") for each in options}
    if len(files) > 1:
        raise ValueError("should have the same ssl_ca_certs in each URL")
    try:
        if "ssl_ca_certs" in names:
            ssl.create_default_context().load_verify_locations(files.pop())
    except OSError:
        raise ValueError("ssl_ca_certs should be a file of certificates (PEM)") from None
    return value


def database_url(value: SecretStr) -> SecretStr:
    text = _with_hosts_as_options(re.sub(r"^postgres:", "postgresql:", value.get_secret_value()))
    try:
        url = make_url(text)
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
        _check_hosts(url)
    return SecretStr(text)


_SEVERAL_HOSTS = re.compile(r"(postgresql[^:/]*://(?:[^/?]*@)?)([^/?@]*,[^/?@]*)(/[^?]*)?(?:\?(.*))?")
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^:\[\]]*))(?::(\d*))?")


def _with_hosts_as_options(url: str) -> str:
    """``//user@h1:p1,h2:p2/db`` is libpq's form; SQLAlchemy's is ``//user@/db?host=h1,h2&port=p1,p2``."""
    if (parts := _SEVERAL_HOSTS.fullmatch(url)) is None:
        return url
    begin, hosts, path, options = parts.groups(default="")
    found = [_HOST.fullmatch(host) for host in hosts.split(",")]
    if not all(found):
        return url  # is refused
    names = ",".join(host[1] or host[2] for host in found if host)
    ports = ",".join(host[3] or "5432" for host in found if host)
    return f"{begin}{path}?host={names}&port={ports}" + (f"&{options}" if options else "")


def _is_number(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch(r"\d{1,5}(\.\d+)?", text) is not None


def _check_libpq_options(options: Mapping[str, Any]) -> None:
    import psycopg  # takes long to import, and few URLs have options
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    known = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}
    if unknown := sorted(options.keys() - known):
        names = ", ".join(name for name in unknown if re.fullmatch(r"\w{1,40}", name)) or "one"
        raise ValueError(f"has an option that libpq does not know: {names}")
    if "replication" in options:
        raise ValueError("should not have the option replication: it is for servers that copy the database")
    for name in ("connect_timeout", "tcp_user_timeout", "keepalives_idle", "keepalives_interval", "keepalives_count"):
        if name in options and not re.fullmatch(r"\d{1,9}", str(options[name])):
            raise ValueError(f"should have a whole number as its option {name}")
    try:
        conninfo_to_dict(make_conninfo(**{name: value for name, value in options.items() if isinstance(value, str)}))
    except psycopg.Error:
        raise ValueError("has options that libpq can't read") from None


def _check_hosts(url: URL) -> None:
    from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

    try:
        PGDialect_psycopg().create_connect_args(url)  # type: ignore[no-untyped-call]
    except ArgumentError:
        raise ValueError(
            "should have one port for each host: //h1:5432,h2:5432/db, ?host=h1,h2&port=5432,5432"
        ) from None


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
