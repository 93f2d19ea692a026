"""The Triton implementation of MLA attention."""

from .triton_backward import (
    _mla_attention_backward_key_value_kernel,
    _mla_attention_backward_query_kernel,
    mla_attention_backward,
)
from .triton_forward import _mla_attention_forward_kernel, mla_attention_forward

__all__ = [
    "_mla_attention_backward_key_value_kernel",
    "_mla_attention_backward_query_kernel",
    "_mla_attention_forward_kernel",
    "mla_attention_backward",
    "mla_attention_forward",
]
