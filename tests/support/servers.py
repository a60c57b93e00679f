"""Private, throw-away RabbitMQ, PostgreSQL, PgBouncer and Prometheus servers for tests.

Both keep their data between `start()`s, listen on 127.0.0.1 only, on free ports, and share nothing with a
server that may already run on the machine: no port, no cookie, no epmd, no configuration file. They end with
the Python process that started them, even if that is killed with SIGKILL.
"""

import atexit
import itertools
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypedDict
from urllib.parse import urlencode, urlsplit
from urllib.request import urlopen

import amqp
import psycopg
import pytest
from psycopg import sql

from tests.support.certificates import Authority, Certificate
from worker.messaging.topology import MAX_MESSAGE_SIZE

START_SECONDS = 60
STOP_SECONDS = 20

_used_ports: set[int] = set()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing uses and that no earlier call returned.

    It lies below the range from which systems take the ports of outgoing connections: there, a client that
    keeps trying to reach a server that is down would sooner or later hold the server's port, connected to
    itself.
    """
    while True:
        port = 20_000 + secrets.randbelow(10_000)  # the test run may seed `random`
        if port not in _used_ports and port != 25_672 and _is_free(port):
            _used_ports.add(port)
            return port


def _memory() -> Path | None:
    """A file system in memory, if there is one that is large enough."""
    memory = Path("/dev/shm")
    fits = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 << 30
    return memory if fits else None


@contextmanager
def folder_in_memory(prefix: str) -> Iterator[Path]:
    """A folder for the data of a server, in memory if possible, so that it waits for no disk. Removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=_memory()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require(server: "type[RabbitMQ] | type[PostgreSQL] | type[PgBouncer] | type[Prometheus]") -> None:
    """Skip the test if the server is not installed; fail it in CI."""
    if reason := server.missing():
        lacking(reason)


