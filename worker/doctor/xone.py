"""Checks XONE: its host name, and one request for a token. Nothing about an offer is sent."""

import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from worker.doctor.finding import Finding, safe_part
from worker.errors import XoneError
from worker.settings import XoneSettings
from worker.xone.client import Xone

HOST, TOKEN = "XONE", "token"  # checks
WAIT_REMEDY = "nothing to fix here: workers go on by themselves when it answers again"


def check(settings: XoneSettings) -> Iterator[Finding]:
    address = urlsplit(settings.XONE_BASE_URL)
    host = safe_part(address.hostname)
    try:
        socket.getaddrinfo(address.hostname, None)
    except (OSError, UnicodeError):
        remedy = "check XONE_BASE_URL, and the name servers of this machine"
        yield Finding.error(HOST, f"no machine is known as {host}", remedy)
        return
    started = time.monotonic()
    try:
        Xone(settings, connections=1).tokens.get()
    except XoneError as error:
        yield _token_error(error, host, settings)
    else:
        yield Finding.ok(TOKEN, f"{host} gave one after {time.monotonic() - started:.1f} s")


def _token_error(error: XoneError, host: str, settings: XoneSettings) -> Finding:
    """Tells a wrong URL or path, wrong credentials, and an outage of XONE apart."""
    status = error.http_status
    if error.code == "connect" and "TLS" in error.detail:
        return Finding.error(
            HOST,
            f"no TLS connection to {host}: its certificate or protocol is not accepted",
            "check XONE_BASE_URL, and whether something between here and there replaces certificates",
        )
    if error.code == "connect" and "refuses" in error.detail:
        return Finding.error(
            HOST,
            f"{host}:{_port(settings)} refuses the connection",
            "check host and port in XONE_BASE_URL, and whether it runs there",
        )
    if error.code == "connect":
        return Finding.error(
            HOST,
            f"{host} takes no connection within XONE_CONNECT_TIMEOUT ({settings.XONE_CONNECT_TIMEOUT:g} s)",
            "check XONE_BASE_URL, and whether this machine may connect to it",
        )
    if status in (404, 405, 410) or (status is not None and 300 <= status < 400):
        where = "is not the place for tokens" if status in (404, 405, 410) else "answers with a redirect"
        message = f"{host}: XONE_TOKEN_PATH {where} ({status})"
        return Finding.error(TOKEN, message, "check XONE_BASE_URL and XONE_TOKEN_PATH")
    if error.code == "credentials":
        return Finding.error(
            TOKEN,
            f"{host} does not accept the credentials ({status})",
            "check XONE_CLIENT_ID and XONE_CLIENT_SECRET; then restart the workers",
        )
    if error.code == "bad-answer":
        return Finding.error(
            TOKEN,
            f"{host} answers {status}, but with no access_token",
            "check XONE_BASE_URL and XONE_TOKEN_PATH: is it XONE that answers?",
        )
    if error.code == "timeout":
        message = f"{host} does not answer within XONE_TIMEOUT ({settings.XONE_TIMEOUT:g} s)"
        return Finding.error(TOKEN, message, WAIT_REMEDY)
    symptom = f"answers {status}" if status else "breaks the connection off"
    return Finding.error(TOKEN, f"{host} {symptom}", WAIT_REMEDY)


def _port(settings: XoneSettings) -> int:
    address = urlsplit(settings.XONE_BASE_URL)
    return address.port or (443 if address.scheme == "https" else 80)
