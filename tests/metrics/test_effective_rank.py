import torch

from lightning_plugins.metrics import EffectiveRank, VonNeumannEntropy


def test_counts_equal_directions_and_ignores_lengths():
    metric = EffectiveRank(6)
    metric.update(torch.eye(6)[:4] * torch.tensor([[1.0], [100.0], [0.01], [3.0]]))
    torch.testing.assert_close(metric.compute().item(), 4.0)


def test_is_the_exponential_of_the_entropy():
    rows = torch.randn(20, 5)
    rank, entropy = EffectiveRank(5)(rows), VonNeumannEntropy(5)(rows)
    torch.testing.assert_close(rank, entropy.exp())
