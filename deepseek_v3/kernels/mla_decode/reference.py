"""Absorbed MLA decode in plain torch: the definition, and what decodes on a CPU, with the softmax in fp32 or wider."""

import torch


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
    if mask is not None:
        mask = mask[..., :total]
        lowest = torch.finfo(wide).min  # and not -inf: a row that sees nothing would be NaN, and its gradient
        if mask.dtype == torch.bool:
            visible = mask
            bias = torch.zeros_like(mask, dtype=wide).masked_fill_(~visible, lowest)
        else:
            visible = mask > torch.finfo(mask.dtype).min
            bias = mask.to(wide).masked_fill(~visible, lowest)
        scores.view(batch, length, heads, total).add_(bias.transpose(1, 2))  # in place: nothing saved it for backward
    weights = scores.softmax(dim=-1).to(latent.dtype)
    output = torch.matmul(weights, latent).view(batch, length, heads, columns)
    if mask is not None:
        output = output.masked_fill(~visible.any(dim=-1, keepdim=True).transpose(1, 2), 0.0)
    return output
