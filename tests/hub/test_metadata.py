"""The front matter of cards: what the Hub's library and its rules refuse is refused here, with the field's name."""

import re
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from deepseek_v3.hub.metadata import base_models, read_card
from tests.hub.fakehub import FakeHub

GOOD = """---
license: apache-2.0
library_name: peft
pipeline_tag: text-generation
base_model: some/base
base_model_relation: adapter
tags: [deepseek_v3]
model-index:
- name: it
  results:
  - task: {type: text-generation}
    dataset: {type: stdlib, name: the library}
    metrics: [{type: bits_per_byte, value: 1.5}]
---

# It
"""


def test_a_good_card(hub: FakeHub) -> None:
    card = read_card(GOOD, "README.md")
    assert base_models(card) == ["some/base"] and card.data.eval_results[0].metric_value == 1.5
    card.validate()  # by the endpoint that the library asks
    assert hub.count("POST /api/validate-yaml") == 1
    assert base_models(read_card(GOOD.replace("some/base", "[a/b, c/d]"), "README.md")) == ["a/b", "c/d"]
    assert read_card(GOOD.replace("license: apache-2.0\n", ""), "README.md").data.license is None


CARDS = sorted((Path(__file__).resolve().parents[2] / "model_cards").glob("*/*.md"))


@pytest.mark.parametrize("path", CARDS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_published_cards(hub: FakeHub, path: Path) -> None:
    card = read_card(path.read_text(), path.name)
    ModelCard.load(path).validate()
    assert card.data.license == "apache-2.0" and all("n = " in r.metric_name for r in card.data.eval_results)
    assert "$" not in card.text and "None" not in card.text
    for name in re.findall(r"\]\(([^)]+)\)", card.text):
        assert (path.parent / name).is_file()


def test_what_the_library_writes_is_read() -> None:
    result = EvalResult("text-generation", "d", "D", "accuracy", 0.5, dataset_split="test", metric_name="n = 3")
    data = ModelCardData(license="mit", model_name="m", eval_results=[result], tags=["a"])
    card = read_card(f"---\n{data.to_yaml()}\n---\n# m\n", "README.md")
    assert card.data.eval_results == [result]


BAD = {
    "no front matter": ("---\n", "", "does not begin with YAML"),
    "no object": (GOOD.split("---\n")[1], "- a\n- b\n", "should be a dict"),
    "no YAML": ("license: apache-2.0", "license: [a", "the front matter is not YAML"),
    "licence": ("apache-2.0", "proprietary", "license is 'proprietary', allowed is one that https"),
    "licence as a list": ("license: apache-2.0", "license: [mit]", "license is .*allowed is text"),
    "other licence": ("apache-2.0", "other", "allowed is that with license_name and license_link"),
    "tags": ("[deepseek_v3]", "[1]", r"tags is \[1\], allowed is a list of texts"),
    "datasets": ("tags:", "datasets: [null]\ntags:", "datasets is .*allowed is a list of texts"),
    "pipeline": ("text-generation\nbase", "Text Generation\nbase", "pipeline_tag is 'Text Generation'"),
    "path as base": ("some/base", "/tmp/x/base", "base_model is '/tmp/x/base', allowed is the name of a repository"),
    "relation": ("relation: adapter", "relation: parent", "allowed is adapter, finetune, merge, quantized"),
    "relation to nothing": ("base_model: some/base\n", "", "the card says base_model_relation: adapter"),
    "no name": ("- name: it", "- title: it", "Invalid `model_index`"),
    "no dataset": ("    dataset: {type: stdlib, name: the library}\n", "", "Invalid `model_index`"),
    "task type": ("{type: text-generation}", "{type: 3}", "model-index: result 0: task.type is 3, allowed is text"),
    "no metrics": ("[{type: bits_per_byte, value: 1.5}]", "[]", r"result 0: metrics is \[\]"),
    "NaN": ("value: 1.5", "value: .nan", "result 0: bits_per_byte is nan, allowed is a number or text"),
    "null": ("value: 1.5", "value: null", "result 0: bits_per_byte is None"),
    "true": ("value: 1.5", "value: true", "result 0: bits_per_byte is True"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_card_is_refused(name: str) -> None:
    old, new, message = BAD[name]
    assert old in GOOD
    with pytest.raises(ValueError, match=f"some.md: .*{message}"):
        read_card(GOOD.replace(old, new), "some.md")


def test_a_card_of_the_library_s_template_is_readable() -> None:
    card = ModelCard.from_template(ModelCardData(license="mit", library_name="transformers"), model_id="a/b")
    read_card(str(card), "README.md")
