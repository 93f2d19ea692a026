"""The public names are frozen: other people's code calls them. Adding one means adding it here; none is removed."""

import ast
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


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = deepseek_v3.no_such_name


def test_the_version_is_the_one_in_setup_py() -> None:
    keywords = [node for node in ast.walk(ast.parse(SETUP.read_text())) if isinstance(node, ast.keyword)]
    assert [ast.literal_eval(k.value) for k in keywords if k.arg == "version"] == [deepseek_v3.__version__]
