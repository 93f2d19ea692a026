import json
import lzma

import pytest

from deepseek_v3.data import read_file_rows, read_rows

RECORDS = [{"text": "one, \"quoted\"\nand a line\u2028separator", "label": "a"}, {"text": "zwei ü", "label": "b"}]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def test_every_format_gives_the_same_rows(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    quoted = "".join('"{}",{}\r\n'.format(r["text"].replace('"', '""'), r["label"]) for r in RECORDS)
    (tmp_path / "a.csv").write_bytes(("\ufefftext,label\r\n" + quoted + "\r\n").encode())
    parquet.write_table(Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    where = {"a.jsonl": ":2", "a.jsonl.xz": ":2", "a.json": ": row 2", "a.csv": ":4", "a.parquet": ": row 2"}
    for name, second in where.items():
        rows = read_rows(tmp_path / name).splits["all"]
        assert [row.fields for row in rows] == RECORDS, name
        assert rows[1].where == f"{tmp_path / name}{second}"
    (tmp_path / "b.txt").write_text("a text\n")
    assert [row.fields for row in read_file_rows(tmp_path / "b.txt")] == [{"text": "a text\n"}]


def test_names_of_files_tell_the_splits(tmp_path):
    names = ["x_train-00000.jsonl", "x_train-00001.jsonl", "x_dev.jsonl", "test/part.jsonl"]
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [{"i": i}])
    (tmp_path / "LICENSE.txt").write_text("all rights")
    (tmp_path / "README.md").write_text("# not rows")
    read = read_rows(tmp_path)
    found = {split: [row.fields["i"] for row in rows] for split, rows in read.splits.items()}
    assert found == {"train": [0, 1], "validation": [2], "test": [3]} and read.left_out == ["LICENSE.txt"]
    assert list(read_rows(tmp_path / "x_dev.jsonl").splits) == ["all"]  # a lone file is no split
    assert [r.fields["i"] for r in read_rows(f"{tmp_path}/x_*.jsonl").splits["validation"]] == [2]


def test_folders_without_a_training_file_or_with_two_splits_in_a_name(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [{"text": "x"}])
    write_jsonl(tmp_path / "dev.jsonl", [{"text": "x"}])
    with pytest.raises(ValueError, match=r"files for \['test', 'validation'\], but no file with 'train'"):
        read_rows(tmp_path)
    (tmp_path / "dev.jsonl").rename(tmp_path / "train_test.jsonl")
    with pytest.raises(ValueError, match=r"train_test.jsonl: the name tells more than one split: \['test', 'train'\]"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"text": "x"}\n["x"]\n', "a.jsonl:2: expected an object with named fields, found list"),
        ("a.jsonl", '{"text": "x"}\n\n{"text"\n', "a.jsonl:3: not JSON"),
        ("a.jsonl", "", "a.jsonl: no row"),
        ("a.json", '{"text": "x"}', "a.json: expected a list of objects, found dict"),
        ("a.json", '[{"text": ' + "1" * 5000 + "}]", "a.json: not JSON: .*digits"),
        ("a.json", "[" * 100_000, "a.json: not JSON: .*recursion"),
        ("a.json", '[{"text": "x"}, 3]', "a.json: row 2: expected an object with named fields, found int"),
        ("a.csv", "text,label\nx,y\nx,y,z\n", "a.csv:3: 3 values under 2 columns"),
        ("a.csv", 'text,label\nx,y\n"x"y,z\n', "a.csv:3: not CSV"),
        ("a.csv", "text,label\n", "a.csv: no row"),
        ("a.parquet", "text", "a.parquet: not Parquet"),
        ("a.xlsx", "text", r"a.xlsx: cannot read rows from '.xlsx'; allowed: .jsonl, .json, .csv, .parquet, .txt"),
        ("a.txt.xz", "text", "a.txt.xz: cannot be read"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name)


def test_a_cell_of_a_csv_file_may_be_a_long_text(tmp_path):
    """Longer than Python's own limit for one."""
    text = "a report, " * 20_000
    (tmp_path / "a.csv").write_text(f'text,label\n"{text}",b\n')
    assert [row.fields for row in read_file_rows(tmp_path / "a.csv")] == [{"text": text, "label": "b"}]


def test_datasets_splits_and_class_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    classes = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": classes})

    def table(*labels):
        records = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
        return datasets.Dataset.from_list(records, features=features, split="train")

    datasets.DatasetDict({"train": table(1, 0), "val": table(0), "extra": table(1)}).save_to_disk(tmp_path / "many")
    read = read_rows(f"datasets:{tmp_path}/many")
    labels = {split: [row.fields["label"] for row in rows] for split, rows in read.splits.items()}
    assert labels == {"train": ["good", "bad"], "validation": ["bad"]} and read.left_out == ["extra"]
    assert read.splits["train"][1].where == f"datasets:{tmp_path}/many train: row 2"
    assert list(read_rows(f"datasets:{tmp_path}/many::val").splits) == ["all"]
    table(1, -1).save_to_disk(tmp_path / "one")
    assert [row.fields["label"] for row in read_rows(f"datasets:{tmp_path}/one").splits["all"]] == ["good", None]
    datasets.DatasetDict({"a": table(1), "b": table(0)}).save_to_disk(tmp_path / "unnamed")
    with pytest.raises(ValueError, match=r"no split 'train', only \['a', 'b'\]; name one: NAME:CONFIG:SPLIT"):
        read_rows(f"datasets:{tmp_path}/unnamed")
    with pytest.raises(ValueError, match=r"split 'c' not found; it has \['a', 'b'\]"):
        read_rows(f"datasets:{tmp_path}/unnamed::c")
    datasets.DatasetDict({"train": table(1), "dev": table(0), "val": table(0)}).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match="two splits of one meaning"):
        read_rows(f"datasets:{tmp_path}/two")
