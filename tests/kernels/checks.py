"""What the kernel tests share: one error measure, one tolerance per dtype, and gradients of an op as a dictionary."""

from collections.abc import Callable

import torch

# Relative error of a whole tensor in the Frobenius norm, against fp64. One rounding to bf16 gives about 1.7e-3.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
DTYPES = tuple(TOLERANCE)


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """`||actual - exact|| / ||exact||` in fp64 (absolute where `exact` is zero); NaN if anything is not finite."""
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    norm = exact.norm().item()
    return (actual - exact).norm().item() / (norm if norm > 0 else 1.0)


def assert_close(actual: torch.Tensor, exact: torch.Tensor, name: str, tolerance: float | None = None) -> None:
    """Against the fp64 result, with the tolerance of `actual`'s dtype (`tolerance` replaces it)."""
    bound = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    found = error(actual, exact)
    assert found <= bound, f"{name}: relative error {found:.2e} > {bound:.0e}"  # NaN fails too


def run(
    op: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]], *inputs: torch.Tensor, **fixed
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...]]:
    """The outputs of `op(*inputs, **fixed)`, and its floating-point inputs' gradients for seeded output gradients.

    The gradients that enter are drawn in fp32 and rounded to each output's dtype: the same for every dtype.
    """
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = op(*leaves, **fixed)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    flowing = [y for y in outputs if y.requires_grad]
    grads = [torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y) for y in flowing]
    torch.autograd.backward(flowing, grads)
    return outputs, tuple(x.grad for x in leaves)


def compare(op: Callable, exact: Callable, *inputs: torch.Tensor, tolerance: float | None = None, **fixed) -> None:
    """Outputs and input gradients of `op` against `exact` run on the same values in fp64."""
    outputs, grads = run(op, *inputs, **fixed)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    exact_outputs, exact_grads = run(exact, *wide, **fixed)
    for i, (found, expected) in enumerate(zip(outputs, exact_outputs, strict=True)):
        if found.is_floating_point():
            assert_close(found, expected, f"output {i}", tolerance)
        else:
            assert torch.equal(found.cpu(), expected.cpu()), f"output {i}"
    for i, (found, expected) in enumerate(zip(grads, exact_grads, strict=True)):
        assert (found is None) == (expected is None), f"gradient of input {i}"
        if found is not None:
            assert found.dtype == inputs[i].dtype
            assert_close(found, expected, f"gradient of input {i}", tolerance)


def assert_compiles(op: Callable, *inputs: torch.Tensor, **fixed) -> None:
    """`torch.compile(fullgraph=True)` takes the op, forward and backward, and changes nothing."""
    torch._dynamo.reset()
    expected = run(op, *inputs, **fixed)
    found = run(torch.compile(op, backend="aot_eager", fullgraph=True), *inputs, **fixed)
    for a, b in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0)
