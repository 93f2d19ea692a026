"""The tests' environment. The variables come first: triton, torch and huggingface_hub read them once, on import."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in triton's CPU interpreter; 0 for the gpu tests
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny and xdist has a process per core; same sums in all
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
import sys
import zlib

import hypothesis
import numpy as np
import pytest

# No time limit per example, and the same examples in every run: the machines are shared.
hypothesis.settings.register_profile("repository", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repository")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds every generator from the test's name, so that a test draws the same numbers alone and in any order."""
    value = zlib.crc32(request.node.nodeid.encode())
    random.seed(value)
    np.random.seed(value)
    if torch := sys.modules.get("torch"):  # tests that need no torch do not wait for it
        torch.manual_seed(value)
    return value
