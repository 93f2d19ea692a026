"""Evaluation of a checkpoint: bits per byte, tasks, lm-evaluation-harness, speed and memory.

`text`, `speed` and `estimates` stand below `export.verify`, which compares two checkpoints by the same figures. Only
`tasks` needs the extras of `finetuning`, and only `harness` needs `eval`.
"""

from .run import evaluate
from .text import read_text

__all__ = ["evaluate", "read_text"]
