"""Figures with their intervals, over the rows of a text or the answers to its prompts."""

from typing import Any

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


def ratio_of_sums(above: np.ndarray, below: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """`sum(above) / sum(below)` of sums per row [N], with the bootstrap's percentile interval over the rows.

    A seed draws the same rows for every figure of the same N, so that figures and their differences belong together.

    Returns:
        `value`, `low`, `high` (None where undefined: no row, one row, nothing below) and `n`, the number of rows.
    """
    above, below = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    n, total = len(below), below.sum()
    if not total:
        return {"value": None, "low": None, "high": None, "n": n}
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    sums = counts @ below
    ratios = (counts @ above)[sums > 0] / sums[sums > 0]
    tail = (1 - LEVEL) / 2
    low, high = map(float, np.quantile(ratios, (tail, 1 - tail))) if n > 1 else (None, None)
    return {"value": float(above.sum() / total), "low": low, "high": high, "n": n}
