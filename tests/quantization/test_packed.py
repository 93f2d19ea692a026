"""NF4 weights and layers: equal to bitsandbytes matrix by matrix, to the definition, and in what they compute to plain
layers with the dequantized weights."""

import copy
import io
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from torch import nn

from deepseek_v3.modeling_deepseek_v3.moe import DeepseekV3Experts
from deepseek_v3.quantization import NF4Weight
from deepseek_v3.quantization.layers import NF4Linear, pack_linear_
from tests.modeling_deepseek_v3.helpers import relative_error, tiny_config

# blocks of 64 that end with the rows and that do not, or not with the matrix; an odd number of elements; more than 256
# blocks, which is one of double quantization
MATRICES = [(16, 64), (16, 8), (12, 48), (6, 20), (5, 3), (130, 128)]


def random_experts(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype) * 0.05


def reference(matrix: torch.Tensor, double_quant: bool) -> tuple[torch.Tensor, functional.QuantState]:
    return functional.quantize_4bit(matrix, blocksize=64, compress_statistics=double_quant, quant_type="nf4")


def dequantized(packed: torch.Tensor, state: functional.QuantState) -> torch.Tensor:
    """fp32, from the definition. bitsandbytes' own is wrong on CPUs with AVX512 where rows are no multiple of 64."""
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()[: state.shape.numel()]
    return (state.code[codes.int()] * absmax.repeat_interleave(64)[: len(codes)]).view(state.shape)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("matrix", MATRICES)
def test_every_expert_is_what_bitsandbytes_makes_of_it(matrix, dtype, double_quant) -> None:
    experts = random_experts(3, *matrix, dtype=dtype)
    weight = NF4Weight.quantize(experts, double_quant)
    assert weight.shape == experts.shape and weight.dtype == dtype and weight.device == experts.device
    dense = weight.dequantize()
    wide = weight.dequantize(torch.float32)
    assert dense.dtype == dtype and wide.dtype == torch.float32
    for expert in range(3):
        packed, state = reference(experts[expert], double_quant)
        expected = dequantized(packed, state)
        parts = {"packed": packed.flatten(), "absmax": state.absmax}
        if double_quant:
            nested = state.state2
            parts |= {"nested_absmax": nested.absmax, "nested_code": nested.code, "offset": state.offset}
        assert parts.keys() == weight.state_dict().keys()
        for name, part in parts.items():
            ours = getattr(weight, name)
            assert torch.equal(ours if name == "nested_code" else ours[expert], part), name
        assert torch.equal(wide[expert], expected) and torch.equal(weight[expert], dense[expert])
        assert torch.equal(dense[expert], expected.to(dtype))
        if matrix[1] % 64 == 0:
            assert torch.equal(dense[expert], functional.dequantize_4bit(packed, state))
    chosen = torch.tensor([2, 0])
    assert torch.equal(weight.dequantize(experts=chosen), dense[chosen])


def test_large_stacks_are_dequantized_in_pieces(monkeypatch) -> None:
    weight = NF4Weight.quantize(random_experts(5, 16, 8))
    whole = weight.dequantize()
    monkeypatch.setattr("deepseek_v3.quantization.packed._MAX_ELEMENTS", 300)  # two experts
    assert torch.equal(weight.dequantize(), whole)


