"""What can fail. Each fault begins when its block is entered, and all is mended when it is left."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

from tests.cluster.bench import Bench
from tests.cluster.servers import DATABASE, Node
from tests.support.servers import PgBouncer
from tests.support.system import until

AFTERWARDS = 60.0  # seconds after a fault within which all must flow again, unless it has a bound of its own


class Fault(NamedTuple):
    """seconds: how long it lasts when it comes alone.

    within: seconds from its begin within which all must flow again; None: until AFTERWARDS seconds after its end.
    max_pause: the longest time in seconds in which jobs may wait and no event comes.
    is_lossy: the database loses commits, so that rows may be lost. in_soak: whether it is one of those of a soak.
    """

    strike: Callable[[Bench], AbstractContextManager[None]]
    seconds: float
    within: float | None = None
    max_pause: float = math.inf
    is_lossy: bool = False
    in_soak: bool = True


# --- RabbitMQ ---


@contextmanager
def leader_killed(bench: Bench) -> Iterator[None]:
    """The node that leads all queues, and that the workers are connected to."""
    node = bench.cluster.of_workers()
    bench.cluster.make_leader(node)
    with _killed(bench, node):
        yield


@contextmanager
def follower_killed(bench: Bench) -> Iterator[None]:
    leader = bench.cluster.leader()
    with _killed(bench, next(node for node in bench.cluster.nodes if node is not leader)):
        yield


@contextmanager
def own_node_killed(bench: Bench) -> Iterator[None]:
    """The node that most workers are connected to, while another one leads."""
    node = bench.cluster.of_workers()
    bench.cluster.make_leader(next(other for other in bench.cluster.nodes if other is not node))
    with _killed(bench, node):
        yield


@contextmanager
def two_nodes_killed(bench: Bench) -> Iterator[None]:
    with _killed(bench, *bench.cluster.nodes[1:]):
        yield


@contextmanager
def _killed(bench: Bench, *nodes: Node) -> Iterator[None]:
    for node in nodes:
        node.kill()
    try:
        yield
    finally:
        bench.cluster.recover()


@contextmanager
def leader_frozen(bench: Bench) -> Iterator[None]:
    """The node that leads all queues, and that the workers are connected to, stops with all connections open.

    RabbitMQ itself then serves nobody, on whatever node, until net_ticktime (60 s) is over.
    """
    node = bench.cluster.of_workers()
    bench.cluster.make_leader(node)
    with _frozen(bench, node):
        yield


@contextmanager
def own_node_frozen(bench: Bench) -> Iterator[None]:
    """The node that most workers are connected to, while another one leads.

    Messages that RabbitMQ has handed to the frozen node, but not the node to a worker, wait until it goes on, or until
    net_ticktime (60 s) is over.
    """
    node = bench.cluster.of_workers()
    bench.cluster.make_leader(next(other for other in bench.cluster.nodes if other is not node))
    with _frozen(bench, node):
        yield


@contextmanager
def _frozen(bench: Bench, node: Node) -> Iterator[None]:
    node.pause()
    try:
        yield
    finally:
        bench.cluster.recover()


@contextmanager
def rolling_restart(bench: Bench) -> Iterator[None]:
    for node in bench.cluster.nodes:
        node.stop()
        node.start()
    yield


@contextmanager
def partition(bench: Bench) -> Iterator[None]:
    """The workers' node is alone, and pauses; the others go on."""
    node = bench.cluster.of_workers()
    bench.cluster.partition(node)
    try:
        yield
    finally:
        bench.cluster.heal(node)
        bench.cluster.recover()


def alarm(on: list[str], off: list[str]) -> Callable[[Bench], AbstractContextManager[None]]:
    """A node is short of something: no node takes messages."""

    @contextmanager
    def strike(bench: Bench) -> Iterator[None]:
        node = bench.cluster.nodes[0]
        node.ctl(*on)
        try:
            yield
        finally:
            node.ctl(*off)

    return strike


@contextmanager
def black_hole_to_broker(bench: Bench) -> Iterator[None]:
    """Between the workers and the node that most are connected to."""
    proxy = bench.cluster.proxy_of(bench.cluster.of_workers())
    proxy.black_hole()
    try:
        yield
    finally:
        proxy.pass_on()


