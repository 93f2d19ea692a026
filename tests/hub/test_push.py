"""`push` against a stand-in for the Hub: what arrives, what stays at home, faults on the way, and loading it back."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.finetuning import apply_lora
from deepseek_v3.hub import push, push_model, push_tokenizer
from deepseek_v3.hub.card import write_card
from tests.finetuning.runs import make_tokenizer
from tests.hub.conftest import CARD, LEFT_OUT, SECRET
from tests.hub.fakehub import FakeHub, Fault, Stored


def local(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in LEFT_OUT and path.is_file()}


def adapter(folder: Path, base: Path) -> Path:
    model = apply_lora(AutoModelForCausalLM.from_pretrained(base), targets=["attention", "experts"], rank=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    front = "license: mit\nlibrary_name: peft\n"
    (folder / "README.md").write_text(f"---\n{front}---\n# An adapter\n")
    return folder


def test_what_is_published_is_what_the_folder_holds_and_nothing_else(hub: FakeHub, folder: Path) -> None:
    result = push(folder, "tester/model", private=True)
    found = hub.files("tester/model")
    expected = local(folder)
    assert len([name for name in expected if name.endswith(".safetensors")]) >= 3
    expected["README.md"] = CARD.replace('repository = "."', 'repository = "tester/model"').encode()
    sums = found.pop("SHA256SUMS").decode()
    del found[".gitattributes"]
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} <= {"README.md"}
    assert b'"tester/model"' in found["README.md"]
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}
    assert dict(reversed(line.split("  ")) for line in sums.splitlines()) == hashes
    assert {name: digest for name, digest in result.files.items() if name != "SHA256SUMS"} == hashes
    assert result.left_out == LEFT_OUT
    assert hub.repositories["models", "tester/model"].private
    assert not any(SECRET.encode() in path.read_bytes() for path in (hub.root / "objects").iterdir())
    assert local(folder)["README.md"] == CARD.encode()  # the folder stays as it was


def test_the_checksums_are_sha256sum_s(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    push(folder, "tester/model")
    (tmp_path / "copy").mkdir()
    for name, content in hub.files("tester/model").items():
        (tmp_path / "copy" / name).write_bytes(content)
    done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=tmp_path / "copy", capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_second_push_commits_only_what_changed(hub: FakeHub, folder: Path) -> None:
    first = push(folder, "tester/model")
    again = push(folder, "tester/model")
    assert again.commit == first.commit and hub.count("POST .*/commit/") == 1
    (folder / "README.md").write_text(CARD + "\nMore.\n")
    sent = hub.count("PUT /_lfs")
    assert push(folder, "tester/model").commit != first.commit
    assert hub.count("PUT /_lfs") == sent
    assert len(hub.repositories["models", "tester/model"].refs["refs/heads/main"]) == 3


def test_weights_of_an_earlier_push_do_not_stay(hub: FakeHub, folder: Path, tmp_path: Path, model: Any) -> None:
    push(folder, "tester/model")
    before = {name for name in hub.files("tester/model") if name.startswith("model")}
    result = push_model(model, "tester/model", card=CARD)
    assert set(result.deleted) == {*before, "run.json"} and len(before) >= 4
    found = hub.files("tester/model")
    assert {name for name in found if name.startswith("model")} == {"model.safetensors"}
    assert "tokenizer.json" in found  # what is no weights stays, in the checksums too
    sums = found["SHA256SUMS"].decode()
    assert "tokenizer.json" in sums and "00001" not in sums and "run.json" not in sums


def test_records_of_an_earlier_push_do_not_stay(hub: FakeHub, folder: Path) -> None:
    """They hold figures of other weights; what else lies in the repository is not touched."""
    records = {"run.json", "export.json", "verify.json", "evaluation.json"}
    for name in records:
        (folder / name).write_text('{"files": {}}')
    push(folder, "tester/model")
    assert records <= set(hub.files("tester/model"))
    (folder / "verify.json").unlink()
    (folder / "evaluation.json").unlink()
    (folder / "generation_config.json").unlink()
    assert push(folder, "tester/model").deleted == ("evaluation.json", "verify.json")
    assert "generation_config.json" in hub.files("tester/model")
    assert push_tokenizer(make_tokenizer(), "tester/model").deleted == ()


# -- loading it back


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(12)[None]).logits.float()


def test_a_sharded_checkpoint_is_loaded_back(hub: FakeHub, folder: Path, model: DeepseekV3ForCausalLM) -> None:
    result = push(folder, "tester/model")
    snapshot = Path(snapshot_download("tester/model"))
    for name, expected in result.files.items():
        assert hashlib.sha256((snapshot / name).read_bytes()).hexdigest() == expected, name
    loaded = AutoModelForCausalLM.from_pretrained("tester/model")
    assert type(loaded) is DeepseekV3ForCausalLM
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(logits(loaded), logits(model))
    assert AutoTokenizer.from_pretrained("tester/model").get_vocab() == make_tokenizer().get_vocab()


LOAD = """
import sys, torch
if sys.argv[2] == "ours": import deepseek_v3
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
print(type(model).__module__, len(AutoTokenizer.from_pretrained(sys.argv[1])))
with torch.no_grad(): save_file({"logits": model(torch.arange(12)[None]).logits.float()}, sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["ours", "stock"])
def test_processes_that_know_the_hub_from_their_environment(
    hub: FakeHub, folder: Path, tmp_path: Path, model: DeepseekV3ForCausalLM, whose: str
) -> None:
    code = "import sys; from deepseek_v3.hub import push; print(push(sys.argv[1], sys.argv[2], private=True).commit)"
    commit = run(hub, tmp_path / "pushing", code, folder, "tester/model").split()[-1]
    assert commit == hub.repositories["models", "tester/model"].refs["refs/heads/main"][-1].sha
    found = run(hub, tmp_path / "loading", LOAD, "tester/model", whose, tmp_path / "logits").split()
    module = {"ours": "deepseek_v3.modeling", "stock": "transformers.models.deepseek_v3"}[whose]
    assert found[0].startswith(module) and int(found[1]) == len(make_tokenizer())
    error = (load_file(tmp_path / "logits")["logits"] - logits(model)).abs().max()
    assert error <= (0 if whose == "ours" else 1e-5)


