"""MLA decode in absorbed form: few queries of all heads on the cache of latents."""

import torch

from ..dispatch import custom_op, uses_triton
from . import reference


def mla_decode(
    query_latent: torch.Tensor,
    query_rope: torch.Tensor,
    latent: torch.Tensor,
    key_rope: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of multi-head latent attention on the latents themselves (paper 2.1.1, W^UK absorbed in the query).

    `softmax_j(scale * (q_i . c_j + q_i^R . k_j^R)) c_j` over the keys j that query i may see. `query_latent
    [B, S, H, c]` holds q, each head's query times its W^UK, and `query_rope [B, S, H, r]` q^R. `latent [B, T, c]` are
    the normed latents c^KV and `key_rope [B, T, r]` the rotary keys k^R: all that the cache has, for all heads
    together. -> `[B, S, H, c]`, whose product with W^UV is the heads' output. All have one floating dtype; softmax and
    sums are in fp32. Layouts are free as long as columns are adjacent. Made for S of 1 to 8: one token, or a draft's.

    `mask [B or 1, 1, S, >= T]` says which keys a query sees: bool (True is seen), or floating and added to the scores,
    where -inf and its dtype's lowest number both hide the key. None: every query sees every key. A query that sees
    nothing gives 0. Keys after the last visible one are not read: a static cache costs what is filled of it.

    ValueError if shapes or dtypes do not fit together; with Triton also if c or r is no power of two >= 16, and
    NotImplementedError if a gradient is asked for.
    """
    _check(query_latent, query_rope, latent, key_rope, mask)
    if not uses_triton(latent):
        return reference.mla_decode(query_latent, query_rope, latent, key_rope, scale, mask)
    for name, x in (("latent", latent), ("key_rope", key_rope)):
        if not fits(x):
            raise ValueError(f"{name} has {x.shape[-1]} columns; allowed with Triton: a power of two of at least 16")
    return torch.ops.deepseek_v3.mla_decode(query_latent, query_rope, latent, key_rope, scale, mask)


def fits(x: torch.Tensor) -> bool:
    """Whether `mla_decode` takes latents, or rotary keys, of x's width: any without Triton."""
    columns = x.shape[-1]
    return not uses_triton(x) or (columns >= 16 and not columns & (columns - 1))


def _check(
    query_latent: torch.Tensor,
    query_rope: torch.Tensor,
    latent: torch.Tensor,
    key_rope: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    named = {"latent": latent, "key_rope": key_rope, "query_latent": query_latent, "query_rope": query_rope}
    for name, x in named.items():
        dimensions = 4 if name.startswith("query") else 3
        if x.dim() != dimensions:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; allowed: {dimensions} dimensions")
        if x.dtype != latent.dtype:
            raise ValueError(f"{name} is {x.dtype}; allowed: the latent's dtype, {latent.dtype}")
    batch, total, columns = latent.shape
    length, heads = query_latent.shape[1:3]
    expected = {
        "key_rope": (batch, total, key_rope.shape[-1]),
        "query_latent": (batch, length, heads, columns),
        "query_rope": (batch, length, heads, key_rope.shape[-1]),
    }
    for name, shape in expected.items():
        if named[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(named[name].shape)}; allowed beside the other inputs: {shape}")
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"mask is {mask.dtype}; allowed: {torch.bool} or a floating dtype")
    shape = tuple(mask.shape)
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[1:3] != (1, length) or shape[3] < total:
        raise ValueError(f"mask has shape {shape}; allowed: ({batch} or 1, 1, {length}, {total} or more)")


@custom_op("deepseek_v3::mla_decode")
def _forward(
    query_latent: torch.Tensor,
    query_rope: torch.Tensor,
    latent: torch.Tensor,
    key_rope: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    from .triton_impl import mla_decode

    return mla_decode(query_latent, query_rope, latent, key_rope, scale, mask)


@_forward.register_fake
def _(query_latent, query_rope, latent, key_rope, scale, mask):
    return latent.new_empty(query_latent.shape)


def _autograd(ctx, grad):
    raise NotImplementedError("deepseek_v3::mla_decode has no gradient: it decodes. Use mla_attention to train.")


_forward.register_autograd(_autograd)
