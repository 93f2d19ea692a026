"""Tiny runs of every method: what they leave on disk, that it is what was trained, and what the record says of it."""

import json
import math
import mmap
import shutil
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import TikTokenConverter

from deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification
from deepseek_v3.data import heldout_bits_per_byte, load_corpus, pack_documents
from deepseek_v3.finetuning import FinetuneRecipe, finetune, load_adapter, load_task
from deepseek_v3.finetuning.batches import encode_chat, encode_text
from deepseek_v3.finetuning.build import as_language_model, build_model, load_tokenizer
from deepseek_v3.finetuning.changes import expert_movement
from deepseek_v3.finetuning.evaluate import classification_results, evaluate_task
from deepseek_v3.finetuning.examples import make_examples
from deepseek_v3.process import peak_memory
from deepseek_v3.quantization import dequantize_, nf4_config
from tests.finetuning.runs import COEFFICIENTS, recipe, save_base, weights
from tests.modeling_deepseek_v3.helpers import run_python

CPU = torch.device("cpu")
FULL = {"method": "full", "learning_rate": 3e-3}
LORA = {"dropout": 0.1, "merge": True}
STAGES = {"first_layers": 1, "layers_per_stage": 1, "advance": "steps", "every": 1}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "two classes": ("two", {**LORA, "compare": True}),
    "three classes": ("three", {**LORA, "targets": ["all", "router"], "dropout": 0.0}),
    "head": ("three", {"method": "head"}),
    "chat": ("messages", {**LORA, "generate": 2}),
    "mtp": ("completion", {**LORA, "mtp": "trained"}),
    "text": ("text", {**LORA, "rank": 2, "alpha": 8}),
    "full": ("messages", FULL),
    "unfreezing": ("three", {**FULL, "unfreezing": STAGES}),
    "unfreezing adapters": ("messages", {"unfreezing": STAGES, "batch_size": 4}),
    "nf4 chat": ("messages", {**LORA, "quantize": "nf4"}),
    "nf4 classes": ("two", {**LORA, "quantize": "nf4"}),
}
Finished = Callable[[str], tuple[FinetuneRecipe, dict[str, Any], Path]]


