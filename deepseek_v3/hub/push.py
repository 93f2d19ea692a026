"""Publishing a folder, a model in memory or a tokenizer: checked before, and compared after the upload."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..configuration.adapter_file import ADAPTER_CONFIG
from ..configuration.local_paths import without_paths
from .card import CARD, HERE, load_card
from .folder import (
    EVALUATED,
    RECORDS,
    VERIFIED,
    Publication,
    evaluated_hashes,
    read_folder,
    read_object,
    recorded_hashes,
)
from .metadata import base_models, read_card
from .remote import Content, Remote, different
from .secrets import check_no_secrets

CHECKSUMS = "SHA256SUMS"
HOW_TO_CARD = (
    "runs write one; `deepseek_v3.hub` has write_pretraining_card, write_finetuning_cards and write_export_card, "
    "which make it from a run's record"
)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")


@dataclass(frozen=True)
class PushResult:
    """What a push did.

    Attributes:
        repo_id, url: the repository.
        commit: what holds the files now.
        pull_request: its URL, if one was asked for and needed.
        files: name -> SHA-256 of every file, read back from the Hub.
        left_out: names of the folder's files that were not sent.
        deleted: names of weights and records of an earlier push that these do not replace.
    """

    repo_id: str
    url: str
    commit: str
    pull_request: str | None
    files: dict[str, str]
    left_out: tuple[str, ...]
    deleted: tuple[str, ...]


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    token: str | None = None,
    base_model: str | None = None,
    message: str | None = None,
) -> PushResult:
    """Publish a checkpoint, an adapter or an export, with its card, as a model repository.

    Before anything is sent: the weights must be whole, the card valid and true to `verify.json`, the figures of
    `evaluation.json` those of these weights, and no file may hold a secret or a path of a home folder. Afterwards
    every file's hash is read back. An interrupted push goes on when it is repeated. `SHA256SUMS` is added. In the
    uploaded card the code names the repository instead of the folder; in uploaded records names stand for local
    paths; an uploaded adapter names `base_model` as its base. The folder itself is not changed.

    Args:
        folder: with `README.md`; see `hub.folder.ALLOWED` for what is uploaded beside weights and licence.
        repo_id: `name` or `namespace/name`.
        private: of a repository that is made now; an existing public one is refused with True.
        create_pr: open a pull request on an existing repository instead of committing to it.
        revision: branch to commit to, made if it is not there.
        token: for the Hub; None takes HF_TOKEN or that of `hf auth login`.
        base_model: the repository of the base, for a card that was written while the base lay in a local folder.
        message: of the commit.

    Raises:
        ValueError: the folder, its card, a file's content or the repository's name; names file and field.
        PermissionError: no token, or one that may not do this.
        ConnectionError: the Hub did not answer, or only with errors, several times in a row.
        RuntimeError: a file reads back with another hash; names it.
    """
    folder = Path(folder)
    publication = read_folder(folder)
    if CARD not in publication.files:
        raise ValueError(f"{folder}: has no {CARD} (the model card): {HOW_TO_CARD}")
    card = _card(folder / CARD, publication, base_model)
    files: dict[str, Path | bytes] = {**publication.files, CARD: str(card).encode()}
    for name in RECORDS:
        if name in publication.files:
            files[name] = _record(folder / name)
    if VERIFIED in publication.files:
        _check_failures_are_said(folder / VERIFIED, card)
    if publication.kind == "adapter":
        files[ADAPTER_CONFIG] = _adapter_config(folder / ADAPTER_CONFIG, base_models(card)[0])
    check_no_secrets(files)
    recorded = recorded_hashes(folder)
    if absent := [name for name in recorded if not (folder / name).is_file()]:
        raise ValueError(f"{folder / absent[0]}: not found, but the export wrote it")
    contents = {name: _hashed(content) for name, content in files.items()}
    for name, digest in recorded.items():
        if name in publication.files and (found := contents[name].sha256) != digest:
            raise ValueError(f"{folder / name}: has SHA-256 {found}, but the export wrote {digest}")
    for name, digest in evaluated_hashes(folder).items():
        if name not in contents or contents[name].sha256 != digest:
            found = f"SHA-256 {contents[name].sha256}" if name in contents else "no such file"
            raise ValueError(
                f"{folder / EVALUATED}: holds figures of other weights ({name} had SHA-256 {digest}, found {found}): "
                f"`deepseek-v3 evaluate {folder}` measures these"
            )

    remote = Remote(repo_id, revision, token)
    for base in base_models(card):
        if not remote.exists(base):
            raise ValueError(f"{folder / CARD}: base_model is {base}, which is not on the Hub, or not for this token")
    remote.open(private, create=not create_pr)
    return _publish(remote, card, contents, publication, create_pr, message or f"Upload {folder.resolve().name}")


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    card: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "5GB",
    commit_message: str | None = None,
    **options: Any,
) -> PushResult:
    """`push` for a model in memory, and its tokenizer: what `model.push_to_hub` does.

    Args:
        card: the model card, a file or its text.
        max_shard_size: as `save_pretrained` takes it.
        **options: `private`, `create_pr`, `revision`, `token`, `base_model` of `push`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        text = card if isinstance(card, str) and "\n" in card else Path(card).read_text(encoding="utf-8")
        (Path(temporary) / CARD).write_text(text, encoding="utf-8")
        return push(temporary, repo_id, message=commit_message or "Upload model", **options)


