"""DeepSeek-V3 configurations: the class, named presets and exact parameter counts."""

from .configuration_deepseek_v3 import DeepseekV3Config
from .parameters import ParameterCount, num_parameters
from .presets import PRESETS, preset

__all__ = ["PRESETS", "DeepseekV3Config", "ParameterCount", "num_parameters", "preset"]
