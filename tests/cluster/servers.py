"""The servers of a cluster: three nodes of RabbitMQ, PostgreSQL as primary and standby, workers.

All end with this process, however it ends (see tests/support/servers.py), and listen on free ports of 127.0.0.1.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, LiteralString

import amqp

from tests.cluster.proxy import FaultProxy
from tests.support.servers import PostgreSQL, RabbitMQ, _Server, postgresql_program
from tests.support.servers import _rabbitmq_program as rabbitmq_program
from tests.support.system import until
from worker.messaging import topology

DATABASE = "confirm_offer"


class _Epmd(_Server):
    """Erlang's port mapper, of these nodes only."""

    end_at_once = signal.SIGKILL

    def start(self, env: dict[str, str]) -> None:
        self._launch(["epmd", "-port", str(self.port)], env, {})


class Node(RabbitMQ):
    """A node of a cluster."""

    def __init__(self, folder: Path, number: int, epmd: _Epmd, cookie: str) -> None:
        folder.mkdir(parents=True)
        (folder / ".erlang.cookie").write_text(cookie)
        (folder / ".erlang.cookie").chmod(0o400)
        super().__init__(folder)
        self.name = f"node-{number}-{epmd.port}@localhost"
        self._env |= {
            "RABBITMQ_NODENAME": self.name,
            "ERL_EPMD_PORT": str(epmd.port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none -kernel inet_dist_use_interface {127,0,0,1}"
            ),
        }
        with (folder / "rabbitmq.conf").open("a") as configuration:
            configuration.write("cluster_partition_handling = pause_minority\n")

    def start(self) -> None:
        """Return when clients can connect."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Start it without waiting: a node may wait for others."""
        self._launch([rabbitmq_program("rabbitmq-server")], self._env, {})

    def wait(self) -> None:
        """Return when clients can connect."""
        self._wait_for_start(self._connect, (OSError, amqp.AMQPError))


class BrokerCluster:
    """Three nodes, each behind a proxy for the workers."""

    def __init__(self, folder: Path) -> None:
        self.cookie = secrets.token_hex(20)
        self.epmd = _Epmd(folder / "epmd")
        self.nodes = [Node(folder / f"node-{number}", number, self.epmd, self.cookie) for number in (1, 2, 3)]
        self.proxies = [FaultProxy(node.port) for node in self.nodes]

    def start(self) -> None:
        """Starts the nodes, joins them to one cluster, and declares exchanges and queues, with a replica on each."""
        first, *others = self.nodes
        self.epmd.start(first._env)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda node: node.start(), self.nodes))
        for node in others:
            node.ctl("stop_app")
            node.ctl("join_cluster", first.name)
            node.ctl("start_app")
            node.wait()

    def flush(self) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda node: node.flush(), self.nodes))

    def close(self) -> None:
        for proxy in self.proxies:
            proxy.close()
        for server in (*self.nodes, self.epmd):
            server.kill()

    @property
    def url(self) -> str:
        """For workers, through the proxies."""
        return ";".join(f"amqp://guest:guest@127.0.0.1:{proxy.port}//" for proxy in self.proxies)

    @property
    def ports(self) -> list[int]:
        """For checkouts and consumers, which are elsewhere: past the proxies."""
        return [node.port for node in self.nodes]

    def of_workers(self) -> Node:
        """The node to which workers have most connections."""
        most = max(self.proxies, key=lambda proxy: proxy.connections)
        return self.nodes[self.proxies.index(most)]

    def proxy_of(self, node: Node) -> FaultProxy:
        return self.proxies[self.nodes.index(node)]

    def leader(self, queue: str = topology.JOBS) -> Node:
        """The node that leads a queue."""
        table = self.nodes[0].ctl("list_queues", "--no-table-headers", "name", "leader")
        leaders = dict(line.split("\t") for line in table.splitlines())
        return next(node for node in self.nodes if node.name == leaders[queue])

    def make_leader(self, node: Node) -> None:
        """Moves the leaders of all queues to a node. One that has just come back may not have caught up yet."""
        move = f"[rabbit_quorum_queue:transfer_leadership(Queue, '{node.name}') || Queue <- rabbit_amqqueue:list()]."

        def is_moved() -> bool:
            node.ctl("eval", move)
            return self.leader() is node

        until(is_moved, seconds=120, every=0.5)

    def partition(self, node: Node) -> None:
        """Separates a node from the others, both of which it loses at once. All three Erlang VMs go on."""
        self._set_cookies(node, "cut", "erlang:disconnect_node(Other)")

    def heal(self, node: Node) -> None:
        self._set_cookies(node, self.cookie, "net_kernel:connect_node(Other)")

    def _set_cookies(self, node: Node, cookie: str, then: str) -> None:
        """Sets on both sides with which cookie a node and the others speak. then: what follows, for each Other."""
        others = [other for other in self.nodes if other is not node]
        for here, there in [(node, others), *((other, [node]) for other in others)]:
            names = ", ".join(f"'{each.name}'" for each in there)
            here.ctl("eval", f"[begin erlang:set_cookie(Other, '{cookie}'), {then} end || Other <- [{names}]].")

    def recover(self) -> None:
        """Starts again what does not run, resumes what is frozen, and returns when every node takes connections."""
        for proxy in self.proxies:
            proxy.pass_on()
        for node in self.nodes:
            if node.processes:
                node.resume()
            else:
                node.launch()
        for node in self.nodes:
            node.wait()


