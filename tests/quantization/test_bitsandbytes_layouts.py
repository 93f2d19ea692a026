"""bitsandbytes' formats against bitsandbytes' own layers: what they save, and what it stands for."""

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional

from deepseek_v3.quantization.bitsandbytes_layouts import (
    LLMInt8Rows,
    NF4Blocks,
    llm_int8_tensors,
    nf4_tensors,
)
from deepseek_v3.quantization.layouts import Layout

STATE = "weight.quant_state.bitsandbytes__nf4"


def saved(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f".{name}": tensor for name, tensor in layer.state_dict().items()}


def nf4_layer(weight: torch.Tensor, double: bool) -> torch.nn.Module:
    layer = bitsandbytes.nn.Linear4bit(weight.shape[1], weight.shape[0], False, None, double, "nf4")
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.clone(), False, quant_type="nf4", blocksize=64, compress_statistics=double, module=layer
    )
    return layer.to("cpu")


def int8_layer(weight: torch.Tensor) -> torch.nn.Module:
    layer = bitsandbytes.nn.Linear8bitLt(weight.shape[1], weight.shape[0], False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(weight.half(), False, has_fp16_weights=False)
    return layer.to("cpu")


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def there_and_back(layout: Layout, stored: dict[str, torch.Tensor], matrix: tuple[int, int]) -> torch.Tensor:
    """What the weight stands for, after it has been checked that it is written as it was read."""
    parts = {part: layout.read(part, matrix, stored.__getitem__) for part in layout.parts(matrix)}
    for part, (dtype, shape) in layout.parts(matrix).items():
        assert parts[part].dtype == dtype and parts[part].shape == shape, part
    same(layout.write(parts, matrix), stored)
    for suffix, (dtypes, shape) in layout.stored(matrix).items():
        names = {torch.uint8: "U8", torch.int8: "I8", torch.float32: "F32"}
        assert names[stored[suffix].dtype] in dtypes and shape in (None, tuple(stored[suffix].shape)), suffix
    return layout.dequantize({part: tensor[None] for part, tensor in parts.items()}, matrix, torch.float32)[0]


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("matrix", [(128, 192), (1, 64), (3, 5), (96, 160), (300, 70)])
def test_nf4(double: bool, dtype, matrix: tuple[int, int]) -> None:
    weight = torch.randn(matrix, generator=torch.Generator().manual_seed(0)).to(dtype)
    stored = nf4_tensors(weight, double)
    same(stored, saved(nf4_layer(weight, double)))
    found = there_and_back(NF4Blocks(double, len(stored[f".{STATE}"]) + 7), stored, matrix)
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if double else state.absmax
    codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[: weight.numel()].int()
    expected = state.code[codes] * scales.repeat_interleave(64)[: weight.numel()]
    torch.testing.assert_close(found, expected.view(matrix), rtol=3e-7, atol=0)
    if matrix[1] % 64 == 0:  # others bitsandbytes decodes wrongly on CPUs with AVX512
        state.dtype = torch.float32
        assert torch.equal(found, functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("matrix", [(128, 192), (1, 64), (3, 5)])
def test_llm_int8(matrix: tuple[int, int]) -> None:
    weight = torch.randn(matrix, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored = llm_int8_tensors(weight)
    same(stored, saved(int8_layer(weight)))
    found = there_and_back(LLMInt8Rows(), stored, matrix)
    assert torch.equal(found, functional.int8_vectorwise_dequant(stored[".weight"], stored[".SCB"]))
    assert (found - weight.float()).abs().max() < 0.6 * weight.float().abs().max() / 127
