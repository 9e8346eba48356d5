"""SMAC's search for hyperparameters as an Optuna sampler, for the comparison of searches."""

import tempfile
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState


class SMACSampler(optuna.samplers.BaseSampler):
    """Ask and tell `HyperparameterOptimizationFacade`, at its defaults, about ints and categories.

    Args:
        trials: Number of trials of the search, which SMAC's initial design is a part of.
        seed: Random seed.
    """

    def __init__(self, trials: int, seed: int) -> None:
        self.trials, self.seed = trials, seed
        self.random = optuna.samplers.RandomSampler(seed=seed)
        self.facade: Any = None
        self.asked: dict[int, Any] = {}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the parameters of the trials so far: none in the first trial, which is random."""
        return IntersectionSearchSpace().calculate(study)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        """Tell all results that are new, and ask for a point."""
        if not search_space:
            return {}
        if self.facade is None:
            self._begin(search_space)
            (first,) = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
            self._tell(self._info(first.params), first)
        for other in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
            if other.number in self.asked:
                self._tell(self.asked.pop(other.number), other)
        info = self.facade.ask()
        self.asked[trial.number] = info
        return {name: int(value) for name, value in dict(info.config).items()}  # categories are strings to SMAC

    def sample_independent(self, study: Study, trial: FrozenTrial, name: str, distribution: Any) -> Any:
        """Return a random value, in the first trial."""
        return self.random.sample_independent(study, trial, name, distribution)

    def _begin(self, space: dict[str, Any]) -> None:
        from ConfigSpace import Categorical, ConfigurationSpace, Integer
        from smac import HyperparameterOptimizationFacade, Scenario

        parameters = [
            Integer(name, (each.low, each.high))
            if isinstance(each, IntDistribution)
            else Categorical(name, list(map(str, each.choices)))
            for name, each in space.items()
        ]
        self.space = ConfigurationSpace(seed=self.seed, space=parameters)
        # Deterministic: like all other methods here it evaluates no point twice.
        settings = {"n_trials": self.trials, "seed": self.seed, "deterministic": True}
        scenario = Scenario(self.space, output_directory=tempfile.mkdtemp(), **settings)

        def never(config: Any, seed: int = 0) -> float:
            raise RuntimeError("results are told")

        self.facade = HyperparameterOptimizationFacade(scenario, never, overwrite=True, logging_level=False)

    def _info(self, values: dict[str, Any]) -> Any:
        from ConfigSpace import Configuration
        from smac.runhistory import TrialInfo

        own = {name: value if name in self._ints() else str(value) for name, value in values.items()}
        return TrialInfo(Configuration(self.space, own), seed=0)

    def _ints(self) -> set[str]:
        return {name for name, each in dict(self.space).items() if hasattr(each, "upper")}

    def _tell(self, info: Any, trial: FrozenTrial) -> None:
        from smac.runhistory import TrialValue

        self.facade.tell(info, TrialValue(cost=trial.value))
