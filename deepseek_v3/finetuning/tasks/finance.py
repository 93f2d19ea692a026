"""Finance: Financial PhraseBank (sentiment of news) and FinanceIQ (Chinese certificates). German credit: credit.py."""

from pathlib import Path

from ...data import Row, read_file_rows
from ...data.sources import read_bytes
from .fields import given_path, label_of, text_of
from .task_data import TaskData, TaskRow, build_task, split_by_hash

SENTIMENTS = ("negative", "neutral", "positive")
LETTERS = ("A", "B", "C", "D")


def financial_phrasebank(path: str | None, seed: int, limit: int | None, *, agreement: str | int = "50") -> TaskData:
    """Financial PhraseBank v1.0 (Malo et al. 2014): news sentence -> negative, neutral or positive for an investor.

    Args:
        path: a folder with ``50agree_train.jsonl`` and so on (columns sentence, label), one with the original
            ``Sentences_50Agree.txt``, or such a file itself. The original has no split: ours is `split_by_hash` of
            the sentence.
        agreement: share of annotators that agree: "50", "66", "75" or "all".

    Raises:
        ValueError: no such files; a line that is not ``sentence@label``.
    """
    agreement = str(agreement)  # YAML's 75
    if agreement not in ("50", "66", "75", "all"):
        raise ValueError(f"task 'financial-phrasebank': agreement must be 50, 66, 75 or all, found {agreement!r}")
    root = given_path("financial-phrasebank", path)
    original = root if root.is_file() else root / f"Sentences_{agreement.capitalize()}Agree.txt"
    files = {split: root / f"{agreement}agree_{split}.jsonl" for split in ("train", "validation", "test")}
    if all(file.is_file() for file in files.values()):
        splits = {split: [_sentiment(row) for row in read_file_rows(file)] for split, file in files.items()}
        note = "splits as in the files"
    elif original.is_file():
        rows = [_sentiment(row) for row in _phrasebank_rows(original)]
        splits = split_by_hash(rows, lambda row: row["text"], seed, str(original))
        note = f"split by SHA-256 of the sentence, seed {seed}"
    else:
        raise ValueError(f"{root}: expected {files['train'].name} and so on, or {original.name}")
    return build_task(
        "financial-phrasebank", "classification", splits, labels=SENTIMENTS,
        licence="CC-BY-NC-SA-3.0", source=str(root), seed=seed, limit=limit,
        notes=(note, f"{agreement} % agreement", "many sentences differ only in their numbers and cross the split"),
    )  # fmt: skip


def finance_iq(path: str | None, seed: int, limit: int | None) -> TaskData:
    """FinanceIQ (Duxiaoman, Chinese): questions of ten finance certificates, four options, answered by a letter.

    For evaluation: dev (50) is the validation split, test has 7,123 questions, train is empty.

    Args:
        path: a folder with ``dev.jsonl`` and ``test.jsonl``: columns subject, question, A, B, C, D, answer.
    """
    root = given_path("financeiq", path)
    read = {"validation": root / "dev.jsonl", "test": root / "test.jsonl"}
    splits = {split: [_choice(row) for row in read_file_rows(file)] for split, file in read.items()}
    return build_task(
        "financeiq", "classification", {"train": [], **splits}, labels=LETTERS,
        licence="CC-BY-NC-SA-4.0", source=str(root), seed=seed, limit=limit,
        notes=("for evaluation only: no training split; dev is the validation split",),
    )  # fmt: skip


def _phrasebank_rows(path: Path) -> list[Row]:
    """The lines of an original file, ``sentence@label``."""
    data = read_bytes(path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("iso-8859-1")  # as first published
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        sentence, at, label = line.rstrip("\r").rpartition("@")
        if at:
            rows.append(Row(f"{path}:{number}", {"sentence": sentence, "label": label}))
        elif line.strip():
            raise ValueError(f"{path}:{number}: expected sentence@label, found {line:.60}")
    return rows


def _sentiment(row: Row) -> TaskRow:
    return {"text": text_of(row, "sentence"), "label": label_of(row, "label", SENTIMENTS)}


def _choice(row: Row) -> TaskRow:
    options = [f"{letter}. {text_of(row, letter)}" for letter in LETTERS]
    return {"text": "\n".join([text_of(row, "question"), *options]), "label": label_of(row, "answer", LETTERS)}
