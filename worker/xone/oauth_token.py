"""The OAuth token: client credentials, cached until shortly before its end, one refresh at a time."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from worker.observability import metrics

DEFAULT_LIFETIME = 300.0  # seconds, where the answer has no expires_in


@dataclass(frozen=True)
class Token:
    value: str
    fresh_until: float  # monotonic seconds: from here on it is renewed
    good_until: float  # monotonic seconds: until here it may still be used

    def __repr__(self) -> str:
        return "Token(…)"


def issued(value: str, lifetime: float, asked_at: float) -> Token:
    """A token of ``lifetime`` seconds that was asked for at ``asked_at``.

    Renewed a margin before its end: the smaller of 60 s and a tenth of its life.
    """
    margin = min(60.0, lifetime / 10)
    return Token(value, asked_at + lifetime - margin, asked_at + lifetime)


class TokenCache:
    """Shares one token between threads. While one thread renews it, the others use the old one if it is still good."""

    def __init__(self, request: Callable[[], Token], clock: Callable[[], float] = time.monotonic) -> None:
        """request: asks the token endpoint; what it raises reaches the thread that asked."""
        self._request = request
        self._clock = clock
        self._renewing = Lock()
        self._token: Token | None = None
        self._renewals = 0
        self._failure: Exception | None = None  # of the last renewal

    def get(self) -> str:
        """A token that is good now. Raises what the token endpoint's call raised, for all who waited for it."""
        token, renewals = self._token, self._renewals
        if token is not None and self._clock() < token.fresh_until:
            return token.value
        still_good = token is not None and self._clock() < token.good_until
        if not self._renewing.acquire(blocking=not still_good):
            assert token is not None
            return token.value
        try:
            token = self._token
            if self._renewals != renewals:  # another thread asked while we waited for the lock
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
        """XONE did not accept this token. Does nothing where another thread has replaced it already."""
        token = self._token
        if token is not None and token.value == value:
            self._token = None
