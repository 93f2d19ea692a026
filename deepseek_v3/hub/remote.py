"""A repository on the Hub as `push` needs it: requests tried again, one commit all the same, hashes read back.

huggingface_hub retries the upload of large files (5xx, cut connections), but neither the commit nor the creation of a
repository. A commit whose answer was lost may have been made: before it is sent again, the repository is looked at.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import HFValidationError

from ..process import say

# what every error of its HTTP library descends from, whichever library the release uses
HTTPError: type[Exception] = HfHubHTTPError.__mro__[1]
# 412: the branch moved between reading its head and committing
TRANSIENT = (408, 412, 429, 500, 502, 503, 504)
ATTEMPTS = 6
FIRST_WAIT = 1.0  # seconds; doubles up to LONGEST_WAIT
LONGEST_WAIT = 30.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class Content:
    """What is to stand under one name in a repository: its bytes or where they lie, and their two hashes.

    Attributes:
        data: the bytes, or the path of the file.
        sha256: hexadecimal; the Hub's hash of a file in LFS or Xet storage.
        blob: git's SHA-1 of the same bytes as a blob; the Hub's hash of every other file.
    """

    data: Path | bytes
    sha256: str
    blob: str


class Remote:
    """One branch of one model repository.

    Raises, from every method:
        ValueError: a name that cannot be, or is taken.
        PermissionError: no token, or one that may not do this.
        ConnectionError: the Hub did not answer, or only with errors, `ATTEMPTS` times.
    """

    def __init__(self, repo_id: str, revision: str | None, token: str | None) -> None:
        if (token or get_token()) is None:
            raise PermissionError("no token for the Hub: run `hf auth login`, set HF_TOKEN, or pass token=")
        self.api = HfApi(token=token)
        self.repo_id, self.revision = repo_id, revision or "main"

    def ask(self, what: str, call: Callable[[], Result]) -> Result:
        """`call()`, again after errors that may pass."""
        wait = FIRST_WAIT
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call()
            except (HTTPError, RuntimeError) as error:
                if not _may_pass(error):
                    raise self._explained(what, error) from error
                if attempt == ATTEMPTS:
                    problem = f"{what} failed {ATTEMPTS} times, the last time with: {_short(error)}"
                    raise ConnectionError(f"{self.repo_id}: {problem}. The same command goes on from there") from error
                say(f"{what}: {_short(error)}; again in {wait:.0f} s")
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
        raise AssertionError

    def open(self, private: bool | None, create: bool) -> None:
        """Make the repository (with `create`) and the branch if they are not there, and complete the name.

        An existing public repository is refused with `private=True`.
        """
        try:
            if create:
                made = self.ask("creating the repository", lambda: self._create(private))
                self.repo_id = made
            info = self.ask("looking at the repository", lambda: self.api.model_info(self.repo_id))
        except HFValidationError as error:
            raise ValueError(f"repository {self.repo_id!r}: {error}") from None
        except LookupError:
            others = [kind for kind in ("dataset", "space") if self.exists(self.repo_id, kind)]
            what = f"the name is taken by a {others[0]}" if others else "there is no such model, or not for this token"
            raise ValueError(f"repository {self.repo_id}: {what}") from None
        if private and not info.private:
            raise ValueError(f"repository {self.repo_id}: exists and is public, but private was asked for")
        if self.revision != "main" and not self.revision.startswith("refs/"):
            self.ask("making the branch", lambda: self._branch())

    def _create(self, private: bool | None) -> str:
        return self.api.create_repo(self.repo_id, private=private, exist_ok=True).repo_id

    def _branch(self) -> None:
        self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)

    def exists(self, repo_id: str, kind: str = "model") -> bool:
        return self.ask(f"looking for the {kind} {repo_id}", lambda: self.api.repo_exists(repo_id, repo_type=kind))

    def head(self) -> str:
        found = self.ask("reading the branch", lambda: self.api.model_info(self.repo_id, revision=self.revision))
        assert found.sha
        return found.sha

    def tree(self, commit: str) -> dict[str, RepoFile]:
        """Name -> file; the names of files in folders are their paths."""

        def listed() -> dict[str, RepoFile]:
            entries = self.api.list_repo_tree(self.repo_id, revision=commit, recursive=True)
            return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

        return self.ask("reading the list of files", listed)

    def read(self, name: str, commit: str) -> str:
        """A small text file."""

        def download() -> str:
            return Path(self.api.hf_hub_download(self.repo_id, name, revision=commit)).read_text(encoding="utf-8")

        return self.ask(f"reading {name}", download)

    def upload(self, files: Mapping[str, Content]) -> list[CommitOperationAdd]:
        """Send the large files. Those that the Hub has already, from an upload cut short, are not sent again."""
        additions = [CommitOperationAdd(name, content.data) for name, content in files.items()]

        def send() -> None:
            self.api.preupload_lfs_files(self.repo_id, additions, revision=self.revision, free_memory=False)

        self.ask("uploading", send)
        return additions

    def commit(
        self, files: Mapping[str, Content], deleted: Sequence[str], message: str, create_pr: bool
    ) -> tuple[str, str | None]:
        """Commit `files`, whatever becomes of the answers: never twice, and not at all if they are there already.

        Returns:
            The commit and, with `create_pr`, the URL of the pull request.
        """
        additions = self.upload(files)
        before = self._pull_requests() if create_pr else {}

        def send() -> tuple[str, str | None]:
            head = self.head()
            if self._is_done(files, deleted, head):
                return head, None
            for ref, sha in self._pull_requests().items() if create_pr else ():
                if ref not in before and self._is_done(files, deleted, sha):
                    return sha, f"{self.api.endpoint}/{self.repo_id}/discussions/{ref.rsplit('/')[-1]}"
            info = self.api.create_commit(
                self.repo_id,
                [*additions, *(CommitOperationDelete(name) for name in deleted)],
                commit_message=message,
                revision=self.revision,
                create_pr=create_pr,
                parent_commit=head,  # if the branch has moved after all, the Hub refuses
            )
            return info.oid, info.pr_url

        return self.ask("committing", send)

    def _pull_requests(self) -> dict[str, str]:
        def listed() -> dict[str, str]:
            refs = self.api.list_repo_refs(self.repo_id, include_pull_requests=True).pull_requests or []
            return {ref.ref: ref.target_commit for ref in refs}

        return self.ask("reading the pull requests", listed)

    def _is_done(self, files: Mapping[str, Content], deleted: Sequence[str], commit: str) -> bool:
        tree = self.tree(commit)
        return not different(files, tree) and not set(deleted) & set(tree)

    def _explained(self, what: str, error: Exception) -> Exception:
        """`error` in the user's terms."""
        if isinstance(error, RepositoryNotFoundError):
            return LookupError(self.repo_id)
        if isinstance(error, RevisionNotFoundError):
            return ValueError(f"repository {self.repo_id}: has no branch {self.revision!r}")
        status = _status(error)
        if status in (401, 403):
            return PermissionError(f"repository {self.repo_id}: {what}: not allowed for this token ({_short(error)})")
        if status == 409:
            return ValueError(f"repository {self.repo_id}: {what}: the name is taken ({_short(error)})")
        return ValueError(f"repository {self.repo_id}: {what}: {_short(error)}")


