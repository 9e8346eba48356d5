import numpy as np
import torch

from lightning_plugins.metrics import RankMe


def test_matches_numpy_singular_values_of_the_raw_rows():
    rows = np.random.default_rng(0).normal(size=(30, 5)) * [3.0, 1.0, 1.0, 0.1, 0.01]
    share = np.linalg.svd(rows, compute_uv=False)
    share /= share.sum()
    metric = RankMe(5)
    for batch in torch.tensor(rows).split(11):
        metric.update(batch)
    torch.testing.assert_close(metric.compute().item(), np.exp(-np.sum(share * np.log(share))))


def test_lengths_of_rows_count():
    equal, unequal = torch.eye(3), torch.diag(torch.tensor([1.0, 1.0, 1e-3]))
    torch.testing.assert_close(RankMe(3)(equal).item(), 3.0)
    assert 2.0 < float(RankMe(3)(unequal)) < 2.02


def test_rank_deficient_rows_do_not_rise_above_their_rank():
    rows = torch.randn(200, 2) @ torch.randn(2, 100)
    assert float(RankMe(100)(rows.double())) <= 2.0 + 1e-4
