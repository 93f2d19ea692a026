"""Holds "Who may import whom" of the design, for every import in the package, those inside functions included."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "deepseek_v3"

# room -> the rooms it may import besides itself. "package" is deepseek_v3/__init__.py: the public names.
MODEL = {"modeling_deepseek_v3", "configuration", "tokenization", "kernels"}
MAY_IMPORT = {
    "cli": {"package", "recipe", "training", "finetuning", "conversion", "export", "evaluation", "hub"} | MODEL,
    "__main__": {"cli"},
    "package": (MODEL - {"kernels"}) | {"registration"},
    "registration": {"tokenization"},
    "gguf_header": set(),
    "optimizer": set(),
    "durable": set(),
    "process": set(),
    "recipe": set(),
    "training": {"package", "data", "durable", "optimizer", "process", "recipe"} | MODEL,
    "finetuning": {"package", "data", "durable", "optimizer", "process", "recipe", "quantization"} | MODEL,
    "export": {"package", "data", "durable", "evaluation", "gguf_header", "process", "quantization"} | MODEL,
    "evaluation": {"package", "data", "durable", "finetuning", "process", "quantization"} | MODEL,
    "hub": {"package", "durable", "gguf_header", "process"} | MODEL,
    "conversion": {"package", "data", "durable", "gguf_header", "optimizer", "process", "recipe"} | MODEL,
    "quantization": {"modeling_deepseek_v3", "configuration", "kernels"},
    "data": {"package"} | MODEL,
    "modeling_deepseek_v3": {"configuration", "kernels"},
    "configuration": set(),
    "tokenization": set(),
    "kernels": set(),
}
# (file, room): the only imports against this order, for what `from_pretrained` and `push_to_hub` have to reach
UPWARD = {
    ("modeling_deepseek_v3/checkpoint.py", "quantization"),
    ("modeling_deepseek_v3/checkpoint.py", "hub"),
}
# library -> the only rooms that may import it
ONLY_IN = {
    "accelerate": {"training"},
    "datasets": {"data"},
    "peft": {"finetuning"},
    "bitsandbytes": {"quantization"},
    "hqq": {"export"},
    "optimum": {"export"},
    "gguf": {"export"},
    "lm_eval": {"evaluation"},
    "trackio": {"training"},
    "triton": {"kernels"},
}
# room -> the only libraries it may import besides Python's own
ONLY_THESE: dict[str, set[str]] = {
    "gguf_header": set(),
    "configuration": {"transformers", "huggingface_hub"},
    "tokenization": {"transformers", "tokenizers", "huggingface_hub"},
    "kernels": {"torch", "triton"},
}
HEAVY = ("torch", "triton", "transformers", "accelerate", "peft", "datasets")


def imported_names(source: str, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of each import in a module that lives in `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def violations(source: str, path: Path) -> list[str]:
    """`path` is relative to the repository; the rooms are the modules and folders right below the package."""
    inside = path.parts[1:]
    room = "package" if inside == ("__init__.py",) else Path(inside[0]).stem
    if room not in MAY_IMPORT:
        return [f"{path}: the room {room!r} is new: say in MAY_IMPORT what it may import"]
    found = []
    for line, name in imported_names(source, path.parent.parts):
        top, _, rest = name.partition(".")
        if top == PACKAGE:
            below = rest.split(".")[0]
            there = ROOT / PACKAGE / below
            target = below if below in MAY_IMPORT or there.is_dir() or there.with_suffix(".py").exists() else "package"
            allowed = target == room or target in MAY_IMPORT[room] or ("/".join(inside), target) in UPWARD
        else:
            allowed = room in ONLY_IN.get(top, {room})
            if room in ONLY_THESE and top not in sys.stdlib_module_names:
                allowed = allowed and top in ONLY_THESE[room]
        if not allowed:
            found.append(f"{path}:{line}: {room} may not import {name}")
    return found


def test_each_room_imports_only_what_stands_below_it() -> None:
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    assert files
    found = [line for file in files for line in violations(file.read_text(), file.relative_to(ROOT))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "path, source",
    [
        ("training/loop.py", "from ..export import gguf"),
        ("training/loop.py", "def f():\n    from deepseek_v3.finetuning.lora import Lora"),
        ("training/loop.py", "import importlib\nimportlib.import_module('deepseek_v3.hub')"),
        ("kernels/rope/triton_impl.py", "from ...configuration import presets"),
        ("kernels/rope/triton_impl.py", "import transformers"),
        ("modeling_deepseek_v3/moe.py", "from accelerate import Accelerator"),
        ("modeling_deepseek_v3/moe.py", "import triton.language as tl"),
        ("configuration/__init__.py", "import torch"),
        ("configuration/__init__.py", "from .. import DeepseekV3Model"),
        ("tokenization/__init__.py", "from ..configuration import presets"),
        ("hub/push.py", "from deepseek_v3 import training"),
        ("new_room/__init__.py", ""),
    ],
)
def test_the_walker_sees_a_forbidden_import(path: str, source: str) -> None:
    assert len(violations(source, Path(PACKAGE, path))) == 1


@pytest.mark.parametrize(
    "path, source",
    [
        ("cli.py", "def f():\n    from .training.loop import train"),
        ("training/loop.py", "import accelerate\nfrom ..data.mixing import mix\nfrom . import recipe"),
        ("modeling_deepseek_v3/moe.py", "import torch\nfrom ..kernels import moe\nfrom .rope import rotate"),
        ("tokenization/__init__.py", "import json\nfrom tokenizers import Tokenizer"),
        ("hub/card.py", "from deepseek_v3 import __version__, DeepseekV3Config"),
    ],
)
def test_the_walker_lets_an_allowed_import_pass(path: str, source: str) -> None:
    assert violations(source, Path(PACKAGE, path)) == []


@pytest.mark.parametrize(
    "code",
    [
        "import deepseek_v3",
        "import deepseek_v3; deepseek_v3.__version__; dir(deepseek_v3)",
        "sys.argv = ['deepseek-v3', '--help']; from deepseek_v3.cli import main; main()",
    ],
)
def test_import_and_help_load_no_heavy_library(code: str) -> None:
    code = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit as exit:\n    assert not exit.code, exit.code\n"
        f"print(*sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == []
