"""A card on the disk: written anew while it is as it was written, and kept once somebody changed it."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from deepseek_v3.hub.card import Measured, load_card, results, write_card
from tests.hub.conftest import CARD

KEPT = "is not as it was written here, and is kept; delete it for a new one"


def test_a_card_that_nobody_changed_is_written_anew(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "README.md").write_text(" \n")
    for text in (CARD, CARD.replace("# A model", "# Another"), CARD):
        path = write_card(tmp_path, text)
        assert path == tmp_path / "README.md" and path.read_text().startswith(text)
        assert "SHA-256" in path.read_text() and str(load_card(path)) == text
    assert not capsys.readouterr().out


CHANGES = [("apache-2.0", "mit"), ("# A model", "# Mine"), ("-->\n", "-->\n\nMore.\n"), ("\n", "\r\n")]


@pytest.mark.parametrize("old, new", CHANGES)
def test_a_changed_card_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture, old: str, new: str) -> None:
    path = write_card(tmp_path, CARD)
    changed = path.read_bytes().replace(old.encode(), new.encode())
    path.write_bytes(changed)
    assert write_card(tmp_path, CARD + "\nNewer.\n") == path
    assert path.read_bytes() == changed
    assert f"{path}: {KEPT}" in capsys.readouterr().out
    path.unlink()
    write_card(tmp_path, CARD + "\nNewer.\n")
    assert "Newer." in path.read_text() and not capsys.readouterr().out


def test_a_card_of_somebody_else_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for content in (CARD.encode(), b"\xff\xfe# no text"):
        (tmp_path / "README.md").write_bytes(content)
        write_card(tmp_path, CARD)
        assert (tmp_path / "README.md").read_bytes() == content
        assert KEPT in capsys.readouterr().out


def test_an_empty_form_is_replaced(tmp_path: Path) -> None:
    """PEFT leaves one beside each adapter."""
    form = str(ModelCard.from_template(ModelCardData()))
    (tmp_path / "README.md").write_text(form)
    assert write_card(tmp_path, CARD).read_text().startswith(CARD)
    (tmp_path / "README.md").write_text(filled := form.replace("Model Card for Model ID", "Mine"))
    assert write_card(tmp_path, CARD).read_text() == filled


@pytest.mark.parametrize("name, type", [("信用数据", "custom"), ("信用.jsonl", "jsonl"), ("My Rows", "my-rows")])
def test_a_data_set_may_have_any_name(name: str, type: str) -> None:
    (result,) = results("text-generation", name, "test", "0" * 64, [Measured("accuracy", "accuracy", {"value": 0.5})])
    assert (result.dataset_type, result.dataset_name) == (type, name)
