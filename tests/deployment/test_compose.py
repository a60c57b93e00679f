"""docker-compose.yml and Dockerfile: checked by the specification, by a linter, and against the program."""

import json
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import pytest

from tests.support import dockerfile
from tests.support.deployment import MARGIN, SETTINGS, default_xone_timeout, need_module, parse, read_sections, run
from tests.support.settings import REQUIRED
from tests.support.system import PROJECT

COMPOSE = PROJECT / "docker-compose.yml"
PASSWORDS = {"RABBITMQ_PASSWORD": "of-rabbitmq", "POSTGRES_PASSWORD": "of-postgresql"}
MONITORING = PROJECT / "deploy" / "prometheus"
OURS = {"migrations", "worker", "sandbox"}


def config(file: Path = COMPOSE, **environment: str) -> Any:
    """Runs Compose on the file, which checks it by the JSON Schema of the specification."""
    return run(
        "docker-compose",
        *("--file", file, "--project-directory", PROJECT, "--env-file", "/dev/null", "--profile", "*"),
        *("config", "--no-env-resolution", "--format", "json"),
        **environment,
    )


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    done = config(**PASSWORDS)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)["services"])


@pytest.fixture(scope="module")
def image() -> list[dockerfile.Instruction]:
    return dockerfile.stages(dockerfile.read(PROJECT / "Dockerfile"))[-1]


def only(image: list[dockerfile.Instruction], name: str) -> dockerfile.Instruction:
    (found,) = [instruction for instruction in image if instruction.name == name]
    return found


def healthcheck(service: dict[str, Any], image: list[dockerfile.Instruction]) -> list[str] | None:
    """The command of the healthcheck; None if there is none."""
    settings = service.get("healthcheck", {})
    if settings.get("disable"):
        return None
    if "test" in settings:
        assert settings["test"][0] == "CMD"
        return list(settings["test"][1:])
    text = only(image, "HEALTHCHECK").text.removeprefix("CMD ") if service["image"] == "confirm-offer" else "[]"
    return json.loads(text) or None


def test_the_compose_file_follows_the_specification() -> None:
    done = config(**PASSWORDS)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("    expose:", "    exposes:"),
        ("condition: service_started", "condition: service_begun"),
        ("  grafana:\n  # end", "  grafana: [x]"),
        ("volumes:\n  rabbitmq:", "volumes:\n  rabbit:"),
    ],
    ids=["key", "value", "type", "reference"],
)
def test_a_violation_of_the_specification_is_found(right: str, wrong: str, tmp_path: Path) -> None:
    text = COMPOSE.read_text() + "  # end\n"
    assert right in text
    (tmp_path / "compose.yml").write_text(text.replace(right, wrong))

    assert config(tmp_path / "compose.yml", **PASSWORDS).returncode != 0


@pytest.mark.parametrize("name", PASSWORDS)
def test_a_missing_password_is_named(name: str) -> None:
    done = config(**{other: value for other, value in PASSWORDS.items() if other != name})

    assert done.returncode != 0
    assert f"set {name} in .env" in done.stderr


def test_variables_of_the_compose_file_are_in_the_example() -> None:
    read = set(re.findall(r"\$\{([A-Z_]+)", COMPOSE.read_text()))
    listed = set(re.findall(r"^#? ?([A-Z_]+)=", (PROJECT / ".env.example").read_text(), re.MULTILINE))

    assert read == PASSWORDS.keys()
    assert read <= listed


def test_no_secret_is_in_the_file() -> None:
    need_module("yaml")
    import yaml

    written = yaml.safe_load(COMPOSE.read_text())["services"]
    for service in written.values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASS|SECRET|KEY|TOKEN|DSN|URL", name):
                assert "${" in value, name


def test_the_environment_of_our_services_consists_of_settings(services: dict[str, Any]) -> None:
    for name in OURS:
        environment = services[name].get("environment", {})
        assert environment.keys() <= SETTINGS.keys()
        read_sections({**REQUIRED, **environment})


