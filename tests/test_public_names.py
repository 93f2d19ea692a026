"""The public names are frozen: other people's code calls them. Adding one means adding it here; none is removed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import deepseek_v3

SETUP = Path(__file__).resolve().parents[1] / "setup.py"

PUBLIC_NAMES = [
    "DeepseekV3Config",
    "DeepseekV3ForCausalLM",
    "DeepseekV3ForSequenceClassification",
    "DeepseekV3ForTokenClassification",
    "DeepseekV3Model",
    "DeepseekV3PreTrainedModel",
    "DeepseekV3Tokenizer",
    "__version__",
]


def test_all_is_the_frozen_list() -> None:
    assert sorted(deepseek_v3.__all__) == sorted(PUBLIC_NAMES)


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_each_name_resolves_and_is_listed(name: str) -> None:
    assert name in dir(deepseek_v3)
    value = getattr(deepseek_v3, name)
    if isinstance(value, type):
        assert value.__name__ == name
        assert value.__module__.startswith("deepseek_v3.")


ROOMS = sorted(path.parent.name for path in Path(deepseek_v3.__file__).parent.glob("*/__init__.py"))


def test_a_room_is_loaded_when_it_is_asked_for() -> None:
    """In a fresh interpreter: here other tests have imported the rooms."""
    program = (
        "import sys, deepseek_v3\n"
        "rooms = lambda: {name for name in sys.argv[1:] if f'deepseek_v3.{name}' in sys.modules}\n"
        "assert set(sys.argv[1:]) <= set(dir(deepseek_v3)) and not rooms(), rooms()\n"
        "assert deepseek_v3.kernels.__name__ == 'deepseek_v3.kernels' and rooms() == {'kernels'}, rooms()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *ROOMS], capture_output=True, text=True, cwd=SETUP.parent)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ROOMS)
def test_each_room_resolves(name: str) -> None:
    assert getattr(deepseek_v3, name) is sys.modules[f"deepseek_v3.{name}"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = deepseek_v3.no_such_name


def test_the_version_is_the_one_in_setup_py() -> None:
    keywords = [node for node in ast.walk(ast.parse(SETUP.read_text())) if isinstance(node, ast.keyword)]
    assert [ast.literal_eval(k.value) for k in keywords if k.arg == "version"] == [deepseek_v3.__version__]