@pytest.fixture(scope="module")
def finished(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The recipe, the record and the folder of a run of `RUNS`, made when it is first asked for."""
    root, runs = tmp_path_factory.mktemp("runs"), {}

    def get(name: str) -> tuple[FinetuneRecipe, dict[str, Any], Path]:
        if name not in runs:
            kind, changes = RUNS[name]
            changes = {"general_text": str(data / "text" / "train.jsonl"), **changes}
            chosen = recipe(base, data / kind, root / name.replace(" ", "-"), **changes)
            runs[name] = chosen, finetune(chosen), Path(chosen.output_dir)
        return runs[name]

    return get


def base_model(chosen: FinetuneRecipe, cls: type) -> Any:
    """What an adapter was trained on."""
    labels = len(load_task(chosen.task).labels or ())
    options = {"num_labels": labels} if cls is DeepseekV3ForSequenceClassification else {}
    if chosen.quantize == "none":
        model = cls.from_pretrained(chosen.base, **options)
    else:
        model = dequantize_(cls.from_pretrained(chosen.base, quantization_config=nf4_config(), **options))
    model.config.pad_token_id = load_tokenizer(chosen.base).pad_token_id  # the base has none
    return model


def class_of(chosen: FinetuneRecipe) -> type:
    return DeepseekV3ForSequenceClassification if load_task(chosen.task).labels else DeepseekV3ForCausalLM


IDS = torch.randint(3, 300, (3, 14), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_leaves(finished: Finished, name: str) -> None:
    chosen, record, output = finished(name)
    folders = {"adapter", "merged"} if chosen.merge else {"adapter"} if chosen.method == "lora" else {"model"}
    assert {path.name for path in output.iterdir()} == {
        *(".lock", "recipe.json", "inputs.json", "run.json"), *folders
    }  # fmt: skip
    assert set(record["artifacts"]) == folders
    for folder in folders:
        files = list((output / folder).iterdir())
        assert record["artifacts"][folder]["bytes"] == sum(path.stat().st_size for path in files)
        assert output / folder / "README.md" not in files
        assert (output / folder / "LICENSE").read_text() == "MIT"  # the base's
        saved, original = ((path / "tokenizer.json").read_text() for path in (output / folder, Path(chosen.base)))
        assert saved == original  # without the cut to max_length that was set meanwhile
    assert json.loads((output / "run.json").read_text()) == record
    assert "NaN" not in (output / "run.json").read_text()

    task = load_task(chosen.task)
    assert record["task"]["rows"] == {"train": 16, "validation": 6, "test": 8} and record["test"]["n"] == 8
    assert record["task"]["sha256"] == task.sha256 and record["epochs"] == 2
    losses = [row["loss"] for row in record["history"] if "loss" in row]
    assert len(losses) == record["steps"] and losses[-1] < losses[0]
    evaluated = [row["eval_loss"] for row in record["history"] if "eval_loss" in row]
    assert len(evaluated) == 2 and evaluated[1] < evaluated[0]
    mtp = {"layers.3"} if chosen.mtp == "trained" or (chosen.method == "full" and not task.labels) else set()
    moved = set() if chosen.method == "head" else {"layers.1", "layers.2"} | mtp
    assert set(record["experts"].get("layers", ())) == moved


@pytest.mark.parametrize("name", [name for name, (_, changes) in RUNS.items() if changes.get("method") != "full"])
def test_only_what_the_method_names_was_trained(finished: Finished, name: str) -> None:
    chosen, record, output = finished(name)
    if chosen.method == "head":
        trained, start = weights(output / "model"), weights(Path(chosen.base))
        assert {key for key in trained if key not in start or not torch.equal(trained[key], start[key])} == {
            "score.weight"
        }
        assert record["trainable"]["targets"] == {"head": {"tensors": 1, "parameters": 3 * 64}}
        return
    adapter = weights(output / "adapter")
    assert not [key for key in adapter if "lora_" not in key and "score" not in key]
    assert not [key for key, tensor in adapter.items() if "lora_B" in key and not tensor.any()]
    assert set(record["trainable"]["targets"]) - {"head"} == (
        {"attention", "dense_mlp", "shared_experts", "experts", "router"}
        if "all" in chosen.targets
        else {"attention", "experts"}
    )


@pytest.mark.parametrize("name", ["two classes", "three classes", "chat", "mtp", "text", "nf4 chat", "nf4 classes"])
def test_merged_is_the_adapter_on_the_base(finished: Finished, name: str) -> None:
    """The adapter is put on by PEFT alone."""
    chosen, _, output = finished(name)
    cls = class_of(chosen)
    merged = cls.from_pretrained(output / "merged")
    adapted = PeftModel.from_pretrained(base_model(chosen, cls), output / "adapter")
    expected = logits(adapted)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    with adapted.disable_adapter():
        assert (logits(adapted) - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", ["two classes", "three classes", "head", "unfreezing", "nf4 classes"])
def test_the_record_s_figures_are_those_of_the_files(finished: Finished, name: str) -> None:
    """A classifier's: each row alone, without padding."""
    chosen, record, output = finished(name)
    task, tokenizer = load_task(chosen.task), load_tokenizer(chosen.base)
    assert task.labels is not None
    if chosen.method == "lora":
        model = PeftModel.from_pretrained(base_model(chosen, class_of(chosen)), output / "adapter")
    else:
        model = AutoModelForSequenceClassification.from_pretrained(output / "model")
    splits = []
    for rows in (task.validation, task.test):
        found = []
        for row in rows:
            inputs = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=48)
            with torch.no_grad():
                found.append(model.eval()(**inputs).logits[0].double().softmax(-1))
        splits.append(torch.stack(found).numpy())
    expected = classification_results(task, *splits)
    for figure in ("accuracy", "macro_f1", "roc_auc", "ece", "brier"):
        # PEFT alone dequantizes nothing while it computes: NF4 weights are rounded to fp32 at another place
        assert record["test"][figure] == pytest.approx(expected[figure], rel=1e-4), figure
    if len(task.labels) == 2:
        at, same = record["test"]["at_validation_recall"], expected["at_validation_recall"]
        assert at["threshold"] == pytest.approx(same["threshold"], rel=1e-4) and at["recall"] == 0.9


