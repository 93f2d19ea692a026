"""What a fresh clone needs: the two scripts, the pins, and a wheel that holds the package and nothing else."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]
FIXED = {
    "torch": "2.13.0",
    "triton": "3.7.1",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "peft": "0.21.2",
    "datasets": "5.2.0",
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    matches = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    found = [(normal(match[1]), match[2]) for match in matches if match]
    assert len(dict(found)) == len(found), "a package is pinned twice"
    return dict(found)


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The keywords of setup.py."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", found.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return found


@pytest.mark.parametrize("name", ["run", ".ci/run"])
def test_scripts_are_executable_and_parse(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / name], check=True)


def test_help_of_run_sets_nothing_up(tmp_path: Path) -> None:
    for name in ("run", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run([tmp_path / "run", "--help"], env={}, capture_output=True, text=True, check=True)
    assert "./run test" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["constraints.txt", "run"]


def test_fixed_pins(pins: dict[str, str]) -> None:
    assert {name: pins.get(name) for name in FIXED} == FIXED


def test_each_requirement_has_a_pin(pins: dict[str, str], metadata: dict[str, Any]) -> None:
    requirements = metadata["install_requires"] + sum(metadata["extras_require"].values(), [])
    names = {normal(match[0]) for line in requirements if (match := re.match(r"[\w.-]+", line))}
    assert len(names) > 20
    assert names - set(pins) == set()


def test_run_installs_extras_that_exist(metadata: dict[str, Any]) -> None:
    match = re.search(r"^extras=(\S+)$", (ROOT / "run").read_text(), re.MULTILINE)
    assert match
    assert set(match[1].split(",")) <= set(metadata["extras_require"])


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv*", "outputs", "build", "*.egg-info", ".*_cache")
    )
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(pip, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 1_000_000
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"deepseek_v3"}
    package = source / "deepseek_v3"
    wanted = [p for p in package.rglob("*") if p.suffix in {".py", ".jinja", ".json", ".yaml"} or p.name == "py.typed"]
    assert {str(path.relative_to(source)) for path in wanted} <= set(names)
    assert "deepseek_v3/py.typed" in names
