"""Classes are counted, and labels and pairs that a probe cannot take are named; the fewest are taken."""

import pytest
import torch

from lightning_plugins.information import class_information, fit_class_probe
from lightning_plugins.information.fitting import check_pairs
from lightning_plugins.information.posterior import count_classes

LABELS = torch.tensor([2, 0, 2, 2, 0])


@pytest.mark.parametrize(
    ("classes", "counts"), [(None, [2, 0, 3]), (3, [2, 0, 3]), (5, [2, 0, 3, 0, 0])], ids=["largest", "all", "more"]
)
def test_members_are_counted(classes, counts):
    found = count_classes("labels", LABELS, 5, classes)
    assert found.dtype == torch.float64
    assert found.tolist() == counts


@pytest.mark.parametrize(
    ("labels", "rows", "classes", "error", "message"),
    [
        (torch.tensor([3, -1, 0]), 3, None, ValueError, r"`own` must be in \[0, C\), got -1$"),
        (torch.tensor([3, -2, 0]), 3, 2, ValueError, r"`own` must be in \[0, 2\), got -2$"),
        (torch.tensor([3, 1, 0]), 3, 3, ValueError, r"`own` must be in \[0, 3\), got 3$"),
        (torch.tensor([3, 1, 0]), 2, 4, ValueError, r"`own` must have shape \(2,\), a label a row, got \(3,\)"),
        (torch.tensor([], dtype=torch.int64), 0, None, ValueError, r"`own` must have shape \(0,\)"),
        (torch.tensor([0.0, 1.0]), 2, None, TypeError, "`own` must be a tensor of integers, one class a row"),
        ([0, 1], 2, None, TypeError, "`own` must be a tensor of integers, one class a row, got list"),
    ],
    ids=str,
)
def test_labels_out_of_range_are_named(labels, rows, classes, error, message):
    with pytest.raises(error, match=message):
        count_classes("own", labels, rows, classes)


def test_labels_of_a_probe_are_checked():
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    probe = fit_class_probe(x, torch.arange(8) % 2)
    with pytest.raises(ValueError, match=r"`labels` must be in \[0, 2\), got 2"):
        class_information(probe, x, torch.arange(8) % 3)
    with pytest.raises(ValueError, match=r"`labels` must be in \[0, C\), got -1"):
        fit_class_probe(x, torch.arange(8) % 2 - 1)


def test_the_fewest_rows_make_a_probe():
    x, labels = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
    assert fit_class_probe(x, labels).log_posteriors(x).isfinite().all()
    with pytest.raises(ValueError, match="at least 4 pairs, got 3"):
        fit_class_probe(x[:3], torch.tensor([0, 0, 0]))


@pytest.mark.parametrize("fewest", [2, 8])
def test_the_fewest_pairs_are_taken(fewest):
    pairs = torch.randn(2, fewest, 3, generator=torch.Generator().manual_seed(0))
    assert check_pairs(*pairs, fewest=fewest) is None
    with pytest.raises(ValueError, match=f"`x` must have at least {fewest} pairs, got {fewest - 1}"):
        check_pairs(*pairs[:, 1:], fewest=fewest)
