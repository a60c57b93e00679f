"""A broker that sends nothing is told by health before the worker hangs up on it."""

import os
import time
from typing import cast

from worker.messaging.broker import HEARTBEAT, MAX_SILENCE, Peer
from worker.services.health import HEARD_WITHIN, BrokerWatch
from worker.services.health_file import PartHealth, WorkerHealth


class SilentPeer:
    """Silent for as long as a test says."""

    def __init__(self) -> None:
        self.silent = 0.0
        self.hang_ups = 0

    def seconds_silent(self) -> float:
        return self.silent

    def hang_up(self) -> None:
        self.hang_ups += 1


def unwell(silent: float) -> list[str]:
    now = time.time()
    parts = {
        "consumer": PartHealth(now - silent, now, "broker", HEARD_WITHIN),
        "relay": PartHealth(now - silent, now),
    }
    return WorkerHealth(os.getpid(), now, False, parts, []).unwell


def test_the_watch_hangs_up_once_and_not_before_its_time() -> None:
    peer, watch = SilentPeer(), BrokerWatch()
    watch.watch(cast(Peer, peer))
    hang_ups = []
    for peer.silent in (HEARTBEAT, MAX_SILENCE - 0.1, MAX_SILENCE + 0.1, MAX_SILENCE + 1.1):
        watch.run_once()
        hang_ups.append(peer.hang_ups)

    assert hang_ups == [0, 0, 1, 1]
    assert watch.seconds_silent == MAX_SILENCE + 0.1, "it is not well until it has connected again"
    watch.watch(None)
    assert watch.seconds_silent == 0.0


def test_a_consumer_is_not_well_before_the_watch_hangs_up() -> None:
    assert HEARTBEAT < HEARD_WITHIN < MAX_SILENCE < 2 * HEARTBEAT
    assert unwell(HEARTBEAT + 0.5) == []
    assert unwell(HEARD_WITHIN + 0.5) == ["consumer"]
    assert unwell(60.0) == ["consumer", "relay"]
