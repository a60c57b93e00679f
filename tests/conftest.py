"""Private, throw-away servers; a database and a virtual host for each test; the sandbox; the system under test."""

import itertools
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sentry_sdk
import structlog
from cryptography.fernet import Fernet
from sqlalchemy import Engine

from tests.support.certificates import Authority
from tests.support.sentry import Capturing
from tests.support.servers import PostgreSQL, RabbitMQ, folder_in_memory, require
from tests.support.system import System, WorkerProcess
from worker.messaging import broker, topology
from worker.observability import log_context, logs
from worker.observability.sentry import configure_sentry
from worker.runtime import Runtime
from worker.sandbox.server import Sandbox
from worker.settings import SentrySettings
from worker.storage import database, migrator

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that only clients with its certificate trust."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def rabbitmq(authority: Authority) -> Iterator[RabbitMQ]:
    """A server whose certificate is for 127.0.0.1, not for localhost."""
    require(RabbitMQ)
    with folder_in_memory("rabbitmq-") as folder:
        server = RabbitMQ(folder, certificate=authority.issue("127.0.0.1"))
        server.start()
        yield server
        server.kill()


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSQL]:
    require(PostgreSQL)
    server = PostgreSQL(tmp_path_factory.mktemp("postgresql"), in_memory=True)
    server.start()
    server.create_database("template_confirm_offer")
    engine = database.connect(server.url("template_confirm_offer"))
    migrator.upgrade(engine)
    engine.dispose()
    yield server
    server.stop()


@pytest.fixture
def broker_url(rabbitmq: RabbitMQ) -> str:
    """A virtual host for this test, with exchanges and queues declared."""
    url = f"{rabbitmq.url.removesuffix('//')}/{rabbitmq.virtual_host()}"
    with broker.connect(url) as connection:
        topology.declare(connection)
    return url


@pytest.fixture
def postgresql_url(postgresql: PostgreSQL) -> Iterator[str]:
    """A migrated database for this test."""
    name = f"test_{next(_numbers)}"
    postgresql.create_database(name, template="template_confirm_offer")
    yield postgresql.url(name)
    postgresql.drop_database(name)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path}/confirm-offer.db"
    engine = database.connect(url)
    migrator.upgrade(engine)
    engine.dispose()
    return url


@pytest.fixture(params=["postgresql", "sqlite"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A test with this fixture runs on both databases."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = database.connect(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        yield running


@pytest.fixture
def environment(sandbox: Sandbox, tmp_path: Path) -> dict[str, str]:
    """Settings of a program under test, without database and broker, with short delays."""
    return {
        "XONE_BASE_URL": sandbox.url,
        "XONE_CLIENT_ID": sandbox.client_id,
        "XONE_CLIENT_SECRET": sandbox.client_secret,
        "XONE_TIMEOUT": "2",
        "RETRY_BASE_DELAY": "0.1",
        "RETRY_MAX_DELAY": "1",
        "DATA_KEYS": Fernet.generate_key().decode(),
        "TMPDIR": str(tmp_path),
    }


@pytest.fixture
def system(
    broker_url: str, postgresql_url: str, sandbox: Sandbox, environment: dict[str, str], tmp_path: Path
) -> Iterator[System]:
    """RabbitMQ, PostgreSQL and the sandbox, with a queue that gets all events. The test starts workers."""
    with System(broker_url, postgresql_url, sandbox, environment, tmp_path) as running:
        yield running


@pytest.fixture
def start_worker(system: System) -> Callable[..., WorkerProcess]:
    return system.start_worker


@pytest.fixture
def runtime(database_url: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """The parts of a worker in this process, with an in-memory broker."""
    for name, value in {**environment, "DATABASE_URL": database_url, "BROKER_URL": "memory://"}.items():
        monkeypatch.setenv(name, value)
    runtime = Runtime(dice=lambda: 0.0)
    yield runtime
    runtime.close()


@pytest.fixture
def _sentry_off_afterwards() -> Iterator[None]:
    before = sentry_sdk.get_global_scope().client
    yield
    sentry_sdk.get_client().close()
    sentry_sdk.get_global_scope().set_client(before)
    configure_sentry(SentrySettings(SENTRY_DSN=None))


@pytest.fixture
def sentry(_sentry_off_afterwards: None) -> Capturing:
    """Sentry as the program configures it, with a transport that keeps what would be sent."""
    configure_sentry(SentrySettings(SENTRY_DSN="https://key@sentry.example/1"))
    transport = Capturing()
    sentry_sdk.get_client().transport = transport
    return transport


@pytest.fixture(autouse=True)
def _empty_log_context() -> Iterator[None]:
    """Removes what a test bound to the log context."""
    yield
    log_context._bound.set({})


@pytest.fixture
def logging_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for hooks, name in ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(hooks, name, getattr(hooks, name))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    root = logging.getLogger()
    names = [*logs.OURS, "celery", "celery.app.trace"]
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in names}
    root_level = root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(root_level)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
