"""The pages: each link has a target, each named file exists, and the index links each page."""

import re
from pathlib import Path

from models.tables import Base
from tests.support.system import PROJECT

FOLDERS = ("docs", "examples", "tests", "deploy", "benchmarks")
PAGES = sorted(
    page
    for page in [*PROJECT.glob("*.md"), *(page for folder in FOLDERS for page in (PROJECT / folder).rglob("*.md"))]
    if "node_modules" not in page.parts
)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
NAMED_FILE = re.compile(r"`((?:worker|tasks|models|migrations|docs|tests|examples|benchmarks|deploy)/[\w./-]+)`")
FENCED = re.compile(r"^ *```.*?^ *```", flags=re.MULTILINE | re.DOTALL)
MAX_README = 175  # lines


def name_of(page: Path) -> str:
    return str(page.relative_to(PROJECT))


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text("utf-8"))


def links(page: Path) -> list[str]:
    return [target for target in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes from headings."""
    headings = re.findall(r"^#+ +(.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> list[str]:
    dead = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and (target.suffix != ".md" or anchor not in anchors(target))):
            dead.append(link)
    return dead


def test_links_have_targets() -> None:
    assert {(name_of(page), link) for page in PAGES for link in dead_links(page)} == set()


def test_named_files_exist() -> None:
    named = {(name_of(page), name) for page in PAGES for name in NAMED_FILE.findall(page.read_text("utf-8"))}

    assert {(page, name) for page, name in named if not (PROJECT / name).exists()} == set()


def test_modules_in_diagrams_exist() -> None:
    """Diagrams name modules without backquotes. test_architecture.py checks the list of modules."""
    page = (PROJECT / "docs/architecture.md").read_text("utf-8")
    named = set(re.findall(r"\b(?:worker|tasks|models)/[\w/]+\.py\b", page))

    assert len(named) > 15
    assert {name for name in named if not (PROJECT / name).exists()} == set()


def test_named_tests_exist() -> None:
    tests = {path.name for path in (PROJECT / "tests").rglob("test_*.py")}
    named = {(name_of(page), name) for page in PAGES for name in re.findall(r"\btest_\w+\.py\b", page.read_text())}

    assert {(page, name) for page, name in named if name not in tests} == set()


def test_the_page_on_personal_data_lists_each_column() -> None:
    rows = re.findall(r"^\| (.*?) \|", (PROJECT / "docs/privacy.md").read_text("utf-8"), flags=re.MULTILINE)
    places = [re.fullmatch(r"`(\w+)`: (.*)", place) for row in rows for place in row.split("; ")]
    listed = {(place[1], column) for place in places if place for column in re.findall(r"`(\w+)`", place[2])}

    assert listed == {(table.name, column.name) for table in Base.metadata.sorted_tables for column in table.columns}


def test_each_page_is_linked_from_the_index() -> None:
    index = PROJECT / "docs/index.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)}

    assert {page for page in (PROJECT / "docs").glob("*.md") if page != index} <= linked
    assert {PROJECT / "docs/adr", *PROJECT.glob("*.md")} <= linked


def test_the_readme_is_short_and_links_the_index() -> None:
    readme = PROJECT / "README.md"

    assert "docs/index.md" in links(readme)
    assert len(readme.read_text("utf-8").splitlines()) <= MAX_README


def test_dead_links_are_found(tmp_path: Path) -> None:
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# A title, with `code`: what?\n```sh\n# no title\n```\n")
    page.write_text(
        "[a](other.md) [b](other.md#a-title-with-code-what) [c](#here) [d](gone.md) [e](other.md#no-title) "
        "[f](#there) [g](https://example.com/x) ![h](gone.png) `[i](code.md)`\n\n## Here\n"
    )

    assert dead_links(page) == ["gone.md", "other.md#no-title", "#there", "gone.png"]
