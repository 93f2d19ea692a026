import pytest
import torch

from deepseek_v3.data import heldout_bits_per_byte, pack_documents
from tests.modeling_deepseek_v3.helpers import build


@pytest.mark.parametrize(("rows", "passes"), [({}, [6]), ({"batch_size": 4}, [4, 2])])
def test_evaluation_takes_the_rows_it_is_given_and_builds_no_cache(rows: dict, passes: list[int]) -> None:
    model = build(attn_implementation="sdpa").train()
    documents = torch.randint(2, 97, (3, 11), generator=torch.Generator().manual_seed(1))
    dataset = pack_documents(documents.tolist(), 8, bos_id=0, eos_id=1, evaluation=True)
    seen: list[int] = []

    def note(_, args, kwargs, output) -> None:
        seen.append(len(kwargs["input_ids"]))
        assert output.past_key_values is None and output.logits is None

    model.register_forward_hook(note, with_kwargs=True)
    found = heldout_bits_per_byte(model, dataset, 100, document_mask=True, **rows)
    assert seen == passes and model.training
    assert found == pytest.approx(heldout_bits_per_byte(model, dataset, 100, document_mask=True, batch_size=1))
