import torch

from lightning_plugins.metrics import Isotropy


def test_is_the_mean_squared_cosine_upside_down():
    rows = torch.randn(30, 5, dtype=torch.float64)
    cosine = torch.nn.functional.cosine_similarity(rows[:, None], rows, dim=-1)
    metric = Isotropy(5)
    for batch in rows.split(7):
        metric.update(batch)
    torch.testing.assert_close(metric.compute(), 1 / (5 * cosine.square().mean()))


def test_ends_of_the_range():
    torch.testing.assert_close(Isotropy(4)(torch.eye(4)).item(), 1.0)
    torch.testing.assert_close(Isotropy(4)(torch.ones(7, 4)).item(), 0.25)
    torch.testing.assert_close(Isotropy(4)(torch.zeros(7, 4)).item(), 0.25)


def test_all_zero_rows_are_left_out():
    rows = torch.randn(9, 4)
    torch.testing.assert_close(Isotropy(4)(torch.cat([rows, torch.zeros(5, 4)])), Isotropy(4)(rows))
