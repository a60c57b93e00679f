"""Group commit: a lone caller commits at once; callers that come during a commit share the next one."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

import pytest

from tests.support.system import until
from worker.errors import ShuttingDown
from worker.storage.group_commit import MAX_GROUP, GroupCommit


class Store:
    """Records its groups. The first group waits for ``may_continue``. An item that is an error is raised."""

    def __init__(self) -> None:
        self.groups: list[list[object]] = []
        self.may_continue = Event()

    def __call__(self, items: Sequence[object]) -> list[str]:
        self.groups.append(list(items))
        if items == ["first"]:
            self.may_continue.wait(30)
        for item in items:
            if isinstance(item, BaseException):
                raise item
        return [f"{item} stored" for item in items]


def store_during_first(store: Store, items: Sequence[object]) -> list[Future[str]]:
    """The futures of the first item, and of the items that came while it was stored."""
    group = GroupCommit(store)
    with ThreadPoolExecutor(len(items) + 1) as pool:
        futures = [pool.submit(group.store, "first")]
        until(lambda: store.groups)
        futures += [pool.submit(group.store, item) for item in items]
        until(lambda: len(group._waiting) == len(items))
        store.may_continue.set()
    return futures


def test_a_lone_caller_commits_at_once() -> None:
    store = Store()
    group = GroupCommit(store)

    assert [group.store("a"), group.store("b")] == ["a stored", "b stored"]
    assert store.groups == [["a"], ["b"]]


def test_callers_that_come_during_a_commit_share_the_next() -> None:
    store = Store()

    futures = store_during_first(store, [str(number) for number in range(20)])

    assert [future.result() for future in futures] == [
        "first stored",
        *(f"{number} stored" for number in range(20)),
    ]
    assert [len(group) for group in store.groups] == [1, 20]


def test_a_group_has_a_maximum_size() -> None:
    store = Store()

    store_during_first(store, [str(number) for number in range(MAX_GROUP + 10)])

    assert [len(group) for group in store.groups] == [1, MAX_GROUP, 10]


def test_only_the_item_at_fault_fails() -> None:
    store = Store()

    futures = store_during_first(store, ["a", ValueError("b"), "c"])

    assert [futures[1].result(), futures[3].result()] == ["a stored", "c stored"]
    with pytest.raises(ValueError, match="b"):
        futures[2].result()


@pytest.mark.parametrize("error", [ShuttingDown(), SystemExit(1)])
def test_an_error_that_ends_the_process_fails_the_group_without_a_retry(error: BaseException) -> None:
    store = Store()

    futures = store_during_first(store, ["a", error, "c"])

    assert [type(future.exception()) for future in futures[1:]] == [type(error)] * 3
    assert [len(group) for group in store.groups] == [1, 3]


def test_the_next_group_is_stored_after_an_error() -> None:
    store = Store()
    group = GroupCommit(store)

    with pytest.raises(ValueError, match="a"):
        group.store(ValueError("a"))
    assert group.store("b") == "b stored"