def lacking(reason: str) -> NoReturn:
    """Skip the test because this machine lacks something; fail it in CI."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def _has_stopped(pid: int) -> bool:
    """Whether all threads of a process have stopped after a SIGSTOP."""
    states = [stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    return set(states) == {"T"}


class Identity(TypedDict, total=False):
    """Arguments of `subprocess` for another user."""

    user: int
    group: int
    extra_groups: Sequence[int]


class _Server:
    """One process group, and the log its processes write to."""

    end_at_once: ClassVar[signal.Signals]

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = free_port()
        self.log = folder / "server.log"
        self.processes: list[subprocess.Popen[bytes]] = []
        self._guard: subprocess.Popen[bytes] | None = None
        atexit.register(self.kill)

    def kill(self) -> None:
        """End the server as a crash would, keeping its data. Does nothing if it is not running."""
        for process in self.processes:
            process.send_signal(self.end_at_once)
        self._wait_for_end()

    def _launch(self, command: Sequence[str | Path], env: Mapping[str, str], identity: Identity) -> None:
        if self._guard is None:
            # Leads the process group. Its standard input reaches the end of file when this process closes the
            # pipe or dies, however it dies.
            name = self.end_at_once.name.removeprefix("SIG")
            script = f"trap '' INT TERM HUP QUIT; read -r _; kill -{name} 0"
            self._guard = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, process_group=0)
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                cwd="/",
                process_group=self._guard.pid,
                **identity,
            )
        self.processes.append(process)

    def _wait_for_start(self, connect: Callable[[], None], not_yet: tuple[type[Exception], ...]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return connect()
            except not_yet as error:
                ended = any(process.poll() is not None for process in self.processes)
                if ended or time.monotonic() > deadline:
                    self.kill()
                    tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])
                    outcome = "ended while starting" if ended else f"did not start in {START_SECONDS} s"
                    raise RuntimeError(f"{type(self).__name__} {outcome}; the end of its log:\n{tail}") from error
            time.sleep(0.05)

    def _wait_for_end(self) -> None:
        for process in self.processes:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()
        if self._guard is not None:
            self._guard.communicate()
            self._guard = None


class RabbitMQ(_Server):
    """A node with its own epmd.

    Only `plugins` are enabled; the ports of those that serve HTTP are in `http_ports`. With a certificate, clients
    may use TLS on `tls_port`.
    """

    end_at_once = signal.SIGKILL
    _http_settings: ClassVar = {
        "rabbitmq_management": "management.tcp",
        "rabbitmq_prometheus": "prometheus.tcp",
    }

    def __init__(self, folder: Path, plugins: Sequence[str] = (), certificate: Certificate | None = None) -> None:
        super().__init__(folder)
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        self.http_ports = {name: free_port() for name in plugins if name in self._http_settings}
        self._epmd_port = free_port()
        self._virtual_hosts = (f"test-{number}" for number in itertools.count(1))
        self._unused: list[str] = []

        cookie = folder / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text(secrets.token_hex(20))
            cookie.chmod(0o400)
        (folder / "enabled_plugins").write_text(f"[{','.join(plugins)}].\n")
        (folder / "environment.conf").touch()
        (folder / "advanced.config").write_text("[].\n")
        settings = {
            "listeners.tcp.1": f"127.0.0.1:{self.port}",
            "log.console": "true",
            "log.console.level": "info",
            "disk_free_limit.absolute": "1MB",
            "vm_memory_high_watermark.absolute": "512MB",
            "raft.wal_max_size_bytes": "16777216",
            "max_message_size": str(MAX_MESSAGE_SIZE),
        }
        for name, port in self.http_ports.items():
            settings[f"{self._http_settings[name]}.ip"] = "127.0.0.1"
            settings[f"{self._http_settings[name]}.port"] = str(port)
        self.tls_port = free_port()
        if certificate:
            settings |= {
                "listeners.ssl.1": f"127.0.0.1:{self.tls_port}",
                "ssl_options.certfile": str(certificate.chain),
                "ssl_options.keyfile": str(certificate.key),
                "ssl_options.verify": "verify_none",  # of clients' certificates
            }
        lines = [f"{name} = {value}\n" for name, value in settings.items()]
        (folder / "rabbitmq.conf").write_text("".join(lines))

        foreign = ("RABBITMQ_", "ERL_", "NOTIFY_SOCKET")
        self._env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
            "HOME": str(folder),  # where Erlang looks for the cookie
            "LC_ALL": "C.UTF-8",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": f"test-{self.port}@localhost",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "environment.conf"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_CONFIG_FILES": str(folder / "conf.d" / "*.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": " ".join(  # no scheduler busy-waits
                ["+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none", "-kernel inet_dist_use_interface {127,0,0,1}"]
            ),
            "RABBITMQ_CTL_ERL_ARGS": "+S 1:1",
            "RABBITMQ_CTL_DIST_PORT_MIN": "0",
            "RABBITMQ_CTL_DIST_PORT_MAX": "0",
            # The start script then becomes the Erlang VM instead of waiting for one, so signals reach it.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    @staticmethod
    def missing() -> str | None:
        """Why this machine can't run the server, or None."""
        if not shutil.which(_rabbitmq_program("rabbitmq-server")):
            return "RabbitMQ is not installed: there is no rabbitmq-server."
        if not (shutil.which("erl") and shutil.which("epmd")):
            return "Erlang is not installed: erl and epmd must be on the PATH."
        return None

    def start(self) -> None:
        """Return when clients can connect.

        :raises RuntimeError: the node did not start; the message ends with its log.
        """
        self._launch(["epmd", "-port", str(self._epmd_port)], self._env, {})
        self._launch([_rabbitmq_program("rabbitmq-server")], self._env, {})
        self._wait_for_start(self._connect, (OSError, amqp.AMQPError))

    def stop(self) -> None:
        """Shut down in order. Does nothing if the node is not running."""
        for process in reversed(self.processes):
            process.send_signal(signal.SIGCONT)
            process.terminate()
        self._wait_for_end()

    def pause(self) -> None:
        """Stop answering with all connections open, as behind a network that drops every packet."""
        process = self.processes[-1]
        process.send_signal(signal.SIGSTOP)
        while not _has_stopped(process.pid):
            time.sleep(0.001)

    def resume(self) -> None:
        """Undo `pause()`."""
        self.processes[-1].send_signal(signal.SIGCONT)

    @property
    def shell(self) -> dict[str, str]:
        """The environment with which `rabbitmqctl` in a shell reaches this node."""
        own = ("HOME", "LC_ALL", "ERL_", "RABBITMQ_")
        wrapped = os.path.dirname(_rabbitmq_program("rabbitmqctl"))
        path = os.pathsep.join(filter(None, (wrapped, self._env["PATH"])))
        return {name: value for name, value in self._env.items() if name.startswith(own)} | {"PATH": path}

    def ctl(self, *arguments: str) -> str:
        """What `rabbitmqctl` prints. It takes a second or two.

        :raises RuntimeError: it failed; the message is its output.
        """
        command = [_rabbitmq_program("rabbitmqctl"), "--quiet", *arguments]
        done = subprocess.run(command, env=self._env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"rabbitmqctl {' '.join(arguments)}: {done.stderr or done.stdout}")
        return done.stdout

    @contextmanager
    def max_message_size(self, size: int) -> Iterator[None]:
        """Closes channels for larger messages meanwhile. size: in bytes."""
        self.ctl("eval", f"application:set_env(rabbit, max_message_size, {size}).")
        try:
            yield
        finally:
            self.ctl("eval", f"application:set_env(rabbit, max_message_size, {MAX_MESSAGE_SIZE}).")

    def virtual_host(self) -> str:
        """The name of a new, empty virtual host. Twenty are made at once, because one costs as much as twenty."""
        if not self._unused:
            self._unused = list(itertools.islice(self._virtual_hosts, 20))
            names = ", ".join(f'<<"{name}">>' for name in reversed(self._unused))
            add = 'rabbit_vhost:add(Name, <<"test">>)'
            permit = 'rabbit_auth_backend_internal:set_permissions(<<"guest">>, Name, All, All, All, <<"test">>)'
            self.ctl("eval", f'All = <<".*">>, [begin {add}, {permit} end || Name <- [{names}]].')
        return self._unused.pop()

    def flush(self) -> None:
        """Make the node save which quorum queues it has. Call this before `kill()`.

        By itself it does so up to a second later (Ra's `names.dets`, auto_save of 500 ms). A node killed before
        that restarts with a new, empty, leaderless queue of the same name, whose users wait for ever.
        """
        self.ctl("eval", "[dets:sync(Table) || Table <- dets:all()].")

    def _connect(self) -> None:
        with amqp.Connection(f"127.0.0.1:{self.port}", connect_timeout=2, read_timeout=2):
            pass


