"""XONE: is its name known, and does it give a token? One call, and nothing about an offer."""

import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from worker.doctor.finding import Finding, ok, plain, wrong
from worker.errors import XoneError
from worker.settings import XoneSettings
from worker.xone.client import Xone

HOST, TOKEN = "XONE", "token"
WAIT = "nothing to mend here: workers go on by themselves when it answers again"


def look(settings: XoneSettings) -> Iterator[Finding]:
    address = urlsplit(settings.XONE_BASE_URL)
    host = plain(address.hostname)
    try:
        socket.getaddrinfo(address.hostname, None)
    except (OSError, UnicodeError):
        yield wrong(HOST, f"no machine is known as {host}", "check XONE_BASE_URL, and the name servers of this machine")
        return
    started = time.monotonic()
    try:
        Xone(settings, connections=1).tokens.get()
    except XoneError as error:
        yield _refusal(error, host, settings)
    else:
        yield ok(TOKEN, f"{host} gave one after {time.monotonic() - started:.1f} s")


def _refusal(error: XoneError, host: str, settings: XoneSettings) -> Finding:
    """The wrong path, the wrong credentials, or no fault of ours."""
    status = error.http_status
    if error.code == "connect" and "TLS" in error.detail:
        return wrong(
            HOST,
            f"no TLS connection to {host}: its certificate or protocol is not accepted",
            "check XONE_BASE_URL, and whether something between here and there replaces certificates",
        )
    if error.code == "connect":
        return wrong(
            HOST,
            f"{host} takes no connection within XONE_CONNECT_TIMEOUT ({settings.XONE_CONNECT_TIMEOUT:g} s)",
            "check XONE_BASE_URL, and whether this machine may connect to it",
        )
    if status in (404, 405, 410) or (status is not None and 300 <= status < 400):
        where = "is not the place for tokens" if status in (404, 405, 410) else "answers with a redirect"
        return wrong(TOKEN, f"{host}: XONE_TOKEN_PATH {where} ({status})", "check XONE_BASE_URL and XONE_TOKEN_PATH")
    if error.code == "credentials":
        return wrong(
            TOKEN,
            f"{host} does not accept the credentials ({status})",
            "check XONE_CLIENT_ID and XONE_CLIENT_SECRET; then restart the workers",
        )
    if error.code == "bad-answer":
        return wrong(
            TOKEN,
            f"{host} answers {status}, but with no access_token",
            "check XONE_BASE_URL and XONE_TOKEN_PATH: is it XONE that answers?",
        )
    if error.code == "timeout":
        return wrong(TOKEN, f"{host} does not answer within XONE_TIMEOUT ({settings.XONE_TIMEOUT:g} s)", WAIT)
    said = f"answers {status}" if status else "breaks the connection off"
    return wrong(TOKEN, f"{host} {said}", WAIT)