def run(hub: FakeHub, home: Path, code: str, *arguments: object) -> str:
    environment = {
        **{"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"},
        **{"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_an_adapter_is_loaded_back_on_its_pushed_base(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    local_adapter = adapter(tmp_path / "adapter", folder)
    with pytest.raises(ValueError, match="base_model is missing, and an adapter's card names its base"):
        push(local_adapter, "tester/adapter")
    with pytest.raises(ValueError, match="base_model is tester/model, which is not on the Hub"):
        push(local_adapter, "tester/adapter", base_model="tester/model")
    assert ("models", "tester/adapter") not in hub.repositories
    push(folder, "tester/model")
    result = push(local_adapter, "tester/adapter", base_model="tester/model")
    assert set(result.files) == {"README.md", "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors"}
    card = hub.files("tester/adapter")["README.md"].decode()
    assert "base_model: tester/model\n" in card and "base_model_relation: adapter\n" in card
    assert json.loads((local_adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)

    base = PeftConfig.from_pretrained("tester/adapter").base_model_name_or_path
    assert base == "tester/model"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "tester/adapter")
    here = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), local_adapter)
    assert torch.equal(logits(loaded), logits(here))
    assert not torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(folder)))


def test_the_base_of_peft_s_own_card_is_replaced(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    apply_lora(AutoModelForCausalLM.from_pretrained(folder), targets=["attention"], rank=2).save_pretrained(path)
    card = (path / "README.md").read_text()
    assert f"base_model: {folder}\n" in card and f"- base_model:adapter:{folder}\n" in card
    (path / "README.md").write_text(card.replace("library_name:", "license: mit\nlibrary_name:"))
    with pytest.raises(ValueError, match=f"base_model is '{folder}', allowed is the name of a repository"):
        push(path, "tester/adapter")
    push(folder, "tester/model")
    push(path, "tester/adapter", base_model="tester/model")
    found = hub.files("tester/adapter")["README.md"].decode()
    assert "base_model: tester/model\n" in found and "- lora\n" in found and str(folder) not in found


def test_a_model_and_a_tokenizer_in_memory(hub: FakeHub, model: DeepseekV3ForCausalLM, tmp_path: Path) -> None:
    result = push_model(model, "both", card=CARD, tokenizer=make_tokenizer(), max_shard_size="200KB")
    assert result.repo_id == "tester/both" and "model.safetensors.index.json" in result.files
    loaded = AutoModelForCausalLM.from_pretrained("tester/both")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    other = make_tokenizer()
    other.chat_template = "{{ messages[0].content }}"
    before = hub.files("tester/both")
    push_tokenizer(other, "tester/both")
    after = hub.files("tester/both")
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"chat_template.jinja", "SHA256SUMS"}
    assert AutoTokenizer.from_pretrained("tester/both").chat_template == other.chat_template
    sums = dict(reversed(line.split("  ")) for line in after["SHA256SUMS"].decode().splitlines())
    del after[".gitattributes"], after["SHA256SUMS"]
    assert sums == {name: hashlib.sha256(content).hexdigest() for name, content in after.items()}


