"""Fine-tuning: LoRA and QLoRA that reach the experts, progressive unfreezing, tasks of finance and medicine.

Needs the extras `train`, `peft`, `quant` and `domains`.
"""

import logging

# peft imports bitsandbytes, which on CPUs with AVX512-BF16 looks for a kernel on the Hub and warns of its absence.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from .adapters import load_adapter  # noqa: E402
from .lora import TARGETS, apply_lora, lora_config, report_trainable  # noqa: E402
from .recipe import FinetuneRecipe  # noqa: E402
from .run import finetune  # noqa: E402
from .tasks import TASKS, TaskData, load_task  # noqa: E402
from .unfreezing import ProgressiveUnfreezing, Unfreezing  # noqa: E402

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
