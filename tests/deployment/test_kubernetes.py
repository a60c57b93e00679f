"""Kubernetes manifests, as kustomize makes them: checked by the published schemas, and against the program."""

import inspect
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support.deployment import MARGIN, SETTINGS, need_module, parse, read_sections, run
from tests.support.settings import REQUIRED
from tests.support.system import PROJECT
from worker.messaging import topology
from worker.storage import database

need_module("yaml")
need_module("jsonschema")
need_module("kubernetes_validate")

import jsonschema  # noqa: E402
import kubernetes_validate  # noqa: E402
import yaml  # noqa: E402

MANIFESTS = PROJECT / "deploy" / "kubernetes"
OVERLAYS = ["worker", "migrations", "example", "example/migrations"]
VERSIONS = ["1.31", "1.37"]  # the oldest with all used features, and a new one
SCHEMAS = Path(__file__).parent / "schemas"
CONNECTIONS = 97  # PostgreSQL's default for users other than administrators

Manifest = dict[str, Any]


@cache
def build(overlay: str) -> list[Manifest]:
    done = run("kubectl", "kustomize", MANIFESTS / overlay)
    assert (done.returncode, done.stderr) == (0, "")
    return list(yaml.safe_load_all(done.stdout))


def find(kind: str, overlay: str = "example") -> Manifest:
    (found,) = [manifest for manifest in build(overlay) if manifest["kind"] == kind]
    return found


def secrets() -> list[Manifest]:
    return list(yaml.safe_load_all((MANIFESTS / "secrets.example.yaml").read_text()))


def pod(manifest: Manifest) -> Manifest:
    return dict(manifest["spec"]["template"]["spec"])


def container(manifest: Manifest) -> Manifest:
    (found,) = pod(manifest)["containers"]
    return dict(found)


