"""Grouped-query attention becomes multi-head latent attention (paper 2.1.1): a factorisation of the weights.

Llama rotates every key head; MLA has one rotary key of `r` columns for all heads, and a latent without position.
RoPE multiplies the complex number (column j) + i (column j + d/2) of a key by e^(i theta_j t) at position t. That
commutes with every complex matrix which mixes the G key heads' numbers of one j. So for each j the principal component
of the G numbers (each weighted by its queries' energy) becomes the rotary key; what is left of the keys goes through
the latent with the values and loses its rotation, which matters little where theta_j is small.

Shape legend: N calibration tokens, D hidden size, H query heads, G key-value heads, d head width, r rotary width,
c latent rank, m = r / d rotary components per frequency, M rows read from the latent.
"""

from dataclasses import dataclass

import torch

LATENT_EPS = 1e-6  # of the latent's RMSNorm
RIDGE = 1e-3  # times the mean of the diagonal


@dataclass(frozen=True)
class HeadLayout:
    """Widths of the source's attention (H, G, d as above) and of the target's (r, c)."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: int
    rank: int


def as_complex(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of Llama's half-split layout `[heads * d, D]` -> complex rows `[heads, d/2, D]`, one per rotated pair."""
    first, second = weight.unflatten(0, (heads, -1)).chunk(2, dim=1)
    return torch.complex(first, second)


def as_interleaved(rows: torch.Tensor) -> torch.Tensor:
    """Complex rows `[..., n, D]` -> real rows `[..., 2n, D]` in DeepSeek's order: real, imaginary, real, ..."""
    return torch.stack((rows.real, rows.imag), dim=-2).flatten(-3, -2)


def attention_weights(
    q_proj: torch.Tensor, k_proj: torch.Tensor, v_proj: torch.Tensor, o_proj: torch.Tensor,
    hidden: torch.Tensor, layout: HeadLayout,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The MLA weights, under their names in `DeepseekV3Attention`; `o_proj` stays as it is.

    Args:
        q_proj, k_proj, v_proj: `[H d, D]`, `[G d, D]`, `[G d, D]` fp32, with the weight of the norm before them
            multiplied in.
        o_proj: `[D, H d]`; only weighs the values where the rank is too small for all of them.
        hidden: `[N, D]`, what these projections see: tokens after the norm (without its weight).
    """
    heads, groups, dim = layout.heads, layout.kv_heads, layout.head_dim
    parts = layout.rope // dim
    moment = hidden.T @ hidden / len(hidden)  # [D, D]
    queries, keys = as_complex(q_proj, heads), as_complex(k_proj, groups)
    energy = (queries @ moment.to(queries.dtype) * queries.conj()).sum(-1).real  # [H, d/2], mean |q|^2
    energy = energy.unflatten(0, (groups, -1)).sum(1).T  # [d/2, G]
    weight = (energy / energy.mean()).clamp(min=1e-6).sqrt().to(keys.dtype)

    # Per frequency: weighted keys = components @ (components^H @ weighted keys).
    weighted = weight[..., None] * keys.transpose(0, 1)  # [d/2, G, D]
    covariance = weighted @ moment.to(keys.dtype) @ weighted.mH  # [d/2, G, G]
    components = torch.linalg.eigh(covariance).eigenvectors.flip(-1)[..., :parts]  # [d/2, G, m]
    rotary = components.mH @ weighted  # [d/2, m, D]
    loading = components / weight[..., None]  # k_g = sum_m loading[g, m] rotary[m] + rest
    rest = keys - (loading @ rotary).transpose(0, 1)  # [G, d/2, D]

    # Frequency theta^(-2j/r) of slot j = m i is theta_i; a further component takes the next slot, a little slower.
    owner = torch.arange(heads) // (heads // groups)
    query_rope = loading.conj()[:, owner].permute(1, 0, 2)[..., None] * queries[:, :, None]  # [H, d/2, m, D]
    query = torch.cat((as_interleaved(queries), as_interleaved(query_rope.flatten(1, 2))), dim=1)
    query = query * ((dim + layout.rope) / dim) ** 0.5  # the target divides the scores by sqrt(d + r)

    wanted = torch.stack((as_interleaved(rest), v_proj.unflatten(0, (groups, -1))), dim=1)  # [G, 2, d, D]
    importance = torch.stack((energy.mean() ** 0.5 * wanted.new_ones(groups), _value_gain(o_proj, layout)), dim=1)
    latent = latent_basis(wanted.flatten(0, 2), importance.repeat_interleave(dim), moment, layout.rank)
    up = expansion(wanted.flatten(0, 2), latent, hidden).view(groups, 2 * dim, -1)
    return {
        "q_proj.weight": query.flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat((latent, as_interleaved(rotary.flatten(0, 1)))),
        "kv_a_layernorm.weight": hidden.new_ones(layout.rank),
        "kv_b_proj.weight": up[owner].flatten(0, 1),
        "o_proj.weight": o_proj,
    }


def latent_basis(wanted: torch.Tensor, importance: torch.Tensor, moment: torch.Tensor, rank: int) -> torch.Tensor:
    """Orthonormal rows `[c, D]`: the subspace from which the rows of `wanted` `[M, D]` are read.

    All directions that `wanted` has, or the principal ones under `importance` `[M]` if these are more than c. Further
    ones are those with the most energy of the rest: the closer the latent's length comes to that of the hidden state,
    which the norm before has fixed, the less the latent's own RMSNorm changes. c = D is exact.
    """
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    scaled = importance[:, None] * wanted
    left, sizes, _ = torch.linalg.svd(scaled @ root, full_matrices=False)
    needed = min(rank, int((sizes > 1e-6 * sizes[0]).sum()))
    span = torch.linalg.qr((left[:, :needed].T @ scaled).T)[0].T
    outside = torch.eye(len(moment), dtype=moment.dtype) - span.T @ span
    filler = torch.linalg.eigh(outside @ moment @ outside)[1].flip(-1).T[: rank - needed]
    return torch.linalg.qr(torch.cat((span, filler)).T)[0].T


def expansion(wanted: torch.Tensor, latent: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """`[M, c]`: reads `wanted @ x` from the normalised latent of x, as well as a linear map can over `hidden [N, D]`.

    Were the latent's length constant, `wanted @ latent^T` times that length would do. The difference is fitted by
    ridge regression, which leaves an exact solution as it is.
    """
    projected = hidden @ latent.T
    normalised = projected * torch.rsqrt(projected.square().mean(-1, keepdim=True) + LATENT_EPS)
    scale = (projected * normalised).sum() / normalised.square().sum()
    plain = scale * wanted @ latent.T
    missing = hidden @ wanted.T - normalised @ plain.T
    gram = normalised.T @ normalised
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return plain + torch.linalg.solve(gram, normalised.T @ missing).T


def _value_gain(o_proj: torch.Tensor, layout: HeadLayout) -> torch.Tensor:
    """`[G]`: root mean square of a value column's way into the residual stream, over the group's heads."""
    columns = o_proj.square().sum(0).view(layout.kv_heads, -1)
    return columns.mean(-1).sqrt() * (layout.heads // layout.kv_heads) ** 0.5
