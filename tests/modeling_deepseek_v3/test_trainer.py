"""transformers' own `Trainer` on the models, without a word about labels or outputs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.utils.generic import find_labels

from deepseek_v3 import (
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification,
)
from tests.modeling_deepseek_v3.helpers import build, tiny_config, tokens

pytest.importorskip("accelerate")


@pytest.mark.parametrize(
    "cls", [DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification, DeepseekV3ForTokenClassification]
)
def test_labels_are_the_only_labels(cls: type) -> None:
    assert find_labels(cls) == ["labels"]


@pytest.mark.parametrize("router_logits", [False, True])
def test_evaluate_gives_the_loss_and_one_array_of_logits(router_logits: bool, tmp_path: Path) -> None:
    model = build(tiny_config(num_hidden_layers=2, output_router_logits=router_logits), attn_implementation="sdpa")
    rows = tokens(3, 6)
    with torch.no_grad():
        expected = model(rows, labels=rows)
    seen: list[Any] = []

    def metrics(prediction) -> dict[str, float]:
        seen.append(prediction)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True)
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    found = Trainer(model, arguments, eval_dataset=dataset, compute_metrics=metrics).evaluate()
    assert found["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-6)
    [prediction] = seen
    assert isinstance(prediction.predictions, np.ndarray) and prediction.predictions.shape == (3, 6, 97)
    np.testing.assert_allclose(prediction.predictions, expected.logits, rtol=1e-4, atol=1e-5)
    assert np.array_equal(prediction.label_ids, rows) and 0 <= found["eval_accuracy"] < 1
