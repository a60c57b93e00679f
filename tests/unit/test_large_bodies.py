"""Of the bodies that are too large for a job, one at a time is kept; the others are asked for again, one by one."""

from worker.messaging.large_bodies import LargeBodies


def test_a_second_body_is_not_kept_and_its_message_goes_back_when_the_first_has_ended() -> None:
    bodies, put_back = LargeBodies(), list[str]()
    assert bodies.may_keep()
    assert not bodies.may_keep()
    bodies.came()
    for name in ("second", "third"):
        assert not bodies.may_keep()
        bodies.wait(lambda name=name: put_back.append(name))  # type: ignore[misc]
    assert put_back == []

    bodies.ended()
    assert put_back == ["second"]

    assert bodies.may_keep()
    bodies.came()
    bodies.ended()
    assert put_back == ["second", "third"]


def test_a_message_that_comes_after_the_end_of_the_first_goes_back_at_once() -> None:
    bodies, put_back = LargeBodies(), list[str]()
    bodies.may_keep()
    bodies.came()
    assert not bodies.may_keep()
    bodies.ended()

    bodies.wait(lambda: put_back.append("second"))

    assert put_back == ["second"]


def test_a_lost_connection_forgets_what_waits_and_what_came_in_part() -> None:
    bodies, put_back = LargeBodies(), list[str]()
    bodies.may_keep()
    bodies.wait(lambda: put_back.append("second"))

    bodies.connection_lost()

    assert bodies.may_keep()
    bodies.came()
    bodies.ended()
    assert put_back == []