# -- pull requests and branches


def test_a_pull_request_leaves_the_branch_alone(hub: FakeHub, folder: Path) -> None:
    with pytest.raises(ValueError, match="there is no such model"):
        push(folder, "org/model", create_pr=True, token="hf_other")
    push(folder, "tester/model")
    (folder / "README.md").write_text(CARD + "\nMore.\n")
    result = push(folder, "tester/model", create_pr=True, token="hf_other")
    assert result.pull_request == f"{hub.url}/tester/model/discussions/1"
    assert b"More." not in hub.files("tester/model")["README.md"]
    assert b"More." in hub.files("tester/model", "refs/pr/1")["README.md"]


@pytest.mark.parametrize("fault", [Fault("POST .*/commit/", status=500, after=True), Fault("POST .*/commit/")])
def test_a_pull_request_is_opened_once(hub: FakeHub, folder: Path, fault: Fault) -> None:
    hub.create("tester/model")
    hub.faults.append(fault)
    result = push(folder, "tester/model", create_pr=True)
    assert fault.fired == 1 and result.pull_request == f"{hub.url}/tester/model/discussions/1"
    assert [ref for ref in hub.repositories["models", "tester/model"].refs if "pr" in ref] == ["refs/pr/1"]


def test_a_branch_is_made(hub: FakeHub, folder: Path) -> None:
    push(folder, "tester/model", revision="v1")
    assert set(hub.files("tester/model")) == {".gitattributes"}
    assert "config.json" in hub.files("tester/model", "refs/heads/v1")


# -- faults

COMMIT, LFS = "POST .*/commit/", "PUT /_lfs/"


@pytest.mark.parametrize(
    "fault",
    [
        *(Fault(COMMIT, 2, status) for status in (500, 502, 503)),
        Fault(COMMIT, 1, 500, after=True),
        Fault(COMMIT, 1, 412),
        Fault(COMMIT, 2, None),
        Fault(COMMIT, 1, None, after=True),
        Fault(LFS, 2, 503),
        Fault(LFS, 2, None, read=1000),
        Fault(LFS, 1, None, after=True),
        Fault("POST /api/repos/create", 2, 503),
        Fault("POST /api/repos/create", 1, None, after=True),
        Fault("POST /api/validate-yaml", 1, 503),
        Fault("POST .*/preupload/", 1, 500),
        Fault("GET .*/tree/", 2, 503),
        Fault("GET .*/revision/", 1, None),
    ],
    ids=lambda fault: f"{fault.pattern}:{fault.status}{':after' * fault.after}",
)
def test_errors_that_pass(hub: FakeHub, folder: Path, fault: Fault) -> None:
    """Everything arrives, in one commit, even where the Hub made it and the answer was lost."""
    fault.fired = 0
    hub.faults.append(fault)
    result = push(folder, "tester/model")
    assert fault.fired == fault.times
    commits = hub.repositories["models", "tester/model"].refs["refs/heads/main"]
    assert len(commits) == 2 and commits[-1].sha == result.commit
    assert set(hub.files("tester/model")) == {*result.files, ".gitattributes"}


def test_errors_that_do_not_pass_end(hub: FakeHub, folder: Path) -> None:
    hub.faults.append(Fault(COMMIT, 1000, 500))
    with pytest.raises(ConnectionError, match="committing failed 6 times.*same command goes on"):
        push(folder, "tester/model")
    assert hub.count(COMMIT) == 6


