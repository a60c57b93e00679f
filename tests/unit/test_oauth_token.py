"""The token's cache: renewed in time, by one thread, while the others go on with the old one."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from worker.xone.oauth_token import DEFAULT_LIFETIME, Token, TokenCache, issued


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Issuer:
    """Gives token-1, token-2 … of a lifetime in seconds. ``before`` is called in each request."""

    def __init__(self, clock: Clock, lifetime: float = 100.0) -> None:
        self.clock, self.lifetime = clock, lifetime
        self.requests = 0
        self.before: Callable[[], None] = lambda: None

    def __call__(self) -> Token:
        self.requests += 1
        number = self.requests
        self.before()
        return issued(f"token-{number}", self.lifetime, self.clock.now)


@pytest.fixture
def clock() -> Clock:
    return Clock()


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
def test_the_margin_is_a_tenth_of_its_life_and_a_minute_at_most(lifetime: float, margin: float) -> None:
    token = issued("t", lifetime, asked_at=1000.0)

    assert token.good_until == 1000.0 + lifetime
    assert token.fresh_until == pytest.approx(1000.0 + lifetime - margin)


def test_a_token_does_not_show_itself() -> None:
    assert "secret" not in repr(issued("secret", 300, 0.0))


@pytest.mark.parametrize(
    ("after", "requests"),
    [(0, 1), (89.9, 1), (90, 2), (99.9, 2), (100, 2), (5000, 2)],
)
def test_a_token_is_renewed_from_its_margin_on(
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


def test_dropping_before_there_is_one_does_nothing(cache: TokenCache) -> None:
    cache.drop("token-1")

    assert cache.get() == "token-1"


def test_the_old_token_is_used_while_one_thread_renews(cache: TokenCache, issuer: Issuer, clock: Clock) -> None:
    cache.get()
    clock.now += 95
    asked, answered = threading.Event(), threading.Event()

    def hold() -> None:
        asked.set()
        assert answered.wait(10)

    issuer.before = hold
    with ThreadPoolExecutor() as pool:
        renewing = pool.submit(cache.get)
        assert asked.wait(10)
        others = [cache.get() for _ in range(5)]  # would block here if they waited
        answered.set()

        assert renewing.result(10) == "token-2"
    assert others == ["token-1"] * 5
    assert (cache.get(), issuer.requests) == ("token-2", 2)


@pytest.mark.parametrize("age", [None, 100], ids=["none yet", "past its end"])
def test_without_a_good_token_all_wait_for_the_one_that_is_asked_for(
    cache: TokenCache, issuer: Issuer, clock: Clock, age: float | None
) -> None:
    if age is not None:
        cache.get()
        clock.now += age
    before = issuer.requests
    come: list[int] = []
    all_have_come = threading.Event()

    def work(number: int) -> str:
        come.append(number)
        if len(come) == 20:
            all_have_come.set()
        return cache.get()

    def hold() -> None:
        assert all_have_come.wait(10)

    issuer.before = hold
    with ThreadPoolExecutor(20) as pool:
        values = set(pool.map(work, range(20)))

    assert values == {f"token-{before + 1}"}
    assert issuer.requests == before + 1


class Refused(Exception):
    pass


def test_an_error_reaches_the_caller_and_the_next_call_tries_again(cache: TokenCache, issuer: Issuer) -> None:
    def fail() -> None:
        raise Refused

    issuer.before = fail
    for _ in range(2):
        with pytest.raises(Refused):
            cache.get()
    issuer.before = lambda: None

    assert (cache.get(), issuer.requests) == ("token-3", 3)


def test_an_error_reaches_all_who_waited_and_is_asked_for_once(cache: TokenCache, issuer: Issuer) -> None:
    come: list[int] = []
    all_have_come = threading.Event()

    def work(number: int) -> str:
        come.append(number)
        if len(come) == 20:
            all_have_come.set()
        with pytest.raises(Refused):
            cache.get()
        return "refused"

    def fail() -> None:
        assert all_have_come.wait(10)
        raise Refused

    issuer.before = fail
    with ThreadPoolExecutor(20) as pool:
        assert set(pool.map(work, range(20))) == {"refused"}

    assert issuer.requests < 20, "those who waited do not ask again, one after another"


def test_an_error_while_renewing_leaves_the_old_token_to_others(
    cache: TokenCache, issuer: Issuer, clock: Clock
) -> None:
    cache.get()
    clock.now += 95
    asked, answered = threading.Event(), threading.Event()

    def fail() -> None:
        asked.set()
        assert answered.wait(10)
        raise Refused

    issuer.before = fail
    with ThreadPoolExecutor() as pool:
        renewing = pool.submit(cache.get)
        assert asked.wait(10)
        assert cache.get() == "token-1"
        answered.set()
        with pytest.raises(Refused):
            renewing.result(10)
    issuer.before = lambda: None

    assert cache.get() == "token-3"


def test_a_token_that_was_dropped_while_it_was_renewed_stays_dropped(
    cache: TokenCache, issuer: Issuer, clock: Clock
) -> None:
    old = cache.get()
    clock.now += 95
    issuer.before = lambda: cache.drop(old)

    assert (cache.get(), cache.get(), issuer.requests) == ("token-2", "token-2", 2)
