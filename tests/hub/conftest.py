"""The stand-in for the Hub, and huggingface_hub pointed at it."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import close_session
from transformers.utils import hub as transformers_hub

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.hub import remote
from tests.finetuning.runs import make_tokenizer, save_base
from tests.hub.fakehub import FakeHub

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# A model

```python
repository = "."
```
"""
SECRET = "hf_" + "aB3" * 11
LEFT_OUT = (
    *(".env", ".lock", "NOTICE.pkl", "checkpoints", "notes.txt", "optimizer.pt", "rng_state.pth", "training_args.bin"),
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A fresh one, with the caches and the token of the client, and without waits between attempts.

    The client reads its environment on import, long before this: what it made of it is replaced.
    """
    with FakeHub(tmp_path / "hub") as fake:
        values = {
            "ENDPOINT": fake.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": fake.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
            "HF_TOKEN_PATH": str(tmp_path / "home" / "token"),
        }
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", fake.url)  # what module-level functions go through
        monkeypatch.setattr(transformers_hub, "_hf_api", None)  # transformers' own, made on first use
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setattr(time, "sleep", lambda _: None)
        monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
        close_session()
        yield fake
        close_session()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DeepseekV3ForCausalLM:
    return DeepseekV3ForCausalLM.from_pretrained(save_base(tmp_path_factory.mktemp("base") / "base"))


@pytest.fixture
def folder(tmp_path: Path, model: DeepseekV3ForCausalLM) -> Path:
    """A checkpoint of several shards, with things beside it that are nobody's business."""
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="200KB")
    make_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "run.json").write_text('{"finished": true}')
    (folder / "LICENSE-MODEL").write_text("MIT")
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", ".env", "notes.txt", ".lock", "NOTICE.pkl"):
        (folder / name).write_text(f"HF_TOKEN={SECRET}")
    (folder / "checkpoints").mkdir()
    return folder
