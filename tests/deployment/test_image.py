"""The Dockerfile is built and docker-compose.yml is run without an engine: each instruction, and each command."""

import json
import re
import secrets
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from psycopg import sql

from tests.support import containers
from tests.support.containers import Container, Image
from tests.support.deployment import need, run
from tests.support.servers import PostgreSQL, RabbitMQ, free_port, postgresql_program
from tests.support.system import PROJECT, until

pytestmark = pytest.mark.slow

DOCUMENT = (PROJECT / "docs" / "deployment.md").read_text("utf-8")
ENV_FILE = DOCUMENT.partition("cat > .env <<EOF\n")[2].partition("EOF\n")[0]
((JOB, ENQUEUE),) = re.findall(r"echo '(\{.+\})' \|\n  docker compose exec -T worker (.+)", DOCUMENT)
(SHOW,) = re.findall(r"docker compose exec worker (.+ show .+)", DOCUMENT)

Start = Callable[..., Container]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    reason = containers.missing()
    need(reason is None, str(reason))
    return containers.build(PROJECT, tmp_path_factory.mktemp("image"))


@pytest.fixture
def start(image: Image) -> Iterator[Start]:
    """Starts the image as ``docker run`` does. After the test, ends containers that still run."""
    started: list[Container] = []

    def start(*command: str, **environment: str) -> Container:
        container = Container(image, [*image.entrypoint, *(command or image.cmd)], environment, is_hardened=True)
        started.append(container)
        return container

    yield start
    for container in started:
        container.kill()


def test_the_image_has_the_program_and_no_build_tools(image: Image) -> None:
    packages = {path.name.split("-")[0].lower() for path in (image.root / "app").rglob("*.dist-info")}

    assert {"confirm_offer", "celery", "psycopg"} <= packages
    assert not packages & {"pip", "setuptools", "wheel", "uv", "pytest", "mypy", "ruff"}
    assert not [path.name for path in (image.root / "app/bin").iterdir() if path.name.startswith("pip")]
    assert not (image.root / "build").exists()
    assert not (image.root / "tools").exists()
    assert not (image.root / "wheels").exists()
    assert next((image.root / "app").rglob("worker/sandbox/page.html"))
    assert next((image.root / "app").rglob("migrations/versions/0001_*.py"))


def test_the_program_runs_as_a_user_without_rights(image: Image, start: Start) -> None:
    identity = Container(
        image, ["/bin/sh", "-c", "id -u; id -g; grep CapEff /proc/1/status; touch /app/x"], {}, True
    ).finish()

    assert identity.stdout.split("\n")[:3] == ["10001", "10001", "CapEff:\t0000000000000000"]
    assert "Read-only file system" in identity.stdout
    assert "confirm-offer:x:10001:10001:" in (image.root / "etc/passwd").read_text()
    assert start("--version").finish().stdout.startswith("confirm-offer, version")
    assert len(start("keygen").finish().stdout.strip()) == 44


def test_a_wrong_setting_is_named_with_exit_code_2(start: Start) -> None:
    ended = start("worker").finish()

    assert ended.returncode == 2
    assert "DATA_KEYS is not set" in ended.stdout


class Composed:
    """docker-compose.yml as containers, with private servers instead of rabbitmq and postgresql."""

    def __init__(self, services: dict[str, Any], replacements: dict[str, str], start: Start) -> None:
        self._services, self._replacements, self._start = services, replacements, start

    def up(self, name: str) -> Container:
        service = self._services[name]
        environment = {key: self._replaced(value) for key, value in service.get("environment", {}).items()}
        return self._start(*map(self._replaced, service["command"]), **environment)

    def healthcheck(self, name: str) -> list[str]:
        return [self._replaced(word) for word in self._services[name]["healthcheck"]["test"][1:]]

    def _replaced(self, text: str) -> str:
        for original, replacement in self._replacements.items():
            text = text.replace(original, replacement)
        return text


