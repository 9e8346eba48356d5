"""A Gaussian process with warped inputs as the model of an objective."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_plugins.search.space import Array

_MOST = 200  # observations; a random subset of them where there are more
_ROOT3 = math.sqrt(3.0)
_NOISE = (-4.63, 0.5)  # mean and standard deviation of the logarithm of the noise's variance
_WARPING = (0.0, 0.75)  # of the logarithms of the exponents of the warping
_LENGTH = (-0.7, 1.0)  # of the logarithms of the length scales, ours: without one a flat direction has no optimum
_STEPS = 40
_JITTER = 1e-8


def kumaraswamy(coordinates: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Warp coordinates in [0, 1] by the distribution function ``1 - (1 - x**a)**b``.

    Args:
        coordinates: Of shape ``(n, d)``.
        a: Positive exponents, of shape ``(d,)``.
        b: Likewise.

    Returns:
        Coordinates in [0, 1], of the same shape; the same ones where ``a = b = 1``.

    Example:
        >>> kumaraswamy(torch.tensor([[0.5]]), torch.tensor([2.0]), torch.tensor([1.0]))
        tensor([[0.2500]])
    """
    edge = 1e-9  # where powers have no derivative
    inside = coordinates.clamp(edge, 1 - edge)
    return 1 - (1 - inside**a) ** b


class _Parameters(NamedTuple):
    """The logarithms of all hyper-parameters."""

    lengths: Tensor
    a: Tensor
    b: Tensor
    amplitude: Tensor
    slope: Tensor
    noise: Tensor

    @classmethod
    def unpack(cls, flat: Tensor, dimensions: int) -> "_Parameters":
        lengths, a, b, rest = flat.split([dimensions, dimensions, dimensions, 3])
        return cls(lengths, a, b, *rest)

    def log_prior(self) -> Tensor:
        """The logarithm of the prior's density, constants aside."""
        terms = [(self.lengths, _LENGTH), (self.a, _WARPING), (self.b, _WARPING), (self.noise[None], _NOISE)]
        terms += [(self.amplitude[None], (0.0, 1.0)), (self.slope[None], (-2.0, 1.5))]
        return -torch.stack(
            [((value - mean) / deviation).square().sum() / 2 for value, (mean, deviation) in terms]
        ).sum()


def covariance(left: Tensor, right: Tensor, parameters: Any) -> Tensor:
    """The linear and the Matérn-3/2 kernel with a length scale per dimension, summed, between warped points."""
    x, y = (kumaraswamy(points, parameters.a.exp(), parameters.b.exp()) for points in (left, right))
    scaled_x, scaled_y = x / parameters.lengths.exp(), y / parameters.lengths.exp()
    squares = scaled_x.square().sum(1)[:, None] + scaled_y.square().sum(1)[None] - 2 * scaled_x @ scaled_y.T
    distance = _ROOT3 * squares.clamp_min(1e-12).sqrt()
    matern = (1 + distance) * torch.exp(-distance)
    linear = (x - 0.5) @ (y - 0.5).T
    total: Tensor = parameters.amplitude.exp() * matern + parameters.slope.exp() * linear
    return total


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
        if len(values) > _MOST:
            kept = rng.choice(len(values), _MOST, replace=False)
            features, values = features[kept], values[kept]
        self._center, self._scale = float(values.mean()), float(values.std()) or 1.0
        self._x = torch.from_numpy(np.ascontiguousarray(features, dtype=float))
        self._y = torch.from_numpy((values - self._center) / self._scale)
        self._parameters = self._fit()
        with torch.no_grad():
            self._factor = self._cholesky(self._parameters)
            self._weights = torch.cholesky_solve(self._y[:, None], self._factor)

    def predict(self, features: Array) -> tuple[Array, Array]:
        """Return mean and variance of the objective, without its noise, each of shape ``(n,)``."""
        with torch.no_grad():
            x = torch.from_numpy(np.ascontiguousarray(features, dtype=float))
            cross = covariance(x, self._x, self._parameters)
            mean = (cross @ self._weights)[:, 0]
            half = torch.linalg.solve_triangular(self._factor, cross.T, upper=False)
            warped = kumaraswamy(x, self._parameters.a.exp(), self._parameters.b.exp()) - 0.5
            own = self._parameters.amplitude.exp() + self._parameters.slope.exp() * warped.square().sum(1)
            variance = (own - half.square().sum(0)).clamp_min(0)
        return (mean * self._scale + self._center).numpy(), (variance * self._scale**2).numpy()

    def _cholesky(self, parameters: _Parameters) -> Tensor:
        matrix = covariance(self._x, self._x, parameters)
        noise = (parameters.noise.exp() + _JITTER) * torch.eye(len(matrix), dtype=matrix.dtype)
        factor: Tensor = torch.linalg.cholesky(matrix + noise)
        return factor

    def negative_log_posterior(self, parameters: _Parameters) -> Tensor:
        """Return the negative logarithm of the hyper-parameters' posterior density, constants aside."""
        factor = self._cholesky(parameters)
        fit = torch.linalg.solve_triangular(factor, self._y[:, None], upper=False).square().sum() / 2
        total: Tensor = fit + factor.diagonal().log().sum() - parameters.log_prior()
        return total

    def _fit(self) -> _Parameters:
        from scipy.optimize import minimize

        dimensions = self._x.shape[1]

        def objective(flat: Array) -> tuple[float, Array]:
            tensor = torch.tensor(flat, dtype=torch.float64, requires_grad=True)
            loss = self.negative_log_posterior(_Parameters.unpack(tensor, dimensions))
            (gradient,) = torch.autograd.grad(loss, tensor)
            return loss.item(), gradient.numpy()

        start = np.concatenate([np.full(dimensions, _LENGTH[0]), np.zeros(2 * dimensions), [0.0, -2.0, _NOISE[0]]])
        bounds = (
            [(-5.0, 4.0)] * dimensions + [(-2.5, 2.5)] * (2 * dimensions) + [(-6.0, 4.0), (-8.0, 4.0), (-10.0, 1.0)]
        )
        found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": _STEPS})
        return _Parameters.unpack(torch.from_numpy(found.x), dimensions)
