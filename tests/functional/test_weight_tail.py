"""The exponent of a power-law tail, against samples of known exponent and a loop over all starts."""

import math

import numpy as np
import pytest
import torch

from lightning_plugins.functional.weight_spectrum import power_law_tail, summarize_spectrum


def by_loop(numbers: np.ndarray) -> float:
    """Every start, its maximum-likelihood exponent, and the distance of the two distributions."""
    best = (math.inf, math.nan)
    for k in range(1, len(numbers)):
        tail, start = numbers[: k + 1], numbers[k]
        total = np.sum(np.log(tail / start))
        if total <= 0:
            continue
        alpha = 1 + len(tail) / total
        law = 1 - (np.sort(tail) / start) ** (1 - alpha)
        steps = np.arange(len(tail) + 1) / len(tail)
        distance = max(np.abs(law - steps[1:]).max(), np.abs(law - steps[:-1]).max())
        best = min(best, (distance, alpha))
    return best[1]


@pytest.mark.parametrize("alpha", [2.0, 3.0, 5.0])
def test_recovers_the_exponent_of_a_sample(alpha):
    sample = np.sort(np.random.default_rng(0).uniform(size=2000) ** (-1 / (alpha - 1)))[::-1].copy()
    assert abs(power_law_tail(torch.from_numpy(sample)).item() - alpha) < 0.15 * alpha


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_loop(seed):
    s = np.linalg.svd(np.random.default_rng(seed).standard_t(3, size=(40, 60)), compute_uv=False) ** 2
    torch.testing.assert_close(power_law_tail(torch.from_numpy(s.copy())).item(), float(by_loop(s)))


def test_heavy_tailed_weights_have_a_smaller_exponent():
    generator = np.random.default_rng(0)
    gaussian = np.linalg.svd(generator.normal(size=(100, 200)), compute_uv=False)
    heavy = np.linalg.svd(generator.standard_t(2, size=(100, 200)), compute_uv=False)
    exponents = [summarize_spectrum(torch.from_numpy(s.copy())).tail_exponent for s in (heavy, gaussian)]
    assert exponents[0] < exponents[1]


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0], [2.0, 2.0, 2.0], [math.nan, 1.0]], ids=str)
def test_no_tail_is_not_a_number(values):
    assert math.isnan(summarize_spectrum(torch.tensor(values)).tail_exponent)
