"""Rules that no linter checks. Layers, and the one module for each library, are in pyproject.toml: ``make lint``."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("models", "tasks", "worker")
# All others use worker.settings, which reads it by pydantic. The demo sets what settings then reads, metrics sets the
# folder of prometheus-client, gevent_support and celery_environment run before pydantic or Celery can be imported.
READ_THE_ENVIRONMENT = {
    "worker.settings",  # the names only, for the doctor
    "worker.demo",
    "worker.observability.metrics",
    "worker.gevent_support",
    "worker.celery_environment",
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def sources(*packages: str) -> dict[str, ast.Module]:
    paths = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    return {module_of(path): ast.parse(path.read_text("utf-8")) for path in paths if "node_modules" not in path.parts}


SOURCES = sources(*PACKAGES)


def imported(tree: ast.Module) -> Iterator[str]:
    """The full names of modules and definitions that a module imports anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names)


def environment_names(tree: ast.Module) -> set[str]:
    """The functions and mappings by which a module reaches the environment."""
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {name.removeprefix("os.") for name in imported(tree) if name.startswith("os.")}
    return names & {"environ", "environb", "getenv", "getenvb"}


def test_each_module_has_a_layer() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = (contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    named = {name for layer in layers for name in re.split(r" [:|] ", layer)}
    children = {module_of(path) for package in ("tasks", "worker") for path in (ROOT / package).iterdir() if
                path.suffix == ".py" or (path / "__init__.py").exists()}  # fmt: skip

    assert children - {"tasks", "worker"} == {name for name in named if "." in name}


def test_the_listing_of_modules_equals_the_tree() -> None:
    page = (ROOT / "docs/architecture.md").read_text("utf-8")
    (listing,) = re.findall(r"^```text\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    listed, folder = set(), ""
    for line in listing.splitlines():
        if match := re.match(r"([\w/]+)/( |$)", line):
            folder = match[1].replace("/", ".")
        elif match := re.match(r"  (\w+)", line):
            listed.add(f"{folder}.{match[1]}")

    packages = {name for name in SOURCES if any(other.startswith(f"{name}.") for other in SOURCES)}
    assert listed == SOURCES.keys() - packages


def test_package_files_are_empty() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")]

    assert len(files) > 10
    assert [str(path.relative_to(ROOT)) for path in files if path.read_text()] == []


def test_imports_are_absolute() -> None:
    assert [name for name, tree in SOURCES.items() if any(target.startswith(".") for target in imported(tree))] == []


def test_only_settings_read_the_environment() -> None:
    assert {name for name, tree in SOURCES.items() if environment_names(tree)} == READ_THE_ENVIRONMENT


def test_the_program_imports_nothing_of_the_tests() -> None:
    of_tests = {
        name: [target for target in imported(tree) if target.split(".")[0] in ("tests", "pytest", "hypothesis")]
        for name, tree in SOURCES.items()
    }

    assert {name: found for name, found in of_tests.items() if found} == {}


def test_no_test_module_imports_another() -> None:
    """Shared helpers are in tests/support."""
    tests = sources("tests")
    found = {
        name: [target for target in imported(tree) if re.match(r"tests\.\w+\.test_", target)]
        for name, tree in tests.items()
    }

    assert "tests.unit.test_architecture" in found
    assert {name: others for name, others in found.items() if others} == {}