class _Replica(PostgreSQL):
    """A server that begins as a copy of another one and follows it, or as an empty primary while ``source`` is None."""

    source: int | None = None  # the port that it copies from

    def kill(self) -> None:
        """As a crash would, also if it is frozen."""
        if self.processes and self.processes[-1].poll() is None:
            for each in (self.end_at_once, signal.SIGCONT):
                for pid in self._pids():
                    with suppress(ProcessLookupError):
                        os.kill(pid, each)
        super().kill()

    def promote(self) -> None:
        """Return when it accepts writes."""
        self._run([postgresql_program("pg_ctl"), "promote", "-w", "-D", str(self.home / "data")])

    def follow(self, port: int) -> None:
        """Throws its data away, copies the server at a port, and follows it."""
        self.kill()
        self.source = port
        shutil.rmtree(self.home / "data", ignore_errors=True)
        self.start()

    def _make_cluster(self, data: Path) -> None:
        if self.source is None:
            super()._make_cluster(data)
            return
        origin = f"host=127.0.0.1 port={self.source} user=postgres application_name=standby"
        copy = [postgresql_program("pg_basebackup"), "--checkpoint=fast", "--write-recovery-conf", "-X", "stream"]
        self._run([*copy, "-D", str(data), "-d", origin])
        with (data / "postgresql.conf").open("a") as configuration:
            configuration.write(f"port = {self.port}\nunix_socket_directories = '{self.home}'\n")

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(command, env=self._env, cwd=self.home, capture_output=True, text=True, **self._identity)
        if done.returncode != 0:
            raise RuntimeError(f"{command[0]}: {done.stderr or done.stdout}")


class DatabasePair:
    """A primary, and a standby that streams from it through the proxy ``replication``. Workers use proxies, too.

    Commits wait for the standby, except between a failover and ``recover()``, and after ``set_synchronous(False)``.
    """

    def __init__(self, folder: Path) -> None:
        self.primary, self.standby = (_Replica(folder / name) for name in ("a", "b"))
        self.servers = (self.primary, self.standby)
        self.proxies = [FaultProxy(server.port) for server in self.servers]
        self.replication = FaultProxy(self.primary.port)

    def start(self) -> None:
        self.primary.start()
        self.primary.create_database(DATABASE)
        self.recover()

    def close(self) -> None:
        for proxy in (*self.proxies, self.replication):
            proxy.close()
        for server in self.servers:
            server.kill()

    @property
    def url(self) -> str:
        """For workers: both servers, of which the one that accepts writes is used."""
        hosts = "&".join(f"host=127.0.0.1:{proxy.port}" for proxy in self.proxies)
        return f"postgresql+psycopg://postgres@/{DATABASE}?{hosts}&target_session_attrs=read-write"

    def proxy_of(self, server: PostgreSQL) -> FaultProxy:
        return self.proxies[self.servers.index(server)]  # type: ignore[arg-type]

    def set_synchronous(self, is_on: bool) -> None:
        """Whether commits wait for the standby. Return when that holds."""
        self.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{'*' if is_on else ''}'")
        self.execute("SELECT pg_reload_conf()")
        holds = "SELECT 1 FROM pg_stat_replication WHERE state = 'streaming' AND (sync_state = 'sync') = %s"
        until(lambda: self.fetch(holds, is_on))

    def fail_over(self) -> None:
        """Promotes the standby. What was the primary is not asked: it is dead, or hangs."""
        self.replication.cut()
        self.standby.promote()
        self.primary, self.standby = self.standby, self.primary
        self.execute("ALTER SYSTEM SET synchronous_standby_names = ''")  # there is no standby to wait for
        self.execute("SELECT pg_reload_conf()")

    def recover(self) -> None:
        """Makes a new standby of what is not the primary. Commits wait for it again."""
        for proxy in self.proxies:
            proxy.pass_on()
        self.replication.cut()
        self.replication.target = self.primary.port
        self.replication.pass_on()
        self.standby.follow(self.replication.port)
        self.set_synchronous(True)

    def execute(self, statement: LiteralString) -> None:
        with self.primary.connect() as connection:
            connection.execute(statement)

    def fetch(self, query: LiteralString, *parameters: object) -> list[tuple[Any, ...]]:
        with self.primary.connect() as connection:
            return connection.execute(query, parameters).fetchall()


_WITH_ANOTHER_CLOCK = (
    "import runpy, sys, time; real = time.time; time.time = lambda: real() + {seconds};"
    " sys.argv[:] = ['confirm-offer', 'worker']; runpy.run_module('worker', run_name='__main__')"
)


class Worker(_Server):
    """A worker in a process group and with a TMPDIR of its own.

    clock: seconds by which its ``time.time`` is ahead of this machine's.
    """

    end_at_once = signal.SIGKILL

    def __init__(self, folder: Path, environment: dict[str, str], clock: float = 0.0) -> None:
        super().__init__(folder)
        self._env = {**os.environ, **environment, "TMPDIR": str(folder)}
        self._command = ["-m", "worker", "worker"]
        if clock:
            self._command = ["-c", _WITH_ANOTHER_CLOCK.format(seconds=clock)]

    def start(self) -> None:
        """It connects to its servers by itself, whenever they are there."""
        self._launch([sys.executable, *self._command], self._env, {})

    def freeze(self) -> None:
        self.processes[-1].send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.processes[-1].send_signal(signal.SIGCONT)

    def stop(self, seconds: float = 90.0) -> int:
        """A warm shutdown. Returns the exit code."""
        self.processes[-1].terminate()
        code = self.processes[-1].wait(seconds)
        self._wait_for_end()
        return code

    @property
    def ended_by_itself(self) -> int | None:
        """The exit code of one that should run, else None."""
        return self.processes[-1].poll() if self.processes else None