@contextmanager
def cut_from_broker(bench: Bench) -> Iterator[None]:
    """Between the workers and all nodes."""
    for proxy in bench.cluster.proxies:
        proxy.cut()
    try:
        yield
    finally:
        for proxy in bench.cluster.proxies:
            proxy.pass_on()


# --- PostgreSQL ---


@contextmanager
def primary_killed(bench: Bench) -> Iterator[None]:
    bench.databases.primary.kill()
    try:
        yield
    finally:
        bench.databases.primary.start()


@contextmanager
def failover(bench: Bench) -> Iterator[None]:
    """The primary is killed and a standby, for which every commit has waited, is promoted."""
    bench.databases.primary.kill()
    bench.databases.fail_over()
    try:
        yield
    finally:
        bench.databases.recover()


@contextmanager
def asynchronous_failover(bench: Bench) -> Iterator[None]:
    """As failover(), but no commit has waited for the standby."""
    bench.databases.set_synchronous(False)
    time.sleep(3)
    with failover(bench):
        yield


@contextmanager
def lagging_failover(bench: Bench) -> Iterator[None]:
    """As asynchronous_failover(), and for five seconds nothing has reached the standby."""
    bench.databases.set_synchronous(False)
    bench.databases.replication.black_hole()
    time.sleep(5)
    with failover(bench):
        yield


@contextmanager
def primary_frozen(bench: Bench) -> Iterator[None]:
    """It answers no more, while its kernel takes connections. Nothing is promoted."""
    bench.databases.primary.pause()
    try:
        yield
    finally:
        bench.databases.primary.resume()


@contextmanager
def primary_hangs(bench: Bench) -> Iterator[None]:
    """As primary_frozen(), and the standby is promoted. What hangs is killed at the end and never thaws."""
    bench.databases.primary.pause()
    bench.databases.fail_over()
    try:
        yield
    finally:
        bench.databases.recover()


@contextmanager
def read_only(bench: Bench) -> Iterator[None]:
    """The primary takes no writes, and has closed all connections, as one that has become a standby."""
    _set_read_only(bench, True)
    try:
        yield
    finally:
        _set_read_only(bench, False)


def _set_read_only(bench: Bench, is_on: bool) -> None:
    value = "on" if is_on else "off"
    with bench.databases.primary.connect() as connection:
        connection.execute(f"ALTER DATABASE {DATABASE} SET default_transaction_read_only = {value}")
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [DATABASE])


@contextmanager
def row_locked(bench: Bench) -> Iterator[None]:
    """A session that was forgotten holds a lock on a confirmation that is under way."""
    lock = "SELECT offer_id FROM confirmations WHERE state IN ('confirming', 'retrying') LIMIT 1 FOR UPDATE SKIP LOCKED"
    with bench.databases.primary.connect(DATABASE) as connection, connection.transaction():
        (offer,) = until(lambda: connection.execute(lock).fetchone(), every=0.01)
        bench.held.add(offer)
        yield


@contextmanager
def black_hole_to_primary(bench: Bench) -> Iterator[None]:
    """Between the workers and the primary."""
    proxy = bench.databases.proxy_of(bench.databases.primary)
    proxy.black_hole()
    try:
        yield
    finally:
        proxy.pass_on()


@contextmanager
def standby_killed(bench: Bench) -> Iterator[None]:
    """Commits wait for it."""
    bench.databases.standby.kill()
    try:
        yield
    finally:
        bench.databases.standby.start()


def pgbouncer_killed(pool_mode: str) -> Callable[[Bench], AbstractContextManager[None]]:
    """The workers reach the primary through PgBouncer, which is killed and is back after three seconds."""

    @contextmanager
    def strike(bench: Bench) -> Iterator[None]:
        folder = bench.folder / f"pgbouncer-{pool_mode}"
        pooler = PgBouncer(folder, bench.databases.primary, pool_mode, pool_size=40)
        pooler.start()
        try:
            _replace_workers(bench, DATABASE_URL=pooler.url(DATABASE))
            time.sleep(8)
            pooler.kill()
            time.sleep(3)
            pooler.start()
            yield
            _replace_workers(bench)
        finally:
            pooler.kill()

    return strike


def _replace_workers(bench: Bench, **settings: str) -> None:
    for place in range(len(bench.workers)):
        bench.replace_worker(place, **settings)


# --- Workers ---


@contextmanager
def worker_killed(bench: Bench) -> Iterator[None]:
    bench.workers[0].kill()
    yield
    bench.replace_worker(0)


