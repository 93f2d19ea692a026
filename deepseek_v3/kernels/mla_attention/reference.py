"""MLA attention in plain torch: the definition, with all scores in memory. Computes in fp32 or wider."""

import torch


def mla_attention(
    query: torch.Tensor,
    key_nope: torch.Tensor,
    key_rope: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    document_starts: torch.Tensor | None = None,
) -> torch.Tensor:
    length, total = query.shape[1], key_nope.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    key_rope = key_rope.unsqueeze(2).expand(-1, -1, key_nope.shape[2], -1)
    key = torch.cat((key_nope, key_rope), dim=-1)
    scores = torch.einsum("bshd,bthd->bhst", query.to(wide), key.to(wide)) * scale

    key_position = torch.arange(total, device=query.device)
    position = key_position[total - length :, None]
    hidden = (key_position > position).expand(query.shape[0], 1, length, total)
    if document_starts is not None:
        hidden = hidden | (key_position < document_starts[:, None, :, None])
    # The smallest number and not -inf: a row that sees nothing is then uniform, and the second fill makes it zero.
    weights = scores.masked_fill(hidden, torch.finfo(wide).min).softmax(dim=-1).masked_fill(hidden, 0.0)
    return torch.einsum("bhst,bthv->bshv", weights, value.to(wide)).to(value.dtype)
