"""One tiny base and one set of data files for all tests of this folder."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from deepseek_v3.finetuning.build import load_tokenizer
from tests.finetuning.runs import save_base, write_data


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_base(tmp_path_factory.mktemp("base"))
    (folder / "LICENSE").write_text("MIT")
    return folder


@pytest.fixture(scope="session")
def tokenizer(base: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(base))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each kind of data."""
    folder = tmp_path_factory.mktemp("data")
    for kind in ("two", "three", "messages", "completion", "text"):
        write_data(folder / kind, kind)
    return folder
