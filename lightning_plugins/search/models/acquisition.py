"""Acquisition functions of a search that minimises: the larger, the sooner a candidate is tried."""

from typing import Literal

import numpy as np

try:
    from scipy.special import log_ndtr, ndtr
except ImportError as error:
    raise ImportError("searches need SciPy; run `pip install 'lightning-plugins[search]'`") from error

from lightning_plugins.search.space import Array

Acquisition = Literal["ei", "pi", "ucb"]
ACQUISITIONS: tuple[Acquisition, ...] = ("ei", "pi", "ucb")
_FLOOR = 1e-4  # added to every standard deviation, as published


def acquire(kind: Acquisition, mean: Array, variance: Array, best: float) -> Array:
    """Score candidates by what a model predicts for them.

    With ``s = sqrt(variance) + 1e-4`` and ``u = (best - mean) / s``: expected improvement ``s (u Φ(u) + φ(u))``,
    probability of improvement ``Φ(u)``, and the upper confidence bound of the negated objective, ``s - mean``.

    Args:
        kind: ``"ei"``, ``"pi"`` or ``"ucb"``.
        mean: Predicted values, of shape ``(n,)``; smaller is better.
        variance: Their variances, of the same shape.
        best: The smallest value seen.

    Returns:
        The scores, of shape ``(n,)``. Those of ``"pi"`` are logarithms, which keep the order where probabilities
        would all be zero.

    Example:
        >>> acquire("ucb", np.array([0.0, 1.0]), np.array([0.0, 4.0]), best=0.0).round(3).tolist()
        [0.0, 1.0]

    Source:
        Cho et al., https://arxiv.org/abs/2202.03005, and its code for the floor of the standard deviation.
    """
    deviation = np.sqrt(np.maximum(variance, 0)) + _FLOOR
    if kind == "ucb":
        return deviation - mean
    u = (best - mean) / deviation
    if kind == "pi":
        return np.asarray(log_ndtr(u))
    density = np.exp(-0.5 * u * u) / np.sqrt(2 * np.pi)
    return np.asarray(deviation * (u * ndtr(u) + density))
