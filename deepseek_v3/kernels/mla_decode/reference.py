"""Absorbed MLA decode in plain torch: the definition, and what decodes on a CPU, with the softmax in fp32 or wider."""

import torch

LOWEST = torch.finfo(torch.float32).min  # not -inf: a row that sees nothing would be NaN, and so would its gradient


def mla_decode(
    query_latent: torch.Tensor,
    query_rope: torch.Tensor,
    latent: torch.Tensor,
    key_rope: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    batch, length, heads, columns = query_latent.shape
    total = latent.shape[1]
    wide = torch.promote_types(latent.dtype, torch.float32)
    # All heads read the same latents: fold them into the query axis instead of copying the latents H times. The large
    # operand stands first and untransposed in each product: torch would copy a transposed bf16 one. The products add
    # and scale what they compute: every pass over the scores that is left out counts beside them.
    query_latent = query_latent.reshape(batch, length * heads, columns).transpose(1, 2)
    query_rope = query_rope.reshape(batch, length * heads, -1).transpose(1, 2)
    scores = torch.baddbmm(torch.matmul(key_rope, query_rope), latent, query_latent, beta=scale, alpha=scale)
    scores = scores.transpose(1, 2).to(wide, memory_format=torch.contiguous_format)
    bias = None if mask is None else _bias(mask[..., :total].transpose(1, 2), wide)
    if bias is not None:  # in place: backward needs the softmax, not what it was taken of
        scores.view(batch, length, heads, total).add_(bias)
    weights = scores.softmax(dim=-1).to(latent.dtype)
    output = torch.matmul(weights, latent).view(batch, length, heads, columns)
    return output if bias is None else output * (bias.amax(dim=-1, keepdim=True) > LOWEST)


def _bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a mask adds to the scores: LOWEST hides a key."""
    if mask.dtype == torch.bool:
        return torch.where(mask, 0.0, LOWEST).to(dtype)
    return torch.where(mask > torch.finfo(mask.dtype).min, mask.to(dtype), LOWEST)
