import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_plugins.compression import Calibration, equal_ratio, layer_costs, output_energy, trade_off
from lightning_plugins.compression.rank_search.choices import Choice, cheapest_choices


def total(choices: Any) -> tuple[float, int]:
    return sum(choice.error for choice in choices), sum(choice.cost for choice in choices)


@st.composite
def problems(draw: Any) -> tuple[list[list[Choice]], int]:
    """Layers with ranks at a constant price and a dense form of its own price; many errors are equal."""
    layers = []
    for _ in range(draw(st.integers(1, 4))):
        count, price = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 3, 7]))
        sizes = st.one_of(st.integers(0, 3).map(float), st.floats(0, 1e3, allow_subnormal=False))
        errors = sorted(draw(st.lists(sizes, min_size=count, max_size=count)), reverse=True)
        options = [Choice(rank, price * rank, error) for rank, error in enumerate(errors, 1)]
        layers.append([*options, Choice(count + 1, price * count + draw(st.integers(1, 5)), 0.0)])
    least = sum(min(choice.cost for choice in one) for one in layers)
    most = sum(max(choice.cost for choice in one) for one in layers)
    return layers, draw(st.integers(least, most))


@settings(max_examples=300, deadline=None)
@given(problems())
def test_no_choice_within_the_limit_has_a_smaller_error(problem: tuple[list[list[Choice]], int]):
    layers, limit = problem
    error, cost = total(cheapest_choices(layers, limit))
    possible = [total(one) for one in itertools.product(*layers)]
    best = min(error for error, cost in possible if cost <= limit)
    assert cost <= limit
    assert error == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_of_equal_errors_the_cheapest():
    layer = [Choice(1, 3, 1.0), Choice(2, 6, 1.0), Choice(3, 9, 1.0)]
    assert [choice.rank for choice in cheapest_choices([layer, layer], 100)] == [1, 1]


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 5)).double()


def errors_of(net: nn.Sequential, x: Tensor) -> list[Tensor]:
    """For each layer the output error at every rank, by singular values of its outputs."""
    found = []
    for layer in net[::2]:
        squares = torch.linalg.svdvals(x @ layer.weight.T).square()[: min(layer.weight.shape)]
        found.append(torch.cat([squares.flip(0).cumsum(0).flip(0), torch.zeros(1)]).detach())
        x = layer(x).tanh()
    return found


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("budget", [0.9, 0.65, 0.5, 0.3])
def test_ranks_have_the_least_sum_of_output_errors(budget: float, relative: bool):
    net, x = make_net(), torch.randn(200, 6, dtype=torch.float64) * torch.linspace(0.1, 2, 6)
    calibration = Calibration(net, effort=None, damping=1e-12).record([x])
    factors = {"0": 1.0, "2": 3.0, "4": 0.5}
    errors = [one * factor for one, factor in zip(errors_of(net, x), factors.values(), strict=True)]
    errors = [one / one[0] for one in errors] if relative else errors
    costs = list(layer_costs(net).values())
    dense = sum(cost.dense for cost in costs)

    def loss(ranks: tuple[int, ...]) -> float:
        dense_or = zip(errors, ranks, costs, strict=True)
        return sum(0.0 if rank == cost.full_rank else float(one[rank]) for one, rank, cost in dense_or)

    def left(ranks: tuple[int, ...]) -> int:
        return sum(cost.at(rank) for cost, rank in zip(costs, ranks, strict=True))

    options = itertools.product(*([*range(1, cost.break_even + 1), cost.full_rank] for cost in costs))
    best = min(loss(ranks) for ranks in options if left(ranks) / dense <= budget)
    found = output_energy(net, calibration, budget=budget, sensitivity=factors, relative=relative)
    assert found.share <= budget
    assert loss(tuple(found.ranks.values())) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("cost", ["params", "flops"])
def test_no_worse_than_other_choices(cost: Any):
    net, x = make_net(), torch.randn(50, 6, dtype=torch.float64)
    calibration = Calibration(net, effort=None).record([x])
    given: Any = {"budget": 0.6, "cost": cost, "inputs": x if cost == "flops" else None}
    errors = errors_of(net, x)

    def loss(ranks: dict[str, int]) -> float:
        return sum(float(one[rank]) for one, rank in zip(errors, ranks.values(), strict=True))

    found = loss(output_energy(net, calibration, **given).ranks)
    for other in (trade_off(net, calibration=calibration, **given), equal_ratio(net, **given)):
        assert found <= loss(other.ranks) * 1.001


@pytest.mark.parametrize("budget", [1 / 3, 0.3, 0.7, 2 / 3, 0.1 + 0.2])
def test_a_budget_that_a_choice_meets_exactly_is_met(budget: float):
    net = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10))
    assert output_energy(net, budget=budget).share <= budget


def test_mistakes_are_named():
    net = make_net()
    with pytest.raises(ValueError, match="`sensitivity` must have a factor for each layer, but has none for '2'"):
        output_energy(net, budget=0.6, sensitivity={"0": 1.0})
    with pytest.raises(ValueError, match=r"`sensitivity\['0'\]` must be at least 0, got -1"):
        output_energy(net, budget=0.6, sensitivity={"0": -1.0, "2": 1.0, "4": 1.0})
    with pytest.raises(TypeError, match="`sensitivity` must give a number for each layer by name, got list"):
        output_energy(net, budget=0.6, sensitivity=[1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`budget` must be at least"):
        output_energy(net, budget=0.001)
