"""Fine-tuning: LoRA and QLoRA that reach the experts, progressive unfreezing, tasks of finance and medicine.

Needs the extras `train`, `peft`, and for QLoRA `quant`.
"""

from .lora import TARGETS, apply_lora, load_adapter, lora_config, report_trainable
from .recipe import FinetuneRecipe
from .run import finetune
from .tasks import TASKS, TaskData, load_task
from .unfreezing import ProgressiveUnfreezing, Unfreezing

__all__ = [
    "TARGETS",
    "TASKS",
    "FinetuneRecipe",
    "ProgressiveUnfreezing",
    "TaskData",
    "Unfreezing",
    "apply_lora",
    "finetune",
    "load_adapter",
    "load_task",
    "lora_config",
    "report_trainable",
]