@contextmanager
def worker_frozen(bench: Bench) -> Iterator[None]:
    worker = bench.workers[0]
    worker.freeze()
    try:
        yield
    finally:
        worker.thaw()


def clock_off(seconds: float) -> Callable[[Bench], AbstractContextManager[None]]:
    """A worker whose clock is ``seconds`` ahead of the others'."""

    @contextmanager
    def strike(bench: Bench) -> Iterator[None]:
        bench.replace_worker(0, clock=seconds)
        yield
        bench.replace_worker(0)

    return strike


# --- XONE ---


@contextmanager
def xone_down(bench: Bench) -> Iterator[None]:
    bench.sandbox.stop()
    try:
        yield
    finally:
        bench.sandbox.start()


@contextmanager
def xone_flapping(bench: Bench) -> Iterator[None]:
    """It hangs up for one second in two."""
    is_over = threading.Event()

    def flap() -> None:
        while not is_over.wait(1.0):
            bench.sandbox.down = not bench.sandbox.down

    thread = threading.Thread(target=flap, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        bench.sandbox.down = False


@contextmanager
def xone_hanging(bench: Bench) -> Iterator[None]:
    """It books, and does not answer before the client gives up."""
    latency, bench.sandbox.latency = bench.sandbox.latency, 60.0
    try:
        yield
    finally:
        bench.sandbox.latency = latency


MEMORY_ALARM = ["set_vm_memory_high_watermark", "0.0000001"], ["set_vm_memory_high_watermark", "absolute", "512MB"]
DISK_ALARM = ["set_disk_free_limit", "9000GB"], ["set_disk_free_limit", "1MB"]

FAULTS: dict[str, Fault] = {
    "leader killed, which workers use": Fault(leader_killed, 30, within=28),
    "follower killed": Fault(follower_killed, 10),
    "workers' own node killed": Fault(own_node_killed, 30, within=28),
    "leader frozen, which workers use": Fault(leader_frozen, 60),
    "workers' own node frozen": Fault(own_node_frozen, 60, max_pause=30),
    "two of three nodes killed": Fault(two_nodes_killed, 15),
    "rolling restart of the nodes": Fault(rolling_restart, 0),
    "partition, workers' node alone": Fault(partition, 20),
    "memory alarm": Fault(alarm(*MEMORY_ALARM), 15),
    "disk alarm": Fault(alarm(*DISK_ALARM), 15),
    "black hole to workers' node": Fault(black_hole_to_broker, 60, within=50, max_pause=30),
    "cut from all nodes": Fault(cut_from_broker, 10),
    "primary killed, started again": Fault(primary_killed, 5),
    "failover, synchronous": Fault(failover, 20),
    "failover, asynchronous": Fault(asynchronous_failover, 20, is_lossy=True, in_soak=False),
    "failover, standby lags by 5 s": Fault(lagging_failover, 20, is_lossy=True, in_soak=False),
    "primary frozen": Fault(primary_frozen, 20),
    "primary hangs, standby promoted": Fault(primary_hangs, 60, within=55),
    "primary read-only": Fault(read_only, 10),
    "a row locked": Fault(row_locked, 20, within=15),
    "black hole to the primary": Fault(black_hole_to_primary, 20),
    "standby killed, commits wait": Fault(standby_killed, 10),
    "PgBouncer killed, session mode": Fault(pgbouncer_killed("session"), 10, in_soak=False),
    "PgBouncer killed, transaction mode": Fault(pgbouncer_killed("transaction"), 10, in_soak=False),
    "worker killed": Fault(worker_killed, 5),
    "worker frozen past its lease": Fault(worker_frozen, 20),
    "worker's clock 10 min ahead": Fault(clock_off(600), 10, in_soak=False),
    "worker's clock 10 min behind": Fault(clock_off(-600), 10, in_soak=False),
    "XONE down": Fault(xone_down, 10),
    "XONE flapping": Fault(xone_flapping, 15),
    "XONE hanging": Fault(xone_hanging, 15),
}


def strike(bench: Bench, fault: Fault, seconds: float) -> tuple[float, float]:
    """Lets a fault last for so many seconds. Returns when it began and ended, by the monotonic clock."""
    began = time.monotonic()
    with fault.strike(bench):
        time.sleep(seconds)
    return began, time.monotonic()
