import gzip
import hashlib
import json
import lzma
import platform
import random
import re

import pytest

from deepseek_v3.data import Document, build_corpus, load_corpus


def make_documents(n):
    return [Document(f"{i:04d}.txt", f"text number {i}\n") for i in range(n)]


def flipped(content):
    """`content` with its middle damaged."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 20]) + content[middle + 20 :]


@pytest.fixture(scope="module")
def stdlib():
    return load_corpus()


def test_stdlib_is_a_corpus_of_ten_megabytes(stdlib):
    assert stdlib.name == f"python-stdlib-{platform.python_version()}" and stdlib.licence == "PSF-2.0"
    assert 8e6 < stdlib.train_bytes + stdlib.heldout_bytes < 16e6
    assert 0.015 < stdlib.heldout_bytes / (stdlib.train_bytes + stdlib.heldout_bytes) < 0.06
    names = [doc.name for doc in (*stdlib.train, *stdlib.heldout)]
    assert len(set(names)) == len(names)
    assert "encodings/utf_8.py" in names and "encodings/cp1252.py" not in names and "encodings/big5.py" not in names
    assert "pydoc_data/topics.py" not in names
    forbidden = ("site-packages/", "test/", "tests/", "_sysconfigdata", "config-3")
    assert not [name for name in names if any(part in f"/{name}" for part in map("/{}".format, forbidden))]


def in_heldout(group, fraction):
    return int(hashlib.sha256(group.encode()).hexdigest(), 16) < fraction * 2**256


def test_split_of_the_stdlib_is_that_of_its_groups(stdlib):
    """Written down: published figures rest on it."""
    for split, is_held in ((stdlib.train, False), (stdlib.heldout, True)):
        assert all(in_heldout(doc.name.split("#")[0], 0.05) == is_held for doc in split)


def test_a_hash_sign_in_a_name_joins_nothing(tmp_path):
    (tmp_path / "C#").mkdir()
    for i in range(40):
        (tmp_path / "C#" / f"{i}.txt").write_text(f"file {i}")
    (tmp_path / "issues#1.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(40)))
    for source in (tmp_path / "C#", tmp_path, tmp_path / "issues#1.jsonl"):
        corpus = load_corpus(source, heldout_fraction=0.3)
        for split, is_held in ((corpus.train, False), (corpus.heldout, True)):
            assert len(split) >= 4 and all(in_heldout(doc.name, 0.3) == is_held for doc in split)


def test_documents_of_a_group_stay_on_one_side():
    groups = [f"group {i // 4}" for i in range(80)]
    docs = [Document(f"{i}", f"text {i}", group) for i, group in enumerate(groups)]
    corpus = build_corpus(docs, "x", heldout_fraction=0.3)
    train, heldout = ({doc.group for doc in split} for split in (corpus.train, corpus.heldout))
    assert train | heldout == set(groups) and not train & heldout
    assert heldout == {group for group in groups if in_heldout(group, 0.3)}


def test_stdlib_topics_stay_on_one_side(stdlib):
    # They quote each other: "compound" contains "while", "try" and so on.
    sides = [
        [doc for doc in split if doc.name.startswith("pydoc_data/topics#")] for split in (stdlib.train, stdlib.heldout)
    ]
    assert sorted(map(len, sides))[0] == 0 and sorted(map(len, sides))[1] > 50


def test_same_inputs_give_the_same_hash_and_any_change_another(stdlib):
    assert load_corpus("stdlib") == stdlib
    docs = make_documents(200)
    base = build_corpus(docs, "x")
    changed = build_corpus([*docs[:-1], Document(docs[-1].name, "other")], "x")
    renamed = build_corpus([*docs[:-1], Document("other", docs[-1].text)], "x")
    assert base.sha256 == build_corpus(docs, "y").sha256
    assert (
        len({base.sha256, changed.sha256, renamed.sha256, build_corpus(docs, "x", heldout_fraction=0.2).sha256}) == 4
    )


def test_split_is_the_hash_of_the_name_and_stable_under_additions():
    docs = make_documents(400)
    corpus = build_corpus(docs, "x", heldout_fraction=0.1)
    expected = {d.name for d in docs if int(hashlib.sha256(d.name.encode()).hexdigest(), 16) < 0.1 * 2**256}
    assert {doc.name for doc in corpus.heldout} == expected and 20 < len(expected) < 60
    assert {doc.name for doc in corpus.train} == {d.name for d in docs} - expected
    more = build_corpus(docs + [Document("new", "new text")], "x", heldout_fraction=0.1)
    assert expected <= {doc.name for doc in more.heldout} <= expected | {"new"}


def test_duplicates_and_blanks_are_removed_before_the_split():
    docs = make_documents(300)
    copies = [Document(f"copy/{doc.name}", doc.text) for doc in docs]
    corpus = build_corpus([*docs, *copies, Document("blank", " \n")], "x", heldout_fraction=0.2)
    train, heldout = ({doc.text for doc in split} for split in (corpus.train, corpus.heldout))
    assert not train & heldout and len(train) + len(heldout) == len(corpus.train) + len(corpus.heldout) == 300
    assert not [
        doc for doc in (*corpus.train, *corpus.heldout) if doc.name.startswith("copy/")
    ]  # the first copy stays


def test_official_heldout_source_wins_over_training_copies(tmp_path):
    (tmp_path / "train.txt").write_text("shared")
    (tmp_path / "b.jsonl").write_text('{"text": "shared"}\n{"text": "own"}\n')
    (tmp_path / "train.jsonl").write_text('{"text": "shared"}\n{"text": "kept"}\n')
    corpus = load_corpus(tmp_path / "train.jsonl", heldout=str(tmp_path / "b.jsonl"))
    assert [doc.text for doc in corpus.heldout] == ["shared", "own"] and [doc.text for doc in corpus.train] == ["kept"]


def test_lone_document_is_cut_at_a_line_break(tmp_path):
    text = "".join(f"line {i} é\n" for i in range(1000))
    (tmp_path / "book.txt").write_bytes(text.encode())
    corpus = load_corpus(tmp_path / "book.txt", heldout_fraction=0.1)
    [train], [held] = corpus.train, corpus.heldout
    assert train.text + held.text == text and train.text.endswith("\n")
    assert 0.09 < len(held.text) / len(text) < 0.11
    assert corpus.train_bytes + corpus.heldout_bytes == len(text.encode())


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        ("Title\n" + "word " * 2000, " "),  # one long line: between words
        ("word " * 2000, " "),
        ("Title\n" + "字" * 2000, "字"),  # no white space: between characters
        ("Title \n\n" + "字" * 2000, "字"),
    ],
)
def test_a_lone_document_of_long_lines_loses_no_more_than_its_end(text, ending):
    for fraction in (0.05, 0.5):
        corpus = build_corpus([Document("book.txt", text)], "x", heldout_fraction=fraction)
        [train], [held] = corpus.train, corpus.heldout
        assert train.text + held.text == text and train.text.endswith(ending)
        assert fraction <= len(held.text) / len(text) < 1.01 * fraction + 0.001


def test_a_line_break_within_twice_the_fraction_is_taken():
    lines = [f"{i:09d}\n" for i in range(11)]  # the cut asked for is inside the last line but one
    corpus = build_corpus([Document("book.txt", "".join(lines))], "x", heldout_fraction=0.1)
    assert corpus.heldout[0].text == "".join(lines[9:])


def test_the_corpus_says_how_its_heldout_part_was_made():
    docs = make_documents(100)
    assert build_corpus(docs, "x").split == "drawn by a hash of the documents' names"
    assert build_corpus([Document("a", "text\n" * 99)], "x").split == "the end of the one document"
    for train in (docs[:1], docs[:9]):
        assert build_corpus(train, "x", heldout=docs[9:]).split == "a text of its own"


def test_folder_glob_and_compressed_files(tmp_path):
    root = tmp_path / "corpus"
    (root / "sub").mkdir(parents=True)
    rng = random.Random(0)
    texts = [f"{rng.random()}\r\nü" for _ in range(60)]
    for i, text in enumerate(texts[:30]):
        (root / "sub" / f"{i}.txt").write_bytes(text.encode())
    records = "".join(json.dumps({"body": text, "text": text}, ensure_ascii=False) + "\n" for text in texts[30:45])
    (root / "a.jsonl.xz").write_bytes(lzma.compress(records.encode()))
    for i, text in enumerate(texts[45:]):
        (root / f"{i}.md.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    (root / "ignored.bin").write_bytes(b"\xff\xff")
    corpus = load_corpus(root, heldout_fraction=0.2)
    documents = [*corpus.train, *corpus.heldout]
    assert sorted(doc.text for doc in documents) == sorted(texts)
    assert {"sub/0.txt", "a.jsonl.xz:1", "a.jsonl.xz:15", "0.md.gz"} <= {doc.name for doc in documents}

    # The same files give the same names, and so the same split, wherever they lie and however they are named.
    globbed = load_corpus(f"{root}/**/*[tlz]*", heldout_fraction=0.2)
    assert {doc.name for doc in globbed.heldout} == {doc.name for doc in corpus.heldout}
    moved = root.rename(tmp_path / "elsewhere")
    assert load_corpus(moved, heldout_fraction=0.2).sha256 == corpus.sha256
    assert len(load_corpus(moved / "a.jsonl.xz", text_field="body", heldout_fraction=0.2).train) > 8


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "one"}\n{"text": "two"}')
    (tmp_path / "b.txt").write_text("\ufeffheld")
    corpus = load_corpus(tmp_path / "a.jsonl", heldout=tmp_path / "b.txt")
    assert [doc.text for doc in (*corpus.train, *corpus.heldout)] == ["one", "two", "held"]


def test_line_separators_inside_a_json_string_do_not_end_the_line(tmp_path):
    text = "one\u2028two\x85three"
    (tmp_path / "a.jsonl").write_bytes((json.dumps({"text": text}, ensure_ascii=False) + "\n\n").encode())
    (tmp_path / "b.jsonl").write_text('{"text": "held"}')
    assert load_corpus(tmp_path / "a.jsonl", heldout=tmp_path / "b.jsonl").train[0].text == text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good \xff", r"a\.txt: not UTF-8: byte 0xff at byte offset 5"),
        ("a.txt", b" \n", r"a\.txt' is empty"),
        ("a.txt", b"x", r"nothing left in the train split of 1 distinct"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "x"}\n', r"a\.jsonl:3: field 'text' not found; found \['body'\]"),
        ("a.jsonl", b'{"text": 7}', r"a\.jsonl:1: field 'text' must be a string, found int"),
        ("a.jsonl", b"[1]", r"a\.jsonl:1: field 'text' not found; found list"),
        ("a.jsonl", b'{"text": "x"}\n{"te', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"n": ' + b"1" * 5000 + b"}", r"a\.jsonl:2: not JSON: .*digits"),
        ("a.jsonl", b'{"text": "x"}\n' + b"[" * 100_000, r"a\.jsonl:2: not JSON: .*recursion"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"}\n', r"nothing left in the heldout split of 2 distinct"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "bad \\ud83d here"}', r"a\.jsonl:2: field 'text': found '\\ud83d' at"),
        ("a.txt.xz", b"not xz at all", r"a\.txt\.xz: cannot be read"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:20], r"a\.txt\.gz: cannot be read"),
        ("a.txt.gz", flipped(gzip.compress(str([*range(5000)]).encode(), mtime=0)), r"a\.txt\.gz: cannot be read"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus(tmp_path / name, heldout_fraction=0.001)


def test_missing_sources_and_bad_fractions_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.txt: no such file or folder"):
        load_corpus(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="the pattern matches no file"):
        load_corpus(f"{tmp_path}/*.txt")
    with pytest.raises(ValueError, match=r"no file in this folder ends in \.txt"):
        load_corpus(tmp_path)
    with pytest.raises(ValueError, match="heldout_fraction must lie between 0 and 1, found 1"):
        build_corpus(make_documents(9), "x", heldout_fraction=1)


def test_datasets_source(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    texts = [f"row {i}" for i in range(100)]
    table = datasets.Dataset.from_dict({"text": texts}, info=datasets.DatasetInfo(license="mit"))
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(validation=table).save_to_disk(str(tmp_path / "many"))

    corpus = load_corpus(f"datasets:{tmp_path}/one", heldout_fraction=0.2)
    assert sorted(doc.text for doc in (*corpus.train, *corpus.heldout)) == sorted(texts) and corpus.licence == "mit"
    assert load_corpus(f"datasets:{tmp_path}/many::validation", heldout_fraction=0.2).train
    with pytest.raises(ValueError, match=r"split 'train' not found; it has \['validation'\]"):
        load_corpus(f"datasets:{tmp_path}/many")
    with pytest.raises(ValueError, match=r"column 'body' not found; it has \['text'\]"):
        load_corpus(f"datasets:{tmp_path}/one", text_field="body")
    with pytest.raises(ValueError, match=r"expected datasets:NAME\[:CONFIG\[:SPLIT\]\]"):
        load_corpus("datasets:a:b:c:d")

    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or table)
    corpus = load_corpus("datasets:owner/name:config:test", heldout_fraction=0.2)
    assert calls == [(("owner/name", "config"), {"split": "test"})]
    assert {f"owner/name:config:test:{i}" for i in range(100)} == {d.name for d in (*corpus.train, *corpus.heldout)}


def test_a_folder_of_datasets_has_one_split_however_its_path_is_spelled(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(100)]}).save_to_disk(str(tmp_path / "a" / "ds"))
    monkeypatch.chdir(tmp_path / "a")
    paths = ["ds", "./ds", "ds/", "../a/ds", str(tmp_path / "a" / "ds")]
    hashes = {load_corpus(f"datasets:{path}", heldout_fraction=0.2).sha256 for path in paths}
    (tmp_path / "b").mkdir()
    moved = (tmp_path / "a" / "ds").rename(tmp_path / "b" / "ds")
    hashes.add(load_corpus(f"datasets:{moved}::train", heldout_fraction=0.2).sha256)
    assert len(hashes) == 1
    assert load_corpus(f"datasets:{moved}", heldout_fraction=0.2).train[0].name.startswith("ds:train:")


def test_a_lone_saved_dataset_has_no_other_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = [f"row {i}" for i in range(100)]
    for folder, split, others in (("a", "test", ["train"]), ("b", "train[:9]", ["test", "train"]), ("c", None, ["x"])):
        datasets.Dataset.from_dict({"text": texts}, split=split).save_to_disk(str(tmp_path / folder))
        assert load_corpus(f"datasets:{tmp_path}/{folder}", heldout_fraction=0.2)  # none asked for
        for other in others:
            found = re.escape(f"split '{other}' not found; it has ['{split or 'train'}']")
            with pytest.raises(ValueError, match=found):
                load_corpus(f"datasets:{tmp_path}/{folder}::{other}")
    assert load_corpus(f"datasets:{tmp_path}/a::test", heldout_fraction=0.2)
    assert load_corpus(f"datasets:{tmp_path}/c::train", heldout_fraction=0.2)


def test_a_file_that_datasets_cannot_read_is_a_value_error(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "a"}\n{"te\n')
    with pytest.raises(ValueError, match=f"source 'datasets:{re.escape(str(tmp_path))}/data': .*JSON"):
        load_corpus(f"datasets:{tmp_path}/data")
    assert (tmp_path / "cache").is_dir()