def different(files: Mapping[str, Content], tree: Mapping[str, RepoFile]) -> list[str]:
    """The names whose content in the repository has another hash than `files` has, in words."""
    problems = []
    for name, content in files.items():
        entry = tree.get(name)
        if entry is None:
            problems.append(f"{name} is not there")
            continue
        kind, found, sent = "git blob", entry.blob_id, content.blob
        if entry.lfs is not None:
            kind, found, sent = "SHA-256", entry.lfs.sha256, content.sha256
        if found != sent:
            problems.append(f"{name} has {kind} {found}, sent was {sent}")
    return problems


def _cause(error: Exception) -> Exception:
    """The HTTP error itself: huggingface_hub wraps those that come up while it sends a large file."""
    return error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, HTTPError) else error


def _status(error: Exception) -> int | None:
    cause = _cause(error)
    return cause.response.status_code if isinstance(cause, HfHubHTTPError) else None


def _may_pass(error: Exception) -> bool:
    status = _status(error)
    if status is not None:
        return status in TRANSIENT
    return isinstance(_cause(error), HTTPError)  # no answer, or half of one


def _short(error: Exception) -> str:
    cause = _cause(error)
    text = getattr(cause, "server_message", None) or str(cause).strip()
    return f"{type(cause).__name__}: {text.splitlines()[0]:.200}" if text else type(cause).__name__
