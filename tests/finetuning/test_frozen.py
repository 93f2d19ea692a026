"""Features of a frozen base give the head what the whole classifier would."""

import torch
from transformers import PreTrainedTokenizerBase

from deepseek_v3.finetuning.batches import encode_classification, pad_classification
from deepseek_v3.finetuning.frozen import HeadOnFeatures, stack_features, with_features
from deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForSequenceClassification
from tests.modeling_deepseek_v3.helpers import build, tiny_config


def test_the_heads_logits_are_the_classifiers(tokenizer: PreTrainedTokenizerBase) -> None:
    config = tiny_config(num_labels=3, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model = build(config, cls=DeepseekV3ForSequenceClassification)
    texts = [" ".join(["loss of debt"] * n) for n in (1, 9, 2, 30, 5)] * 4  # more than a batch, of many lengths
    rows = [{"text": text, "label": "abc"[i % 3]} for i, text in enumerate(texts)]
    examples = encode_classification(rows, tokenizer, "abc", 40)
    pad = tokenizer.pad_token_id  # where it is EOS, a row may end in it or hold nothing else
    examples += [{"input_ids": ids, "labels": 0} for ids in ([5, 6, pad], [5, pad, 6, pad, pad], [pad, pad], [pad])]
    found = with_features(model, examples, tokenizer.pad_token_id)
    assert [row["input_ids"] for row in found] == [row["input_ids"] for row in examples]
    batch, whole = stack_features(found), pad_classification(examples, tokenizer.pad_token_id)
    assert torch.equal(batch["labels"], whole.pop("labels"))
    head = HeadOnFeatures(model)
    assert list(head.state_dict()) == ["score.weight"] and head.score is model.score
    with torch.no_grad():
        torch.testing.assert_close(head(batch["features"]).logits, model(**whole).logits, rtol=1e-5, atol=1e-6)
