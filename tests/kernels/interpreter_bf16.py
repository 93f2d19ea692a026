"""Makes bf16 and fp8 right in Triton's interpreter, which adds and multiplies the bits of bf16 values as integers.

Patches private functions of the pinned Triton, so it fails loudly when one is missing. Import after setting
TRITON_INTERPRET=1 and before running a kernel.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
BITS = {1: (np.uint8, torch.uint8), 2: (np.uint16, torch.int16), 4: (np.uint32, torch.int32)}
BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
COMPARISONS = (np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal)

_convert_float = interpreter._convert_float
_builder = interpreter.InterpreterBuilder
_create_dot, _binary_op, _unary_op = _builder.create_dot, _builder.binary_op, _builder.unary_op


def _convert(data, source, target, rounding_mode):
    """As the GPU converts: to nearest even, saturating in e4m3."""
    if source not in TORCH or target not in TORCH:
        return _convert_float(data, source, target, rounding_mode)
    from_, to = TORCH[source], TORCH[target]
    signed = {1: np.uint8, 2: np.int16, 4: np.int32}[from_.itemsize]  # torch has no unsigned types of these sizes
    values = torch.from_numpy(np.ascontiguousarray(data).view(signed).copy()).view(from_).float()
    if to == torch.float8_e4m3fn:
        values = torch.where(values.isnan(), values, values.clamp(-448, 448))
    numpy_bits, torch_bits = BITS[to.itemsize]
    return values.to(to).view(torch_bits).numpy().view(numpy_bits).reshape(np.shape(data))


def _to_float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    data = _convert(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


def _to_bfloat16(handle):
    return interpreter.TensorHandle(_convert(handle.data, tl.float32, tl.bfloat16, None), tl.bfloat16)


def _dot(self, a, b, d, precision, max_imprecise):
    return _create_dot(self, _to_float32(a), _to_float32(b), d, precision, max_imprecise)


def _binary(self, left, right, op):
    if left.dtype.scalar != tl.bfloat16 or op in BITWISE:
        return _binary_op(self, left, right, op)
    result = _binary_op(self, _to_float32(left), _to_float32(right), op)
    return result if op in COMPARISONS else _to_bfloat16(result)


def _unary(self, argument, op):
    if argument.dtype.scalar != tl.bfloat16:
        return _unary_op(self, argument, op)
    return _to_bfloat16(_unary_op(self, _to_float32(argument), op))


interpreter._convert_float = _convert
_builder.create_dot, _builder.binary_op, _builder.unary_op = _dot, _binary, _unary
