"""Ranks for many layers at once from their weights or second moments, and the score of any choice of ranks.

What `beam_search` finds is compared with these: they run no network, take seconds, and have the same result type.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_callable, check_positive_int, check_text
from lightning_plugins._deprecation import Replaced, renamed, share_left
from lightning_plugins.compression.costs.layer_costs import Cost
from lightning_plugins.compression.low_rank.decomposition import InputMoments
from lightning_plugins.compression.low_rank.layers import full_rank
from lightning_plugins.compression.low_rank.splittable import select_layers
from lightning_plugins.compression.networks.evaluation import evaluation
from lightning_plugins.compression.rank_search.prefix_reuse import PrefixReuse
from lightning_plugins.compression.rank_search.problem import (
    RankProblem,
    Ranks,
    RankSearch,
    largest_that_meets,
    state_problem,
)
from lightning_plugins.compression.rank_search.scoring import CandidateScores, Score, check_batches
from lightning_plugins.compression.rank_search.truncation import TruncatedWeights, energies
from lightning_plugins.weights import Scheme


@renamed(ratio=Replaced("budget", share_left))
def equal_ratio(
    model: nn.Module,
    *,
    budget: float,
    layers: str | Sequence[str] = "*",
    cost: Cost = "params",
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    scheme: Scheme = 1,
) -> RankSearch:
    """Give every layer the same ratio of its rank to its full rank, the largest within the budget.

    The rank is this ratio of the full rank, rounded down, at least 1. A layer that this would not make cheaper stays
    dense. The ratio is not the budget, which is a share of the cost.

    Args:
        model: The network; only its weights are used.
        budget: The share of the selected layers' cost that may be left, in (0, 1).
        layers: The layers: dotted name, glob over dotted names, or a sequence of them.
        cost: ``"params"`` or ``"flops"``.
        inputs: Input of the model for ``cost="flops"``.
        scheme: How a convolution's kernel becomes a matrix; see `low_rank_layer`.

    Returns:
        The ranks and the share that they leave; the score is None and the trace empty.

    Raises:
        ValueError: If an argument is out of its range, no layer is selected, or the budget cannot be met.
        TypeError: If an argument is of a wrong type.

    Example:
        >>> net = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
        >>> equal_ratio(net, budget=0.5).ranks
        {'0': 6, '1': 3}
    """
    problem = state_problem(model, budget, layers, cost, inputs, scheme)
    full = [one.full_rank for one in problem.costs]

    def ranks_at(fraction: float) -> Ranks:  # the fraction is k / full for one layer: rounding must not lose the k
        return problem.without_gainless([max(1, int(fraction * rank + 1e-9)) for rank in full])

    levels = torch.cat([torch.arange(1, rank + 1, dtype=torch.float64) / rank for rank in full])
    return problem.result(largest_that_meets(problem, ranks_at, levels))


@renamed(ratio=Replaced("budget", share_left))
def energy_threshold(
    model: nn.Module,
    *,
    budget: float,
    layers: str | Sequence[str] = "*",
    cost: Cost = "params",
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    scheme: Scheme = 1,
    calibration: InputMoments | None = None,
) -> RankSearch:
    """Keep the same fraction of every weight's energy, the largest within the budget.

    The energy is the sum of the squared singular values of the weight, or of what the layer puts out; a layer's rank is
    the smallest that keeps the fraction. A layer that this would not make cheaper stays dense.

    Args:
        model: As for `equal_ratio`.
        budget: As for `equal_ratio`.
        layers: As for `equal_ratio`.
        cost: As for `equal_ratio`.
        inputs: As for `equal_ratio`.
        scheme: As for `equal_ratio`.
        calibration: What the layers receive, such as a `Calibration`: the energy is then that of their outputs.

    Returns:
        As `equal_ratio`.

    Raises:
        ValueError: As `equal_ratio`, or if a weight is not finite or ``calibration`` knows nothing of a layer.
        TypeError: As `equal_ratio`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
        >>> with torch.no_grad():
        ...     net[0].weight[1:] *= 0.01  # one strong direction, so that little rank keeps much energy
        >>> energy_threshold(net, budget=0.5).ranks
        {'0': 4, '1': 10}
    """
    problem = state_problem(model, budget, layers, cost, inputs, scheme)
    kept = []
    for energy in energies(problem.modules, scheme, calibration):
        total = energy.cumsum(0)
        kept.append(total / total[-1] if total[-1] > 0 else torch.ones_like(total))

    def ranks_at(fraction: float) -> Ranks:
        return problem.without_gainless([int(torch.searchsorted(one, fraction)) + 1 for one in kept])

    return problem.result(largest_that_meets(problem, ranks_at, torch.cat(kept)))


@renamed(ratio=Replaced("budget", share_left))
def trade_off(
    model: nn.Module,
    *,
    budget: float,
    layers: str | Sequence[str] = "*",
    cost: Cost = "params",
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    scheme: Scheme = 1,
    calibration: InputMoments | None = None,
) -> RankSearch:
    """Minimise error energy plus a price times the cost, in every layer, at the lowest price that removes enough.

    The error energy is the sum of the squared singular values that are cut off, not divided by the layer's own energy;
    staying dense has none. At a given price each layer is solved exactly by trying all its ranks, so no other ranks of
    at most the same cost have a smaller sum of errors.

    Args:
        model: As for `equal_ratio`.
        budget: As for `equal_ratio`.
        layers: As for `equal_ratio`.
        cost: As for `equal_ratio`.
        inputs: As for `equal_ratio`.
        scheme: As for `equal_ratio`.
        calibration: What the layers receive, such as a `Calibration`: the energy is then that of their outputs.

    Returns:
        As `equal_ratio`.

    Raises:
        ValueError: As `equal_ratio`, or if a weight is not finite or ``calibration`` knows nothing of a layer.
        TypeError: As `equal_ratio`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
        >>> trade_off(net, budget=0.5).share <= 0.5
        True

    Source:
        The compression step of the learning-compression algorithm: Idelbayev and Carreira-Perpinan, CVPR 2020. Our
        reading; its alternation with training is not part of this function.
    """
    problem = state_problem(model, budget, layers, cost, inputs, scheme)
    corners = [
        _corners(problem, layer, energy) for layer, energy in enumerate(energies(problem.modules, scheme, calibration))
    ]

    def ranks_at(negative_price: float) -> Ranks:  # the higher the price the fewer ranks
        return tuple(
            next(rank for rank, lowest in reversed(options) if lowest <= -negative_price) for options in corners
        )

    prices = torch.tensor([price for options in corners for _, price in options], dtype=torch.float64)
    return problem.result(largest_that_meets(problem, ranks_at, -prices))


def score_ranks(
    model: nn.Module,
    ranks: Mapping[str, int],
    batches: Iterable[Any],
    score: Score,
    *,
    scheme: Scheme = 1,
    calibration: InputMoments | None = None,
) -> float:
    """Score a network with weights truncated to given ranks, as `beam_search` scores, and put the weights back.

    Args:
        model: The network.
        ranks: Rank by layer name, such as ``equal_ratio(...).ranks``; a layer at its full rank or above is as it is.
        batches: As for `beam_search`.
        score: As for `beam_search`.
        scheme: As for `beam_search`.
        calibration: As for `beam_search`.

    Returns:
        The mean score.

    Raises:
        ValueError: If a layer cannot be truncated or is not called, a rank is below 1, there are no batches, or a score
            is not one finite number.
        TypeError: If an argument or a score is of a wrong type.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 3))
        >>> _ = net[0].weight.data.copy_(torch.diag(torch.tensor([3.0, 2.0, 1.0]))), net[0].bias.data.zero_()
        >>> score_ranks(net, {"0": 2}, [torch.ones(1, 3)], lambda net, x: net(x).sum())
        5.0
    """
    if not isinstance(ranks, Mapping) or not ranks:
        raise TypeError(f"`ranks` must give the rank of at least one layer by name, got {ranks!r}")
    for name, rank in ranks.items():
        check_text("ranks", name, "a mapping from names of layers to ranks")
        check_positive_int(f"ranks[{name!r}]", rank)
    check_batches(batches)
    check_callable("score", score, "a function of model and batch")
    try:
        modules = select_layers(model, list(ranks), scheme=scheme, transposed=True)
    except ValueError as error:
        raise ValueError(str(error).replace("`layers`", "`ranks`")) from None
    wanted = tuple(min(ranks[name], full_rank(module, scheme=scheme)) for name, module in modules.items())
    with (
        evaluation(model),
        TruncatedWeights(modules, scheme, calibration) as weights,
        PrefixReuse(model, modules, enabled=False) as reuse,
    ):
        return CandidateScores(model, batches, score, weights, reuse, bounds=None).first(wanted)


def _corners(problem: RankProblem, layer: int, energy: Tensor) -> list[tuple[int, float]]:
    """The ranks of a layer that are best at some price, with the lowest price at which each is.

    Returns:
        The corners of the lower convex hull of error over cost, from the dense layer (price 0) to rank 1.
    """
    cost = problem.costs[layer]
    error = energy.flip(0).cumsum(0).flip(0).tolist()  # error[rank]
    points = [(cost.full_rank, cost.dense, 0.0)]
    points += [(rank, cost.at(rank), error[rank]) for rank in range(cost.break_even, 0, -1)]
    hull: list[tuple[int, int, float]] = []
    for point in points:
        while len(hull) > 1 and _price(hull[-2], hull[-1]) >= _price(hull[-2], point):
            hull.pop()
        hull.append(point)
    prices = [0.0, *(_price(one, other) for one, other in pairwise(hull))]
    return [(rank, price) for (rank, _, _), price in zip(hull, prices, strict=True)]


def _price(one: tuple[int, int, float], other: tuple[int, int, float]) -> float:
    """The error that each unit of cost is worth between two choices of a layer."""
    return (other[2] - one[2]) / (one[1] - other[1])
