"""The layers: the outer modules of worker → tasks → the leaf modules of worker → models. No cycles."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEAVES = {
    "worker.settings",
    "worker.storage.database",
    "worker.storage.encryption",
    "worker.errors",
    "worker.xone.client",
    "worker.xone.refusal_text",
    "worker.xone.transport",
    "worker.xone.oauth_token",
    "worker.messaging.topology",
    "worker.xone.circuit_breaker",
    "worker.xone.read_back",
    "worker.storage.rate_limiter",
    "worker.storage.pause_cache",
    "worker.outages",
    "worker.observability.sentry",
    "worker.runtime",
    "worker.storage.group_commit",
    "worker.observability.tracing",
    "worker.observability.log_context",
    "worker.observability.metrics",
    "worker.gevent_support",
}
# The demo sets what settings then reads, metrics sets where prometheus-client keeps its files, and gevent's part comes
# before pydantic can be imported.
READ_THE_ENVIRONMENT = {"worker.settings", "worker.demo", "worker.observability.metrics", "worker.gevent_support"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {
    name_of(path): ast.parse(path.read_text("utf-8"))
    for package in ("models", "tasks", "worker")
    for path in sorted((ROOT / package).rglob("*.py"))
}
TESTS = {
    name_of(path): ast.parse(path.read_text("utf-8"))
    for path in sorted((ROOT / "tests").rglob("*.py"))
    if "node_modules" not in path.parts
}


def imports_in(nodes: Iterator[ast.AST]) -> set[str]:
    """Modules of ours that are imported: ``from worker import broker`` imports worker.broker."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            names |= {
                f"{module}.{alias.name}" if f"{module}.{alias.name}" in SOURCES else module for alias in node.names
            }
    return {name for name in names if name in SOURCES}


def at_module_level(node: ast.AST) -> Iterator[ast.AST]:
    """All that runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_module_level(child)


ALL_IMPORTS = {name: imports_in(ast.walk(tree)) for name, tree in SOURCES.items()}
IMPORTED_AT_ONCE = {name: imports_in(at_module_level(tree)) for name, tree in SOURCES.items()}


def imported_by(tree: ast.AST) -> set[str]:
    """All modules that are imported, ours or not, wherever in the file. What is imported of one may be one itself."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def reads_the_environment(tree: ast.AST) -> bool:
    readers = ("environ", "environb", "getenv", "getenvb")
    return any(
        (isinstance(node, ast.Attribute) and node.attr in readers)
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and {a.name for a in node.names} & {*readers})
        for node in ast.walk(tree)
    )


def layer_of(module: str) -> int:
    """0 models, 1 leaves of worker, 2 tasks, 3 the rest of worker."""
    package = module.split(".")[0]
    if package == "worker":
        return 1 if module in LEAVES | {"worker"} else 3
    return {"models": 0, "tasks": 2}[package]


def test_the_leaves_exist() -> None:
    assert SOURCES.keys() >= LEAVES


def test_imports_go_downwards() -> None:
    upwards = {
        (module, imported)
        for module, names in ALL_IMPORTS.items()
        for imported in names
        if layer_of(imported) > layer_of(module)
    }

    assert upwards == set()


def test_there_are_imports_to_check() -> None:
    """The tests here would pass if imports were not found."""
    assert "models.booking" in ALL_IMPORTS["worker.xone.client"]
    assert "worker.messaging.topology" in ALL_IMPORTS["tasks.celery_tasks"]
    assert "worker.celery" in ALL_IMPORTS["worker.cli.app"] - IMPORTED_AT_ONCE["worker.cli.app"]
    assert "tests.support.jobs" in imported_by(TESTS["tests.unit.test_job"])
    assert "tests.chaos" in imported_by(TESTS["tests.acceptance.test_chaos"])


def test_no_module_imports_itself_by_way_of_others() -> None:
    try:
        order = list(TopologicalSorter(IMPORTED_AT_ONCE).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))

    assert order.index("models.booking") < order.index("worker.xone.client") < order.index("tasks.confirm")


def test_models_import_nothing_of_tasks_and_worker() -> None:
    models = {module: names for module, names in ALL_IMPORTS.items() if module.startswith("models")}

    assert {
        (module, name) for module, names in models.items() for name in names if not name.startswith("models")
    } == set()


def test_only_settings_read_the_environment() -> None:
    readers = {module for module, tree in SOURCES.items() if reads_the_environment(tree)}

    assert readers - READ_THE_ENVIRONMENT == set()
    assert "worker.demo" in readers


def test_nothing_of_the_program_imports_the_tests() -> None:
    """But for the stand-in of XONE, which may."""
    for module, tree in SOURCES.items():
        imported = {name.split(".")[0] for name in imported_by(tree)}
        assert not imported & {"tests", "pytest", "hypothesis"} or module.startswith("worker.sandbox"), module


def test_no_test_module_imports_another() -> None:
    """What two of them need lies in tests/support/, which imports none of them either."""
    offenders = {
        (module, name)
        for module, tree in TESTS.items()
        for name in imported_by(tree)
        if name in TESTS and (name.split(".")[-1].startswith("test_") or name == "tests.conftest")
    }

    assert offenders == set()