def test_moving_copying_and_storing_keep_every_bit(tmp_path: Path) -> None:
    weight = NF4Weight.quantize(random_experts(3, 16, 8, dtype=torch.bfloat16))
    expected = weight.dequantize()
    copied = copy.deepcopy(weight)
    state = copy.deepcopy(weight.state_dict())
    assert {name: tuple(part.shape) for name, part in state.items()} == {
        "packed": (3, 64), "absmax": (3, 2), "nested_absmax": (3, 1), "nested_code": (256,), "offset": (3,)
    }  # fmt: skip
    weight.packed.zero_()
    assert torch.equal(copied.dequantize(), expected)

    copied = nn.ModuleDict({"w": copied}).to("cpu", torch.float16).bfloat16().double()["w"]
    assert copied.absmax.dtype == torch.uint8 and copied.offset.dtype == torch.float32
    assert torch.equal(copied.dequantize(), expected)
    assert copied.to("meta").device.type == "meta"

    with pytest.raises(RuntimeError, match="floating point"):
        weight.requires_grad_(True)
    save_file(state, tmp_path / "weight.safetensors")
    weight.load_state_dict(load_file(tmp_path / "weight.safetensors"))
    assert torch.equal(weight.dequantize(), expected)
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).dequantize(), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_linear_layers_compute_what_the_dequantized_ones_do(dtype, tolerance, bias) -> None:
    for width in (64, 48, 20, 3):
        plain = nn.Linear(width, 5, bias=bias, dtype=dtype)
        layer = NF4Linear(plain, double_quant=True)
        pack_linear_(layer, plain.weight)
        packed, state = reference(plain.weight.detach(), True)
        assert torch.equal(layer.weight.data, packed) and torch.equal(layer.weight.quant_state.absmax, state.absmax)
        assert torch.equal(layer.dequantize(torch.float32), dequantized(packed, state))
        plain.weight.data = dequantized(packed, state).to(dtype)
        for mode in (True, False):
            inputs = [torch.randn(2, 4, width).to(dtype).requires_grad_()]
            inputs.append(inputs[0].detach().clone().requires_grad_())
            outputs = [each.train(mode)(x) for each, x in zip((layer, plain), inputs, strict=True)]
            for output in outputs:
                output.backward(torch.ones_like(output))
            assert outputs[0].dtype == dtype and relative_error(*outputs) <= tolerance
            assert relative_error(inputs[0].grad, inputs[1].grad) <= tolerance
            with torch.no_grad():
                assert torch.equal(layer(inputs[0]), outputs[0])


def expert_pair(dtype: torch.dtype, implementation: str) -> tuple[DeepseekV3Experts, DeepseekV3Experts]:
    """One in NF4 and one with the same weights as plain tensors."""
    config = tiny_config(n_routed_experts=8, hidden_size=64, moe_intermediate_size=32)
    config._experts_implementation = implementation
    packed = DeepseekV3Experts(config).to(dtype)
    for name, parameter in list(packed.named_parameters()):
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        weight = NF4Weight.quantize(parameter)
        delattr(packed, name)
        setattr(packed, name, weight)
    plain = DeepseekV3Experts(config).to(dtype).requires_grad_(False)
    plain.gate_up_proj.copy_(packed.gate_up_proj.dequantize())
    plain.down_proj.copy_(packed.down_proj.dequantize())
    return packed, plain


@pytest.mark.parametrize("implementation", ["deepseek_v3", "eager"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_experts_compute_what_the_dequantized_ones_do(dtype, tolerance, implementation) -> None:
    packed, plain = expert_pair(dtype, implementation)
    for count in (1, 2, 50):
        indices = torch.stack([torch.randperm(9)[:3] for _ in range(count)])  # 8: of another rank
        results = []
        for experts in (packed, plain):
            torch.manual_seed(count)
            hidden = torch.randn(count, 64).to(dtype).requires_grad_()
            weights = torch.rand(count, 3).requires_grad_()
            for _ in range(2):  # a second time, as the first must not have changed the weights
                hidden.grad = weights.grad = None
                output = experts(hidden, indices, weights)
                output.backward(torch.randn(count, 64, generator=torch.Generator().manual_seed(7)).to(dtype))
            with torch.no_grad():
                results.append((output, experts(hidden, indices, weights), hidden.grad, weights.grad))
        for found, expected in zip(*results, strict=True):
            assert found.dtype == expected.dtype and relative_error(found, expected) <= tolerance


def test_decoding_dequantizes_only_the_chosen_experts(monkeypatch) -> None:
    packed, _ = expert_pair(torch.float32, "deepseek_v3")
    sizes = []
    dequantize_4bit = functional.dequantize_4bit

    def spy(*args, **kwargs):
        sizes.append(args[1].shape[0])
        return dequantize_4bit(*args, **kwargs)

    monkeypatch.setattr(functional, "dequantize_4bit", spy)
    with torch.no_grad():
        packed(torch.randn(2, 64), torch.tensor([[1, 5, 8], [5, 1, 7]]), torch.rand(2, 3))
    assert sizes == [3 * 64 * 64, 3 * 64 * 32]  # 1, 5 and 7
