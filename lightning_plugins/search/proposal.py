"""One step of B2EA: two models of the history, with a mutation in between, choose the next point."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lightning_plugins.search.models.acquisition import Acquisition, acquire
from lightning_plugins.search.models.forest import ForestModel
from lightning_plugins.search.models.gaussian_process import GaussianProcessModel
from lightning_plugins.search.models.power_transform import transform_values
from lightning_plugins.search.space import Array, Space, key

_PARENTS = 10
_KEEP = 0.5  # probability that a parent is not mutated


class Arm(NamedTuple):
    """A model and its acquisition function.

    Attributes:
        model: ``"forest"`` or ``"gp"``.
        acquisition: ``"ei"``, ``"pi"`` or ``"ucb"``.
    """

    model: str
    acquisition: Acquisition


ARMS = tuple(Arm(model, kind) for model in ("forest", "gp") for kind in ("ei", "pi", "ucb"))
_Model = ForestModel | GaussianProcessModel
_MODELS: dict[str, type[_Model]] = {"forest": ForestModel, "gp": GaussianProcessModel}


class History(NamedTuple):
    """History of a search.

    Attributes:
        points: Evaluated and running points, of shape ``(n, dimensions)``.
        values: Their values, smaller is better, of shape ``(n,)``; those of running points are assumed.
    """

    points: Array
    values: Array


class Proposal(NamedTuple):
    """The next point, the alternatives, and their origin.

    Attributes:
        points: The ten points in order of preference, of shape ``(n, dimensions)``.
        arms: The arm that ranked the candidates and the one that chose among the parents.
        mutated: For each of the points, whether it is a mutated parent.
    """

    points: Array
    arms: tuple[Arm, Arm]
    mutated: tuple[bool, ...]


def propose(
    space: Space, history: History, trial: int, rng: np.random.Generator, *, transform: bool = True
) -> Proposal:
    """Choose the next point.

    Arm ``trial mod 6`` is fitted to the history and ranks the candidates; its ten best are parents. Each of them
    stays with probability one half, else a copy with one changed coordinate takes its place. Another arm, drawn
    uniformly, chooses the best of the ten; where both arms have the same model, it is fitted once. Points of the
    history are no candidates, and a mutation that leads to one is undone.

    Args:
        space: The search space.
        history: At least two points.
        trial: The trial's number, from 0.
        rng: Random generator.
        transform: Whether values are transformed first.

    Returns:
        The points, the best first, and their origin.

    Source:
        Cho et al., https://arxiv.org/abs/2202.03005. Excluding evaluated points is ours.
    """
    values = transform_values(history.values) if transform else history.values
    features = space.features(history.points)
    pool = space.candidates(rng, history.points)
    first, second = choose_arms(trial, rng)
    if not len(pool):  # everything has been tried: repeat a point at random
        return Proposal(space.random(rng)[None], (first, second), mutated=(False,))
    fitted = {name: _MODELS[name](features, values, rng) for name in dict.fromkeys((first.model, second.model))}
    best = float(values.min())
    ranking = _scores(first, fitted, space.features(pool), best)
    parents = pool[np.argsort(-ranking, kind="stable")[:_PARENTS]]
    offspring, mutated = _mutate(space, parents, history.points, rng)
    order = np.argsort(-_scores(second, fitted, space.features(offspring), best), kind="stable")
    return Proposal(offspring[order], (first, second), tuple(mutated[index] for index in order))


def choose_arms(trial: int, rng: np.random.Generator) -> tuple[Arm, Arm]:
    """Return the current arm, and another one drawn uniformly from the other five."""
    first = trial % len(ARMS)
    others = [index for index in range(len(ARMS)) if index != first]
    return ARMS[first], ARMS[others[rng.integers(len(others))]]


def _scores(arm: Arm, fitted: Mapping[str, _Model], candidates: Array, best: float) -> Array:
    mean, variance = fitted[arm.model].predict(candidates)
    return acquire(arm.acquisition, mean, variance, best)


def _mutate(space: Space, parents: Array, known: Array, rng: np.random.Generator) -> tuple[Array, list[bool]]:
    """The parents, about half of them with a changed coordinate, without duplicates or known points."""
    taken = {key(point) for point in known} | {key(point) for point in parents}
    offspring, mutated = [], []
    for parent in parents:
        child = parent if rng.random() < _KEEP else space.mutate(parent, rng)
        fresh = key(child) not in taken
        taken.add(key(child))
        offspring.append(child if fresh else parent)
        mutated.append(fresh)
    return np.array(offspring), mutated
