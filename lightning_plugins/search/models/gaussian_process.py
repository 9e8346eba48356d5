"""A Gaussian process with warped inputs as the model of an objective."""

import math
from typing import Any, NamedTuple

import numpy as np

from lightning_plugins.search.space import Array

_MOST = 200  # observations; a random subset of them where there are more
_ROOT3 = math.sqrt(3.0)
_NOISE = (-4.63, 0.5)  # mean and standard deviation of the logarithm of the noise's variance
_WARPING = (0.0, 0.75)  # of the logarithms of the exponents of the warping
_LENGTH = (-0.7, 1.0)  # of the logarithms of the length scales, ours: without one a flat direction has no optimum
_AMPLITUDE, _SLOPE = (0.0, 1.0), (-2.0, 1.5)
_STEPS = 40
_JITTER = 1e-8
_BLOCK = 1024  # candidates predicted together: their covariances stay in the processor's cache


def kumaraswamy(coordinates: Array, a: Array, b: Array) -> Array:
    """Warp coordinates in [0, 1] by the distribution function ``1 - (1 - x**a)**b``.

    Args:
        coordinates: Of shape ``(n, d)``.
        a: Positive exponents, of shape ``(d,)``.
        b: Likewise.

    Returns:
        Coordinates in [0, 1], of the same shape; the same ones where ``a = b = 1``.

    Example:
        >>> kumaraswamy(np.array([[0.5]]), np.array([2.0]), np.array([1.0])).tolist()
        [[0.25]]
    """
    warped: Array = 1 - (1 - _inside(coordinates) ** a) ** b
    return warped


def _inside(coordinates: Array) -> Array:
    return np.clip(coordinates, 1e-9, 1 - 1e-9)  # at 0 and 1 powers have no derivative


class Parameters(NamedTuple):
    """Logarithms of all hyper-parameters, or the derivatives by them.

    Attributes:
        lengths: Length scales of the Matérn kernel, of shape ``(d,)``.
        a: Exponents of the warping, of shape ``(d,)``.
        b: Likewise.
        amplitude: Variance of the Matérn kernel.
        slope: Variance of the linear kernel.
        noise: Variance of the noise.
    """

    lengths: Array
    a: Array
    b: Array
    amplitude: Any
    slope: Any
    noise: Any

    @classmethod
    def unpack(cls, flat: Array) -> "Parameters":
        """Read the parameters from a vector of ``3 d + 3`` numbers."""
        lengths, a, b = flat[:-3].reshape(3, -1)
        return cls(lengths, a, b, *flat[-3:])

    def pack(self) -> Array:
        """Return the vector that `unpack` reads."""
        return np.concatenate([np.atleast_1d(value) for value in self])


_PRIORS = Parameters(*map(np.array, (_LENGTH, _WARPING, _WARPING, _AMPLITUDE, _SLOPE, _NOISE)))


def covariance(left: Array, right: Array, parameters: Parameters) -> Array:
    """The linear and the Matérn-3/2 kernel with a length scale per dimension, summed, between warped points.

    Args:
        left: Warped points, of shape ``(n, d)``.
        right: Likewise, of shape ``(m, d)``.
        parameters: The hyper-parameters.

    Returns:
        The matrix of shape ``(n, m)``.
    """
    distance = _distance(left, right, parameters)
    matern = (1 + distance) * np.exp(-distance)
    linear = (left - 0.5) @ (right - 0.5).T
    total: Array = np.exp(parameters.amplitude) * matern + np.exp(parameters.slope) * linear
    return total


def _distance(left: Array, right: Array, parameters: Parameters) -> Array:
    x, y = left / np.exp(parameters.lengths), right / np.exp(parameters.lengths)
    squares = np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * x @ y.T
    distance: Array = _ROOT3 * np.sqrt(np.maximum(squares, 0))
    return distance


def _covariance_gradient(points: Array, parameters: Parameters, upstream: Array) -> Parameters:
    """Derivatives of ``sum(upstream * covariance)`` among points before their warping, for symmetric ``upstream``."""
    inside, a, b = _inside(points), np.exp(parameters.a), np.exp(parameters.b)
    power = inside**a
    rest = 1 - power
    warped = 1 - rest**b
    lengths, amplitude, slope = np.exp(parameters.lengths), np.exp(parameters.amplitude), np.exp(parameters.slope)
    distance = _distance(warped, warped, parameters)
    decay = amplitude * np.exp(-distance)
    by_squares = -1.5 * upstream * decay  # (1 + r) exp(-r) by r**2 / 3
    scaled, centered = warped / lengths, warped - 0.5
    pull = by_squares.sum(1)[:, None] * scaled - by_squares @ scaled
    projected = upstream @ centered
    by_warped = 4 * pull / lengths + 2 * slope * projected
    return Parameters(
        lengths=-4 * (pull * scaled).sum(0),
        a=(by_warped * b * rest ** (b - 1) * a * power * np.log(inside)).sum(0),
        b=-(by_warped * b * rest**b * np.log(rest)).sum(0),
        amplitude=(upstream * (1 + distance) * decay).sum(),
        slope=slope * (projected * centered).sum(),
        noise=np.exp(parameters.noise) * np.trace(upstream),
    )


