"""A random forest as the model of an objective: mean and variance over its trees."""

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
        from sklearn.ensemble import RandomForestRegressor

        seed = int(rng.integers(2**31))
        self._forest = RandomForestRegressor(_TREES, min_samples_split=2, max_features=1.0, random_state=seed)
        self._forest.fit(features, values)

    def predict(self, features: Array) -> tuple[Array, Array]:
        """Return the mean and the variance of the trees' predictions, each of shape ``(n,)``."""
        narrow = np.ascontiguousarray(features, dtype=np.float32)  # what trees compare with, converted once for all
        each = np.stack([tree.tree_.predict(narrow)[:, 0] for tree in self._forest.estimators_])
        return each.mean(0), each.var(0)
