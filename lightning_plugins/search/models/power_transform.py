"""The objective's values made more like a normal distribution before a model sees them."""

import numpy as np

from lightning_plugins.search.space import Array

_SPREAD = 0.5  # a smaller standard deviation after the transform tells that it has squeezed the values together


def transform_values(values: Array) -> Array:
    """Scale values, and transform them by Box-Cox where all are positive, else by Yeo-Johnson.

    Args:
        values: Finite values of the objective, of shape ``(n,)``.

    Returns:
        Values of the same shape and order. Where the transform leaves a standard deviation below one half, Yeo-Johnson
        is applied on top; where that does not help, or something is not finite, the values as they came.

    Example:
        >>> transform_values(np.array([1.0, 1.0])).tolist()
        [1.0, 1.0]

    Source:
        Cho et al., https://arxiv.org/abs/2202.03005, as read in its code.
    """
    deviation = values.std()
    if not np.isfinite(deviation) or deviation <= 0 or len(values) < 2:
        return values
    scaled = values / deviation
    first = _power(scaled, "box-cox" if scaled.min() > 0 else "yeo-johnson")
    if first is not None and first.std() < _SPREAD:
        first = _power(first, "yeo-johnson")
    if first is None or first.std() < _SPREAD:
        return values
    return first


def _power(values: Array, method: str) -> Array | None:
    """The transform with the exponent of the largest likelihood; None where there is none."""
    from scipy import stats

    with np.errstate(all="ignore"):
        try:
            result = _box_cox(values) if method == "box-cox" else stats.yeojohnson(values)[0]
        except (ValueError, RuntimeError, np.linalg.LinAlgError):  # SciPy's `FitError` and `BracketError` included
            return None
    return np.asarray(result) if np.isfinite(result).all() else None


def _box_cox(values: Array) -> Array:
    """The transform of `scipy.stats.boxcox`, whose checks of each likelihood took ten times as long as the rest."""
    from scipy import optimize, special

    logarithms = np.log(values).sum()

    def loss(exponent: float) -> float:
        spread = special.boxcox(values, exponent).var()
        return float(len(values) / 2 * np.log(spread) - (exponent - 1) * logarithms)

    transformed: Array = special.boxcox(values, optimize.brent(loss, brack=(-2.0, 2.0)))
    return transformed
