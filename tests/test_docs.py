"""README and docs/ name only what exists, and their Python parses."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_v3.training import Recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TOP = r"(?:deepseek_v3|tests|examples|benchmarks|docs|model_cards)/[\w./-]*[\w/]"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def names(source: str) -> set[str]:
    """What a module defines at the top, and the members of its classes as `Class.member`."""
    found = set()
    for node in ast.parse(source).body:
        for inner in [node, *(node.body if isinstance(node, ast.ClassDef) else [])]:
            prefix = "" if inner is node else f"{node.name}."
            if isinstance(inner, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + inner.name)
            targets = inner.targets if isinstance(inner, ast.Assign) else [getattr(inner, "target", None)]
            found |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
    return found


def missing(text: str) -> Iterator[str]:
    """Each path, `path.py::name` and relative link of a page that leads nowhere."""
    for path, name in re.findall(rf"({TOP})(?:::([\w.]+))?", text):
        if not (ROOT / path).exists():
            yield path
        elif name and name not in names((ROOT / path).read_text()):
            yield f"{path}::{name}"


def links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target and not (page.parent / target).exists():
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    assert [*missing(page.read_text()), *links(page)] == []


@pytest.mark.parametrize("reference", ["tests/test_docs.py::nowhere", "docs/nowhere.md", "`deepseek_v3/nowhere/`"])
def test_a_wrong_reference_is_seen(reference: str) -> None:
    assert len(list(missing(f"see {reference}."))) == 1
    assert not list(missing("see tests/test_docs.py::names, `docs/`, deepseek_v3/training/balance.py."))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_parse(page: Path) -> None:
    for language, code in FENCE.findall(page.read_text()):
        if language == "python":
            ast.parse(code)


def test_the_folder_tree_of_the_readme_is_true() -> None:
    section = (ROOT / "README.md").read_text().split("## Folders")[1]
    lines = FENCE.findall(section)[0][1].splitlines()
    assert len(lines) > 20
    parents: list[str] = []
    for line in lines:
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        parents[depth:] = [name]
        path = ROOT / "".join(parents)
        assert path.is_dir() if name.endswith("/") else path.is_file(), path
    rooms = {path.parent.name for path in (ROOT / "deepseek_v3").glob("*/__init__.py")}
    assert {f"{room}/" for room in rooms} <= {line.split()[0] for line in lines}, "a room is not in the tree"


def test_each_recipe_field_is_in_the_table_with_its_default() -> None:
    page = (ROOT / "docs" / "pretraining.md").read_text()
    rows = dict(re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([^|]+) \|", page, re.MULTILINE))
    table = {}
    for fields, values in rows.items():
        table.update(zip(re.findall(r"\w+", fields), values.split(", "), strict=True))
    recipe = Recipe()
    expected = {field: getattr(recipe, field) for field in Recipe.__dataclass_fields__}
    shown = {True: "true", False: "false", None: "null"}
    for field, value in expected.items():
        text = shown[value] if value is None or isinstance(value, bool) else str(value)
        assert table.get(field, "").strip("` ") == text, field
    assert table.keys() == expected.keys()
