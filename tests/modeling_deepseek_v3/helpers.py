"""Small models with weights that make every mechanism visible, and the ways the tests of this folder compare them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config as StockConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as StockForCausalLM

from deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM
from deepseek_v3.configuration import preset

ROOT = Path(__file__).resolve().parents[2]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}


def tiny_config(**overrides: Any) -> DeepseekV3Config:
    """The tiny preset with a vocabulary of 97, so that tests spend their time elsewhere."""
    return preset("tiny", **{"vocab_size": 97, **overrides})


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of the size a trained model has, norms away from 1, routing biases away from 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(0.2 * noise)
        elif "inv_freq" in name:
            continue
        elif "norm" in name:
            tensor.copy_(1 + 0.2 * noise)
        elif tensor.dim() < 2:
            tensor.copy_(0.2 * noise)
        elif "embed" in name:
            tensor.copy_(noise)
        else:
            tensor.copy_(noise * tensor.shape[-1] ** -0.5)
    return model


def build(config: DeepseekV3Config | None = None, cls: type = DeepseekV3ForCausalLM, **kwargs: Any) -> Any:
    """A model of `cls` in evaluation mode with `randomize`d weights; `kwargs` choose its kernels."""
    config = tiny_config() if config is None else config
    for key, value in {"attn_implementation": "eager", **kwargs}.items():
        setattr(config, f"_{key}", value)
    return randomize(cls(config)).eval()


def stock_config(config: DeepseekV3Config) -> StockConfig:
    left_out = ("model_type", "rope_scaling", "rope_theta")
    return StockConfig(**{key: value for key, value in config.to_diff_dict().items() if key not in left_out})


def stock_twin(model: DeepseekV3ForCausalLM, **kwargs: Any) -> StockForCausalLM:
    """transformers' own model with the same weights and kernels; it has no MTP layers."""
    config = stock_config(model.config)
    attention = model.config._attn_implementation
    config._attn_implementation = "eager" if attention == "deepseek_v3" else attention  # that one is ours alone
    config._experts_implementation = kwargs.get("experts_implementation", "eager")
    twin = StockForCausalLM(config)
    assert type(twin).__module__.startswith("transformers.models.deepseek_v3")
    ours = model.state_dict()
    twin.load_state_dict({name: ours[name] for name in twin.state_dict()})
    return twin.to(next(model.parameters()).dtype).eval()


def tokens(*shape: int, vocab: int = 97, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, vocab, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> gradient of every parameter that has one; taken out of the model, which is left without."""
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest deviation in units of the expected tensor's largest element."""
    scale = expected.abs().max().item()
    difference = (found.double() - expected.double()).abs().max().item()
    return difference / scale if scale else difference


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) <= tolerance, sorted(errors.items(), key=lambda item: -item[1])[:5]


def run_python(program: str, *arguments: str, **environment: str) -> str:
    """Run a program in a fresh interpreter from the repository's root and return what it prints."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
