from types import SimpleNamespace

import pytest
import torch

from lightning_plugins.functional import products
from lightning_plugins.functional.products import add_outer_, add_product, rounds_to_tf32


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"fp32_precision": "tf32"}, True), ({"fp32_precision": "none"}, False), ({"allow_tf32": True}, True)],
)
def test_reads_either_setting_of_tf32(settings, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(**settings))
    tensor = SimpleNamespace(is_cuda=True, dtype=torch.float32)  # stands for a tensor on a device not at hand
    assert rounds_to_tf32(tensor) is expected
    assert not rounds_to_tf32(SimpleNamespace(is_cuda=True, dtype=torch.float64))
    assert not rounds_to_tf32(torch.eye(2))


def test_a_product_is_split_in_parts_that_tf32_holds(monkeypatch):
    plain = torch.baddbmm

    def rounded(tensor):
        return ((tensor.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)

    monkeypatch.setattr(torch, "baddbmm", lambda base, a, b, **scale: plain(base, rounded(a), rounded(b), **scale))
    torch.manual_seed(0)
    base, left, right = torch.randn(3, 2, 8, 8)
    exact = 2 * base.double() - 0.5 * left.double() @ right.double()
    errors = []
    for split in (False, True):
        monkeypatch.setattr(products, "rounds_to_tf32", lambda tensor, split=split: split)
        errors.append((add_product(base, left, right, beta=2, alpha=-0.5) - exact).abs().max().item())
    assert errors[0] > 1e-4
    assert errors[1] < 3e-6


def test_a_base_with_a_factor_of_zero_is_ignored():
    one = torch.eye(3)[None]
    assert torch.equal(add_product(one * torch.nan, one, one, beta=0), one)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (2, 3, 5), (2, 5, 3)])
@pytest.mark.parametrize("dense", [True, False], ids=["rows in memory", "columns in memory"])
def test_a_product_is_added_in_place_to_wide_and_tall_matrices(shape, dense):
    torch.manual_seed(0)
    matrix = torch.randn(shape) if dense else torch.randn(*shape[:-2], shape[-1], shape[-2]).mT
    left, right = torch.randn(*shape[:-2], 3, 2), torch.randn(*shape[:-2], 2, 5)
    product = left @ right
    wanted = matrix - 0.5 * (product if shape[-2] == 3 else product.mT)
    assert add_outer_(matrix, left, right, alpha=-0.5) is matrix
    torch.testing.assert_close(matrix, wanted)