def push_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> PushResult:
    """Add a tokenizer's files to a repository, with the same search, retries and comparison as `push`; no card."""
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        found = sorted(path for path in Path(temporary).rglob("*") if path.is_file())
        paths = {path.relative_to(temporary).as_posix(): path for path in found}
        check_no_secrets(paths)
        contents = {name: _hashed(path) for name, path in paths.items()}
        remote = Remote(repo_id, revision, token)
        remote.open(private, create=not create_pr)
        return _publish(remote, None, contents, None, create_pr, commit_message or "Upload tokenizer")


def _publish(
    remote: Remote,
    card: ModelCard | None,
    contents: dict[str, Content],
    publication: Publication | None,
    create_pr: bool,
    message: str,
) -> PushResult:
    head = remote.head()
    tree = remote.tree(head)
    if publication is not None:
        _check_same_kind(remote.repo_id, publication, set(tree))
    if card is not None:
        contents[CARD] = _hashed(str(card).replace(HERE, f'repository = "{remote.repo_id}"').encode())
    stale = _stale(contents, set(tree))
    old = remote.read(CHECKSUMS, head) if CHECKSUMS in tree else ""
    contents[CHECKSUMS] = _hashed(_checksums(contents, old, set(tree) - set(stale)))
    commit, pull_request = remote.commit(contents, stale, message, create_pr)
    if problems := different(contents, remote.tree(commit)):
        raise RuntimeError(f"repository {remote.repo_id}, commit {commit}: read back, {'; '.join(problems)}")
    return PushResult(
        remote.repo_id,
        f"{remote.api.endpoint}/{remote.repo_id}",
        commit,
        pull_request,
        {name: content.sha256 for name, content in contents.items()},
        () if publication is None else publication.left_out,
        tuple(stale),
    )


def _card(path: Path, publication: Publication, base_model: str | None) -> ModelCard:
    """The card as it is uploaded: with `base_model` and the relation to it, which adapters and exports must have."""
    card = load_card(path, base_model)
    needed = None if publication.kind == "checkpoint" else publication.kind
    if base_model is not None:
        # PEFT's tags for the base hold its path; the Hub makes its own
        card.data["tags"] = [tag for tag in card.data.get("tags", []) if not tag.startswith("base_model:")] or None
    if needed and not base_models(card):
        what = "an adapter's" if needed == "adapter" else "a quantized model's"
        raise ValueError(
            f"{path}: base_model is missing, and {what} card names its base: push the base first, then pass its "
            "repository as base_model"
        )
    found = card.data.get("base_model_relation", needed)
    if found not in ((needed,) if needed else (None, "finetune", "merge")):
        allowed = repr(needed) if needed else "'finetune', 'merge' or none"
        raise ValueError(f"{path}: base_model_relation is {found!r}, allowed for this folder is {allowed}")
    card.data["base_model_relation"] = found
    if card.data.get("license") is None:
        raise ValueError(f"{path}: license is missing: write `license: apache-2.0`, or another, into its front matter")
    return read_card(str(card), str(path))


def _record(path: Path) -> Path | bytes:
    """A record as it is uploaded: without local paths."""
    record = read_object(path)
    public = without_paths(record)
    return path if public == record else (json.dumps(public, indent=2) + "\n").encode()


def _check_failures_are_said(path: Path, card: ModelCard) -> None:
    """A card from before the comparison failed would say that all is well."""
    said = " ".join(card.text.split())
    failures = [str(failure) for failure in read_object(path).get("failures") or ()]
    if hidden := [failure for failure in failures if " ".join(failure.split()) not in said]:
        raise ValueError(
            f"{path}: found {len(hidden)} failures that {CARD} does not state, the first: {hidden[0]}; allowed is an "
            "export without failures, or a card that `deepseek_v3.hub.write_export_card` wrote since"
        )


def _adapter_config(path: Path, base: str) -> bytes:
    """The adapter's configuration with the repository of its base, where it may name a local folder."""
    config = json.loads(path.read_text(encoding="utf-8"))
    return (json.dumps({**config, "base_model_name_or_path": base}, indent=2, sort_keys=True) + "\n").encode()


def _check_same_kind(repo_id: str, publication: Publication, there: set[str]) -> None:
    """A repository is an adapter or a model: loaders look for an adapter's files first."""
    adapter = publication.kind == "adapter"
    if "config.json" in there if adapter else ADAPTER_CONFIG in there:
        holds = "a model" if adapter else "an adapter"
        raise ValueError(f"repository {repo_id}: holds {holds}, the folder is of kind {publication.kind}: use another")


def _stale(contents: Mapping[str, Content], there: set[str]) -> list[str]:
    """Weights in the repository that a loader could take for a part of those which are sent; records of other ones."""

    def weights(names: set[str]) -> set[str]:
        return {name for name in names if any(fnmatchcase(name, pattern) for pattern in _WEIGHTS)}

    old = weights(there) if weights(set(contents)) else set()
    if CARD in contents:  # which records belong to; a tokenizer comes without
        old |= there & set(RECORDS)
    return sorted(old - set(contents))


def _checksums(contents: Mapping[str, Content], old: str, there: set[str]) -> bytes:
    """`sha256sum`'s format, with the lines of `old` for files that stay."""
    lines = (line.partition("  ") for line in old.splitlines())
    sums = {name: digest for digest, _, name in lines if name in there}
    sums |= {name: content.sha256 for name, content in contents.items()}
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode()


def _hashed(content: Path | bytes) -> Content:
    """Both hashes, in one reading."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    if isinstance(content, bytes):
        sha256.update(content)
        blob.update(content)
        return Content(content, sha256.hexdigest(), blob.hexdigest())
    with content.open("rb") as file:
        while chunk := file.read(2**24):
            sha256.update(chunk)
            blob.update(chunk)
    return Content(content, sha256.hexdigest(), blob.hexdigest())