class PostgreSQL(_Server):
    """A cluster, owned by the superuser `postgres`, which needs no password.

    Its time zone is neither UTC nor that of a usual machine, so that a time without a zone is noticed.
    """

    # An immediate shutdown. SIGKILL would leave the backends, which are in process groups of their own.
    end_at_once = signal.SIGQUIT

    def __init__(self, folder: Path, in_memory: bool = False) -> None:
        """in_memory: whether data is in memory, if possible, which creates a database in a quarter of the time."""
        super().__init__(folder)
        self._identity: Identity = {}
        self.home = folder
        foreign = ("PG", "LC_", "LANG")
        self._env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        is_root = os.geteuid() == 0
        if is_root or in_memory:
            self.home = Path(tempfile.mkdtemp(prefix="postgresql-", dir=_memory() if in_memory else None))
        if is_root:
            # PostgreSQL refuses to run as root, and another user cannot enter pytest's folders.
            owner = _unprivileged()
            self._identity = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": ()}
            os.chown(self.home, owner.pw_uid, owner.pw_gid)
        if self.home != folder:
            atexit.unregister(self.kill)
            atexit.register(self._kill_and_remove)

    @staticmethod
    def missing() -> str | None:
        """Why this machine can't run the server, or None."""
        if not (shutil.which(postgresql_program("initdb")) and shutil.which(postgresql_program("postgres"))):
            return "PostgreSQL is not installed: there is no initdb or no postgres."
        return None

    def start(self) -> None:
        """Return when clients can connect. The first time, make the cluster before.

        :raises RuntimeError: the server did not start; the message ends with its log.
        """
        data = self.home / "data"
        if not (data / "PG_VERSION").exists():
            self._make_cluster(data)
        self._launch([postgresql_program("postgres"), "-D", data], self._env, self._identity)
        self._wait_for_start(lambda: self.connect().close(), (psycopg.OperationalError,))

    def stop(self) -> None:
        """Shut down in order, and close open connections. Does nothing if the server is not running."""
        for process in self.processes:
            process.send_signal(signal.SIGINT)
        self._wait_for_end()

    def pause(self) -> None:
        """Stop answering with all connections open. The kernel goes on taking connections."""
        for pid in self._pids():
            os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Undo `pause()`."""
        for pid in self._pids():
            with suppress(ProcessLookupError):  # a session that has ended with its connection
                os.kill(pid, signal.SIGCONT)

    def _pids(self) -> list[int]:
        """Of the server, which starts no other while it is stopped, and of its sessions."""
        server = self.processes[-1].pid
        return [server, *map(int, Path(f"/proc/{server}/task/{server}/children").read_text().split())]

    def set_tls(self, certificate: Certificate | None) -> None:
        """Offer TLS with this certificate to new connections, or no longer, for None."""
        if certificate:
            for source, name in (certificate.chain, "server.crt"), (certificate.key, "server.key"):
                copy = Path(shutil.copy(source, self.home / "data" / name))
                copy.chmod(0o600)
                os.chown(copy, self._identity.get("user", -1), self._identity.get("group", -1))
        with self.connect() as connection:
            connection.execute(f"ALTER SYSTEM SET ssl = {'on' if certificate else 'off'}")
            connection.execute("SELECT pg_reload_conf()")

    def url(self, database: str = "postgres") -> str:
        """The URL of a database, for SQLAlchemy with psycopg."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{database}"

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        """A connection in autocommit mode, without SQLAlchemy."""
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user="postgres",
            dbname=database,
            autocommit=True,
            connect_timeout=2,
        )

    def create_database(self, name: str, template: str | None = None) -> None:
        """Create an empty database, or a copy of `template`, which must have no connections."""
        self._execute("CREATE DATABASE {} TEMPLATE {}", name, template or "template0")

    def drop_database(self, name: str) -> None:
        """Drop a database, if it exists, and close its connections."""
        self._execute("DROP DATABASE IF EXISTS {} WITH (FORCE)", name)

    def _execute(self, statement: str, *names: str) -> None:
        with self.connect() as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))

    def _make_cluster(self, data: Path) -> None:
        options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"]
        command = [postgresql_program("initdb"), *options, "-D", str(data)]
        done = subprocess.run(command, env=self._env, cwd=self.home, capture_output=True, text=True, **self._identity)
        if done.returncode != 0:
            raise RuntimeError(f"initdb: {done.stderr or done.stdout}")
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self.home,
            "max_connections": 200,
            "shared_buffers": "64MB",
            "fsync": "off",  # data outlives the server's death, not the machine's
            "full_page_writes": "off",
            "timezone": "Asia/Kolkata",
        }
        with (data / "postgresql.conf").open("a") as configuration:
            configuration.writelines(f"{name} = '{value}'\n" for name, value in settings.items())

    def _kill_and_remove(self) -> None:
        self.kill()
        shutil.rmtree(self.home, ignore_errors=True)


