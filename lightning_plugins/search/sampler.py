"""B2EA as an Optuna sampler."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lightning_plugins._checks import check_choice, check_non_negative_int, check_positive_int, shown
from lightning_plugins.search.proposal import History, Proposal, propose
from lightning_plugins.search.space import MAX_CANDIDATES, Space, key

try:
    from optuna.samplers import BaseSampler, RandomSampler
    from optuna.search_space import IntersectionSearchSpace
    from optuna.study import StudyDirection
    from optuna.trial import TrialState
except ImportError as error:
    raise ImportError("searches need Optuna; run `pip install 'lightning-plugins[search]'`") from error

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

_SEED = "b2ea:seed"
_ORIGIN = "b2ea:origin"


class B2EASampler(BaseSampler):
    """Choose trials by evolution assisted by two Bayesian optimisers, for searches with few trials.

    In every trial one of six arms (a random forest or a warped Gaussian process, with expected improvement, probability
    of improvement or confidence bound as acquisition) ranks the candidates, about half of its ten best are mutated, and
    another arm chooses among the ten. Supports one objective; floats, ints and categories, including logarithmic and
    stepped ones. Trials running in other processes count as evaluated, with the worst value seen, so that processes
    sharing a storage try different points; in a finite space no point is repeated while others are left. Each trial's
    choice depends only on the seed, the trial's number and the history: a study resumed from its storage proposes the
    same points as an uninterrupted one. The sampler has no state between trials.

    Args:
        n_startup_trials: The first trials are random, at least 2.
        seed: Random seed; None draws one and stores it in the study.
        pruned: ``"observe"`` counts the last value that a pruned trial reported as its result, ``"skip"`` ignores it.
        failed: ``"skip"`` ignores failed trials, ``"worst"`` counts them with the worst value seen.
        transform: Whether to transform values towards a normal distribution (Box-Cox, Yeo-Johnson).
        max_candidates: Maximum number of candidates; finite spaces up to this size are searched exhaustively.

    Raises:
        ImportError: If Optuna, scikit-learn or SciPy is missing.
        ValueError: If an argument is out of its range, or, when a trial begins, if the study has several objectives.
        TypeError: If an argument is of the wrong type.

    Parameters that not all trials have (dynamic search spaces) are drawn at random, as are those of the first trials.
    Constraints are not supported.

    Example:
        >>> import optuna
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> study = optuna.create_study(sampler=B2EASampler(seed=0))
        >>> study.optimize(lambda trial: trial.suggest_float("x", -1, 1) ** 2, n_trials=12)
        >>> study.best_value < 0.05
        True

    Source:
        Cho et al., https://arxiv.org/abs/2202.03005, and its code. Excluding evaluated points, treating running trials
        as observations and the use of pruned trials are ours.
    """

    def __init__(
        self,
        *,
        n_startup_trials: int = 2,
        seed: int | None = None,
        pruned: Literal["observe", "skip"] = "observe",
        failed: Literal["skip", "worst"] = "skip",
        transform: bool = True,
        max_candidates: int = MAX_CANDIDATES,
    ) -> None:
        if check_positive_int("n_startup_trials", n_startup_trials) < 2:
            raise ValueError("`n_startup_trials` must be at least 2, from which the models learn a scale, got 1")
        if not isinstance(transform, bool):
            raise TypeError(f"`transform` must be True or False, got {transform!r}")
        self.n_startup_trials = n_startup_trials
        self.seed = None if seed is None else check_non_negative_int("seed", seed)
        self.pruned = check_choice("pruned", pruned, ("observe", "skip"))
        self.failed = check_choice("failed", failed, ("skip", "worst"))
        self.transform = transform
        self.max_candidates = check_positive_int("max_candidates", max_candidates)

    def infer_relative_search_space(self, study: "Study", trial: "FrozenTrial") -> "dict[str, BaseDistribution]":
        """Return the parameters common to all trials so far."""
        if len(study.directions) > 1:
            raise ValueError(
                f"`B2EASampler` searches for one objective, got a study of {len(study.directions)}; for several use "
                "`optuna.samplers.NSGAIISampler`"
            )
        shared = IntersectionSearchSpace(include_pruned=self.pruned == "observe").calculate(study)
        return {name: distribution for name, distribution in shared.items() if not distribution.single()}

    def sample_relative(
        self, study: "Study", trial: "FrozenTrial", search_space: "dict[str, BaseDistribution]"
    ) -> dict[str, Any]:
        """Return values for the common parameters; none for the first trials."""
        if not search_space:
            return {}
        space = Space(search_space, max_candidates=self.max_candidates)
        history = self._history(study, trial, space)
        finished = sum(other.state.is_finished() for other in study.get_trials(deepcopy=False))
        rng = np.random.default_rng([self._seed_of(study), trial.number])
        if finished < self.n_startup_trials or len(history.values) < 2:
            return space.decode(space.random(rng, list(history.points)))
        proposal = propose(space, history, trial.number, rng, transform=self.transform)
        # Others may have chosen points while the models were fitted; these are known from here on.
        taken = {key(point) for point in self._history(study, trial, space).points}
        chosen = next((row for row, point in enumerate(proposal.points) if key(point) not in taken), 0)
        self._remember(study, trial, space, proposal, chosen)
        return space.decode(proposal.points[chosen])

    def sample_independent(
        self, study: "Study", trial: "FrozenTrial", param_name: str, param_distribution: "BaseDistribution"
    ) -> Any:
        """Return a random value of a parameter that is not common to all trials."""
        # Includes the name: two parameters of one trial must not have the same random number.
        seed = [self._seed_of(study), trial.number, *param_name.encode()]
        random = RandomSampler(seed=int(np.random.default_rng(seed).integers(2**31)))
        return random.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        """Do nothing: random numbers depend on the study's seed and the trial's number, in every process."""

    def _seed_of(self, study: "Study") -> int:
        if self.seed is not None:
            return self.seed
        kept = study._storage.get_study_system_attrs(study._study_id).get(_SEED)
        if kept is None:
            kept = int(np.random.default_rng().integers(2**31))
            study._storage.set_study_system_attr(study._study_id, _SEED, kept)
        return int(kept)

    def _remember(self, study: "Study", trial: "FrozenTrial", space: Space, proposal: Proposal, chosen: int) -> None:
        origin: dict[str, Any] = {
            "arms": ["+".join(arm) for arm in proposal.arms],
            "mutated": proposal.mutated[chosen],
            "names": [dimension.name for dimension in space.dimensions],
            "point": proposal.points[chosen].tolist(),
        }
        study._storage.set_trial_system_attr(trial._trial_id, _ORIGIN, origin)

    def _history(self, study: "Study", trial: "FrozenTrial", space: Space) -> History:
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        points, values = [], []
        for other in study.get_trials(deepcopy=False):
            value = None if other.number == trial.number else self._value(other)
            point = None if value is None else _point(other, space)
            if point is not None and value is not None:
                points.append(point)
                values.append(sign * value)
        return History(np.array(points).reshape(-1, len(space.dimensions)), _finite(values))

    def _value(self, trial: "FrozenTrial") -> float | None:
        """A trial's result; NaN if it counts as the worst, None if it does not count."""
        if trial.state == TrialState.COMPLETE:
            return trial.value
        if trial.state == TrialState.PRUNED and self.pruned == "observe" and trial.intermediate_values:
            return trial.intermediate_values[max(trial.intermediate_values)]
        if trial.state == TrialState.RUNNING or (trial.state == TrialState.FAIL and self.failed == "worst"):
            return math.nan
        return None


