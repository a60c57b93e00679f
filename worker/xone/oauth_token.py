"""The OAuth token, by client credentials (RFC 6749, section 4.4). One thread renews it shortly before it expires."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from worker.observability import metrics

DEFAULT_LIFETIME = 300.0  # seconds, for an answer without expires_in


@dataclass(frozen=True)
class Token:
    value: str
    fresh_until: float  # monotonic seconds: then it is renewed
    good_until: float  # monotonic seconds: then it expires

    def __repr__(self) -> str:
        return "Token(…)"


def issued(value: str, lifetime: float, asked_at: float) -> Token:
    """A token that was requested at ``asked_at`` (monotonic seconds) and lives ``lifetime`` seconds.

    It is renewed before it expires: by 60 s or a tenth of its lifetime, whichever is smaller.
    """
    margin = min(60.0, lifetime / 10)
    return Token(value, asked_at + lifetime - margin, asked_at + lifetime)


class TokenCache:
    """One token for all threads. While one thread renews it, the others use the old one until it expires."""

    def __init__(self, request: Callable[[], Token], clock: Callable[[], float] = time.monotonic) -> None:
        """request: calls the token endpoint. What it raises reaches all threads that wait for the token."""
        self._request = request
        self._clock = clock
        self._renewing = Lock()
        self._token: Token | None = None
        self._renewals = 0
        self._failure: Exception | None = None  # of the last renewal

    def get(self) -> str:
        """A token that has not expired. Raises what the call of the token endpoint raised."""
        token, renewals = self._token, self._renewals
        if token is not None and self._clock() < token.fresh_until:
            return token.value
        still_good = token is not None and self._clock() < token.good_until
        if not self._renewing.acquire(blocking=not still_good):
            assert token is not None
            return token.value
        try:
            token = self._token
            if self._renewals != renewals:  # another thread renewed it while this one waited
                if self._failure is not None:
                    raise self._failure
                if token is not None:
                    return token.value
            return self._renew().value
        finally:
            self._renewing.release()

    def _renew(self) -> Token:
        try:
            token = self._request()
        except Exception as error:
            self._failure = error
            metrics.token_refreshed("failed")
            raise
        else:
            self._token, self._failure = token, None
            metrics.token_refreshed("ok")
            return token
        finally:
            self._renewals += 1

    def drop(self, value: str) -> None:
        """Drops a token that XONE did not accept, unless another thread has replaced it already."""
        token = self._token
        if token is not None and token.value == value:
            self._token = None
