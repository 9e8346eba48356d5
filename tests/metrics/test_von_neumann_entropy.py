import numpy as np
import torch

from lightning_plugins.metrics import VonNeumannEntropy


def test_matches_numpy_on_all_batches_together():
    rows = np.random.default_rng(0).normal(size=(30, 5))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    spectrum = np.linalg.eigvalsh(unit.T @ unit / len(unit))
    metric = VonNeumannEntropy(5)
    for batch in torch.tensor(rows).split(7):
        metric.update(batch)
    torch.testing.assert_close(metric.compute().item(), -np.sum(spectrum * np.log(spectrum)))


def test_is_above_the_mean_of_the_batches():
    metric = VonNeumannEntropy(4)
    batches = [torch.eye(4)[:2], torch.eye(4)[2:]]
    alone = [float(metric(batch)) for batch in batches]
    torch.testing.assert_close(alone, [np.log(2)] * 2)
    torch.testing.assert_close(metric.compute().item(), np.log(4))