def _point(trial: "FrozenTrial", space: Space) -> Any:
    """A trial's point; None if it lacks a parameter. A running trial may not have asked for all parameters yet."""
    names = [dimension.name for dimension in space.dimensions]
    if all(name in trial.params for name in names):
        return space.encode(trial.params)
    origin = trial.system_attrs.get(_ORIGIN)
    return np.array(origin["point"]) if origin is not None and origin["names"] == names else None


def origins(study: "Study") -> list[dict[str, Any]]:
    """Return the origin of each finished trial of a study.

    Args:
        study: A study whose sampler is a `B2EASampler`.

    Returns:
        For every trial proposed by a model: ``number``, ``value``, the names of both ``arms``, and ``mutated``.

    Raises:
        TypeError: If ``study`` is not an Optuna study.
    """
    if not hasattr(study, "get_trials"):
        raise TypeError(f"`study` must be a study of Optuna's, got {shown(study)}")
    rows = []
    for trial in study.get_trials(deepcopy=False):
        origin = trial.system_attrs.get(_ORIGIN)
        if origin is not None and trial.state.is_finished():
            known = {name: origin[name] for name in ("arms", "mutated")}
            rows.append({"number": trial.number, "value": trial.value, **known})
    return rows


def _finite(values: Sequence[float]) -> Any:
    """The values, with non-finite ones replaced by the worst of the others; empty if no value is known."""
    array = np.array(values, dtype=float)
    known = array[np.isfinite(array)]
    if not len(known):
        return np.zeros_like(array)
    best = np.where(array == -np.inf, known.min(), array)
    return np.where(np.isfinite(best), best, known.max())
