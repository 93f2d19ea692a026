"""Rows that hold several documents and padding: what of a row is one document, and who keeps documents apart."""

import pytest
import torch

from deepseek_v3.modeling_deepseek_v3.model import packed_causal_mask
from tests.modeling_deepseek_v3.helpers import build, relative_error, tiny_config, tokens


def separate(model, *documents: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(document, use_cache=False).logits for document in documents], dim=1)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "deepseek_v3"])
def test_padding_between_documents_joins_nothing(attention: str) -> None:
    """`A pad pad B pad C`, each document padded to a multiple of three."""
    model = build(attn_implementation=attention)
    a, b, c = tokens(1, 4, seed=3), tokens(1, 2, seed=4), tokens(1, 3, seed=5)
    pad = torch.zeros(1, 1, dtype=torch.long)
    ids = torch.cat((a, pad, pad, b, pad, c), dim=1)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2]])
    found = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert relative_error(found[mask.bool()][None], separate(model, a, b, c)) < 3e-6
    zeros = positions.masked_fill(mask == 0, 0)  # as collators fill the positions of padding
    again = model(ids, attention_mask=mask, position_ids=zeros, use_cache=False).logits
    assert torch.equal(again[mask.bool()], found[mask.bool()])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("after", [[5, 6], [3, 4]])  # positions that count the padding, and that do not
def test_padding_inside_a_document_does_not_end_it(after: list[int], attention: str) -> None:
    """Neither alone nor beside a row that is packed."""
    model = build(attn_implementation=attention)
    ids, mask = tokens(1, 7), torch.tensor([[1, 1, 1, 0, 0, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 3, 4, *after]])
    alone = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[mask.bool()]
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    found = model(
        torch.cat((ids, tokens(1, 7, seed=4))),
        attention_mask=torch.cat((mask, torch.ones_like(mask))),
        position_ids=torch.cat((positions, packed)),
        use_cache=False,
    ).logits
    assert relative_error(found[0][mask[0].bool()], alone) < 3e-6
    expected = separate(model, *tokens(1, 7, seed=4).split([3, 4], dim=1))
    assert relative_error(found[1:], expected) < 3e-6


def test_positions_without_a_batch_dimension_of_their_own() -> None:
    model = build()
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    found = model(ids, attention_mask=mask, position_ids=torch.tensor([[0, 1, 0, 1, 2, 3]]), use_cache=False).logits
    assert relative_error(found, separate(model, *ids.split([2, 4], dim=1))) < 3e-6


PACKED = [0, 1, 2, 0, 1, 2]
WHOLE = [0, 1, 2, 3, 4, 5]


def flash_mask(positions: list[list[int]], mask: list[list[int]] | None) -> torch.Tensor | None:
    config = tiny_config()
    config._attn_implementation = "flash_attention_2"
    attention_mask = None if mask is None else torch.tensor(mask)
    embeddings = torch.zeros(len(positions), len(positions[0]), 8)
    return packed_causal_mask(config, embeddings, attention_mask, None, torch.tensor(positions))


@pytest.mark.parametrize(
    ("positions", "mask"),
    [([PACKED], [[1, 1, 1, 1, 1, 0]]), ([PACKED, WHOLE], None), ([WHOLE, PACKED], [[1] * 6] * 2)],
    ids=["padding", "two rows", "two rows and a mask"],
)
def test_flash_attention_would_join_these_documents(positions, mask) -> None:
    with pytest.raises(ValueError, match="position_ids: found .*flash_attention_2.*allowed"):
        flash_mask(positions, mask)


@pytest.mark.parametrize(
    ("positions", "mask"),
    [
        ([PACKED], None),
        ([PACKED], [[1] * 6]),
        ([WHOLE] * 2, [[1] * 6, [0, 0, 1, 1, 1, 1]]),
        ([WHOLE, [0, 0, 0, 1, 2, 3]], [[1] * 6, [0, 0, 1, 1, 1, 1]]),
        ([WHOLE] * 2, None),
    ],
    ids=["one row", "one row and a full mask", "padding alone", "padding of position 0", "nothing packed"],
)
def test_flash_attention_takes_the_rest(positions, mask) -> None:
    found = flash_mask(positions, mask)
    assert (found is None) == (mask is None or all(map(all, mask)))
