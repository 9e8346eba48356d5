import math

import torch

from lightning_plugins.metrics import CorrelationGap


def test_uncorrelated_features_have_no_gap():
    rows = torch.diag(torch.tensor([5.0, 1.0, 0.2]))
    torch.testing.assert_close(CorrelationGap(3)(rows).item(), 0.0)


def test_features_that_say_the_same_have_the_largest():
    torch.testing.assert_close(CorrelationGap(4)(torch.ones(6, 4)).item(), math.log(4))


def test_a_rotation_of_uncorrelated_features_opens_it():
    rows = torch.diag(torch.tensor([1.0, 1.0, 1.0])).repeat_interleave(torch.tensor([6, 3, 1]), dim=0)
    rotation = torch.linalg.qr(torch.randn(3, 3)).Q
    assert float(CorrelationGap(3)(rows)) < 1e-6
    assert float(CorrelationGap(3)(rows @ rotation)) > 0.05
