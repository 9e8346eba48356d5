"""Collapsed features, very many rows, and the smallest numbers of half precision."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_plugins.functional import (
    autocorrelation_eigenvalues,
    diagonal_entropy,
    effective_rank,
    modified_stable_rank,
    nuclear_norm,
    polar_factor,
    renyi_entropy,
    singular_value_threshold,
    stable_rank,
    von_neumann_entropy,
)
from lightning_plugins.regularizers import VonNeumannEntropy

ENTROPIES: dict[str, Any] = {
    "von Neumann": von_neumann_entropy,
    "the loss term": VonNeumannEntropy(1.0).entropy,
    "Rényi 2": renyi_entropy,
    "Rényi 1/2": lambda h: renyi_entropy(h, 0.5),
    "effective rank": effective_rank,
    "RankMe": lambda h: effective_rank(h, of="singular_values"),
    "diagonal": diagonal_entropy,
}


def value_and_gradient(fn: Any, h: Tensor) -> tuple[float, Tensor]:
    h = h.clone().requires_grad_()
    value = fn(h)
    return float(value), torch.autograd.grad(value, h)[0].double()


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("shape", [(32, 128), (128, 32), (64, 64)], ids=str)
@pytest.mark.parametrize("name", ENTROPIES)
def test_gradient_of_collapsed_features_is_that_of_float64(name: str, shape: tuple[int, int], spread: float):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(shape[1], generator=generator) + spread * torch.randn(shape, generator=generator)
    value, gradient = value_and_gradient(ENTROPIES[name], h)
    exact, expected = value_and_gradient(ENTROPIES[name], h.double())
    assert (gradient - expected).norm() < 0.01 * expected.norm()
    assert value == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("name", ENTROPIES)
def test_values_of_very_many_rows(name: str):
    h = torch.randn(200_000, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    assert float(ENTROPIES[name](h)) == pytest.approx(float(ENTROPIES[name](h.double())), rel=1e-6)


def test_eigenvalues_of_collapsed_features():
    h = torch.randn(16) + 1e-3 * torch.randn(64, 16)
    torch.testing.assert_close(
        autocorrelation_eigenvalues(h).double(), autocorrelation_eigenvalues(h.double()), rtol=1e-4, atol=0
    )


OF_WEIGHTS: dict[str, Any] = {
    "stable rank": stable_rank,
    "modified stable rank": lambda w: modified_stable_rank(w, 1),
    "nuclear norm": nuclear_norm,
    "polar factor": lambda w: polar_factor(w).sum(),
    "threshold": lambda w: singular_value_threshold(w, 1e-7).sum(),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*ENTROPIES, *OF_WEIGHTS])
def test_every_finite_input_of_half_precision_has_a_finite_gradient(name: str, dtype: torch.dtype):
    fn = {**ENTROPIES, **OF_WEIGHTS}[name]
    for scale in (6e-8, 3e-7, 1e-6, 6e-5, 7e-5, 1e-3, 1.0, 1e4):
        for rows in (1, 2, 3, 16):
            h = (torch.randn(rows, 5, generator=torch.Generator().manual_seed(rows)) * scale).to(dtype)
            value, gradient = value_and_gradient(fn, h)
            assert torch.isfinite(torch.tensor(value)), (scale, rows)
            assert gradient.isfinite().all(), (scale, rows)


def test_a_subnormal_row_of_half_precision_is_a_row_of_zeros():
    h = torch.tensor([[3e-7, 1e-7], [1.0, 2.0], [2.0, -1.0]]).half()
    zeroed = h.clone()
    zeroed[0] = 0
    torch.testing.assert_close(von_neumann_entropy(h), von_neumann_entropy(zeroed))