def test_images_are_pinned_by_digest(services: dict[str, Any]) -> None:
    bases = re.findall(r"^(?:FROM |# syntax=)(\S+)", (PROJECT / "Dockerfile").read_text(), re.MULTILINE)
    images = [service["image"] for service in services.values() if service["image"] != "confirm-offer"]

    assert len(images) >= 4
    assert len(bases) == 3
    assert [
        image for image in {*bases, *images} if not re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", image)
    ] == []


def test_the_sandbox_has_no_secret_of_the_workers(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("XONE_CLIENT_SECRET=secret\nDATA_KEYS=key\n")
    services = run(
        "docker-compose",
        *("--file", COMPOSE, "--project-directory", tmp_path, "--profile", "*", "config", "--format", "json"),
        **PASSWORDS,
    )
    environments = {
        name: service.get("environment", {}) for name, service in json.loads(services.stdout)["services"].items()
    }

    assert {"XONE_CLIENT_SECRET", "DATA_KEYS", "DATABASE_URL"} <= environments["worker"].keys()
    assert not environments["sandbox"]


@pytest.mark.slow
def test_the_bill_of_materials_lists_each_package_of_the_image(tmp_path: Path) -> None:
    sbom = tmp_path / "sbom.json"
    (installed,) = re.findall(r"/app/bin/python install .* -r (\S+)", (PROJECT / "Dockerfile").read_text())
    assert f"cyclonedx_py requirements {installed} " in (PROJECT / "Makefile").read_text()
    command = ["-m", "cyclonedx_py", "requirements", PROJECT / installed, "--of", "JSON", "-o", sbom]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)

    components = {f"{each['name'].lower()}=={each['version']}" for each in json.loads(sbom.read_text())["components"]}
    locked = re.findall(r"^([\w.-]+==[^ ;]+)", (PROJECT / installed).read_text(), re.MULTILINE)
    assert components == set(locked)


def test_our_services_run_commands_that_exist(services: dict[str, Any]) -> None:
    commands = {name: parse(services[name]["command"]) for name in OURS}

    assert commands == {"migrations": "upgrade", "worker": "worker", "sandbox": "sandbox"}
    with pytest.raises(click.ClickException):
        parse(["sandbox", "--ports", "1"])


def test_all_services_share_one_image_without_root_or_new_privileges(services: dict[str, Any]) -> None:
    for name in OURS:
        service = services[name]
        assert (service["image"], service["read_only"], service["cap_drop"]) == ("confirm-offer", True, ["ALL"])
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "user" not in service


def test_every_lasting_service_has_a_healthcheck_and_restarts(
    services: dict[str, Any], image: list[dockerfile.Instruction]
) -> None:
    assert services["migrations"]["restart"] == "no"
    for name, service in services.items():
        assert (healthcheck(service, image) is None) == (name == "migrations"), name
        assert name == "migrations" or service["restart"] == "unless-stopped"


def test_healthchecks_ask_what_their_service_serves(
    services: dict[str, Any], image: list[dockerfile.Instruction]
) -> None:
    worker = healthcheck(services["worker"], image)
    assert worker is not None
    assert (worker[0], parse(worker[1:])) == ("confirm-offer", "health")
    for name in ("sandbox", "prometheus", "grafana"):
        command = " ".join(healthcheck(services[name], image) or [])
        (port,) = services[name]["ports"]
        assert f"http://127.0.0.1:{port['target']}/" in command


def test_each_service_waits_for_its_dependencies(services: dict[str, Any], image: list[dockerfile.Instruction]) -> None:
    waits = {name: service.get("depends_on", {}) for name, service in services.items()}

    assert {other: dependency["condition"] for other, dependency in waits["worker"].items()} == {
        "rabbitmq": "service_healthy",
        "postgresql": "service_healthy",
        "migrations": "service_completed_successfully",
    }
    assert waits["migrations"].keys() == {"postgresql"}
    assert waits["grafana"].keys() == {"prometheus"}
    for others in waits.values():
        for other, dependency in others.items():
            assert dependency["condition"] != "service_healthy" or healthcheck(services[other], image)