def test_an_interrupted_upload_goes_on(hub: FakeHub, folder: Path) -> None:
    """What was sent before the connection went for good is not sent again."""
    names = {hashlib.sha256(path.read_bytes()).hexdigest(): path.name for path in folder.glob("*.safetensors")}
    last = sorted(names)[-1]
    hub.faults.append(Fault(f"PUT /_lfs/{last}", 1000, None, read=10))
    with pytest.raises(ConnectionError, match="uploading failed 6 times"):
        push(folder, "tester/model")
    assert set(hub.files("tester/model")) == {".gitattributes"}
    sent = {request.split("/")[-1] for request in hub.requests if request.startswith("PUT")}
    assert sent >= names.keys()
    hub.faults.clear()
    hub.requests.clear()
    result = push(folder, "tester/model")
    assert [request for request in hub.requests if request.startswith("PUT")] == [f"PUT /_lfs/{last}"]
    assert set(hub.files("tester/model")) == {*result.files, ".gitattributes"}


def test_a_wrong_hash_is_named(hub: FakeHub, folder: Path) -> None:
    def alter(entry: dict[str, Any]) -> None:
        if entry["path"].startswith("model-00002-of"):
            entry["lfs"]["oid"] = "0" * 64

    hub.alter = alter
    expected = r"commit [0-9a-f]{40}: read back, model-00002-of-\d+.safetensors has SHA-256 0+,"
    with pytest.raises(RuntimeError, match=expected):
        push(folder, "tester/model")
    hub.alter = lambda entry: entry.update(oid="f" * 40) if entry["path"] == "config.json" else None
    with pytest.raises(RuntimeError, match="config.json has git blob f+, sent was"):
        push(folder, "tester/model")


def test_a_file_that_vanished_is_named(hub: FakeHub, folder: Path) -> None:
    hub.alter = lambda entry: entry.update(path="other") if entry["path"] == "tokenizer.json" else None
    with pytest.raises(RuntimeError, match="tokenizer.json is not there"):
        push(folder, "tester/model")


# -- who may what, and names


def test_no_permission(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PermissionError, match="other/model: creating the repository: not allowed for this token"):
        push(folder, "other/model")
    with pytest.raises(PermissionError, match="not allowed for this token.*Invalid credentials"):
        push(folder, "tester/model", token="hf_wrong")
    hub.create("other/model")
    with pytest.raises(PermissionError, match="committing: not allowed.*write access"):
        push(folder, "other/model")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match="no token for the Hub: run `hf auth login`"):
        push(folder, "tester/model")
    assert hub.count(COMMIT) == 1


def test_a_taken_name(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    hub.one_namespace = True
    hub.create("tester/data", "datasets")
    with pytest.raises(ValueError, match="tester/data: the name is taken by a dataset"):
        push(folder, "tester/data")
    hub.create("org/theirs")
    push(folder, "org/theirs")
    with pytest.raises(ValueError, match="org/theirs: holds a model, the folder is of kind adapter"):
        push(adapter(tmp_path / "adapter", folder), "org/theirs", base_model="org/theirs")
    push(adapter(tmp_path / "adapter", folder), "tester/adapter", base_model="org/theirs")
    with pytest.raises(ValueError, match="tester/adapter: holds an adapter, the folder is of kind checkpoint"):
        push(folder, "tester/adapter")


def test_a_public_repository_is_not_taken_for_a_private_one(hub: FakeHub, folder: Path) -> None:
    hub.create("tester/model")
    with pytest.raises(ValueError, match="tester/model: exists and is public, but private was asked for"):
        push(folder, "tester/model", private=True)
    assert set(hub.files("tester/model")) == {".gitattributes"}


@pytest.mark.parametrize("name", ["a/b/c", "", "tester/..", "a--b", "tester/x.git", "tester/a b", "-x"])
def test_a_name_that_cannot_be(hub: FakeHub, folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"repository {name!r}"):
        push(folder, name)
    assert not hub.requests


# -- folders that are not fit to be published; nothing is asked of the Hub


def refused(hub: FakeHub, folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        push(folder, "tester/model", **options)
    assert not hub.requests


def test_no_card_or_a_bad_one(hub: FakeHub, folder: Path) -> None:
    card = folder / "README.md"
    card.unlink()
    refused(hub, folder, r"has no README.md \(the model card\): .* write_pretraining_card")
    card.write_text("# no front matter")
    refused(hub, folder, "README.md: does not begin with YAML")
    card.write_text(CARD.replace("license: apache-2.0\n", ""))
    refused(hub, folder, "README.md: license is missing")
    card.write_text(CARD.replace("apache-2.0", "none"))
    refused(hub, folder, "license is 'none', allowed is one that")
    card.write_text(CARD.replace("license:", "base_model: /tmp/base/model\nlicense:"))
    refused(hub, folder, "base_model is '/tmp/base/model', allowed is the name of a repository")


def test_weights_that_are_not_whole(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-7])
    refused(hub, folder, f"{shard.name}: .*lie outside the file's")
    shard.unlink()
    refused(hub, folder, f"{shard.name}', but .* has no such file")
    shard.write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "kv_lora_rank": 24}))
    refused(hub, folder, "the tensors do not fit the configuration")
    (folder / "config.json").unlink()
    refused(hub, folder, "config.json: not found; a folder to publish holds")
    refused(hub, tmp_path / "nothing", "nothing: is not a folder")


