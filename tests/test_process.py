"""What a run's record says of where it ran: the commit of this package's sources, and of no other repository."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import deepseek_v3
from deepseek_v3 import process


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "init.defaultBranch=main")
    done = subprocess.run(
        ["git", *identity, "-C", str(folder), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_versions_and_hardware() -> None:
    found = process.environment("cpu")
    assert (found["package"], found["torch"]) == (deepseek_v3.__version__, torch.__version__)
    assert (found["device"], found["threads"]) == ("cpu", torch.get_num_threads())
    assert found["hardware"].endswith(" cores") and found.keys() >= {"git", "python", "transformers"}


def test_the_commit_is_that_of_the_package(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "repository" / "deepseek_v3"
    package.mkdir(parents=True)
    shutil.copy(process.__file__, package)
    (package / "__init__.py").touch()
    monkeypatch.setattr(process, "__file__", str(package / "process.py"))
    assert process.environment("cpu")["git"] is None
    git(package.parent, "init")
    assert process.environment("cpu")["git"] is None  # installed inside somebody else's repository
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-m", "x")
    commit = git(package.parent, "rev-parse", "HEAD")
    assert process.environment("cpu")["git"] == commit
    (package.parent / "notes").touch()
    (package / "untracked").touch()
    assert process.environment("cpu")["git"] == commit
    (package / "__init__.py").write_text("x = 1\n")
    assert process.environment("cpu")["git"] == f"{commit}+changes"


def test_without_git(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert process.environment("cpu")["git"] is None


@pytest.mark.gpu
def test_the_peak_of_a_gpu_counts_from_its_reset() -> None:
    torch.ones(2**20, device="cuda")
    assert process.peak_memory("cuda") >= 2**22
    process.reset_peak_memory("cuda")
    assert process.peak_memory("cuda") == torch.cuda.memory_allocated()