def test_urls_name_services_and_their_ports(services: dict[str, Any]) -> None:
    environment = services["worker"]["environment"]
    for url, server in (environment["BROKER_URL"], "rabbitmq"), (environment["DATABASE_URL"], "postgresql"):
        host, port = re.findall(r"@([a-z]+):(\d+)/", url)[0]
        assert host == server
        assert int(port) in [published["target"] for published in services[server]["ports"]]
    assert environment["METRICS_PORT"] in services["worker"]["expose"]
    (sandbox,) = services["sandbox"]["ports"]
    assert str(sandbox["target"]) in services["sandbox"]["command"]


def test_ports_are_bound_to_this_machine_only(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]

    assert len(ports) == 6
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}


def test_a_worker_has_time_to_finish_its_calls(services: dict[str, Any]) -> None:
    minutes, seconds = re.fullmatch(r"(\d+)m(\d+)s", services["worker"]["stop_grace_period"]).groups()  # type: ignore[union-attr]

    assert timedelta(minutes=int(minutes), seconds=int(seconds)).total_seconds() >= default_xone_timeout() + MARGIN


def test_lasting_data_is_in_volumes(services: dict[str, Any]) -> None:
    for name in ("rabbitmq", "postgresql", "prometheus", "grafana"):
        assert any(mount["type"] == "volume" for mount in services[name]["volumes"])
    for mount in (mount for service in services.values() for mount in service.get("volumes", [])):
        assert mount["type"] == "volume" or mount["read_only"]


def test_prometheus_and_grafana_find_their_mounted_files(services: dict[str, Any]) -> None:
    need_module("yaml")
    import yaml

    def written(path: Path) -> Any:
        return yaml.safe_load((PROJECT / "deploy" / path).read_text())

    mounts = {
        mount["target"]: Path(mount["source"])
        for name in ("prometheus", "grafana")
        for mount in services[name]["volumes"]
        if mount["type"] == "bind"
    }
    prometheus = written(Path("prometheus/prometheus.yml"))
    found = [source for scrape in prometheus["scrape_configs"] for source in scrape.get("dns_sd_configs", [])]
    (provider,) = written(Path("grafana/provisioning/dashboards/confirm-offer.yml"))["providers"]
    (source,) = written(Path("grafana/provisioning/datasources/prometheus.yml"))["datasources"]
    (port,) = services["prometheus"]["ports"]

    assert all(path.is_dir() for path in mounts.values())
    assert all((MONITORING / file).is_file() for file in prometheus["rule_files"])
    assert [(each["names"], str(each["port"])) for each in found] == [(["worker"], services["worker"]["expose"][0])]
    assert list(mounts[provider["options"]["path"]].glob("*.json"))
    assert source["url"] == f"http://prometheus:{port['target']}"


def test_the_linter_finds_nothing_in_the_dockerfile() -> None:
    done = run("hadolint", "--failure-threshold", "style", "Dockerfile")

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_image_runs_in_exec_form_and_not_as_root(image: list[dockerfile.Instruction]) -> None:
    assert only(image, "ENTRYPOINT").words == ["confirm-offer"]
    assert parse(only(image, "CMD").words) == "worker"
    assert only(image, "ENTRYPOINT").is_exec
    assert only(image, "CMD").is_exec
    assert only(image, "USER").text == "10001:10001"
    assert only(image, "STOPSIGNAL").text == "SIGTERM"


def test_nothing_is_installed_in_the_last_stage(image: list[dockerfile.Instruction]) -> None:
    assert not re.search("pip|apt|curl|wget", only(image, "RUN").text)
    assert only(image, "COPY").flags == {"from": "build"}


def test_the_build_context_holds_exactly_what_the_build_copies() -> None:
    ignore = dockerfile.Ignore((PROJECT / ".dockerignore").read_text())
    copied = [
        word
        for instruction in dockerfile.read(PROJECT / "Dockerfile")
        if instruction.name == "COPY" and "from" not in instruction.flags
        for word in instruction.words[:-1]
    ]

    assert all(any(ignore.files(PROJECT, source)) for source in copied)
    for excluded in (".env", ".git/config", "tests/conftest.py", "deploy/x", "worker/__pycache__/cli.pyc", ".venv/x"):
        assert ignore.excludes(Path(excluded)), excluded