@pytest.mark.parametrize("name", ["chat", "text", "full"])
def test_perplexity_is_that_of_the_files(finished: Finished, data: Path, name: str) -> None:
    chosen, record, output = finished(name)
    model = DeepseekV3ForCausalLM.from_pretrained(output / ("model" if name == "full" else "merged")).eval()
    tokenizer = load_tokenizer(str(output / ("model" if name == "full" else "merged")))
    nats, tokens, size = 0.0, 0, 0
    for row in load_task(chosen.task).test:
        if name == "text":
            ids = [tokenizer.bos_token_id, *tokenizer(row["text"], add_special_tokens=False)["input_ids"]]
            prompt, ids = 1, [*ids, tokenizer.eos_token_id]
            size += len(row["text"].encode())
        else:
            prompt, ids = (
                len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **more)["input_ids"])
                for messages, more in ((row["messages"][:-1], {"add_generation_prompt": True}), (row["messages"], {}))
            )
            ids = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)["input_ids"][:48]
            size += len(row["messages"][-1]["content"].encode())
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nats -= sum(float(scores[i - 1, ids[i]]) for i in range(prompt, len(ids)))
        tokens += len(ids) - prompt
    test = record["test"]
    assert (test["n_tokens"], test["n_bytes"]) == (tokens, size)
    assert test["perplexity"]["value"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert test["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    if name == "chat":
        assert 0 <= test["rouge_l"]["value"] <= 1 and test["rouge_l"]["n"] == 2


STOCK = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
ids, folders = torch.tensor(json.loads(sys.argv[1])), json.loads(sys.argv[2])
for name, (folder, classes, adapter) in folders.items():
    auto = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    options = {"num_labels": len(classes)} if classes and adapter else {}
    model = auto.from_pretrained(folder, **options)
    if classes and not adapter:
        assert [model.config.id2label[i] for i in range(len(classes))] == classes, model.config.id2label
        assert model.config.label2id == {name: i for i, name in enumerate(classes)}
    assert type(model).__module__.startswith("transformers.models.deepseek_v3")
    if adapter:
        model.config.pad_token_id = 2
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        print(json.dumps([name, model.eval()(input_ids=ids).logits.tolist()]))
assert not [name for name in sys.modules if name.split(".")[0] == "deepseek_v3"]
"""


def test_stock_transformers_and_peft_read_what_a_run_leaves(finished: Finished) -> None:
    """In a process that never imports this package, with label names and all."""
    folders, expected = {}, {}
    for name in ("two classes", "three classes", "chat", "full", "unfreezing", "nf4 classes"):
        chosen, _, output = finished(name)
        classes = list(load_task(chosen.task).labels or ())
        folder = output / ("merged" if chosen.method == "lora" else "model")
        folders[name] = (str(folder), classes, "")
        expected[name] = logits(class_of(chosen).from_pretrained(folder))
        if name in ("two classes", "chat"):
            folders[f"{name}: adapter"] = (chosen.base, classes, str(output / "adapter"))
            expected[f"{name}: adapter"] = expected[name]
    printed = run_python(STOCK, json.dumps(IDS.tolist()), json.dumps(folders))
    found = dict(json.loads(line) for line in printed.splitlines() if line.startswith("["))
    assert found.keys() == expected.keys()
    for name, values in found.items():
        torch.testing.assert_close(torch.tensor(values), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["two classes", "head", "chat", "full", "nf4 chat", "mtp"])
def test_config_json_is_the_base_s(finished: Finished, name: str) -> None:
    """What training switches off is on again: MTP and balance loss, the cache in generation."""
    chosen, _, output = finished(name)
    folder = output / ("merged" if chosen.method == "lora" else "model")
    found, expected = (json.loads((path / "config.json").read_text()) for path in (folder, Path(chosen.base)))
    changed = {key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)}
    labels = {"architectures", "id2label", "label2id", "pad_token_id"}
    assert changed - {"transformers_version"} == (labels if load_task(chosen.task).labels else set())
    assert {key: found[key] for key in COEFFICIENTS} == COEFFICIENTS
    assert found["num_nextn_predict_layers"] == 1 and found.get("use_cache", True)


# --- MTP, forgetting, the experts' movement


def is_mtp(name: str) -> bool:
    """A tensor of the MTP layer, without the copies of embedding and head."""
    return "layers.3." in name and not name.endswith(("embed_tokens.weight", "shared_head.head.weight"))


def test_frozen_mtp_layers_stay_as_they_are(finished: Finished) -> None:
    for name in ("full", "chat", "text"):
        chosen, _, output = finished(name)
        start, trained = weights(Path(chosen.base)), weights(output / ("model" if name == "full" else "merged"))
        assert trained.keys() == start.keys()
        same = {key for key in start if torch.equal(start[key], trained[key])}
        assert {key for key in start if is_mtp(key)} <= same and len(same) < 0.7 * len(start)
    adapter = weights(finished("chat")[2] / "adapter")
    assert not [key for key in adapter if "layers.3." in key]


def test_trained_mtp_layers_move(finished: Finished) -> None:
    chosen, _, output = finished("mtp")
    adapter = weights(output / "adapter")
    kinds = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "experts"}
    moved = {kind for kind in kinds for key in adapter if "layers.3." in key and "lora_B" in key and kind in key}
    assert moved == kinds
    start, merged = weights(Path(chosen.base)), weights(output / "merged")
    assert not torch.equal(start["model.layers.3.self_attn.o_proj.weight"],
                           merged["model.layers.3.self_attn.o_proj.weight"])  # fmt: skip
    for key in ("eh_proj", "enorm", "mlp.gate"):
        assert torch.equal(start[f"model.layers.3.{key}.weight"], merged[f"model.layers.3.{key}.weight"])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_mtp_loss_is_there_only_if_trained(base: Path, data: Path, tokenizer: Any, method: str) -> None:
    task = load_task(data / "messages")
    for mtp in ("frozen", "trained"):
        model = build_model(recipe(base, data / "messages", base, method=method, mtp=mtp), task, tokenizer, CPU)
        output = model.train()(input_ids=IDS, labels=IDS)
        assert (output.mtp_loss is not None) == (mtp == "trained") and output.balance_loss is None
        output.loss.backward()
        assert any(p.grad is not None for n, p in model.named_parameters() if is_mtp(n)) == (mtp == "trained")
        assert not [n for n, p in model.named_parameters() if ".mlp.gate." in n and p.grad is not None]


def test_an_end_token_that_pads_is_trained(base: Path, data: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """`nn.Embedding` gives its padding token no gradient; in conversations EOS stands between the turns."""
    chosen = recipe(base, data / "messages", base, method="full")
    tokenizer = load_tokenizer(str(base))
    tokenizer.pad_token = tokenizer.eos_token
    model = build_model(chosen, load_task(data / "messages"), tokenizer, CPU).train()
    ids = torch.tensor([[5, tokenizer.eos_token_id, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad[tokenizer.eos_token_id].any()


@pytest.fixture(scope="module")
def general(data: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, int]:
    """The held-out part of the general text, packed as a run does it."""
    texts = [document.text for document in load_corpus(str(data / "text" / "train.jsonl")).heldout]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    special = {"bos_id": tokenizer.bos_token_id, "eos_id": tokenizer.eos_token_id}
    return pack_documents(ids, 256, **special, evaluation=True, context=64), sum(len(t.encode()) for t in texts)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["lora", "head"])
def test_a_new_classifier_is_the_base_s_language_model(
    data: Path, tmp_path: Path, tokenizer: Any, general: tuple[Any, int], tied: bool, method: str
) -> None:
    folder = save_base(tmp_path, tie_word_embeddings=tied)
    assert ("lm_head.weight" in weights(folder)) != tied
    chosen = recipe(folder, data / "two", tmp_path, method=method)
    model = build_model(chosen, load_task(data / "two"), tokenizer, CPU)
    original = DeepseekV3ForCausalLM.from_pretrained(folder)
    language = as_language_model(model, folder)
    assert torch.equal(logits(language), logits(original))
    found, expected = (heldout_bits_per_byte(each, *general, document_mask=True) for each in (language, original))
    assert found == expected > 1
    with torch.no_grad():  # the same weights, not copies: training them shows
        for name, parameter in model.named_parameters():
            if "lora_B" in name or (method == "head" and "o_proj" in name):
                parameter.add_(0.1)
    assert heldout_bits_per_byte(as_language_model(model, folder), *general, document_mask=True) != found


@pytest.mark.parametrize("name", ["two classes", "three classes", "head", "chat", "full", "nf4 classes"])
def test_forgetting_is_measured_before_and_after(finished: Finished, general: tuple[Any, int], name: str) -> None:
    chosen, record, output = finished(name)
    folder = output / ("merged" if chosen.method == "lora" else "model")
    bits = record["general_bits_per_byte"]
    start = base_model(chosen, DeepseekV3ForCausalLM)
    expected = heldout_bits_per_byte(start, *general, document_mask=True)
    assert bits["before"] == pytest.approx(expected, rel=1e-4 if chosen.quantize == "nf4" else 1e-6)
    trunk = {key: tensor for key, tensor in class_of(chosen).from_pretrained(folder).state_dict().items()
             if key != "score.weight"}  # fmt: skip
    start.load_state_dict(trunk, strict=False)
    assert bits["after"] == pytest.approx(heldout_bits_per_byte(start, *general, document_mask=True), rel=1e-4)
    assert (bits["after"] == bits["before"]) == (chosen.method == "head")


@pytest.mark.parametrize("name", ["chat", "mtp", "three classes", "full", "unfreezing", "nf4 chat"])
def test_movement_is_the_distance_of_the_weights(finished: Finished, name: str) -> None:
    """Against the difference of what is on disk; the summary is of the same figures."""
    chosen, record, output = finished(name)
    cls = class_of(chosen)
    start = base_model(chosen, cls).state_dict()
    end = cls.from_pretrained(output / ("merged" if chosen.method == "lora" else "model")).state_dict()
    expected = {}
    for layer in record["experts"]["layers"]:
        squares = [
            ((end[key] - start[key]).double().pow(2).sum((1, 2)), start[key].double().pow(2).sum((1, 2)))
            for key in (f"model.{layer}.mlp.experts.{part}_proj" for part in ("gate_up", "down"))
        ]
        moved, whole = (sum(part) for part in zip(*squares, strict=True))
        expected[layer] = (moved / whole).sqrt().float()
    if chosen.method == "lora":
        found = expert_movement(load_adapter(base_model(chosen, cls), output / "adapter"))
        assert found.keys() == expected.keys()
        for layer, values in expected.items():
            torch.testing.assert_close(found[layer], values, rtol=1e-4, atol=1e-6)
    for layer, summary in record["experts"]["layers"].items():
        values = expected[layer]
        assert summary["mean"] == pytest.approx(float(values.mean()), rel=1e-4)
        assert summary["max"] == pytest.approx(float(values.max()), rel=1e-4)
        assert [e for e, _ in summary["most"]] == values.argsort(descending=True)[:5].tolist()
        assert (values > 0).all() == (chosen.method == "lora" or layer != "layers.3")
    squares = torch.cat(list(expected.values())).pow(2).sort(descending=True).values
    tenth = max(1, len(squares) // 10)
    assert record["experts"]["share_of_top_tenth"] == pytest.approx(float(squares[:tenth].sum() / squares.sum()), 1e-4)


# --- data


def test_at_most_validation_rows_are_looked_at(base: Path, data: Path, tokenizer: Any) -> None:
    for kind, rows in (("two", None), ("two", 4), ("two", 99), ("messages", 2)):
        task = load_task(data / kind)
        chosen = recipe(base, data / kind, base, validation_rows=rows, max_length=100)
        examples = make_examples(chosen, task, tokenizer)
        if kind == "messages":
            ends = sum(int((row["input_ids"] == tokenizer.eos_token_id).sum()) for row in examples.validation)
            assert ends == 2
        else:
            assert len(examples.train) == 16 and len(examples.validation) == min(rows or 6, 6)
    chosen = recipe(base, data / "two", base, validation_rows=4)
    few, again = (make_examples(chosen, load_task(data / "two"), tokenizer).validation for _ in range(2))
    assert few == again and [row["labels"] for row in few] != []


def test_a_long_text_is_evaluated_to_its_end(base: Path, data: Path, tokenizer: Any) -> None:
    """Every token but the first once, in pieces of `max_length`, each token with what is before it in its piece."""
    model = DeepseekV3ForCausalLM.from_pretrained(base).eval()
    task = load_task(data / "text")
    text = ". ".join(row["text"] for row in task.test)
    report = evaluate_task(model, replace(task, test=[{"text": text}]), tokenizer, 32)
    ids = [0, *tokenizer(text, add_special_tokens=False)["input_ids"], 1]
    assert len(ids) > 100 and report["n_tokens"] == len(ids) - 1 and report["n_bytes"] == len(text.encode())
    nats = 0.0
    for start in range(0, len(ids) - 1, 31):
        piece = torch.tensor([ids[start : start + 32]])
        with torch.no_grad():
            nats += float(model(piece, labels=piece).loss) * (piece.shape[1] - 1)
    assert report["perplexity"]["value"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-4)
    assert report["perplexity"]["low"] is None  # one text has no interval


def test_no_positive_validation_row_is_no_error(data: Path) -> None:
    task = load_task(data / "two")
    assert task.labels is not None
    negative = [row for row in task.validation if row["label"] == task.labels[0]]
    half = torch.full((8, 2), 0.5).numpy()
    report = classification_results(replace(task, validation=negative), half[: len(negative)], half)
    assert "at_validation_recall" not in report and report["n"] == 8


def test_a_base_that_cannot_be_loaded_is_named(data: Path, tmp_path: Path) -> None:
    for base in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match=f"base {base}: its tokenizer cannot be loaded") as caught:
            finetune(recipe(base, data / "two", tmp_path / "run"))
        assert "\n" not in str(caught.value)
        assert ("found no tokenizer.json" in str(caught.value)) == base.exists()


def test_a_tokenizer_that_is_code_is_not_guessed(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without running the code transformers would convert tiktoken.model, with a split pattern that is not its own."""
    folder = shutil.copytree(base, tmp_path / "base")
    for file in (*folder.glob("tokenizer*"), *folder.glob("*.jinja")):
        file.unlink()
    ranks = {bytes([i]): i for i in range(256)}
    monkeypatch.setattr(TikTokenConverter, "load_tiktoken_bpe", lambda *_: ranks)
    (folder / "tiktoken.model").write_text("".join(f"{b64encode(key).decode()} {i}\n" for key, i in ranks.items()))
    names = {"auto_map": {"AutoTokenizer": ["tokens.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    own = load_tokenizer(str(base))
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"eos_token": own.eos_token}))
    (folder / "tokens.py").write_text("raise SystemExit(7)")
    with pytest.raises(ValueError, match=f"base {folder}: its tokenizer cannot be loaded: {folder}: found no token"):
        load_tokenizer(str(folder))
    shutil.copy(base / "tokenizer.json", folder)
    assert load_tokenizer(str(folder)).get_vocab() == own.get_vocab()


def test_the_head_of_a_classifier_is_kept_for_its_own_classes_only(
    finished: Finished, data: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """A head of other classes is no start, and must not pass for a new one."""
    chosen, _, output = finished("head")
    task = load_task(chosen.task)
    assert task.labels is not None
    chosen = replace(chosen, base=str(output / "model"), output_dir=str(tmp_path))
    model = build_model(chosen, task, tokenizer, CPU)
    assert torch.equal(model.score.weight, weights(output / "model")["score.weight"])
    renamed = replace(task, labels=(*task.labels[:2], "other"))
    for other in (renamed, load_task(data / "two")):
        found = f"a classifier of {', '.join(task.labels)}; the task's classes are {', '.join(other.labels or ())}"
        with pytest.raises(ValueError, match=f"base {output}/model: {found}; allowed is a language model"):
            build_model(chosen, other, tokenizer, CPU)


def test_forgetting_of_a_classifier_is_refused(finished: Finished, tmp_path: Path) -> None:
    """Before anything is trained or written."""
    chosen, _, output = finished("head")
    again = replace(chosen, base=str(output / "model"), output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=f"base {output}/model: found no lm_head.weight .* general_text: null"):
        finetune(again)
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}
    assert finetune(replace(again, general_text=None))["general_bits_per_byte"] == {}


def long_rows(data: Path, folder: Path, counts: dict[str, int]) -> Path:
    """The conversations of `data`, the first `counts[split]` with a question of 120 words."""
    folder.mkdir()
    for split in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (data / "messages" / f"{split}.jsonl").read_text().splitlines()]
        for row in rows[: counts.get(split, 0)]:
            row["messages"][1]["content"] = "late " * 120
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_rows_without_anything_to_learn_are_counted(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = long_rows(data, tmp_path / "data", {"train": 14, "test": 1})
    *rows, last = (folder / "train.jsonl").read_text().splitlines()
    messages = json.loads(last)["messages"]
    messages[2]["content"] = "late " * 120  # an answer that is cut in the middle
    (folder / "train.jsonl").write_text("\n".join([*rows, json.dumps({"messages": messages})]))
    record = finetune(recipe(base, folder, tmp_path / "run", max_steps=1))
    assert record["task"]["left_out"] == {"train": 14, "validation": 0, "test": 1}
    assert record["task"]["truncated"] == {"train": 1, "validation": 0, "test": 0}
    assert record["task"]["rows"] == {"train": 16, "validation": 6, "test": 8}
    assert (record["test"]["n"], record["test"]["n_left_out"]) == (7, 1)
    learn = "have nothing to learn within max_length 48"
    notes = [f"14 of 16 rows of train {learn}", f"1 of 8 rows of test {learn}"]
    notes += ["1 of 16 rows of train are longer than max_length 48: their end is cut off"]
    assert record["task"]["notes"][-3:] == notes
    printed = capsys.readouterr().out
    assert all(f"  {note}" in printed for note in notes)


@pytest.mark.parametrize("kind", ["two", "messages", "text"])
def test_rows_that_are_cut_are_counted(base: Path, data: Path, tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    """But for texts, which go on in the next piece."""
    task = load_task(data / kind)
    rows = {"train": task.train, "validation": task.validation, "test": task.test}
    encode = encode_chat if kind == "messages" else encode_text
    lengths = {name: [len(encode(row, tokenizer).input_ids) for row in of] for name, of in rows.items()}
    length = sorted(lengths["train"])[-4]
    if kind == "two":  # without the end token
        lengths = {name: [each - 1 for each in of] for name, of in lengths.items()}
    examples = make_examples(recipe(base, data / kind, base, max_length=length), task, tokenizer)
    longer = {name: sum(each > length for each in of) for name, of in lengths.items()}
    assert 0 < longer["train"] < 4 and longer["test"] > 0
    assert examples.truncated == (longer if kind != "text" else dict.fromkeys(rows, 0))
    assert examples.left_out == dict.fromkeys(rows, 0)
    cut = [f"{count} of {len(rows[name])} rows of {name} are longer" for name, count in longer.items() if count]
    assert [note.split(" than max_length")[0] for note in examples.notes] == (cut if kind != "text" else [])


@pytest.mark.parametrize("split, count", [("train", 16), ("validation", 6), ("test", 8)])
def test_a_split_without_anything_to_learn_is_refused(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, count: int
) -> None:
    """Before a model is loaded."""
    folder = long_rows(data, tmp_path / "data", {split: count})
    monkeypatch.setattr("deepseek_v3.finetuning.run.build_model", None)
    with pytest.raises(ValueError, match=f"none of the {count} rows of {split} has .* max_length 48"):
        finetune(recipe(base, folder, tmp_path / "run"))


def test_train_tokens_are_those_of_the_rows(finished: Finished) -> None:
    """Without padding, of packed rows neither."""
    for name in ("two classes", "head", "chat", "text"):
        chosen, record, _ = finished(name)
        tokenizer, rows = load_tokenizer(chosen.base), load_task(chosen.task).train
        if name == "chat":
            parts = [tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"] for row in rows]
        else:
            parts = [tokenizer(row["text"])["input_ids"] + [1] * (name == "text") for row in rows]
        assert record["train_tokens"] == sum(min(len(ids), 48) for ids in parts), name


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak cannot be reset here")
def test_the_peak_is_that_of_the_run(base: Path, data: Path, tmp_path: Path) -> None:
    """Not that of what its process did before."""
    mmap.mmap(-1, 2**29, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()
    before = peak_memory()
    record = finetune(recipe(base, data / "two", tmp_path, max_steps=1))
    assert record["peak_memory_bytes"] < before


def test_several_gpus_in_one_process_are_refused(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Trainer` would multiply the rows per step by their number."""
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 2)
    with pytest.raises(ValueError, match="found 2 GPUs in one process, allowed is one: .*torchrun --nproc-per-node 2"):
        finetune(recipe(base, data / "two", tmp_path))
    assert not (tmp_path / "recipe.json").exists()
