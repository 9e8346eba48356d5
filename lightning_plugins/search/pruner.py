"""The early termination rule of B2EA as an Optuna pruner."""

from typing import TYPE_CHECKING

from lightning_plugins._checks import check_positive_int
from lightning_plugins.search.tercet import TercetRule

try:
    from optuna.pruners import BasePruner
    from optuna.study import StudyDirection
    from optuna.trial import TrialState
except ImportError as error:
    raise ImportError("searches need Optuna; run `pip install 'lightning-plugins[search]'`") from error

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial


class TercetPruner(BasePruner):
    """Prune trials with `TercetRule`, compared with the finished and pruned trials of the study; for any sampler.

    Args:
        n_steps: Number of values reported by an unpruned trial, such as one per epoch.
        fractions: Checkpoints; see `TercetRule`.
        quantiles: Quantile of quality below which a trial is pruned, one per checkpoint.
        min_trials: Minimum number of other trials that have reached a checkpoint.

    Raises:
        ValueError: If a number is out of its range.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> import optuna
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> study = optuna.create_study(pruner=TercetPruner(n_steps=10))

    Source:
        Cho et al., https://arxiv.org/abs/2202.03005.
    """

    def __init__(
        self,
        n_steps: int,
        *,
        fractions: tuple[float, ...] = (0.5, 0.9),
        quantiles: tuple[float, ...] = (0.1, 0.9),
        min_trials: int = 4,
    ) -> None:
        self.n_steps = check_positive_int("n_steps", n_steps)
        check_positive_int("min_trials", min_trials)
        self._rules = {
            StudyDirection.MINIMIZE: TercetRule(fractions, quantiles, min_trials, mode="min"),
            StudyDirection.MAXIMIZE: TercetRule(fractions, quantiles, min_trials, mode="max"),
        }

    def prune(self, study: "Study", trial: "FrozenTrial") -> bool:
        """Tell whether to prune the trial after its last reported value."""
        rule = self._rules[study.direction]
        if len(trial.intermediate_values) not in rule.looks(self.n_steps):
            return False  # without a look at the curves of all other trials
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        others = [_curve(other) for other in ended if other.number != trial.number]
        return rule.ends(_curve(trial), others, self.n_steps)


def _curve(trial: "FrozenTrial") -> list[float]:
    return [value for _, value in sorted(trial.intermediate_values.items())]
