"""One small model, in memory and on disk."""

import shutil
from pathlib import Path

import pytest

from deepseek_v3 import DeepseekV3ForCausalLM
from tests.modeling_deepseek_v3.helpers import build, tiny_config


@pytest.fixture(scope="module")
def model() -> DeepseekV3ForCausalLM:
    return build(tiny_config(num_nextn_predict_layers=2))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))