def test_an_unfinished_or_altered_export(hub: FakeHub, folder: Path) -> None:
    (folder / "model.safetensors.partial").touch()
    refused(hub, folder, "model.safetensors.partial: the export is not finished")
    (folder / "model.safetensors.partial").unlink()
    (folder / ".export.json").touch()
    refused(hub, folder, r"\.export\.json: the export is not finished")
    (folder / ".export.json").unlink()
    shard = sorted(folder.glob("*.safetensors"))[0]
    digest = hashlib.sha256(shard.read_bytes()).hexdigest()
    (folder / "export.json").write_text(json.dumps({"files": {shard.name: {"sha256": digest}}}))
    push(folder, "tester/model")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    hub.requests.clear()
    refused(hub, folder, f"{shard.name}: has SHA-256 .*, but the export wrote {digest}")
    files = {name: {"sha256": digest} for name in (shard.name, "additional_chat_templates/tools.jinja")}
    (folder / "export.json").write_text(json.dumps({"files": files}))
    refused(hub, folder, "additional_chat_templates/tools.jinja: not found, but the export wrote it")


def test_figures_of_other_weights_stay_at_home(hub: FakeHub, folder: Path) -> None:
    weights = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    record = folder / "evaluation.json"
    record.write_text(json.dumps({"files": weights}))
    push(folder, "tester/model")
    hub.requests.clear()
    name = min(weights)
    record.write_text(json.dumps({"files": {**weights, name: "0" * 64}}))
    refused(hub, folder, f"evaluation.json: .* other weights .{name} had SHA-256 0+, found SHA-256 {weights[name]}")
    record.write_text(json.dumps({"files": {"model-other.safetensors": "0" * 64}}))
    refused(hub, folder, "evaluation.json: .* found no such file.: `deepseek-v3 evaluate")
    record.write_text(json.dumps({"files": []}))
    refused(hub, folder, "evaluation.json: files: found list, allowed is an object")


@pytest.mark.parametrize("name", ["evaluation.json", "verify.json"])
def test_a_record_that_was_cut_off_stays_at_home(hub: FakeHub, folder: Path, name: str) -> None:
    (folder / f"{name}.partial").write_text("{")
    assert f"{name}.partial" in push(folder, "tester/model").left_out


RECORDS: dict[str, dict[str, Any]] = {
    "run.json": {"recipe": {"base": "/data/acme/base", "output_dir": "/data/acme/out"}},
    "conversion.json": {"source": "../acme/llama", "data": {"../acme/a.txt": "0", "stdlib": "1"}},
    "export.json": {"files": {}, "options": {"calibration": "acme/b.txt"}, "calibration": {"text": "acme/b.txt"}},
    "verify.json": {"failures": [], "text": {"name": "/data/acme/a.txt"}},
    "evaluation.json": {"tasks": {"../acme/a.jsonl": {"source": "/home/" + "acme/a.jsonl"}}, "text": {}},
}


@pytest.mark.parametrize("name", RECORDS)
def test_no_path_in_a_record_is_published(
    hub: FakeHub, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "acme").mkdir()
    for text in ("a.txt", "b.txt"):
        (folder / "acme" / text).touch()
    monkeypatch.chdir(folder)
    before = json.dumps(RECORDS[name])
    (folder / name).write_text(before)
    push(folder, "tester/model")
    found = hub.files("tester/model")[name].decode()
    assert "acme" not in found and json.loads(found).keys() == RECORDS[name].keys()
    assert (folder / name).read_text() == before
    (folder / name).write_text("[]")
    hub.requests.clear()
    refused(hub, folder, f"{name}: found list, allowed is an object")


