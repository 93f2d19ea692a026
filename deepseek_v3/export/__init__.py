"""Checkpoints in other formats: one module per format, all written tensor by tensor by `export`."""

from .run import FORMATS, export, format_options
from .source import Source
from .steps import Output, Step

__all__ = ["FORMATS", "Output", "Source", "Step", "export", "format_options"]