class PgBouncer(_Server):
    """A pooler before a PostgreSQL, as Debian installs it but for what is given here."""

    end_at_once = signal.SIGKILL

    def __init__(self, folder: Path, upstream: PostgreSQL, pool_mode: str, pool_size: int = 20) -> None:
        """pool_mode: session, transaction or statement. pool_size: sessions for each database."""
        super().__init__(folder)
        self._configuration = folder / "pgbouncer.ini"
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "any",
            "pool_mode": pool_mode,
            "default_pool_size": pool_size,
            "max_client_conn": 200,
        }
        if os.geteuid() == 0:  # it reads its configuration first
            settings["user"] = _unprivileged().pw_name
        lines = ["[databases]", f"* = host=127.0.0.1 port={upstream.port} user=postgres", "[pgbouncer]"]
        self._configuration.write_text("\n".join([*lines, *(f"{name} = {value}" for name, value in settings.items())]))

    @staticmethod
    def missing() -> str | None:
        """Why this machine can't run the server, or None."""
        return None if _pgbouncer() else "PgBouncer is not installed: there is no pgbouncer."

    def start(self) -> None:
        """Return when clients can connect."""
        self._launch([_pgbouncer() or "pgbouncer", self._configuration], os.environ, {})
        conninfo = f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres"
        self._wait_for_start(lambda: psycopg.connect(conninfo).close(), (psycopg.OperationalError,))

    def url(self, database: str) -> str:
        """The URL of a database, for SQLAlchemy with psycopg."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{database}"


class Prometheus(_Server):
    """Scrapes each of `jobs` every second, and evaluates the alerts in `rules`."""

    end_at_once = signal.SIGKILL

    def __init__(self, folder: Path, jobs: Mapping[str, str], rules: Path) -> None:
        """jobs: the URLs to scrape, by name of the job."""
        super().__init__(folder)
        self.url = f"http://127.0.0.1:{self.port}"
        lines = ["global: {scrape_interval: 1s, evaluation_interval: 1s}", f"rule_files: ['{rules}']"]
        lines.append("scrape_configs:")
        for job, url in jobs.items():
            target = urlsplit(url)
            lines += [f"- job_name: {job}", f"  metrics_path: {target.path}"]
            lines += [f"  static_configs: [{{targets: ['{target.netloc}']}}]"]
        (folder / "prometheus.yml").write_text("\n".join(lines))

    @staticmethod
    def missing() -> str | None:
        """Why this machine can't run the server, or None."""
        if not (shutil.which("prometheus") and shutil.which("promtool")):
            return "Prometheus is not installed: there is no prometheus or no promtool."
        return None

    def start(self) -> None:
        """Return when it answers queries."""
        options = {
            "config.file": self.folder / "prometheus.yml",
            "storage.tsdb.path": self.folder / "data",
            "web.listen-address": f"127.0.0.1:{self.port}",
        }
        self._launch(["prometheus", *(f"--{name}={value}" for name, value in options.items())], os.environ, {})
        self._wait_for_start(lambda: self._get("/-/ready") and None, (OSError,))

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression has now. Raises urllib's HTTPError if the expression is wrong."""
        answer = self._get("/api/v1/query?" + urlencode({"query": expression}))
        found: list[dict[str, Any]] = json.loads(answer)["data"]["result"]
        return found

    def alerts(self) -> dict[str, dict[str, Any]]:
        """The alert rules by name."""
        groups = json.loads(self._get("/api/v1/rules?type=alert"))["data"]["groups"]
        return {rule["name"]: rule for group in groups for rule in group["rules"]}

    def _get(self, path: str) -> bytes:
        with urlopen(self.url + path, timeout=5) as answer:
            body: bytes = answer.read()
        return body


def over_tls(rabbitmq: RabbitMQ, url: str, host: str = "127.0.0.1", trust: Authority | None = None) -> str:
    """A URL of the private broker over TLS."""
    options = f"?ssl_ca_certs={trust.file}" if trust else ""
    return f"amqps://guest:guest@{host}:{rabbitmq.tls_port}{urlsplit(url).path}{options}"


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _rabbitmq_program(name: str) -> str:
    # Debian's scripts on the PATH insist on the user `rabbitmq`; the ones they wrap do not.
    return shutil.which(name, path="/usr/lib/rabbitmq/bin") or name


def postgresql_program(name: str) -> str:
    # Debian keeps the programs of each version off the PATH.
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: float(path.parts[-3]))
    return shutil.which(name) or (str(debian[-1]) if debian else name)


def _pgbouncer() -> str | None:
    return shutil.which("pgbouncer") or shutil.which("/usr/sbin/pgbouncer")


def _unprivileged() -> pwd.struct_passwd:
    users = {user.pw_name: user for user in pwd.getpwall()}
    return users.get("postgres") or users["nobody"]
