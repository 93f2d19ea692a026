"""llama.cpp as the tests use it: its server on a GGUF file, its converter on a checkpoint, and stock transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config as StockConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as StockForCausalLM

from tests.clients.environments import client_python, run_client
from tests.modeling_deepseek_v3.helpers import stock_config

CLIENT = "llama.cpp"
FOLDER = Path(__file__).parent


def ask(file: Path, calls: list[tuple[str, dict]], mtp: bool = False) -> list[Any]:
    """What llama.cpp's server answers to `calls` of (path, body) on `file`; `mtp`: with drafts of the MTP layer."""
    request = json.dumps({"calls": calls, "mtp": mtp})
    return json.loads(run_client(CLIENT, FOLDER / "llama_cpp_run.py", str(file), text=request).splitlines()[-1])


def convert(folder: Path, file: Path) -> Path:
    """An F32 GGUF of a checkpoint by llama.cpp's own converter."""
    run_client(CLIENT, FOLDER / "llama_cpp_convert.py", str(folder), str(file))
    return file


def next_logprobs(file: Path, prompts: list[list[int]], vocab_size: int) -> torch.Tensor:
    """`[P, V]`: what each prompt's next token is drawn from."""
    # The server reports nothing for a token that is a part of a character, so that "!" is made the one that is drawn;
    # the logprobs are those before that.
    plain = ask(file, [("/tokenize", {"content": "!"})])[0]["tokens"][-1]
    settings = {"n_predict": 1, "n_probs": vocab_size, "temperature": 0.0, "logit_bias": [[plain, 1e4]]}
    answers = ask(file, [("/completion", {"prompt": prompt, **settings}) for prompt in prompts])
    result = torch.full((len(prompts), vocab_size), torch.nan)
    for row, answer in zip(result, answers, strict=True):
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
    return result


def generate(file: Path, prompt: list[int], n_predict: int, mtp: bool = False) -> tuple[list[int], dict[str, Any]]:
    """Greedy tokens, and the timings with the counts of drafts."""
    body = {"prompt": prompt, "n_predict": n_predict, "temperature": 0.0, "return_tokens": True}
    (answer,) = ask(file, [("/completion", body)], mtp)
    return answer["tokens"], answer["timings"]


def stock_model(source: Any, folder: Path) -> StockForCausalLM:
    """Stock transformers' model in fp32 with the dequantized tensors of `source`, through a checkpoint in `folder`."""
    names = [name for name in source.names if not _is_mtp(name, source.config.num_hidden_layers)]
    folder.mkdir(parents=True)
    config: StockConfig = stock_config(source.config)
    config.save_pretrained(folder)
    tensors = {name: source.read(name).float().contiguous() for name in names}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = StockForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    assert type(model).__module__.startswith("transformers.models.deepseek_v3")
    return model


def _is_mtp(name: str, layers: int) -> bool:
    parts = name.split(".")
    return parts[1] == "layers" and int(parts[2]) >= layers


@torch.no_grad()
def expected_logprobs(model: torch.nn.Module, prompts: list[list[int]]) -> torch.Tensor:
    """`[P, V]`: as `next_logprobs`."""
    return torch.stack([model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in prompts])


@torch.no_grad()
def expected_tokens(model: torch.nn.Module, prompt: list[int], n_predict: int) -> list[int]:
    """Greedy tokens, with the whole sequence computed anew for each, until EOS."""
    ids = list(prompt)
    while len(ids) < len(prompt) + n_predict and (len(ids) == len(prompt) or ids[-1] != model.config.eos_token_id):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def dequantize(file: Path, copy: Path) -> Path:
    """An F32 copy of a GGUF file, decoded by llama.cpp's own functions."""
    run_client(CLIENT, FOLDER / "llama_cpp_dequantize.py", str(file), str(copy))
    return copy


def install_quantizer(site: Path) -> None:
    """Put the client's xllamacpp, and nothing else of its environment, into `site`."""
    (extension,) = client_python(CLIENT).parents[1].glob("lib/python*/site-packages/xllamacpp")
    (site / "xllamacpp").symlink_to(extension)