def closed(schema: Any) -> Any:
    """The schema of a custom resource, with unknown keys forbidden: the API server drops them silently."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: closed(part) for key, part in schema.items()}
    if "properties" in schema and schema.get("type") == "object":
        strict.setdefault("additionalProperties", False)
    return strict


def check(manifest: Manifest, version: str) -> None:
    """Raises jsonschema.ValidationError if the manifest violates the schema of its kind."""
    group, _, of_group = manifest["apiVersion"].rpartition("/")
    if "." in group and not group.endswith(".k8s.io"):
        schema = closed(json.loads((SCHEMAS / f"{manifest['kind'].lower()}_{of_group}.json").read_text()))
        schema["properties"]["metadata"] = {"type": "object"}
        jsonschema.validate(manifest, schema)
    else:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", [*OVERLAYS, "secrets"])
def test_every_manifest_follows_the_published_schema(overlay: str, version: str) -> None:
    manifests = secrets() if overlay == "secrets" else build(overlay)

    assert manifests
    for manifest in manifests:
        check(manifest, version)


@pytest.mark.parametrize("kind", ["Deployment", "ScaledObject", "TriggerAuthentication", "PodMonitor", "NetworkPolicy"])
def test_a_misspelt_key_is_found(kind: str) -> None:
    manifest = find(kind)

    with pytest.raises(jsonschema.ValidationError, match=r"Additional properties"):
        check({**manifest, "spec": {**manifest["spec"], "replica": 2}}, VERSIONS[-1])


def test_the_example_has_all_parts() -> None:
    kinds = sorted(manifest["kind"] for manifest in build("example"))

    assert kinds == [
        *("ConfigMap", "Deployment", "NetworkPolicy", "PodDisruptionBudget"),
        *("PodMonitor", "ScaledObject", "TriggerAuthentication"),
    ]
    assert {manifest["metadata"]["namespace"] for manifest in build("example")} == {"confirm-offer"}
    assert container(find("Deployment"))["image"] == container(find("Job", "example/migrations"))["image"]
    assert all("namespace" not in manifest["metadata"] for manifest in build("worker") + build("migrations"))


@pytest.mark.parametrize(("kind", "overlay"), [("Deployment", "worker"), ("Job", "migrations")])
def test_pods_are_restricted(kind: str, overlay: str) -> None:
    """Pods follow the Pod Security Standard "restricted", and have a read-only root."""
    manifest = find(kind, overlay)

    assert pod(manifest)["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container(manifest)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert [mount["mountPath"] for mount in container(manifest)["volumeMounts"]] == ["/tmp"]
    assert pod(manifest)["automountServiceAccountToken"] is False


def test_pods_run_commands_that_exist() -> None:
    worker = container(find("Deployment"))

    assert parse(worker["args"]) == "worker"
    assert parse(container(find("Job", "migrations"))["args"]) == "upgrade"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        command = worker[probe]["exec"]["command"]
        assert (command[0], parse(command[1:])) == ("confirm-offer", "health")


def test_a_worker_that_waits_for_a_server_is_not_restarted() -> None:
    probes = {name: container(find("Deployment"))[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}

    assert {name for name, probe in probes.items() if "--live" in probe["exec"]["command"]} == {"startup", "liveness"}


def test_a_worker_has_time_to_finish_its_calls() -> None:
    timeout = float(find("ConfigMap", "worker")["data"]["XONE_TIMEOUT"])

    assert pod(find("Deployment", "worker"))["terminationGracePeriodSeconds"] >= timeout + MARGIN


def environment_of(manifest: Manifest) -> dict[str, str]:
    """The environment of a pod: plain values, and the names of variables from a Secret."""
    return {entry["name"]: entry.get("value", "from a Secret") for entry in container(manifest)["env"]}


def test_workers_get_all_required_settings_and_only_settings() -> None:
    plain = find("ConfigMap")["data"]
    environment = environment_of(find("Deployment"))

    assert (plain.keys() | environment.keys()) <= SETTINGS.keys()
    assert REQUIRED.keys() <= environment.keys()
    read_sections({**plain, **REQUIRED, "METRICS_PORT": environment["METRICS_PORT"]})
    assert container(find("Deployment"))["envFrom"] == [
        {"configMapRef": {"name": find("ConfigMap")["metadata"]["name"]}}
    ]
    assert environment_of(find("Job", "migrations")).keys() == {"DATABASE_URL"}


def references() -> Iterator[tuple[str, str, bool]]:
    """All references of the manifests to Secrets: Secret, key, and whether it may be missing."""
    for manifest in (find("Deployment"), find("Job", "migrations")):
        for entry in container(manifest)["env"]:
            if "valueFrom" in entry:
                key = entry["valueFrom"]["secretKeyRef"]
                assert key["key"] == entry["name"]
                yield key["name"], key["key"], key.get("optional", False)
    for target in find("TriggerAuthentication")["spec"]["secretTargetRef"]:
        yield target["name"], target["key"], False


def test_secrets_are_referenced_and_listed_in_the_example() -> None:
    listed = {(secret["metadata"]["name"], key) for secret in secrets() for key in secret["stringData"]}

    assert {(secret, key) for secret, key, is_optional in references() if not is_optional} == listed
    assert all(re.fullmatch("<.+>", value) for secret in secrets() for value in secret["stringData"].values())
    assert not [manifest for overlay in OVERLAYS for manifest in build(overlay) if manifest["kind"] == "Secret"]


def test_everything_selects_the_workers() -> None:
    labels = find("Deployment")["spec"]["template"]["metadata"]["labels"]
    selectors = [
        find("Deployment")["spec"]["selector"],
        find("PodDisruptionBudget")["spec"]["selector"],
        find("NetworkPolicy")["spec"]["podSelector"],
        find("PodMonitor")["spec"]["selector"],
        pod(find("Deployment"))["topologySpreadConstraints"][0]["labelSelector"],
    ]

    assert all(selector == {"matchLabels": labels} for selector in selectors)
    assert find("Job", "migrations")["spec"]["template"]["metadata"]["labels"] != labels


def test_metrics_are_found_at_the_port_that_serves_them() -> None:
    (port,) = container(find("Deployment"))["ports"]

    assert str(port["containerPort"]) == environment_of(find("Deployment"))["METRICS_PORT"]
    assert find("PodMonitor")["spec"]["podMetricsEndpoints"][0]["port"] == port["name"]
    (ingress,) = find("NetworkPolicy")["spec"]["ingress"]
    assert ingress["ports"] == [{"port": port["name"], "protocol": "TCP"}]


def test_only_prometheus_may_connect_to_a_worker() -> None:
    (ingress,) = find("NetworkPolicy")["spec"]["ingress"]

    (peer,) = ingress["from"]
    assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}
    assert peer["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "prometheus"}


def test_the_number_of_workers_follows_the_number_of_jobs() -> None:
    scaled = find("ScaledObject")["spec"]
    (trigger,) = scaled["triggers"]
    connections = inspect.signature(database.connect).parameters["connections"].default

    assert trigger["metadata"]["queueName"] == topology.JOBS
    assert trigger["authenticationRef"]["name"] == find("TriggerAuthentication")["metadata"]["name"]
    assert scaled["scaleTargetRef"]["name"] == find("Deployment")["metadata"]["name"]
    assert "replicas" not in find("Deployment")["spec"]
    assert find("Deployment", "worker")["spec"]["replicas"] == scaled["minReplicaCount"]
    assert (scaled["maxReplicaCount"] + 1) * connections <= CONNECTIONS  # and one more during a rollout


def test_the_documented_rollout_names_existing_objects() -> None:
    document = (PROJECT / "docs" / "deployment.md").read_text("utf-8")
    commands = "\n".join(line for line in document.splitlines() if line.startswith("kubectl"))
    folders = re.findall(r"-k deploy/kubernetes/(\S+)", commands)

    assert folders == ["example/migrations", "example/migrations", "example"]
    assert set(re.findall(r"-n (\S+)", commands)) == {find("Deployment")["metadata"]["namespace"]}
    assert set(re.findall(r"job/(\S+)", commands)) == {find("Job", "example/migrations")["metadata"]["name"]}
    assert set(re.findall(r"deployment/(\S+)", commands)) == {find("Deployment")["metadata"]["name"]}
