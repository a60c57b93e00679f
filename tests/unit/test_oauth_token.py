"""The token cache: one thread renews the token in time, and the others use the old one meanwhile."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.clock import Clock
from worker.xone.oauth_token import DEFAULT_LIFETIME, Token, TokenCache, issued


class Issuer:
    """Issues token-1, token-2 … with a lifetime in seconds. Calls ``before`` in each request."""

    def __init__(self, clock: Clock, lifetime: float = 100.0) -> None:
        self.clock, self.lifetime = clock, lifetime
        self.requests = 0
        self.before: Callable[[], None] = lambda: None

    def __call__(self) -> Token:
        self.requests += 1
        number = self.requests
        self.before()
        return issued(f"token-{number}", self.lifetime, self.clock.now)


class SlowRequest:
    """A request that waits for ``answered``, and then raises ``error``, if there is one."""

    def __init__(self, error: Exception | None = None) -> None:
        self.requested, self.answered = threading.Event(), threading.Event()
        self._error = error

    def __call__(self) -> None:
        self.requested.set()
        assert self.answered.wait(10)
        if self._error is not None:
            raise self._error


@pytest.fixture
def issuer(clock: Clock) -> Issuer:
    return Issuer(clock)


@pytest.fixture
def cache(issuer: Issuer, clock: Clock) -> TokenCache:
    return TokenCache(issuer, clock)


@pytest.mark.parametrize(
    ("lifetime", "margin"),
    [(DEFAULT_LIFETIME, 30), (10, 1), (0.5, 0.05), (599, 59.9), (600, 60), (601, 60), (86400, 60)],
)
def test_the_margin_is_a_tenth_of_the_lifetime_and_a_minute_at_most(lifetime: float, margin: float) -> None:
    token = issued("t", lifetime, asked_at=1000.0)

    assert token.good_until == 1000.0 + lifetime
    assert token.fresh_until == pytest.approx(1000.0 + lifetime - margin)


def test_the_repr_of_a_token_hides_its_value() -> None:
    assert "secret" not in repr(issued("secret", 300, 0.0))


@pytest.mark.parametrize(
    ("after", "requests"),
    [(0, 1), (89.9, 1), (90, 2), (99.9, 2), (100, 2), (5000, 2)],
)
def test_a_token_is_renewed_within_its_margin(
    cache: TokenCache, issuer: Issuer, clock: Clock, after: float, requests: int
) -> None:
    cache.get()
    clock.now += after

    assert cache.get() == f"token-{requests}"
    assert issuer.requests == requests


def test_a_dropped_token_is_replaced(cache: TokenCache, issuer: Issuer) -> None:
    cache.drop(cache.get())

    assert (cache.get(), cache.get(), issuer.requests) == ("token-2", "token-2", 2)


@pytest.mark.parametrize("value", ["token-1", "token-9", ""])
def test_dropping_another_value_does_nothing(cache: TokenCache, issuer: Issuer, value: str) -> None:
    cache.drop(cache.get())
    cache.get()

    cache.drop(value)

    assert (cache.get(), issuer.requests) == ("token-2", 2)


def test_dropping_without_a_token_does_nothing(cache: TokenCache) -> None:
    cache.drop("token-1")

    assert cache.get() == "token-1"


def test_other_threads_use_the_old_token_while_one_renews(cache: TokenCache, issuer: Issuer, clock: Clock) -> None:
    cache.get()
    clock.now += 95
    issuer.before = request = SlowRequest()
    with ThreadPoolExecutor() as pool:
        renewing = pool.submit(cache.get)
        assert request.requested.wait(10)
        others = [cache.get() for _ in range(5)]  # would block if they waited
        request.answered.set()

        assert renewing.result(10) == "token-2"
    assert others == ["token-1"] * 5
    assert (cache.get(), issuer.requests) == ("token-2", 2)


@pytest.mark.parametrize("age", [None, 100], ids=["none yet", "past its end"])
def test_without_a_valid_token_all_threads_wait_for_one_request(
    cache: TokenCache, issuer: Issuer, clock: Clock, age: float | None
) -> None:
    if age is not None:
        cache.get()
        clock.now += age
    before = issuer.requests
    arrived: list[int] = []
    all_arrived = threading.Event()

    def work(number: int) -> str:
        arrived.append(number)
        if len(arrived) == 20:
            all_arrived.set()
        return cache.get()

    def wait() -> None:
        assert all_arrived.wait(10)

    issuer.before = wait
    with ThreadPoolExecutor(20) as pool:
        values = set(pool.map(work, range(20)))

    assert values == {f"token-{before + 1}"}
    assert issuer.requests == before + 1


class Refused(Exception):
    pass


def test_an_error_reaches_the_caller_and_the_next_call_retries(cache: TokenCache, issuer: Issuer) -> None:
    def fail() -> None:
        raise Refused

    issuer.before = fail
    for _ in range(2):
        with pytest.raises(Refused):
            cache.get()
    issuer.before = lambda: None

    assert (cache.get(), issuer.requests) == ("token-3", 3)


def test_an_error_of_one_request_reaches_all_waiting_threads(cache: TokenCache, issuer: Issuer) -> None:
    arrived: list[int] = []
    all_arrived = threading.Event()

    def work(number: int) -> str:
        arrived.append(number)
        if len(arrived) == 20:
            all_arrived.set()
        with pytest.raises(Refused):
            cache.get()
        return "refused"

    def fail() -> None:
        assert all_arrived.wait(10)
        raise Refused

    issuer.before = fail
    with ThreadPoolExecutor(20) as pool:
        assert set(pool.map(work, range(20))) == {"refused"}

    assert issuer.requests < 20, "waiting threads do not repeat the request one after another"


def test_other_threads_use_the_old_token_after_an_error_of_a_renewal(
    cache: TokenCache, issuer: Issuer, clock: Clock
) -> None:
    cache.get()
    clock.now += 95
    issuer.before = request = SlowRequest(Refused())
    with ThreadPoolExecutor() as pool:
        renewing = pool.submit(cache.get)
        assert request.requested.wait(10)
        assert cache.get() == "token-1"
        request.answered.set()
        with pytest.raises(Refused):
            renewing.result(10)
    issuer.before = lambda: None

    assert cache.get() == "token-3"


def test_a_token_dropped_during_its_renewal_stays_dropped(cache: TokenCache, issuer: Issuer, clock: Clock) -> None:
    old = cache.get()
    clock.now += 95
    issuer.before = lambda: cache.drop(old)

    assert (cache.get(), cache.get(), issuer.requests) == ("token-2", "token-2", 2)
