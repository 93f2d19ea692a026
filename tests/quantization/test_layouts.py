"""Which products and kernels a layout takes on which device."""

from types import SimpleNamespace

import pytest
import torch

from deepseek_v3.quantization import layouts
from deepseek_v3.quantization.layouts import FP8Blocks


@pytest.mark.parametrize(
    ("capability", "block", "kernel"), [((8, 0), 128, False), ((8, 9), 128, True), ((9, 0), 64, False)]
)
def test_fp8_blocks_are_dequantized_by_the_kernel_where_it_runs(capability, block, kernel, monkeypatch) -> None:
    """For a GPU without E4M3, as the A100, no kernel with it compiles: plain torch dequantizes and multiplies."""
    gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    multiplies = layouts._multiplies_e4m3(gpu)
    assert multiplies == (capability >= (8, 9))
    called = []
    monkeypatch.setattr(layouts, "_multiplies_e4m3", lambda x: multiplies)
    monkeypatch.setattr(layouts, "dequantize_weight_fp8", lambda *parts: called.append(1) or parts[0].to(parts[2]))
    layout = FP8Blocks(block=(block, block), scale_dtype=torch.bfloat16)
    parts = {
        name: torch.empty(2, *shape, dtype=dtype, device="meta")
        for name, (dtype, shape) in layout.parts((300, 200)).items()
    }
    weight = layout.dequantize(parts, (300, 200), torch.bfloat16)
    assert weight.shape == (2, 300, 200) and weight.dtype == torch.bfloat16 and len(called) == kernel
    with torch.no_grad():
        assert kernel or layout.linear(torch.empty(5, 200), parts, (300, 200), {}) is None
