"""HEBO's search for hyperparameters as an Optuna sampler, for the comparison of searches."""

import warnings
from typing import Any

import numpy as np
import optuna
import torch
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState


class HEBOSampler(optuna.samplers.BaseSampler):
    """Suggest and observe with HEBO, at its defaults, over ints and categories.

    Args:
        seed: Random seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = optuna.samplers.RandomSampler(seed=seed)
        self.optimizer: Any = None
        self.told: set[int] = set()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the parameters of the trials so far: none in the first trial, which is random."""
        return IntersectionSearchSpace().calculate(study)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        """Observe all results that are new, and suggest a point."""
        if not search_space:
            return {}
        if self.optimizer is None:
            self._begin(search_space)
        for other in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
            if other.number not in self.told:
                self.told.add(other.number)
                self.optimizer.observe(self._frame(other.params), np.array([[other.value]]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            suggested = self.optimizer.suggest(n_suggestions=1).iloc[0]
        return {name: int(suggested[name]) for name in search_space}

    def sample_independent(self, study: Study, trial: FrozenTrial, name: str, distribution: Any) -> Any:
        """Return a random value, in the first trial."""
        return self.random.sample_independent(study, trial, name, distribution)

    def _begin(self, space: dict[str, Any]) -> None:
        from hebo.design_space.design_space import DesignSpace
        from hebo.optimizers.hebo import HEBO

        np.random.seed(self.seed)  # noqa: NPY002 -- HEBO's evolutionary search draws from the global generators
        torch.manual_seed(self.seed)
        self.names = list(space)
        parsed = DesignSpace().parse(
            [
                {"name": name, "type": "int", "lb": each.low, "ub": each.high}
                if isinstance(each, IntDistribution)
                else {"name": name, "type": "cat", "categories": list(each.choices)}
                for name, each in space.items()
            ]
        )
        self.optimizer = HEBO(parsed, scramble_seed=self.seed)

    def _frame(self, values: dict[str, Any]) -> Any:
        import pandas

        return pandas.DataFrame([{name: values[name] for name in self.names}])
