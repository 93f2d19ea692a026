"""Medicine: ICD-10-CM (diagnosis -> chapter), PubMedQA (yes, no, maybe), MedQuAD and Chinese consultations (chat)."""

import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

from ...data import Row, read_rows
from .fields import given_path, label_of, need_columns, package_file, text_of
from .task_data import SPLITS, Kind, TaskData, TaskRow, build_task, split_by_hash

ANSWERS = ("no", "maybe", "yes")


def icd10_chapter(path: str | None, seed: int, limit: int | None) -> TaskData:
    """ICD-10-CM: the description of a diagnosis -> its chapter (22 classes, named as in the classification).

    Every category and subcategory (46,881 in the release of April 2026), without the seventh characters. All codes of
    a three-character category fall into the same split, by `split_by_hash`, and form a group: their descriptions
    differ by a few words.

    Args:
        path: the tabular list as XML, of any release; None reads the one in simple-icd-10-cm.

    Raises:
        ValueError: package missing, or a file that is not the tabular list.
    """
    if path is None:
        install = "pip install simple-icd-10-cm==1.5.0"
        file, package = package_file("icd10-chapter", "simple_icd_10_cm", "data/*.xml", install)
        source = f"{package}: {file.name}"
    else:
        file, source = given_path("icd10-chapter", path), str(path)
    rows, chapters = _icd_rows(file)
    splits = split_by_hash(rows, lambda row: row["group"], seed, source)
    return build_task(
        "icd10-chapter", "classification", splits, labels=chapters, licence="US government work (public domain)",
        source=source, notes=(f"split by SHA-256 of the three-character category, seed {seed}",),
        seed=seed, limit=limit,
    )  # fmt: skip


def pubmedqa(path: str | None, seed: int, limit: int | None) -> TaskData:
    """PubMedQA PQA-L (Jin et al. 2019), reasoning required: question and abstract without its conclusion -> answer.

    Args:
        path: a folder with train, validation and test ``.jsonl``: columns question, contexts, section_labels, label.
            The conclusion, ``long_answer``, is not read. The official test set has 500 questions.
    """
    return _from_splits(
        "pubmedqa", "classification", path, _pubmedqa_row, seed, limit, labels=ANSWERS, licence="MIT",
        notes=("the abstract's conclusion is not in the text",),
    )  # fmt: skip


def medquad(path: str | None, seed: int, limit: int | None) -> TaskData:
    """MedQuAD (Ben Abacha and Demner-Fushman 2019), answered part: consumer question -> answer of an NIH site.

    Args:
        path: a folder with train, validation and test ``.jsonl``: columns focus, doc, question, answer. The focus, a
            disease or drug, is the group; the shared splits keep each on one side.
    """
    return _from_splits("medquad", "chat", path, _medquad_row, seed, limit, labels=None, licence="CC-BY-4.0")


def chinese_medical_dialogue(path: str | None, seed: int, limit: int | None) -> TaskData:
    """Chinese medical dialogue (Toyhom): a patient's title and question -> a doctor's answer on a public site.

    Args:
        path: a folder with train, validation and test ``.jsonl``: columns title, question, answer.
    """
    return _from_splits(
        "chinese-medical-dialogue", "chat", path, _dialogue_row, seed, limit, labels=None, licence="MIT",
        notes=("unverified answers of a consultation site: for language-model research, never as advice",),
    )  # fmt: skip


def _from_splits(
    task: str,
    kind: Kind,
    path: str | None,
    to_row: Callable[[Row], TaskRow],
    seed: int,
    limit: int | None,
    *,
    labels: tuple[str, ...] | None,
    licence: str,
    notes: tuple[str, ...] = (),
) -> TaskData:
    read = read_rows(given_path(task, path))
    if set(read.splits) != set(SPLITS):
        raise ValueError(f"task {task!r}: {path}: expected files of {', '.join(SPLITS)}, found {[*read.splits]}")
    splits = {split: [to_row(row) for row in rows] for split, rows in read.splits.items()}
    return build_task(
        task, kind, splits, labels=labels, licence=licence, source=str(path), notes=("splits as in the files", *notes),
        seed=seed, limit=limit,
    )  # fmt: skip


def _icd_rows(file: Path) -> tuple[list[TaskRow], tuple[str, ...]]:
    try:
        root = ElementTree.parse(file).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f"{file}: cannot be read as XML: {error}") from error
    rows, chapters = [], []
    for chapter in root.iter("chapter"):
        title = re.sub(r"\s*\([A-Z]\d\w-[A-Z]\w\w\)$", "", chapter.findtext("desc", "").strip())
        chapters.append(title)
        for diagnosis in chapter.iter("diag"):
            code = diagnosis.findtext("name", "")
            row = Row(f"{file}: diagnosis {code!r}", {"name": code, "desc": diagnosis.findtext("desc")})
            rows.append({"text": text_of(row, "desc"), "label": title, "group": text_of(row, "name")[:3]})
    if not rows:
        raise ValueError(f"{file}: no chapter with a diagnosis; expected the ICD-10-CM tabular list")
    return rows, tuple(chapters)


def _pubmedqa_row(row: Row) -> TaskRow:
    need_columns(row, "contexts", "section_labels")
    contexts, names = row.fields["contexts"], row.fields["section_labels"]
    if not isinstance(contexts, list) or not isinstance(names, list) or len(contexts) != len(names):
        raise ValueError(f"{row.where}: contexts and section_labels must be lists of one length")
    sections = [f"{name}: {context}" for name, context in zip(names, contexts, strict=True)]
    return {"text": "\n".join([text_of(row, "question"), *sections]), "label": label_of(row, "label", ANSWERS)}


def _medquad_row(row: Row) -> TaskRow:
    need_columns(row, "focus")
    focus = row.fields["focus"] or text_of(row, "doc")  # some pages name no focus
    return {**_turn(text_of(row, "question"), text_of(row, "answer")), "group": focus.lower()}


def _dialogue_row(row: Row) -> TaskRow:
    return _turn(f"{text_of(row, 'title')}\n{text_of(row, 'question')}", text_of(row, "answer"))


def _turn(question: str, answer: str) -> TaskRow:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
