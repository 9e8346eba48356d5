"""Estimates without a network: nearest neighbours, and a Gaussian with the same covariance; in nats."""

import math

import torch
from torch import Tensor

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import check_positive_int
from lightning_plugins.functional.class_information import gaussian_information
from lightning_plugins.information.fitting import check_pairs


def ksg_information(x: Tensor, y: Tensor, *, neighbours: int = 10) -> float:
    """Estimate mutual information from nearest-neighbour distances; accurate only in few dimensions.

    Args:
        x: Floating tensor of shape ``(N, d)``; scale features equally first, since distances are maximum norms.
        y: Floating tensor of shape ``(N, e)``.
        neighbours: Number of neighbours; more give lower variance and higher bias.

    Returns:
        The first estimator of Kraskov et al. in nats; it can be slightly negative.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If shapes do not fit, there are no more pairs than ``neighbours``, or duplicates make a distance 0.
        ImportError: If scipy is missing.

    Example:
        >>> x = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
        >>> noise = torch.randn(500, 1, generator=torch.Generator().manual_seed(1))
        >>> abs(ksg_information(x, noise)) < 0.1
        True

    Source:
        Kraskov et al., Physical Review E 69, 2004, https://arxiv.org/abs/cond-mat/0305641.
    """
    check_arguments(ksg_information, locals())
    try:
        from scipy.spatial import cKDTree
    except ImportError as error:
        raise ImportError(
            "`ksg_information` needs scipy; run `pip install 'lightning-plugins[information]'`"
        ) from error
    check_pairs(x, y, fewest=check_positive_int("neighbours", neighbours) + 1)
    one, other = (part.detach().cpu().double().numpy() for part in (x, y))
    both = torch.cat([x.detach().cpu().double(), y.detach().cpu().double()], dim=1).numpy()
    distances, _ = cKDTree(both).query(both, k=neighbours + 1, p=math.inf)
    farthest = torch.as_tensor(distances[:, -1])
    if bool((farthest == 0).any()):
        raise ValueError(
            f"`x` and `y` must not repeat a pair more than {neighbours} times, {int((farthest == 0).sum())} pairs "
            "have as many equal ones; the density of discrete values does not exist, add a little noise or take a "
            "critic"
        )
    radius = torch.nextafter(farthest, torch.zeros_like(farthest)).numpy()  # strictly nearer
    total = 0.0
    for points in (one, other):
        counts = cKDTree(points).query_ball_point(points, radius, p=math.inf, return_length=True)  # including itself
        total += float(torch.digamma(torch.as_tensor(counts).double()).mean())
    known = torch.digamma(torch.tensor([neighbours, len(both)], dtype=torch.float64)).sum()
    return float(known) - total


def cca_information(x: Tensor, y: Tensor) -> float:
    """Estimate mutual information from canonical correlations: that of a Gaussian with the pairs' covariance.

    Args:
        x: Floating tensor of shape ``(N, d)``.
        y: Floating tensor of shape ``(N, e)``, with ``N > d + e``.

    Returns:
        The value in nats. For Gaussians it is biased upwards by ``d * e / (2 N)``; for others it can err in either
        direction.

    Raises:
        TypeError: If one is not a floating tensor.
        ValueError: If shapes do not fit, there are too few pairs, or features are constant or duplicates.

    Example:
        >>> x = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
        >>> noise = torch.randn(500, 1, generator=torch.Generator().manual_seed(1))
        >>> abs(cca_information(x, x + noise) - 0.5 * math.log(2)) < 0.1
        True
    """
    check_arguments(cca_information, locals())
    check_pairs(x, y, fewest=2)
    if len(x) <= x.shape[1] + y.shape[1]:
        raise ValueError(
            f"`x` must have more rows than x and y have features together, {x.shape[1]} + {y.shape[1]}, got {len(x)}; "
            "reduce them to principal components"
        )
    z = torch.cat([x.detach().double(), y.detach().double()], dim=1)
    spread = z.std(dim=0)
    covariance = (z / spread.where(spread > 0, torch.ones_like(spread))).T.cov()
    try:
        return float(gaussian_information(covariance, x.shape[1]))
    except ValueError as error:
        raise ValueError(str(error).replace("`covariance` must be", "`x` and `y`: their covariance must be")) from None
