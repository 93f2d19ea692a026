"""RoPE in plain torch: rotate pairs of columns by the angles of their position; the result is laid out in halves."""

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool) -> torch.Tensor:
    """`x [..., r]`; `cos`, `sin` `[..., r/2]`, broadcast against it. The arithmetic is done in the given dtypes."""
    first, second = (x[..., 0::2], x[..., 1::2]) if interleave else x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotate_queries_and_key(
    queries: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same function as `rotate_queries_and_key_`, but the queries are a new tensor too."""
    rope = key.shape[-1]
    nope_part, rope_part = queries.split([queries.shape[-1] - rope, rope], dim=-1)
    rotated = rotate(rope_part, cos.unsqueeze(2), sin.unsqueeze(2), interleave)
    return torch.cat((nope_part, rotated), dim=-1), rotate(key, cos, sin, interleave)
