"""Checkpoints that several tests read."""

from pathlib import Path

import pytest
import torch

from tests.export.helpers import RAGGED, write_checkpoint


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model in fp32 with an MTP layer."""
    return write_checkpoint(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in bf16, with widths that are no multiple of 128."""
    return write_checkpoint(tmp_path_factory.mktemp("ragged"), torch.bfloat16, **RAGGED)
