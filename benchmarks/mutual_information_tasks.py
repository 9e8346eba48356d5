"""Distributions whose mutual information is known in closed form, after the list of the benchmark-mi package.

The formulas are those of Czyż et al., NeurIPS 2023, https://arxiv.org/abs/2306.11078: a Gaussian, Student or uniform
pair whose information is known, and invertible maps of each side, which do not change it. None of the package's code is
used; settings not specified in the paper are ours and listed below.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins.functional import gaussian_information


class Task(NamedTuple):
    information: float  # nats
    sample: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


def covariance(d: int, e: int, *, dense: float | None = None, pairs: dict[int, float] | None = None) -> Tensor:
    """Unit variances; all correlations equal, or only those of x_k with y_k."""
    s = torch.eye(d + e, dtype=torch.float64)
    if dense is not None:
        s = torch.full_like(s, dense).fill_diagonal_(1.0)
    for k, rho in (pairs or {}).items():
        s[k, d + k] = s[d + k, k] = rho
    return s


def gaussian(s: Tensor, d: int) -> Task:
    factor = torch.linalg.cholesky(s)

    def sample(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        z = torch.randn(n, len(s), dtype=torch.float64, generator=generator) @ factor.T
        return z[:, :d], z[:, d:]

    return Task(float(gaussian_information(s, d)), sample)


def student(s: Tensor, d: int, df: int) -> Task:
    """I = I of the Gaussian + f(df) + f(df + d + e) - f(df + d) - f(df + e)."""

    def f(nu: float) -> float:
        return math.lgamma(nu / 2) - nu / 2 * float(torch.digamma(torch.tensor(nu / 2, dtype=torch.float64)))

    e = len(s) - d
    base = gaussian(s, d)

    def sample(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = base.sample(n, generator)
        chi2 = torch.randn(n, df, dtype=torch.float64, generator=generator).square().sum(dim=1, keepdim=True)
        scale = (df / chi2).sqrt()
        return x * scale, y * scale

    return Task(base.information + f(df) + f(df + d + e) - f(df + d) - f(df + e), sample)


def additive_noise(epsilon: float) -> Task:
    """X uniform in [0, 1], Y = X + noise uniform in [-epsilon, epsilon]."""

    def sample(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, u = torch.rand(2, n, 1, dtype=torch.float64, generator=generator).unbind()
        return x, x + epsilon * (2 * u - 1)

    return Task(1 / (4 * epsilon) if epsilon > 0.5 else epsilon + math.log(1 / (2 * epsilon)), sample)


def changed(task: Task, x: Callable[[Tensor], Tensor], y: Callable[[Tensor], Tensor] | None = None) -> Task:
    def sample(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        one, other = task.sample(n, generator)
        return x(one), (y or x)(other)

    return Task(task.information, sample)


def half_cube(x: Tensor) -> Tensor:
    return x.sign() * x.abs() ** 1.5


def wiggly_x(x: Tensor) -> Tensor:
    return x + 0.4 * x.sin() + 0.2 * (1.7 * x + 1).sin() + 0.03 * (3.3 * x - 2.5).sin()  # increasing: 1 > .4 + .34 + .1


def wiggly_y(y: Tensor) -> Tensor:
    return y - 0.4 * (0.4 * y).sin() + 0.17 * (1.3 * y + 3.5).sin() + 0.02 * (4.3 * y - 2.5).sin()


def bimodal(x: Tensor) -> Tensor:
    """The quantiles of an equal mixture of two Gaussians, at -1.5 and 1.5 with deviation 0.5, by bisection."""
    p = torch.special.ndtr(x)
    low, high = torch.full_like(x, -12.0), torch.full_like(x, 12.0)
    for _ in range(60):
        middle = (low + high) / 2
        mixture = (torch.special.ndtr((middle + 1.5) / 0.5) + torch.special.ndtr((middle - 1.5) / 0.5)) / 2
        low, high = torch.where(mixture < p, middle, low), torch.where(mixture < p, high, middle)
    return (low + high) / 2


def swiss_roll(x: Tensor) -> Tensor:
    t = 1.5 * math.pi * (1 + 2 * torch.special.ndtr(x))
    return torch.cat([t * t.cos(), t * t.sin()], dim=1) / 21


def spiral(x: Tensor) -> Tensor:
    """Rotated in the plane of the first two features by the squared length."""
    angle = x.square().sum(dim=1) / x.shape[1]
    first, second = x[:, 0] * angle.cos() - x[:, 1] * angle.sin(), x[:, 0] * angle.sin() + x[:, 1] * angle.cos()
    return torch.cat([first[:, None], second[:, None], x[:, 2:]], dim=1)


def tasks() -> dict[str, Task]:
    one = gaussian(covariance(1, 1, dense=0.75), 1)
    sparse = {0: 0.8, 1: 0.8}
    three, five = gaussian(covariance(3, 3, pairs=sparse), 3), gaussian(covariance(5, 5, pairs=sparse), 5)
    twenty_five = gaussian(covariance(25, 25, pairs=sparse), 25)
    return {
        "1v1 normal": one,
        "1v1 normal CDF": changed(one, torch.special.ndtr),
        "1v1 half-cube": changed(one, half_cube),
        "1v1 bimodal": changed(one, bimodal),
        "1v1 wiggly": changed(one, wiggly_x, wiggly_y),
        "Swiss roll 2v1": changed(one, swiss_roll, torch.special.ndtr),
        "1v1 additive noise 0.1": additive_noise(0.1),
        "1v1 additive noise 0.75": additive_noise(0.75),
        "1v1 Student df 1": student(torch.eye(2, dtype=torch.float64), 1, 1),
        "asinh of 1v1 Student df 1": changed(student(torch.eye(2, dtype=torch.float64), 1, 1), torch.asinh),
        "2v2 Student df 2, sparse": student(covariance(2, 2, pairs=sparse), 2, 2),
        "5v5 Student df 2, sparse": student(covariance(5, 5, pairs=sparse), 5, 2),
        "3v3 Student df 3, dense": student(covariance(3, 3, dense=0.5), 3, 3),
        "2v2 normal, sparse": gaussian(covariance(2, 2, pairs=sparse), 2),
        "5v5 normal, dense": gaussian(covariance(5, 5, dense=0.5), 5),
        "25v25 normal, dense": gaussian(covariance(25, 25, dense=0.5), 25),
        "25v25 normal, sparse": twenty_five,
        "25v25 half-cube, sparse": changed(twenty_five, half_cube),
        "3v3 spiral": changed(three, spiral),
        "5v5 spiral": changed(five, spiral),
    }