class GaussianProcessModel:
    """A Gaussian process on warped inputs, with the hyper-parameters of the largest posterior density.

    The kernel is linear plus Matérn-3/2 with a length scale for every dimension, the noise has a log-normal prior, and
    values are standardised. Of more than 200 observations a random subset is taken.

    Args:
        features: What is known, of shape ``(n, d)``, in [0, 1].
        values: The objective there, of shape ``(n,)``.
        rng: The source of the subset.

    Example:
        >>> x = np.linspace(0, 1, 12)[:, None]
        >>> mean, variance = GaussianProcessModel(x, x[:, 0] ** 2, np.random.default_rng(0)).predict(x)
        >>> bool(np.abs(mean - x[:, 0] ** 2).max() < 0.05), bool((variance >= 0).all())
        (True, True)

    Source:
        Cho et al., https://arxiv.org/abs/2202.03005, and its code for kernel, warping and the noise's prior; the other
        priors are ours. Warping: Snoek et al., ICML 2014.
    """

    def __init__(self, features: Array, values: Array, rng: np.random.Generator) -> None:
        from scipy.linalg import solve_triangular

        if len(values) > _MOST:
            kept = rng.choice(len(values), _MOST, replace=False)
            features, values = features[kept], values[kept]
        self._center, self._scale = float(values.mean()), float(values.std()) or 1.0
        self._x = np.ascontiguousarray(features, dtype=float)
        self._y = (values - self._center) / self._scale
        self.parameters = self._fit()
        self._known = self._warp(self._x, self.parameters)
        factor = np.linalg.cholesky(self._noisy_covariance(self.parameters))
        self._whiten = solve_triangular(factor, np.eye(len(factor)), lower=True).T
        self._weights = self._whiten @ (self._whiten.T @ self._y)

    def predict(self, features: Array) -> tuple[Array, Array]:
        """Return mean and variance of the objective, without its noise, each of shape ``(n,)``."""
        blocks = [self._predict(features[start : start + _BLOCK]) for start in range(0, len(features), _BLOCK)]
        mean, variance = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        return mean * self._scale + self._center, variance * self._scale**2

    def negative_log_posterior(self, flat: Array) -> tuple[float, Array]:
        """Return the negative logarithm of the hyper-parameters' posterior density, constants aside, and its gradient.

        Args:
            flat: The vector of `Parameters.pack`.
        """
        from scipy.linalg import cho_solve

        parameters = Parameters.unpack(flat)
        factor = np.linalg.cholesky(self._noisy_covariance(parameters))
        weights = cho_solve((factor, True), self._y)
        inverse = cho_solve((factor, True), np.eye(len(factor)))
        likelihood = self._y @ weights / 2 + np.log(factor.diagonal()).sum()
        gradient = _covariance_gradient(self._x, parameters, (inverse - np.outer(weights, weights)) / 2)
        z = [(value - mean) / deviation for value, (mean, deviation) in zip(parameters, _PRIORS, strict=True)]
        prior = sum(np.square(each).sum() for each in z) / 2
        slopes = [each / deviation for each, (_, deviation) in zip(z, _PRIORS, strict=True)]
        return float(likelihood + prior), gradient.pack() + Parameters(*slopes).pack()

    def _predict(self, features: Array) -> tuple[Array, Array]:
        warped = self._warp(features, self.parameters)
        cross = covariance(warped, self._known, self.parameters)
        own = np.exp(self.parameters.amplitude) + np.exp(self.parameters.slope) * np.square(warped - 0.5).sum(1)
        explained = np.square(cross @ self._whiten).sum(1)
        return cross @ self._weights, np.maximum(own - explained, 0)

    def _warp(self, points: Array, parameters: Parameters) -> Array:
        return kumaraswamy(points, np.exp(parameters.a), np.exp(parameters.b))

    def _noisy_covariance(self, parameters: Parameters) -> Array:
        warped = self._warp(self._x, parameters)
        matrix = covariance(warped, warped, parameters)
        matrix[np.diag_indices_from(matrix)] += np.exp(parameters.noise) + _JITTER
        return matrix

    def _fit(self) -> Parameters:
        from scipy.optimize import minimize

        dimensions = self._x.shape[1]
        start = np.concatenate([np.full(dimensions, _LENGTH[0]), np.zeros(2 * dimensions), [0.0, -2.0, _NOISE[0]]])
        bounds = (
            [(-5.0, 4.0)] * dimensions + [(-2.5, 2.5)] * (2 * dimensions) + [(-6.0, 4.0), (-8.0, 4.0), (-10.0, 1.0)]
        )
        found = minimize(
            self.negative_log_posterior, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": _STEPS}
        )
        return Parameters.unpack(found.x)
