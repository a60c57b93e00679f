"""Group commit: who comes alone is stored alone; who comes while another stores goes with all the others."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

import pytest

from tests.support.system import until
from worker.errors import ShuttingDown
from worker.storage.group_commit import MAX_GROUP, GroupCommit


class Store:
    """Keeps the groups it was given. The first waits until it may go on; an item may be an error to be raised."""

    def __init__(self) -> None:
        self.groups: list[list[object]] = []
        self.may_go_on = Event()

    def __call__(self, items: Sequence[object]) -> list[str]:
        self.groups.append(list(items))
        if items == ["first"]:
            self.may_go_on.wait(30)
        for item in items:
            if isinstance(item, BaseException):
                raise item
        return [f"{item} stored" for item in items]


def behind_the_first(store: Store, items: Sequence[object]) -> list[Future[str]]:
    """What came of the first and of those that came while it was stored."""
    group = GroupCommit(store)
    with ThreadPoolExecutor(len(items) + 1) as pool:
        futures = [pool.submit(group.store, "first")]
        until(lambda: store.groups)
        futures += [pool.submit(group.store, item) for item in items]
        until(lambda: len(group._waiting) == len(items))
        store.may_go_on.set()
    return futures


def test_who_comes_alone_is_stored_at_once() -> None:
    store = Store()
    group = GroupCommit(store)

    assert [group.store("a"), group.store("b")] == ["a stored", "b stored"]
    assert store.groups == [["a"], ["b"]]


def test_who_comes_meanwhile_goes_together() -> None:
    store = Store()

    futures = behind_the_first(store, [str(number) for number in range(20)])

    assert [future.result() for future in futures] == [
        "first stored",
        *(f"{number} stored" for number in range(20)),
    ]
    assert [len(group) for group in store.groups] == [1, 20]


def test_a_group_has_a_bound() -> None:
    store = Store()

    behind_the_first(store, [str(number) for number in range(MAX_GROUP + 10)])

    assert [len(group) for group in store.groups] == [1, MAX_GROUP, 10]


def test_who_is_at_fault_fails_alone() -> None:
    store = Store()

    futures = behind_the_first(store, ["a", ValueError("b"), "c"])

    assert [futures[1].result(), futures[3].result()] == ["a stored", "c stored"]
    with pytest.raises(ValueError, match="b"):
        futures[2].result()


@pytest.mark.parametrize("error", [ShuttingDown(), SystemExit(1)])
def test_what_ends_the_process_ends_all_and_is_not_tried_again(error: BaseException) -> None:
    store = Store()

    futures = behind_the_first(store, ["a", error, "c"])

    assert [type(future.exception()) for future in futures[1:]] == [type(error)] * 3
    assert [len(group) for group in store.groups] == [1, 3]


def test_it_goes_on_after_an_error() -> None:
    store = Store()
    group = GroupCommit(store)

    with pytest.raises(ValueError, match="a"):
        group.store(ValueError("a"))
    assert group.store("b") == "b stored"
