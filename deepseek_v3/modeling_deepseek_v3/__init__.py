"""The model, one file per section of the paper (arXiv 2412.19437)."""

from .checkpoint import tensor_shapes
from .heads import (
    DeepseekV3CausalLMOutput,
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification,
)
from .model import DeepseekV3Model, DeepseekV3ModelOutput, DeepseekV3PreTrainedModel
from .moe import DeepseekV3TopkRouter

__all__ = [
    "DeepseekV3CausalLMOutput",
    "DeepseekV3ForCausalLM",
    "DeepseekV3ForSequenceClassification",
    "DeepseekV3ForTokenClassification",
    "DeepseekV3Model",
    "DeepseekV3ModelOutput",
    "DeepseekV3PreTrainedModel",
    "DeepseekV3TopkRouter",
    "tensor_shapes",
]
