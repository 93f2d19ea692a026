"""A search for what must not be published: keys, tokens, and paths that name a person's home folder."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ..gguf_header import read_header

# Prefixes and lengths as their issuers document them. The kinds are what an error shows; a match never is.
KINDS: dict[str, bytes] = {
    "Hugging Face token": rb"(?<![A-Za-z0-9])(?:hf|api_org)_(?:[a-z]+_)?[A-Za-z0-9]{30,}",
    "AWS access key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "private key": rb"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----",
    "GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60})",
    "GitLab token": rb"\bglpat-[A-Za-z0-9_-]{20}",
    "OpenAI or Anthropic key": rb"\bsk-[A-Za-z0-9_-]{32}",
    "Google API key": rb"\bAIza[0-9A-Za-z_-]{35}",
    "Slack token": rb"\bxox[abposr]-[A-Za-z0-9-]{10}",
    "PyPI token": rb"\bpypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50}",
    "JSON web token": rb"(?<![A-Za-z0-9])eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10}",
    "password in a URL": rb"://[!-.0-9;-?A-~]{1,80}:[!-.0-?A-~]{1,80}@[A-Za-z0-9]",
    "path of a home folder": rb"(?:(?<![\w.~-])/(?:home|Users|root)/|[A-Z]:(?:\\{1,2}|/)Users(?:\\{1,2}|/))[\w.]",
}


class Finding(NamedTuple):
    """`line` counts from 1; 0 is the header of a file of weights."""

    file: str
    line: int
    kind: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line or ' header'}: {self.kind}"


def find_secrets(name: str, content: bytes) -> Iterator[Finding]:
    """One finding per kind and line of `content`."""
    patterns = dict(KINDS)
    home = str(Path.home()).encode()
    if home.count(b"/") > 1:  # a home elsewhere; not / or /root, which are no person's
        patterns["path of a home folder"] += b"|" + re.escape(home) + rb"\b"
    for kind, pattern in patterns.items():
        for line in sorted({content.count(b"\n", 0, match.start()) + 1 for match in re.finditer(pattern, content)}):
            yield Finding(name, line, kind)


def check_no_secrets(files: Mapping[str, Path | bytes]) -> None:
    """Search every file; of weights, whose headers are known to be whole, only what comes before the tensors.

    Raises:
        ValueError: names file, line and kind of each finding, without what was found.
    """
    found = [finding for name, content in files.items() for finding in _of_file(name, content)]
    if found:
        lines = "".join(f"\n  {finding}" for finding in found)
        raise ValueError(f"not uploaded, {len(found)} places must be cleaned first:{lines}")


def _of_file(name: str, content: Path | bytes) -> Iterator[Finding]:
    if isinstance(content, bytes):
        yield from find_secrets(name, content)
    elif content.suffix in (".gguf", ".safetensors"):
        gguf = content.suffix == ".gguf"
        with content.open("rb") as file:
            header = file.read(read_header(content).n_bytes if gguf else int.from_bytes(file.read(8), "little"))
        yield from {Finding(name, 0, finding.kind) for finding in find_secrets(name, header)}
    else:
        yield from find_secrets(name, content.read_bytes())
