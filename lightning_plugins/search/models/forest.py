"""A random forest as the model of an objective: mean and variance over its trees."""

from typing import Any

import numpy as np

from lightning_plugins.search.space import Array

_TREES = 50


class ForestModel:
    """A random forest of 50 trees, each grown to the end on a bootstrap sample, with all features at every split.

    Args:
        features: What is known, of shape ``(n, d)``.
        values: The objective there, of shape ``(n,)``.
        rng: The source of the bootstrap samples.

    Example:
        >>> x = np.linspace(0, 1, 20)[:, None]
        >>> mean, variance = ForestModel(x, x[:, 0], np.random.default_rng(0)).predict(x)
        >>> bool(np.abs(mean - x[:, 0]).max() < 0.1), variance.shape
        (True, (20,))

    Source:
        Cho et al., https://arxiv.org/abs/2202.03005, and its code for the settings.
    """

    def __init__(self, features: Array, values: Array, rng: np.random.Generator) -> None:
        from sklearn.tree import DecisionTreeRegressor

        # The trees of sklearn's forest, without its input checks and job queue.
        count, narrow, column = len(values), _narrow(features), np.ascontiguousarray(values, dtype=float)[:, None]
        self._trees = []
        for seed in rng.integers(2**31, size=_TREES):
            drawn = np.bincount(rng.integers(count, size=count), minlength=count).astype(float)
            tree = DecisionTreeRegressor(random_state=int(seed))
            self._trees.append(tree.fit(narrow, column, sample_weight=drawn, check_input=False))

    def predict(self, features: Array) -> tuple[Array, Array]:
        """Return the mean and the variance of the trees' predictions, each of shape ``(n,)``."""
        narrow = _narrow(features)
        each = np.stack([tree.tree_.predict(narrow)[:, 0] for tree in self._trees])
        return each.mean(0), each.var(0)


def _narrow(features: Array) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """Features in the type in which trees compare them."""
    return np.ascontiguousarray(features, dtype=np.float32)
