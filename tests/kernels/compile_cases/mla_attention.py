"""Launches of the MLA attention kernels at V3's widths: 128 per-head, 64 rotary and 128 value columns."""

import torch

from deepseek_v3.kernels.mla_attention.triton_impl import mla_attention_backward, mla_attention_forward

WGMMA = {
    "_mla_attention_forward_kernel": "BLOCK_M",
    "_mla_attention_backward_query_kernel": "BLOCK_M",
    "_mla_attention_backward_key_value_kernel": "BLOCK_N",  # the rows are keys
}


def step(dtype: torch.dtype, documents: bool) -> None:
    batch, length, heads, nope, rope, columns = 2, 4096, 16, 128, 64, 128
    query = torch.empty(batch, length, heads, nope + rope, dtype=dtype, device="meta")
    expanded = torch.empty(batch, length, heads, nope + columns, dtype=dtype, device="meta")
    key_nope, value = expanded.split([nope, columns], dim=-1)
    key_rope = torch.empty(batch, length, rope, dtype=dtype, device="meta")
    starts = torch.empty(batch, length, dtype=torch.int32, device="meta") if documents else None
    output, logsumexp = mla_attention_forward(query, key_nope, key_rope, value, 0.1, starts)
    mla_attention_backward(output, query, key_nope, key_rope, value, output, logsumexp, 0.1, starts)


def with_entry(bounds: dict[str, int]) -> None:
    dtype = torch.bfloat16 if bounds.get("bytes") == 2 else torch.float32
    for documents in (False, True):
        step(dtype, documents)


def launch() -> None:
    step(torch.float16, documents=False)


CONFIGS = {
    "mla_attention_forward": with_entry,
    "mla_attention_backward_query": with_entry,
    "mla_attention_backward_key_value": with_entry,
}
