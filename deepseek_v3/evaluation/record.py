"""How a record of figures is written, and printed."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def write_record(path: Path, record: dict[str, Any]) -> None:
    """As JSON, whole or not at all. ValueError for a NaN, which is no JSON."""
    part = path.with_name(path.name + ".partial")
    part.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    part.rename(path)


def evaluation_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """The record of `evaluate` as lines of text: every figure with its interval and its number of items."""
    for name, results in record["text"].items():
        yield f"text {name}: {results['tokens']:,} tokens in {results['rows']} of {results['rows_of']} rows"
        for figure in ("bits_per_byte", "bits_per_token", "mtp_acceptance"):
            if results[figure]:
                yield f"  {figure.replace('_', ' '):<28}{figure_text(results[figure])}"
        for anchor, value in results.get("anchors_bits_per_byte", {}).items():
            yield f"  {'bits per byte of ' + anchor:<28}{value:.4f}"
    for name, results in record["tasks"].items():
        yield f"task {name}: {results['n']} items"
        for who, figures in {"this model": results, **results.get("baselines", {})}.items():
            texts = [f"{key} {figure_text(value)}" for key, value in figures.items() if _is_figure(value)]
            yield f"  {who:<28}{', '.join(texts)}"
    for name, results in record["lm_eval"].items():
        texts = [f"{key} {figure_text(value)}" for key, value in results.items() if _is_figure(value)]
        yield f"lm-eval {name}: {results['n']} items, {', '.join(texts)}"
    if "throughput" in record:
        speed = record["throughput"]
        rates = f"{speed['prefill_tokens_per_second']:.0f} / {speed['decode_tokens_per_second']:.0f} tokens/s"
        yield f"prefill / decode, batch 1: {rates} ({speed['clock']}, {speed['dtype']}, {speed['threads']} threads)"
    yield f"peak memory: {record['peak_memory_bytes'] / 2**20:.0f} MiB"


def figure_text(figure: Mapping[str, Any]) -> str:
    """`value [low, high]`, or what of it is defined."""
    if figure["value"] is None:
        return "undefined"
    interval = "" if figure["low"] is None else f" [{figure['low']:.4f}, {figure['high']:.4f}]"
    return f"{figure['value']:.4f}{interval}"


def _is_figure(value: Any) -> bool:
    return isinstance(value, dict) and {"value", "low", "high"} <= value.keys()
