"""Metrics in one collection, which lets those with equal states share them, and rows that a mask leaves out."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_plugins.metrics import (
    Alignment,
    CorrelationGap,
    EffectiveRank,
    Isotropy,
    RankMe,
    Uniformity,
    VonNeumannEntropy,
)

OF_ROWS: dict[str, Any] = {
    kind.__name__: kind for kind in (CorrelationGap, EffectiveRank, Isotropy, RankMe, Uniformity, VonNeumannEntropy)
}
D = 4
UNIT = torch.eye(D)
STARTS = {"no rows": torch.empty(0, D), "unit rows": UNIT, "zeros": torch.zeros(2, D), "any rows": torch.randn(3, D)}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("one", "other"), itertools.combinations(OF_ROWS, 2))
def test_metrics_in_a_collection_are_those_alone(one: str, other: str, start: str):
    batches = [STARTS[start], torch.randn(5, D) * 3, torch.randn(2, D)]
    together = MetricCollection({name: OF_ROWS[name](D) for name in (one, other)})
    alone = {name: OF_ROWS[name](D) for name in (one, other)}
    for batch in batches:
        together.update(batch)
        for metric in alone.values():
            metric.update(batch)
    torch.testing.assert_close(together.compute(), {name: metric.compute() for name, metric in alone.items()})


def test_metrics_of_one_sum_still_share_it():
    together = MetricCollection([EffectiveRank(D), VonNeumannEntropy(D), Isotropy(D), RankMe(D)])
    together.update(UNIT)
    assert sorted(map(len, together.compute_groups.values())) == [1, 3]


@pytest.mark.parametrize("name", OF_ROWS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_masked_rows_count_as_if_they_were_not_there(name: str, dtype: torch.dtype):
    tokens = torch.randn(3, 5, D)
    mask = torch.arange(5) < torch.tensor([2, 5, 3])[:, None]
    masked, expected = OF_ROWS[name](D), OF_ROWS[name](D)
    filled = torch.where(mask[..., None], tokens, torch.nan)
    masked.update(filled, mask.to(dtype))
    masked.update(tokens[0], mask[0])
    expected.update(tokens[mask])
    expected.update(tokens[0][mask[0]])
    torch.testing.assert_close(masked.compute(), expected.compute())


def test_masked_pairs():
    first, second = torch.randn(2, 5, D), torch.randn(2, 5, D)
    mask = torch.rand(2, 5) < 0.5
    mask[0, 0] = True
    masked, expected = Alignment(), Alignment()
    masked.update(first, second, mask)
    expected.update(first[mask], second[mask])
    torch.testing.assert_close(masked.compute(), expected.compute())


@pytest.mark.parametrize("name", OF_ROWS)
@pytest.mark.parametrize(
    ("rows", "mask", "error", "message"),
    [
        (torch.ones(3, D), torch.ones(2), TypeError, "`mask` must be a bool or integer tensor.*got torch.float32"),
        (torch.ones(3, D), [True] * 3, TypeError, "`mask` must be a bool or integer tensor.*got list"),
        (torch.ones(3, D), torch.ones(2).bool(), ValueError, r"`mask` must have the shape of.*\(3,\), got \(2,\)"),
        (torch.ones(3, 2, D), torch.ones(3).bool(), ValueError, r"\(3, 2\), got \(3,\)"),
        (torch.ones(3, 2, D + 1), torch.ones(3, 2).bool(), ValueError, r"must have shape \(N, 4\)"),
    ],
)
def test_bad_masks_are_named(name: str, rows: Tensor, mask: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        OF_ROWS[name](D).update(rows, mask)
