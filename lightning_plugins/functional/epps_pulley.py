"""Sliced test for an isotropic Gaussian: the statistic of Epps and Pulley on projections of the embeddings."""

import math

import torch
from torch import Tensor

from lightning_plugins._checks import check_int, check_positive_int, check_positive_number
from lightning_plugins.functional.spectrum import at_least_float32, check_embeddings, full_precision
from lightning_plugins.functional.tensors import check_floating

_MOST_KNOTS = 10_000  # a 17-point rule is exact to float32 precision


def epps_pulley(embeddings: Tensor, directions: Tensor, *, knots: int = 17, extent: float = 5.0) -> Tensor:
    """Distance of projections of the embeddings from a standard normal distribution.

    For each direction the value is ``N * integral(|f(t) - exp(-t ** 2 / 2)| ** 2 * exp(-t ** 2 / 2), t)``, with ``f``
    the empirical characteristic function of the projections, by the trapezoidal rule. The integrand is even, so only
    ``t >= 0`` is computed.

    Args:
        embeddings: Floating tensor of shape ``(N, d)``: ``N >= 1`` samples of dimension ``d >= 1``.
        directions: Floating tensor of shape ``(d, M)``, columns of unit length; without gradient.
        knots: Number of quadrature points from ``-extent`` to ``extent``, at least 2.
        extent: Limit of the integral, above 0.

    Returns:
        Tensor of shape ``(M,)``, at least 0: float32 for float16 and bfloat16 input, else the input's dtype. NaN if a
        value is not finite.

    Raises:
        TypeError: If a tensor is not a real floating one, ``knots`` no int or ``extent`` not a number.
        ValueError: If a tensor does not have the shape described, or a number is out of its range.

    Example:
        >>> gaussian = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> close, far = epps_pulley(gaussian, torch.eye(2))[0], epps_pulley(3 * gaussian, torch.eye(2))[0]
        >>> bool(close < 2 < 100 < far)
        True

    Source:
        Balestriero and LeCun (LeJEPA), 2025, https://arxiv.org/abs/2511.08544; Epps and Pulley, Biometrika 1983.
    """
    check_embeddings(embeddings)
    check_floating("directions", directions)
    if embeddings.ndim != 2 or directions.ndim != 2 or len(directions) != embeddings.shape[1] or not directions.numel():
        raise ValueError(
            "`embeddings` and `directions` must have shapes (N, d) and (d, M), got "
            f"{tuple(embeddings.shape)} and {tuple(directions.shape)}"
        )
    if check_positive_int("knots", knots) < 2:
        raise ValueError(f"`knots` must be at least 2, got {knots}")
    if knots > _MOST_KNOTS:
        raise ValueError(f"`knots` must be at most {_MOST_KNOTS}, got {knots}")
    check_positive_number("extent", extent)
    with full_precision(embeddings):
        rows = at_least_float32(embeddings)
        projections = rows @ directions.detach().to(rows)
        total = projections.new_zeros(directions.shape[1])
        for t, share in _half_of_the_rule(knots, extent):
            real, imaginary = (projections * t).cos().mean(0), (projections * t).sin().mean(0)
            gaussian = math.exp(-t * t / 2)
            total = total + share * gaussian * ((real - gaussian).square() + imaginary.square())
        statistic: Tensor = total * len(rows)
    return statistic


def random_directions(dim: int, number: int, *, seed: int, like: Tensor) -> Tensor:
    """Draw directions, uniformly distributed on the sphere, from a seed.

    Args:
        dim: Number of dimensions ``d``.
        number: Number of directions ``M``.
        seed: The same seed gives the same directions on devices of one kind.
        like: A tensor with the desired device and dtype.

    Returns:
        Tensor of shape ``(d, M)`` with columns of unit length.

    Example:
        >>> random_directions(3, 2, seed=0, like=torch.zeros(1)).shape
        torch.Size([3, 2])
    """
    check_positive_int("dim", dim)
    check_positive_int("number", number)
    seed = check_int("seed", seed)
    check_floating("like", like)
    generator = torch.Generator(device=like.device).manual_seed(seed)
    # Always in float32: the generator's numbers depend on the dtype.
    drawn = torch.randn(dim, number, generator=generator, device=like.device, dtype=torch.float32).to(like.dtype)
    directions: Tensor = drawn / torch.linalg.vector_norm(drawn, dim=0).clamp_min(torch.finfo(drawn.dtype).tiny)
    return directions


def _half_of_the_rule(knots: int, extent: float) -> list[tuple[float, float]]:
    """The points ``t >= 0`` of the trapezoidal rule with their weights, including those of mirrored points."""
    step = 2 * extent / (knots - 1)
    points = []
    for index in range(knots // 2, knots):
        t = index * step - extent
        weight = step / 2 if index == knots - 1 else step
        alone = knots % 2 == 1 and index == knots // 2
        points.append((0.0 if alone else t, weight if alone else 2 * weight))
    return points