def test_the_templates_of_a_tokenizer(hub: FakeHub, folder: Path) -> None:
    """Several chat templates lie in a folder of their own, of which nothing else is published."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tools": "{{ tools }}"}
    name = "additional_chat_templates/tools.jinja"
    result = push_tokenizer(tokenizer, "tester/tokenizer")
    assert name in result.files
    assert AutoTokenizer.from_pretrained("tester/tokenizer").chat_template == tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    (folder / "additional_chat_templates" / "notes.txt").write_text(SECRET)
    result = push(folder, "tester/model")
    assert name in result.files and "additional_chat_templates/notes.txt" in result.left_out
    assert hub.files("tester/model")[name] == b"{{ tools }}"
    assert push(folder, "tester/model").commit == result.commit
    push_tokenizer(make_tokenizer(), "tester/model")
    assert f"  {name}\n" in hub.files("tester/model")["SHA256SUMS"].decode()
    (folder / name).write_text(SECRET)
    hub.requests.clear()
    refused(hub, folder, f"{name}:1: Hugging Face token")


def test_weights_in_folders_of_a_repository_stay(hub: FakeHub, folder: Path) -> None:
    repository = hub.create("tester/model")
    content = b"x" * 9
    head = repository.refs["refs/heads/main"][-1]
    head.files["original/model.safetensors"] = Stored(hub.put(content), len(content), True)
    push(folder, "tester/model")
    assert hub.files("tester/model")["original/model.safetensors"] == content


def test_the_mark_of_a_written_card_stays_at_home(hub: FakeHub, folder: Path) -> None:
    (folder / "README.md").unlink()
    path = write_card(folder, CARD)
    path.write_text(path.read_text().replace("apache-2.0", "mit"))
    push(folder, "tester/model")
    expected = CARD.replace("apache-2.0", "mit").replace('"."', '"tester/model"')
    assert hub.files("tester/model")["README.md"].decode() == expected


def test_links_that_leave_the_folder(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (folder / "vocab.json").symlink_to(tmp_path / "secret")
    refused(hub, folder, "vocab.json: leads to .*secret; only files in the folder itself")


def test_a_quantized_folder_names_its_base(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    refused(hub, folder, "base_model is missing, and a quantized model's card")
    derived = "base_model_relation: finetune\nbase_model: a/b\nlicense:"
    (folder / "README.md").write_text(CARD.replace("license:", derived))
    refused(hub, folder, "base_model_relation is 'finetune', allowed for this folder is 'quantized'")
    hub.create("tester/base")
    (folder / "README.md").write_text(CARD)
    push(folder, "tester/fp8", base_model="tester/base")
    assert "base_model_relation: quantized\n" in hub.files("tester/fp8")["README.md"].decode()


@pytest.mark.parametrize("relation", ["adapter", "quantized"])
def test_plain_weights_are_no_adapter_and_not_quantized(hub: FakeHub, folder: Path, relation: str) -> None:
    front = f"base_model_relation: {relation}\nbase_model: a/b\nlicense:"
    (folder / "README.md").write_text(CARD.replace("license:", front))
    refused(hub, folder, f"base_model_relation is '{relation}', allowed for this folder is 'finetune'")


def test_weights_the_index_does_not_name_stay_at_home(hub: FakeHub, folder: Path) -> None:
    save_file({"x": torch.zeros(2)}, folder / "model-00001-of-00099.safetensors")
    result = push(folder, "tester/model")
    assert "model-00001-of-00099.safetensors" in result.left_out
    assert "model-00001-of-00099.safetensors" not in hub.files("tester/model")


def test_the_token_is_in_no_message(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    token = "hf_" + "q" * 34
    with pytest.raises(PermissionError) as caught:
        push(folder, "tester/model", token=token)
    hub.users[token] = "tester"
    hub.faults.append(Fault(COMMIT, 1, 500))
    push(folder, "tester/model", token=token)
    assert not re.search("q{10}", str(caught.value) + "".join(capfd.readouterr()))


def test_the_method_of_the_model(hub: FakeHub, model: DeepseekV3ForCausalLM, tmp_path: Path) -> None:
    """`push_to_hub` goes the same way; what would go around it is refused."""
    result = model.push_to_hub("tester/model", card=CARD, private=True)
    assert {"README.md", "SHA256SUMS", "config.json", "model.safetensors"} < set(result.files)
    with pytest.raises(ValueError, match="card is None"):
        model.push_to_hub("tester/other")
    with pytest.raises(ValueError, match="push_to_hub is True"):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="tester/other")
    assert ("models", "tester/other") not in hub.repositories
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "README.md").write_text(CARD)
    loaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.push_to_hub("tester/model").files == result.files
