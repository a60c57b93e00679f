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


def layer_of(module: str) -> int:
    """0 models, 1 leaves of worker, 2 tasks, 3 the rest of worker."""
    package = module.split(".")[0]
    if package == "worker":
        return 1 if module in LEAVES | {"worker"} else 3
    return {"models": 0, "tasks": 2}[package]


def test_the_leaves_exist() -> None:
    assert SOURCES.keys() >= LEAVES


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_downwards(module: str) -> None:
    upwards = {imported for imported in ALL_IMPORTS[module] if layer_of(imported) > layer_of(module)}

    assert upwards == set()


def test_there_are_imports_to_check() -> None:
    """The tests here would pass if imports were not found."""
    assert "models.booking" in ALL_IMPORTS["worker.xone.client"]
    assert "worker.messaging.topology" in ALL_IMPORTS["tasks.celery_tasks"]
    assert "worker.celery" in ALL_IMPORTS["worker.cli.app"] - IMPORTED_AT_ONCE["worker.cli.app"]


def test_no_module_imports_itself_by_way_of_others() -> None:
    try:
        order = list(TopologicalSorter(IMPORTED_AT_ONCE).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))

    assert order.index("models.booking") < order.index("worker.xone.client") < order.index("tasks.confirm")


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("models")])
def test_models_import_nothing_of_tasks_and_worker(module: str) -> None:
    assert {name.split(".")[0] for name in ALL_IMPORTS[module]} <= {"models"}


@pytest.mark.parametrize("module", SOURCES)
def test_only_settings_read_the_environment(module: str) -> None:
    reads = {
        node.attr
        for node in ast.walk(SOURCES[module])
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "getenvb")
    }
    reads |= {
        alias.name
        for node in ast.walk(SOURCES[module])
        if isinstance(node, ast.ImportFrom) and node.module == "os"
        for alias in node.names
        if alias.name in ("environ", "environb", "getenv", "getenvb")
    }

    assert reads == set() or module in READ_THE_ENVIRONMENT


@pytest.mark.parametrize("module", [name for name in SOURCES if not name.startswith("worker.sandbox")])
def test_nothing_of_the_program_imports_the_tests(module: str) -> None:
    imported = {
        name.split(".")[0]
        for node in ast.walk(SOURCES[module])
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }

    assert not imported & {"tests", "pytest", "hypothesis"}