@pytest.fixture
def composed(
    start: Start, rabbitmq: RabbitMQ, broker_url: str, postgresql: PostgreSQL, tmp_path: Path
) -> Iterator[Composed]:
    rabbitmq_password, postgresql_password = secrets.token_hex(16), secrets.token_hex(16)
    vhost = broker_url.rpartition("/")[2]
    rabbitmq.ctl("add_user", "confirm-offer", rabbitmq_password)
    rabbitmq.ctl("set_permissions", "-p", vhost, "confirm-offer", ".*", ".*", ".*")
    with postgresql.connect() as connection:
        connection.execute(sql.SQL("CREATE ROLE confirm_offer LOGIN PASSWORD {}").format(postgresql_password))
    postgresql.create_database("confirm_offer")
    with postgresql.connect() as connection:
        connection.execute("ALTER DATABASE confirm_offer OWNER TO confirm_offer")
    values = {
        "$(docker run --rm confirm-offer keygen)": start("keygen").finish().stdout.strip(),
        "RABBITMQ_PASSWORD=$(openssl rand -hex 16)": f"RABBITMQ_PASSWORD={rabbitmq_password}",
        "POSTGRES_PASSWORD=$(openssl rand -hex 16)": f"POSTGRES_PASSWORD={postgresql_password}",
    }
    env_file = ENV_FILE
    for command, value in values.items():
        assert command in env_file
        env_file = env_file.replace(command, value)
    (tmp_path / ".env").write_text(env_file)
    config = run(
        "docker-compose",
        *("--file", PROJECT / "docker-compose.yml", "--project-directory", tmp_path, "--profile", "*"),
        *("config", "--format", "json"),
    )
    assert config.returncode == 0, config.stderr
    sandbox = str(free_port())
    replacements = {
        "@rabbitmq:5672//": f"@127.0.0.1:{rabbitmq.port}/{vhost}",
        "@postgresql:5432/": f"@127.0.0.1:{postgresql.port}/",
        "sandbox:8900": f"127.0.0.1:{sandbox}",
        "8900": sandbox,
        "9100": str(free_port()),
    }
    yield Composed(json.loads(config.stdout)["services"], replacements, start)
    postgresql.drop_database("confirm_offer")
    with postgresql.connect() as connection:
        connection.execute("DROP ROLE confirm_offer")
    rabbitmq.ctl("delete_user", "confirm-offer")


def is_healthy(container: Container, check: list[str]) -> Callable[[], bool]:
    def healthy() -> bool:
        assert container.process.poll() is None, container.finish().stdout
        return container.execute(check).returncode == 0

    return healthy


def test_the_composed_system_confirms_an_offer_and_stops_in_order(composed: Composed, image: Image) -> None:
    migrated = composed.up("migrations").finish()
    sandbox = composed.up("sandbox")
    until(is_healthy(sandbox, composed.healthcheck("sandbox")), 60.0)
    worker = composed.up("worker")
    before = worker.execute(image.healthcheck)
    until(is_healthy(worker, image.healthcheck), 60.0, every=1.0)
    enqueued = worker.execute(ENQUEUE.split(), JOB)

    def confirmed() -> Any:
        shown = worker.execute([*SHOW.split(), "--json"])
        found = json.loads(shown.stdout) if shown.returncode == 0 else {}
        return found if found.get("state") == "confirmed" else None

    offer = until(confirmed, every=1.0)
    ended = worker.stop(90.0)

    assert (migrated.returncode, enqueued.returncode) == (0, 0), migrated.stdout + enqueued.stderr
    assert before.returncode == 1
    assert [event["type"] for event in offer["events"]] == ["booking.confirmed"]
    assert ended.returncode == 0, ended.stdout
    assert "Traceback" not in ended.stdout


def test_servers_have_the_commands_that_their_healthchecks_run(
    composed: Composed, rabbitmq: RabbitMQ, postgresql: PostgreSQL
) -> None:
    program, *options = composed.healthcheck("postgresql")
    ready = subprocess.run([postgresql_program(program), *options], env={"PGPORT": str(postgresql.port)})
    broker = subprocess.run(composed.healthcheck("rabbitmq"), env=rabbitmq.shell, capture_output=True, text=True)

    assert ready.returncode == 0
    assert broker.returncode == 0, broker.stderr
