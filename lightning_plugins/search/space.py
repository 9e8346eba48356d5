"""A search space as points of a cube: numbers in [0, 1], categories as indices."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Array = np.ndarray[Any, np.dtype[np.float64]]

MAX_CANDIDATES = 20_000
_MUTATION = 0.5  # standard deviation of the step of a number, in units of its range


class Dimension(NamedTuple):
    """One parameter of a space.

    Attributes:
        name: Its name.
        values: The coordinates it can take, in ascending order; None for a continuous number. Those of a category are
            the indices of its choices.
        categorical: Whether its values have no order.
    """

    name: str
    values: Array | None
    categorical: bool


class Space:
    """Parameters of a search, their coordinates, and the candidates among which a model chooses.

    A number lies in [0, 1], on a logarithmic scale where its distribution says so; a category is the index of its
    choice. Models see `features`, in which a category is one column per choice.

    Args:
        distributions: Optuna's distribution of each parameter, by name.
        max_candidates: A finite space of at most this many points is a candidate as a whole, of a larger one so many
            points of a scrambled Sobol sequence.

    Raises:
        ValueError: If there is no parameter.
        TypeError: If a distribution is none of Optuna's three.

    Example:
        >>> from optuna.distributions import CategoricalDistribution, FloatDistribution
        >>> choice = CategoricalDistribution(["relu", "tanh"])
        >>> space = Space({"lr": FloatDistribution(1e-4, 1e-2, log=True), "act": choice})
        >>> point = space.encode({"lr": 1e-3, "act": "tanh"})
        >>> point.round(6).tolist(), space.decode(point)["act"], space.features(point[None]).shape
        ([0.5, 1.0], 'tanh', (1, 3))
    """

    def __init__(
        self, distributions: Mapping[str, "BaseDistribution"], *, max_candidates: int = MAX_CANDIDATES
    ) -> None:
        if not distributions:
            raise ValueError("`distributions` must have at least one parameter, got none")
        self.distributions = dict(distributions)
        self.max_candidates = max_candidates
        self.dimensions = [
            _dimension(name, distribution, max_candidates) for name, distribution in distributions.items()
        ]

    @property
    def size(self) -> int | None:
        """The number of points; None if a number is continuous."""
        total = 1
        for dimension in self.dimensions:
            if dimension.values is None:
                return None
            total *= len(dimension.values)
        return total

    def encode(self, parameters: Mapping[str, Any]) -> Array:
        """Return the point of shape ``(dimensions,)`` of parameter values."""
        return np.array([_to_unit(self.distributions[d.name], parameters[d.name]) for d in self.dimensions])

    def decode(self, point: Array) -> dict[str, Any]:
        """Return the parameter values of a point of shape ``(dimensions,)``."""
        return {
            d.name: _from_unit(self.distributions[d.name], float(x))
            for d, x in zip(self.dimensions, point, strict=True)
        }

    def features(self, points: Array) -> Array:
        """Return what models see of points ``(n, dimensions)``: numbers as they are, categories one-hot."""
        columns = []
        for index, dimension in enumerate(self.dimensions):
            column = points[:, index]
            if dimension.categorical and dimension.values is not None:
                columns.append((column[:, None] == dimension.values[None]).astype(float))
            else:
                columns.append(column[:, None])
        return np.concatenate(columns, axis=1)

    def candidates(self, rng: np.random.Generator, exclude: Iterable[Array] = ()) -> Array:
        """Draw the points among which a model chooses.

        Args:
            rng: The source of the Sobol sequence's scrambling.
            exclude: Points that are left out.

        Returns:
            Points of shape ``(n, dimensions)``: all others of a small finite space, else those of a Sobol sequence,
            each once. Empty if the whole space is excluded.
        """
        size = self.size
        points = self._grid() if size is not None and size <= self.max_candidates else self._sobol(rng)
        taken = {key(point) for point in exclude}
        fresh = {name: row for row, name in enumerate(_keys(points))}
        return points[[row for name, row in fresh.items() if name not in taken]]

    def random(self, rng: np.random.Generator, exclude: Sequence[Array] = ()) -> Array:
        """Draw one point uniformly, not among ``exclude`` as long as the space has others."""
        taken = {key(point) for point in exclude}
        size = self.size
        if size is not None and size <= self.max_candidates:
            free: list[Array] = [point for point in self._grid() if key(point) not in taken]
            if free:
                return free[int(rng.integers(len(free)))]
        point: Array = self._snap(rng.random((1, len(self.dimensions))))[0]
        for _ in range(100):
            if key(point) not in taken:
                break
            point = self._snap(rng.random((1, len(self.dimensions))))[0]
        return point

    def mutate(self, point: Array, rng: np.random.Generator) -> Array:
        """Change one coordinate, drawn uniformly among those that have more than one value.

        Args:
            point: The point, of shape ``(dimensions,)``.
            rng: The source of chance.

        Returns:
            A copy in which a number is drawn from a normal distribution around it, of standard deviation one half of
            its range, and clipped; a category is drawn uniformly among the others. A coordinate of finitely many
            values always changes. The point itself if the space has only one.
        """
        movable = [i for i, d in enumerate(self.dimensions) if d.values is None or len(d.values) > 1]
        changed = point.copy()
        if not movable:
            return changed
        index = movable[rng.integers(len(movable))]
        dimension = self.dimensions[index]
        if dimension.values is None:
            changed[index] = np.clip(rng.normal(point[index], _MUTATION), 0, 1)
            return changed
        others = dimension.values[dimension.values != point[index]]
        if dimension.categorical:
            changed[index] = others[rng.integers(len(others))]
        else:
            goal = np.clip(rng.normal(point[index], _MUTATION), 0, 1)
            changed[index] = others[np.abs(others - goal).argmin()]
        return changed

    def _grid(self) -> Array:
        values = [d.values for d in self.dimensions if d.values is not None]
        return np.array(list(itertools.product(*values)), dtype=float)

    def _sobol(self, rng: np.random.Generator) -> Array:
        from scipy.stats import qmc

        count = 1 << (self.max_candidates - 1).bit_length()  # a Sobol sequence is balanced at powers of two
        if len(self.dimensions) > qmc.Sobol.MAXDIM:
            return self._snap(rng.random((self.max_candidates, len(self.dimensions))))
        sequence = qmc.Sobol(len(self.dimensions), rng=rng)
        return self._snap(sequence.random(count)[: self.max_candidates])

    def _snap(self, uniform: Array) -> Array:
        """Points of the space from points of the unit cube, each value of a finite coordinate equally likely."""
        points = uniform.copy()
        for index, dimension in enumerate(self.dimensions):
            if dimension.values is not None:
                count = len(dimension.values)
                cells = np.minimum((uniform[:, index] * count).astype(int), count - 1)
                points[:, index] = dimension.values[cells]
        return points


def key(point: Array) -> bytes:
    """Return a name of a point by which duplicates are known, rounding errors aside."""
    return _keys(point[None])[0]


def _keys(points: Array) -> list[bytes]:
    """Return the `key` of every row."""
    rounded = np.ascontiguousarray(np.round(points, 9) + 0.0)
    names: list[bytes] = rounded.view(np.dtype((np.void, rounded[0].nbytes)))[:, 0].tolist()
    return names


def _dimension(name: str, distribution: "BaseDistribution", limit: int) -> Dimension:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return Dimension(name, np.arange(len(distribution.choices), dtype=float), categorical=True)
    if isinstance(distribution, IntDistribution):
        count = (distribution.high - distribution.low) // distribution.step + 1
        numbers: Iterable[float] = range(distribution.low, distribution.high + 1, distribution.step)
    elif isinstance(distribution, FloatDistribution):
        if distribution.low == distribution.high:
            return Dimension(name, np.zeros(1), categorical=False)
        if distribution.step is None:
            return Dimension(name, None, categorical=False)
        count = round((distribution.high - distribution.low) / distribution.step) + 1
        numbers = (distribution.low + step * distribution.step for step in range(count))
    else:
        raise TypeError(f"`distributions[{name!r}]` must be a float, int or categorical one, got {distribution!r}")
    if count > limit:
        return Dimension(name, None, categorical=False)
    return Dimension(name, np.array([_to_unit(distribution, number) for number in numbers]), categorical=False)


def _to_unit(distribution: Any, value: Any) -> float:
    if hasattr(distribution, "choices"):
        return float(distribution.to_internal_repr(value))
    if distribution.low == distribution.high:
        return 0.0
    low, high = float(distribution.low), float(distribution.high)
    inside: float = min(max(float(value), low), high)  # an enqueued one may be outside
    if distribution.log:  # by math: NumPy is slow on three numbers
        low, high, inside = math.log(low), math.log(high), math.log(inside)
    return (inside - low) / (high - low)


def _from_unit(distribution: Any, coordinate: float) -> Any:
    if hasattr(distribution, "choices"):
        return distribution.choices[round(coordinate)]
    low, high = _scaled(distribution, (distribution.low, distribution.high))
    value = low + coordinate * (high - low)
    value = float(np.exp(value)) if distribution.log else float(value)
    if distribution.step is not None:
        steps = round((value - distribution.low) / distribution.step)
        value = distribution.low + steps * distribution.step
    value = min(max(value, distribution.low), distribution.high)
    return int(value) if isinstance(distribution.low, int) and isinstance(distribution.step, int) else value


def _scaled(distribution: Any, values: Sequence[float]) -> Array:
    array = np.asarray(values, dtype=float)
    return np.log(array) if distribution.log else array
